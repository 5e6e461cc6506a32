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

/// Published models of one shape, and what is known of their size.
struct Published {
    preset: &'static str,
    /// Names on the hub.
    repositories: &'static [&'static str],
    /// Numbers that were trained, where they are known exactly.
    trained: Option<u64>,
    /// GB of the published files: of OpenFlamingo the checkpoint's, else all.
    gigabytes: f64,
    /// How far it may be off, as published.
    within: f64,
    /// Millions of numbers of the resampler, of all gated blocks, of the vision encoder.
    millions: [f64; 3],
    /// Billions of all numbers, where they were counted.
    billions: Option<f64>,
    /// GB of what Otter's `final_weights.pt` has: what joins the parts, and the embeddings with the head.
    joined: Option<f64>,
}

/// Every size of the published checkpoints: OpenFlamingo's own count of trainable parameters (issue 200 of its
/// repository), file sizes on the hub, and the formulas of blocks and resamplers.
const PUBLISHED: [Published; 9] = [
    Published {
        preset: "of-3b",
        repositories: &[
            "openflamingo/OpenFlamingo-3B-vitl-mpt1b",
            "openflamingo/OpenFlamingo-3B-vitl-mpt1b-langinstruct",
        ],
        trained: Some(1_046_992_944),
        gigabytes: 4.188,
        within: 0.001,
        millions: [63.019, 24.0 * 36.708_354, 303.1],
        billions: None,
        joined: None,
    },
    Published {
        preset: "of-4b",
        repositories: &[
            "openflamingo/OpenFlamingo-4B-vitl-rpj3b",
            "openflamingo/OpenFlamingo-4B-vitl-rpj3b-langinstruct",
        ],
        trained: None,
        gigabytes: 4.873,
        within: 0.001,
        millions: [63.019, 16.0 * 56.109_058, 303.1],
        billions: None,
        joined: None,
    },
    Published {
        preset: "of-9b",
        repositories: &["openflamingo/OpenFlamingo-9B-vitl-mpt7b"],
        trained: None,
        gigabytes: 5.539,
        within: 0.001,
        millions: [63.019, 8.0 * 139.476_994, 303.1],
        billions: None,
        joined: None,
    },
    Published {
        preset: "of-9b-llama",
        repositories: &["openflamingo/OpenFlamingo-9B", "openflamingo/OpenFlamingo-9B-deprecated"],
        trained: None,
        gigabytes: 5.24,
        within: 0.005,
        millions: [63.019, 8.0 * 139.476_994, 303.1],
        billions: None,
        joined: None,
    },
    Published {
        preset: "idefics-9b",
        repositories: &["HuggingFaceM4/idefics-9b", "HuggingFaceM4/idefics-9b-instruct"],
        trained: None,
        gigabytes: 17.9,
        within: 0.1,
        millions: [126.0, 8.0 * 179.3, 630.8],
        billions: Some(8.93),
        joined: None,
    },
    Published {
        preset: "idefics-80b",
        repositories: &["HuggingFaceM4/idefics-80b", "HuggingFaceM4/idefics-80b-instruct"],
        trained: None,
        gigabytes: 160.0,
        within: 0.1,
        millions: [126.0, 20.0 * 696.3, 630.8],
        billions: Some(79.97),
        joined: None,
    },
    Published {
        preset: "otter-mpt1b",
        repositories: &["luodian/OTTER-MPT1B-RPJama-Init"],
        trained: None,
        gigabytes: 9.99 + 0.24,
        within: 0.01,
        millions: [63.019, 24.0 * 36.708_354, 303.1],
        billions: None,
        joined: None,
    },
    Published {
        preset: "otter-mpt7b",
        repositories: &["luodian/OTTER-Image-MPT7B", "luodian/OTTER-MPT7B-Init"],
        trained: None,
        gigabytes: 32.54,
        within: 0.05,
        millions: [63.019, 8.0 * 139.476_994, 303.1],
        billions: None,
        joined: Some(5.54),
    },
    Published {
        preset: "otter-llama7b",
        repositories: &[
            "luodian/OTTER-Image-LLaMA7B-LA-InContext",
            "luodian/openflamingo-9b-hf",
            "luodian/otter-9b-hf",
            // These have embeddings of frames too, at most a five-hundredth of the resampler.
            "luodian/OTTER-9B-DenseCaption",
            "luodian/OTTER-Video-LLaMA7B-DenseCaption",
        ],
        trained: None,
        gigabytes: 33.0,
        within: 0.2,
        millions: [63.019, 8.0 * 139.476_994, 303.1],
        billions: None,
        joined: Some(5.76),
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
        let billions = |of: &[Component]| {
            let numbers = of.iter().map(|component| counts[component].0 + counts[component].1);
            numbers.sum::<u64>() as f64 * 1e-9
        };
        if let Some(expected) = model.billions {
            let all = billions(&counts.keys().copied().collect::<Vec<_>>());
            assert!((all - expected).abs() <= 0.005, "{name}: {all} billion");
        }
        if let Some(expected) = model.joined {
            use Component::{CrossAttention, Embeddings, Resampler};
            let gigabytes = 4.0 * billions(&[CrossAttention, Embeddings, Resampler]);
            assert!((gigabytes - expected).abs() <= 0.005, "{name}: {gigabytes} GB");
        }
        fs::remove_dir_all(folder).unwrap();
    }
}

