//! `inspect` of a source: what it is, what it lacks, numbers by component as they were published, and memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use flamingo_models::Source;
use flamingo_models::checkpoint::Checkpoint;
use flamingo_models::components::Component;
use flamingo_models::manifest::Limits;
use flamingoc::inspection::Inspection;
use flamingoc::plan::devices::Device;
use flamingoc::synth::outline;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::common::{copy, flamingoc, repository};
use crate::{at, parse};

/// A published model, and what is known of its size.
struct Published {
    preset: &'static str,
    /// Numbers that were trained, where they are known exactly.
    trained: Option<u64>,
    /// GB of the published files: of OpenFlamingo the checkpoint's, else all.
    gigabytes: f64,
    /// How far it may be off, as published.
    within: f64,
    /// Millions of numbers of the resampler, of all gated blocks, of the vision encoder.
    millions: [f64; 3],
}

/// Every size of the published checkpoints: OpenFlamingo's own count of trainable parameters (issue 200 of its
/// repository), file sizes on the hub, and the formulas of blocks and resamplers.
const PUBLISHED: [Published; 9] = [
    Published {
        preset: "of-3b",
        trained: Some(1_046_992_944),
        gigabytes: 4.188,
        within: 0.001,
        millions: [63.019, 24.0 * 36.708_354, 303.1],
    },
    Published {
        preset: "of-4b",
        trained: None,
        gigabytes: 4.873,
        within: 0.001,
        millions: [63.019, 16.0 * 56.109_058, 303.1],
    },
    Published {
        preset: "of-9b",
        trained: None,
        gigabytes: 5.539,
        within: 0.001,
        millions: [63.019, 8.0 * 139.476_994, 303.1],
    },
    Published {
        preset: "of-9b-llama",
        trained: None,
        gigabytes: 5.24,
        within: 0.005,
        millions: [63.019, 8.0 * 139.476_994, 303.1],
    },
    Published {
        preset: "idefics-9b",
        trained: None,
        gigabytes: 17.9,
        within: 0.1,
        millions: [126.0, 8.0 * 179.3, 630.8],
    },
    Published {
        preset: "idefics-80b",
        trained: None,
        gigabytes: 160.0,
        within: 0.1,
        millions: [126.0, 20.0 * 696.3, 630.8],
    },
    Published {
        preset: "otter-mpt1b",
        trained: None,
        gigabytes: 9.99 + 0.24,
        within: 0.01,
        millions: [63.019, 24.0 * 36.708_354, 303.1],
    },
    Published {
        preset: "otter-mpt7b",
        trained: None,
        gigabytes: 32.54,
        within: 0.05,
        millions: [63.019, 8.0 * 139.476_994, 303.1],
    },
    Published {
        preset: "otter-llama7b",
        trained: None,
        gigabytes: 33.0,
        within: 0.2,
        millions: [63.019, 8.0 * 139.476_994, 303.1],
    },
];

fn inspect(folder: &Path) -> Inspection {
    let source = Source::open(folder).unwrap();
    Inspection::of(&source, &source.graphs().unwrap())
}

fn counts(inspection: &Inspection) -> BTreeMap<Component, (u64, u64)> {
    let own = inspection.parameters.iter();
    own.map(|own| (own.component, (own.count.trained, own.count.frozen))).collect()
}

#[test]
fn published_models_have_the_published_numbers() {
    let scratch = tempfile::tempdir().unwrap();
    for model in &PUBLISHED {
        let name = model.preset;
        let folder = scratch.path().join(name);
        outline(name, &folder).unwrap();
        let found = inspect(&folder);
        assert!(found.complete && found.parts.iter().all(|part| part.problem.is_none()), "{name}");
        if let Some(trained) = model.trained {
            assert_eq!(found.total().trained, trained, "{name}");
        }
        let files = found.parts.iter().filter(|part| part.part == "checkpoint");
        let gigabytes = files.map(|part| part.bytes).sum::<u64>() as f64 * 1e-9;
        assert!((gigabytes - model.gigabytes).abs() <= model.within, "{name}: {gigabytes} GB");
        let counts = counts(&found);
        let components = [Component::Resampler, Component::CrossAttention, Component::Vision];
        for (component, millions) in components.into_iter().zip(model.millions) {
            let (trained, frozen) = counts[&component];
            let own = (trained + frozen) as f64 * 1e-6;
            assert!((own - millions).abs() < 0.002 * millions, "{name}, {component:?}: {own}");
            assert_eq!(trained > 0, component != Component::Vision, "{name}, {component:?}");
        }
        fs::remove_dir_all(folder).unwrap();
    }
}

