//! Graphs for GPUs, on ONNX Runtime's CPU provider, which computes f16 in f32 and rounds the results: what the files
//! mean, not how fast a GPU is. README.md says what ran on one.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use flamingo_ir::DType;
use flamingo_ir::onnx::{ReadLimits, read_onnx};
use flamingo_ir::op::{Flavour, OnnxForm};
use flamingo_models::profile::is_dynamic;
use flamingo_runtime::backend::{Media, Sequence, Step};
use flamingo_runtime::{Artifact, GenerateOptions, KvFormat, Model, OpenOptions};
use flamingo_tests::{Golden, compiled_for_all, golden_folders, opening, tiny_scenes};
use flamingoc::calibrate::bundled;
use flamingoc::coverage::report::{stage_reports, targets_of};
use flamingoc::gate::judge;
use flamingoc::parity::{compare, divergence, kl_bound};
use flamingoc::scheme::Precision;

const FLAVOURS: [Flavour; 3] = [Flavour::Cuda, Flavour::Trt10_3, Flavour::Trt10_15];

fn open(artifact: &Path, flavour: Flavour) -> Model {
    let flavour = Some(flavour.name().to_owned());
    let options = OpenOptions { flavour: flavour.clone(), ..opening("ort") };
    let failed = |error| panic!("{} {flavour:?}: {error}", artifact.display());
    Model::open(artifact, &options).unwrap_or_else(failed)
}

/// f16's bound, or that of coarser weights.
fn bound(precision: Precision) -> f64 {
    kl_bound(&[(String::new(), precision.name().to_owned())].into()).unwrap_or(1e-4)
}

#[test]
fn every_family_answers_in_f16_as_pytorch_does_in_f32() {
    for folder in golden_folders() {
        let (_scratch, artifact) = compiled_for_all(&folder, Precision::F32);
        let golden = Golden::read(&folder);
        for flavour in FLAVOURS {
            let model = open(&artifact, flavour);
            let (mut found, mut expected) = (Vec::new(), Vec::new());
            for case in golden.cases() {
                let mut media: Vec<Arc<Media>> = Vec::new();
                if let Some(pixels) = golden.get(&case, "pixel_values") {
                    let shape = pixels.shape();
                    let pixels = pixels.to_f32_vec().unwrap();
                    media = model.encode_pixels(&pixels, shape[0], shape[1]).unwrap();
                    let tokens: Vec<f32> =
                        media.iter().flat_map(|m| m.visual_tokens.iter().copied()).collect();
                    let reference = golden.f32(&case, "visual_tokens").unwrap();
                    let tokens = compare(&case, &tokens, &reference, 1).unwrap();
                    let name = (folder.display(), flavour.name());
                    let fits = tokens.relative_error <= 1e-2 && tokens.cosine >= 0.9999;
                    assert!(fits, "{} {}: {tokens:?}", name.0, name.1);
                }
                let ids = golden.ids(&case, "input_ids").unwrap();
                found.extend(model.logits(&ids, &media).unwrap());
                expected.extend(golden.f32(&case, "logits").unwrap());
            }
            let vocabulary = model.manifest().config.language.vocabulary;
            let found = divergence(&found, &expected, vocabulary).unwrap();
            let (name, flavour) = (folder.display(), flavour.name());
            assert!(found.mean_kl <= bound(Precision::F16), "{name} {flavour}: {found:?}");
        }
    }
}

/// The demo: weights of every precision, against native from the same weights where only they are rounded, and in f32.
#[test]
fn the_demo_answers_from_weights_of_every_precision() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/recipe.toml");
    let (_original, exact) = compiled_for_all(&demo, Precision::F32);
    let exact = Model::open(&exact, &opening("native")).unwrap();
    for precision in [Precision::F32, Precision::F16, Precision::Int8, Precision::Int4] {
        let (_scratch, artifact) = compiled_for_all(&demo, precision);
        for flavour in FLAVOURS {
            let model = open(&artifact, flavour);
            let examples = bundled(&model, 0, 60).unwrap();
            let verdict = judge(&model, &exact, &examples, &mut |_| {}).unwrap();
            let name = (precision.name(), flavour.name());
            assert!(verdict.mean_kl <= bound(precision), "{name:?}: {verdict:?}");
            assert!(verdict.n_tokens >= 400, "{name:?}: {verdict:?}");
        }
    }
}

/// Prefill in pieces, and tokens one by one with what was kept, as all at once.
#[test]
fn steps_give_what_prefill_gives() {
    let (_scratch, artifact) = compiled_for_all(&tiny_scenes(), Precision::F16);
    let native = OpenOptions { kv_format: Some(KvFormat::F16), ..opening("native") };
    let native = Model::open(&artifact, &native).unwrap();
    let golden = Golden::read(&tiny_scenes());
    let options = GenerateOptions { max_new_tokens: 6, ..GenerateOptions::default() };
    let mut n_cases = 0;
    for flavour in FLAVOURS {
        let model = open(&artifact, flavour);
        for case in golden.cases() {
            let ids = golden.ids(&case, "input_ids").unwrap();
            let pixels = golden.get(&case, "pixel_values").unwrap();
            let (shape, pixels) = (pixels.shape(), pixels.to_f32_vec().unwrap());
            let tokens = |model: &Model| {
                let media = model.encode_pixels(&pixels, shape[0], shape[1]).unwrap();
                model.generate_ids(&ids, &media, &options, &mut |_| {}).unwrap().tokens
            };
            assert_eq!(tokens(&model), tokens(&native), "{} {case}", flavour.name());
            n_cases += 1;
        }
    }
    assert!(n_cases >= 6, "{n_cases}");
}