/// Whatever `compile` knows by its name has a shape here, but for a random model of which no size was published.
#[test]
fn every_model_of_the_catalogue_has_a_published_size() {
    let path = repository("compiler/src/hub/catalogue.toml");
    let catalogue: toml::Value = toml::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let sized: Vec<&str> = PUBLISHED.iter().flat_map(|model| model.repositories).copied().collect();
    let rows = catalogue["model"].as_array().unwrap();
    let mut n_names = 0;
    for row in rows {
        let aliases =
            row.get("aliases").and_then(toml::Value::as_array).cloned().unwrap_or_default();
        for name in aliases.iter().chain([&row["repository"]]) {
            let name = name.as_str().unwrap();
            assert!(sized.contains(&name) || name.ends_with("/tiny-random-idefics"), "{name}");
            n_names += 1;
        }
    }
    assert_eq!(n_names, sized.len() + 1);
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

/// Tensors of a checkpoint by name: type, shape, bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// The tensors of a golden's `checkpoint.pt`, all f32.
fn tensors(folder: &Path) -> Tensors {
    let checkpoint = Checkpoint::open(&folder.join("checkpoint.pt")).unwrap();
    let entry = |name: &str, shape: &[usize]| {
        let bytes = checkpoint.bytes(name).unwrap().into_owned();
        (name.to_owned(), (Dtype::F32, shape.to_vec(), bytes))
    };
    checkpoint.infos().map(|info| entry(&info.name, &info.shape)).collect()
}

/// Puts these tensors in the place of a golden's checkpoint.
fn replace_checkpoint(folder: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(folder.join("checkpoint.safetensors"), bytes).unwrap();
    let recipe = fs::read_to_string(folder.join("recipe.toml")).unwrap();
    let recipe = recipe.replace("checkpoint.pt", "checkpoint.safetensors");
    fs::write(folder.join("recipe.toml"), recipe).unwrap();
}

/// The released 4B file has the causal masks of its 32 layers for 2048 tokens, a byte an entry: 0.134 of its 5.01 GB, and no
/// number of the model.
#[test]
fn causal_masks_are_no_numbers_of_the_model() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("masked");
    copy(&repository("tests/golden/openflamingo-gpt-neox"), &folder);
    let plain = inspect(&folder);
    let mut tensors = tensors(&folder);
    for layer in 0..4 {
        let name = format!("lang_encoder.gpt_neox.layers.{layer}.decoder_layer.attention.bias");
        tensors.insert(name, (Dtype::BOOL, vec![1, 1, 128, 128], vec![1; 128 * 128]));
    }
    replace_checkpoint(&folder, &tensors);
    let found = inspect(&folder);
    assert_eq!(found.parameters, plain.parameters);
    assert_eq!(found.unread.tensors, plain.unread.tensors + 4);
    let of_4b = PUBLISHED.iter().find(|model| model.preset == "of-4b").unwrap();
    let gigabytes = of_4b.gigabytes + f64::from(32 * 2048 * 2048) * 1e-9;
    assert!((gigabytes - 5.01).abs() < 0.005, "{gigabytes} GB");
}

/// OpenFlamingo's first release saved each gated block and each decoder layer a second time, and rotary buffers.
#[test]
fn aliases_of_the_first_release_are_counted_once() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("v1");
    copy(&repository("tests/golden/openflamingo-llama"), &folder);
    let mut tensors = tensors(&folder);
    let mut n_aliases = 0;
    for (name, entry) in tensors.clone() {
        if let Some((layer, key)) = name.split_once(".gated_cross_attn_layer.") {
            let layer = layer.rsplit_once('.').unwrap().1;
            let alias = format!("lang_encoder.gated_cross_attn_layers.{layer}.{key}");
            tensors.insert(alias, entry);
            n_aliases += 1;
        }
    }
    let buffer = (Dtype::F32, vec![4], vec![0; 16]);
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
    replace_checkpoint(&folder, &tensors);

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