/// Weights are the numbers times their width, finer precisions are larger, and what fits has the room.
#[track_caller]
fn check_memory(name: &str, found: &Inspection) {
    let total = found.total();
    let numbers = (total.trained + total.frozen) as f64;
    let bytes_each = [("f32", 4.0), ("f16", 2.0), ("int8", 1.0), ("int4", 0.5)];
    for ((precision, each), memory) in bytes_each.into_iter().zip(&found.memory) {
        assert_eq!(memory.precision, precision);
        let own = memory.weights_bytes as f64 / numbers;
        // int4 keeps embeddings and the vision encoder in 8 bits.
        let most = if precision == "int4" { 1.6 } else { 1.1 };
        assert!(
            own >= 0.97 * each && own < most * each,
            "{name}, {precision}: {own} bytes a number"
        );
        let parts = [memory.text_bytes, memory.pictures_bytes, memory.buffers_bytes];
        assert_eq!(memory.total_bytes, memory.weights_bytes + parts.iter().sum::<u64>());
        for device in &memory.fits {
            let device = Device::from_name(device).unwrap();
            assert!(memory.total_bytes < device.visible_bytes, "{name}, {}", device.name);
        }
    }
    let totals: Vec<u64> = found.memory.iter().map(|memory| memory.total_bytes).collect();
    assert!(totals.is_sorted_by(|a, b| a > b), "{name}: {totals:?}");
    let fits: Vec<usize> = found.memory.iter().map(|memory| memory.fits.len()).collect();
    assert!(fits.is_sorted(), "{name}: {fits:?}");
}

/// Of the smallest and the largest published model.
#[test]
fn memory_says_which_devices_have_room() {
    let scratch = tempfile::tempdir().unwrap();
    let fits = |preset: &str| -> Vec<Vec<&str>> {
        let folder = scratch.path().join(preset);
        outline(preset, &folder).unwrap();
        let source = Source::open(&folder).unwrap();
        let limits = Limits { max_context: 2048, max_images: 64 };
        let found = inspect(&folder).with_memory(&source, &limits).unwrap();
        check_memory(preset, &found);
        found.memory.into_iter().map(|memory| memory.fits).collect()
    };
    let [f32, f16, int8, int4] = &fits("of-3b")[..] else { panic!("four precisions") };
    assert!(!f16.contains(&"orin-nano-8") && int8.contains(&"orin-nano-8"));
    assert!(!f32.contains(&"raspberry-pi-5-8") && f16.contains(&"raspberry-pi-5-8"));
    assert!(f32.contains(&"orin-nx-16") && !int4.contains(&"orin-nano-4"));
    assert_eq!(fits("idefics-80b"), [vec![], vec![], vec![], vec!["agx-orin-64"]]);
}

/// What shapes alone say is what whole files say.
#[test]
fn shapes_alone_are_seen_as_the_whole_model() {
    let scratch = tempfile::tempdir().unwrap();
    for preset in ["tiny-openflamingo-gpt-neox", "tiny-idefics", "tiny-otter"] {
        let (whole, shapes) = (scratch.path().join(preset), scratch.path().join("shapes"));
        flamingoc!("synth", preset, "-o", whole).ok();
        flamingoc!("synth", preset, "-o", shapes, "--shapes-only").ok();
        let seen = |folder: &Path| {
            let mut seen = parse(&flamingoc!("inspect", folder, "--json").ok());
            seen["parts"]
                .as_array_mut()
                .unwrap()
                .iter_mut()
                .for_each(|part| part["path"] = Value::Null);
            seen
        };
        assert_eq!(seen(&whole), seen(&shapes), "{preset}");
        fs::remove_dir_all(shapes).unwrap();
    }
}