/// Kernel tables know every operator and type of every family's graphs, TensorRT takes each stage whole, and every
/// dynamic input has the shapes that its engines are for.
#[test]
fn tables_cover_every_family_and_profiles_every_dynamic_input() {
    for (folder, precision) in golden_folders().into_iter().map(|f| (f, Precision::F32)).chain([
        (tiny_scenes(), Precision::F16),
        (tiny_scenes(), Precision::Int8),
        (tiny_scenes(), Precision::Int4),
    ]) {
        let (_scratch, artifact) = compiled_for_all(&folder, precision);
        let artifact = Artifact::open(&artifact, false).unwrap();
        let (path, manifest) = (&artifact.path, &artifact.manifest);
        for flavour in FLAVOURS {
            for target in targets_of(flavour) {
                let place = format!("{} {} on {target}", folder.display(), precision.name());
                let reports =
                    stage_reports(path, &manifest.graphs, &manifest.limits, target, flavour);
                for report in reports.unwrap() {
                    let coverage = &report.coverage;
                    assert!(coverage.is_full(), "{place}: {:?}", coverage.fallbacks);
                    assert!(coverage.nodes.len() > 50, "{place}");
                    if flavour != Flavour::Cuda {
                        assert_eq!(coverage.partitions.len(), 1, "{place}");
                    }
                }
            }
            let profiles = artifact.profiles(flavour.name()).unwrap();
            for stage in ["media", "decoder"] {
                let graph = manifest.graph(stage, flavour.name()).unwrap();
                let dynamic: Vec<&str> = graph
                    .inputs
                    .iter()
                    .filter(|i| is_dynamic(i))
                    .map(|i| i.name.as_str())
                    .collect();
                assert!(!dynamic.is_empty());
                for profile in profiles.of(stage) {
                    for shapes in [&profile.min, &profile.opt, &profile.max] {
                        let named: BTreeSet<&str> = shapes.keys().map(String::as_str).collect();
                        assert_eq!(named, dynamic.iter().copied().collect(), "{stage}");
                    }
                }
            }
        }
    }
}

/// Buffers of keys and values: grown while tokens are in them, shared with a fork that then goes its own way, cut.
#[test]
fn buffers_grow_fork_and_are_cut() {
    const N: usize = 300;
    let (_scratch, artifact) = compiled_for_all(&tiny_scenes(), Precision::F16);
    let model = open(&artifact, Flavour::Cuda);
    let vocabulary = model.manifest().config.language.vocabulary;
    let ids: Vec<u32> = (0..N).map(|i| u32::try_from(i * 7 % vocabulary).unwrap()).collect();
    let others = &ids[17..22];
    let advance = |sequence: &mut dyn Sequence, ids: &[u32]| {
        let media_time = vec![0; ids.len()];
        let step = Step {
            input_ids: ids,
            media_time: &media_time,
            media: &[],
            logit_rows: &[ids.len() - 1],
        };
        sequence.advance(&step).unwrap()
    };
    let close = |found: &[f32], expected: &[f32], what: &str| {
        let found = compare(what, found, expected, 1).unwrap();
        assert!(found.relative_error <= 1e-2 && found.cosine >= 0.9999, "{found:?}");
    };
    let new = || model.backend().new_sequence(N + 10).unwrap();
    let (mut whole, mut sequence) = (new(), new());
    let expected = advance(&mut *whole, &ids);
    advance(&mut *sequence, &ids[..200]);
    let mut fork = sequence.fork();
    let of_fork = advance(&mut *fork, others);
    close(&advance(&mut *sequence, &ids[200..]), &expected, "grown");
    assert!(sequence.kv_bytes() > fork.kv_bytes());
    sequence.truncate(200);
    close(&advance(&mut *sequence, others), &of_fork, "cut");
    let mut straight = new();
    advance(&mut *straight, &ids[..200]);
    close(&of_fork, &advance(&mut *straight, others), "fork");
}

/// What a graph of a flavour may not have: functions, operators of other domains, products in f32.
#[test]
fn files_have_no_other_operators_and_types_than_their_flavour() {
    let (_scratch, artifact) = compiled_for_all(&tiny_scenes(), Precision::Int8);
    for flavour in FLAVOURS {
        for stage in ["media", "decoder"] {
            let path = artifact.join(format!("graphs/{stage}.{}.onnx", flavour.name()));
            let model = read_onnx(&fs::read(&path).unwrap(), &ReadLimits::default()).unwrap();
            let graph = &model.graph;
            let mut products = 0;
            for node in graph.nodes() {
                assert!(!node.op.is_function(), "{}: {}", path.display(), node.name);
                let form = node.op.operator().onnx_form();
                let is_contrib =
                    matches!(form, OnnxForm::Node { domain, .. } if domain == "com.microsoft");
                assert!(flavour == Flavour::Cuda || !is_contrib, "{stage}: {}", node.name);
                if node.op.name().contains("MatMul") || node.op.name().contains("Attention") {
                    products += 1;
                    let dtype = graph.fact(node.outputs[0]).dtype;
                    assert_eq!(dtype, DType::F16, "{}: {}", path.display(), node.name);
                }
            }
            assert!(products >= 8, "{}: {products}", path.display());
            let entry = |name: &str| {
                let ends = graph.inputs().iter().chain(graph.outputs());
                let found: BTreeSet<DType> = ends
                    .filter(|(other, _)| other.starts_with(name))
                    .map(|(_, id)| graph.fact(*id).dtype)
                    .collect();
                found.into_iter().collect::<Vec<_>>()
            };
            assert_eq!(entry("media_k."), [DType::F16]);
            match stage {
                "media" => assert_eq!(entry("pixel_values"), [DType::F32]),
                _ => assert_eq!(
                    (entry("past_"), entry("logits")),
                    (vec![DType::F16], vec![DType::F32])
                ),
            }
        }
    }
}