#[test]
fn missing_parts_are_named_and_what_is_there_is_counted() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("m");
    flamingoc!("synth", "tiny-openflamingo-mpt", "-o", folder).ok();
    let whole = parse(&flamingoc!("inspect", folder, "--json").ok());
    assert_eq!(at(&whole, "/complete"), &json!(true));
    let text = flamingoc!("inspect", folder).ok();
    for words in
        ["an OpenFlamingo, complete", "gated cross-attention", "int4", "orin-nano-8", "trained"]
    {
        assert!(text.contains(words), "no `{words}` in {text}");
    }
    let of = |seen: &Value, component: &str| -> Value {
        let rows = at(seen, "/parameters").as_array().unwrap();
        rows.iter().find(|row| row["component"] == component).cloned().unwrap_or_default()
    };
    fs::remove_file(folder.join("clip_visual.pt")).unwrap();
    let seen = parse(&flamingoc!("inspect", folder, "--json").ok());
    assert_eq!(
        (at(&seen, "/complete"), at(&seen, "/parts/2/problem")),
        (&json!(false), &json!("missing"))
    );
    for component in ["resampler", "cross_attention", "language", "embeddings"] {
        assert_eq!(of(&seen, component), of(&whole, component), "{component}");
    }
    assert_eq!(of(&seen, "vision"), Value::Null);
    let text = flamingoc!("inspect", folder).ok();
    assert!(
        text.contains("missing: vision_encoder, `") && text.contains("clip_visual.pt"),
        "{text}"
    );

    let alone = flamingoc!("inspect", folder.join("checkpoint.pt")).ok();
    assert!(alone.contains("2 gated blocks") && alone.contains("`transformer.blocks`"), "{alone}");
    let alone = flamingoc!("inspect", folder.join("lang_encoder")).ok();
    assert!(alone.contains("a language model (`mpt`), one part"), "{alone}");

    fs::write(folder.join("checkpoint.pt"), "broken").unwrap();
    let ran = flamingoc!("inspect", folder);
    assert_eq!(ran.status, Some(2), "{}", ran.stdout);
}

/// OpenFlamingo's first release saved each gated block and each decoder layer a second time, and rotary buffers.
#[test]
fn aliases_of_the_first_release_are_counted_once() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("v1");
    copy(&repository("tests/golden/openflamingo-llama"), &folder);
    let checkpoint = Checkpoint::open(&folder.join("checkpoint.pt")).unwrap();
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut n_aliases = 0;
    for info in checkpoint.infos() {
        let entry = (info.shape.clone(), checkpoint.bytes(&info.name).unwrap().into_owned());
        if let Some((layer, key)) = info.name.split_once(".gated_cross_attn_layer.") {
            let layer = layer.rsplit_once('.').unwrap().1;
            let alias = format!("lang_encoder.gated_cross_attn_layers.{layer}.{key}");
            tensors.insert(alias, entry.clone());
            n_aliases += 1;
        }
        tensors.insert(info.name.clone(), entry);
    }
    let buffer = (vec![4], vec![0; 16]);
    for name in [
        "old_decoder_blocks.0.mlp.up_proj.weight",
        "old_decoder_blocks.0.self_attn.rotary_emb.inv_freq",
    ] {
        tensors.insert(format!("lang_encoder.{name}"), buffer.clone());
    }
    tensors.insert(
        "lang_encoder.model.layers.0.decoder_layer.self_attn.rotary_emb.inv_freq".to_owned(),
        buffer,
    );
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    fs::write(folder.join("checkpoint.safetensors"), safetensors::serialize(views, None).unwrap())
        .unwrap();
    let recipe = fs::read_to_string(folder.join("recipe.toml")).unwrap();
    fs::write(
        folder.join("recipe.toml"),
        recipe.replace("checkpoint.pt", "checkpoint.safetensors"),
    )
    .unwrap();

    let (found, plain) =
        (inspect(&folder), inspect(&repository("tests/golden/openflamingo-llama")));
    assert_eq!(found.parameters, plain.parameters);
    assert!(n_aliases > 20);
    assert_eq!((found.aliases.tensors, plain.aliases.tensors), (n_aliases + 2, 0));
    assert_eq!(found.unread.tensors, plain.unread.tensors + 1);
    let artifacts = ["a", "b"].map(|name| scratch.path().join(name));
    flamingoc!("compile", folder, "-o", artifacts[0]).ok();
    flamingoc!("compile", repository("tests/golden/openflamingo-llama"), "-o", artifacts[1]).ok();
    let weights =
        artifacts.map(|artifact| fs::read(artifact.join("graphs/weights.safetensors")).unwrap());
    assert!(weights[0] == weights[1], "the aliases change nothing");
}
