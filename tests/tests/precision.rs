//! Artifacts of every precision: the engines agree on the same files, next tokens stay near those of
//! PyTorch's f32, and the demo model still answers.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use flamingo_runtime::backend::Media;
use flamingo_runtime::{GenerateOptions, KvFormat, Model, OpenOptions, PromptFile, Segment};
use flamingo_scenes::Split;
use flamingo_tests::{Golden, compiled_as, golden_folders, opening, tiny_scenes};
use flamingoc::calibrate::bundled;
use flamingoc::eval::{EvalOptions, eval, tasks};
use flamingoc::gate::judge;
use flamingoc::parity::{Divergence, F32_BOUND, MIN_COSINE, compare, divergence};
use flamingoc::scheme::{Precision, Scheme};
use serde_json::Value;

fn open(artifact: &Path, backend: &str) -> Model {
    open_with(artifact, opening(backend))
}

fn open_with(artifact: &Path, options: OpenOptions) -> Model {
    let backend = options.backend.clone().unwrap_or_default();
    Model::open(artifact, &options)
        .unwrap_or_else(|error| panic!("{} on {backend}: {error}", artifact.display()))
}

/// Visual tokens and logits of one case.
fn forward(model: &Model, golden: &Golden, case: &str) -> (Vec<f32>, Vec<f32>) {
    let media: Vec<Arc<Media>> = match golden.get(case, "pixel_values") {
        None => Vec::new(),
        Some(pixels) => {
            let shape = pixels.shape();
            model.encode_pixels(&pixels.to_f32_vec().unwrap(), shape[0], shape[1]).unwrap()
        }
    };
    let ids = golden.ids(case, "input_ids").unwrap();
    let logits = model.logits(&ids, &media).unwrap();
    (media.iter().flat_map(|m| m.visual_tokens.iter().copied()).collect(), logits)
}

/// How far two engines may be apart: largest error as a part of the largest magnitude, and cosine.
///
/// f16 rounds no activations, so the bound is that of f32. Elsewhere sums that differ in their last
/// bits may fall on two sides of a tie: one activation moves by one step, which is 1 / 127 of the
/// row's largest (1 / 256 of itself in bf16), and later layers carry that on. Other weights, scales
/// or zero points would be off by far more.
fn engine_bound(precision: Precision) -> (f32, f64) {
    match precision {
        Precision::F32 | Precision::F16 => (F32_BOUND, MIN_COSINE),
        Precision::Bf16 => (0.02, 0.9999),
        Precision::Int8 | Precision::Int4 => (0.05, 0.999),
    }
}

/// Every golden at a precision: the engines agree with the native one, and next tokens stay near those of PyTorch.
///
/// Random models of widths around 32 are harder to round than real ones: few numbers share a scale, and none is
/// redundant. f16, bf16 and int8 keep the project's bounds all the same.
fn check_goldens(precision: Precision, max_kl: f64) {
    let (mut n_rows, mut n_equal) = (0u32, 0u32);
    for folder in golden_folders() {
        let (_scratch, artifact) = compiled_as(&folder, precision.into());
        let golden = Golden::read(&folder);
        let found = next_tokens(&artifact, &golden);
        assert!(found.mean_kl <= max_kl, "{} {}: {found:?}", precision.name(), folder.display());
        // Other engines keep keys and values in f32.
        let exact = OpenOptions { kv_format: Some(KvFormat::F32), ..opening("native") };
        let native = open_with(&artifact, exact);
        let (rows, equal) = check_engine("ort", precision, &artifact, &golden, &native);
        (n_rows, n_equal) = (n_rows + rows, n_equal + equal);
        // tract has no bfloat16.
        if precision != Precision::Bf16 {
            check_engine("tract", precision, &artifact, &golden, &native);
        }
    }
    // Rows of few tokens seldom fall on a tie: there the engines agree as they do in f32, which shows that what is apart
    // elsewhere is rounding, and not another meaning of the file.
    let share = f64::from(n_equal) / f64::from(n_rows);
    assert!(n_rows >= 50 && share >= 0.8, "{}: {n_equal} of {n_rows}", precision.name());
}

/// Compares an engine with the native one on every case. Of those without pictures, how many rows of logits there are, and
/// how many are equal but for f32's rounding.
fn check_engine(
    backend: &str,
    precision: Precision,
    artifact: &Path,
    golden: &Golden,
    native: &Model,
) -> (u32, u32) {
    let (bound, min_cosine) = engine_bound(precision);
    let vocabulary = native.manifest().config.language.vocabulary;
    let other = open(artifact, backend);
    let (mut n_rows, mut n_equal) = (0, 0);
    for case in golden.cases() {
        let (expected, found) = (forward(native, golden, &case), forward(&other, golden, &case));
        for (expected, found) in [(&expected.0, &found.0), (&expected.1, &found.1)] {
            let comparison = compare(&case, found, expected, 1).unwrap();
            let fits = comparison.relative_error <= bound && comparison.cosine >= min_cosine;
            let name = precision.name();
            assert!(fits, "{} {name} on {backend}: {comparison:?}", artifact.display());
        }
        if golden.get(&case, "pixel_values").is_none() {
            for (found, expected) in found.1.chunks(vocabulary).zip(expected.1.chunks(vocabulary)) {
                let comparison = compare(&case, found, expected, vocabulary).unwrap();
                n_rows += 1;
                n_equal += u32::from(comparison.relative_error <= 1e-5);
            }
        }
    }
    (n_rows, n_equal)
}

#[test]
fn goldens_in_f16() {
    check_goldens(Precision::F16, 1e-4);
}

#[test]
fn goldens_in_bf16() {
    check_goldens(Precision::Bf16, 1e-3);
}

#[test]
fn goldens_in_int8() {
    check_goldens(Precision::Int8, 0.01);
}

#[test]
fn goldens_in_int4() {
    check_goldens(Precision::Int4, 0.2);
}

/// Teacher-forced, prompts of every task of the demo. In every other picture some activation is so near the middle of two
/// levels that the engines round it apart, and the layers after it carry that on: next tokens are then as far apart as
/// rounding alone puts them, which is no more than this.
#[test]
fn the_same_weights_give_the_same_next_tokens_in_onnx_runtime() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/recipe.toml");
    for precision in [Precision::Int8, Precision::Int4] {
        let (_scratch, artifact) = compiled_as(&demo, precision.into());
        let exact = OpenOptions { kv_format: Some(KvFormat::F32), ..opening("native") };
        let (native, other) = (open_with(&artifact, exact), open(&artifact, "ort"));
        let examples = bundled(&native, 0, 300).unwrap();
        let verdict = judge(&other, &native, &examples, &mut |_| {}).unwrap();
        let name = precision.name();
        assert!(verdict.n_tokens >= 2000 && verdict.top1_agreement >= 0.995, "{name}: {verdict:?}");
        assert!(verdict.mean_kl <= 1e-3, "{name}: {verdict:?}");
        let (same, all) = answered_the_same(&native, &other);
        assert!(all >= 400 && same as f64 >= 0.999 * all as f64, "{name}: {same} of {all}");
    }
}

/// How many tokens of the answers to the demo's tasks are the same, and how many tokens there are.
fn answered_the_same(one: &Model, other: &Model) -> (usize, usize) {
    let tasks = tasks(&[], &[0, 2, 4]).unwrap();
    let options = EvalOptions { tasks, split: Split::Test, n: 25, seed: 7, blind: false };
    let answers = |model: &Model| {
        let mut tokens = Vec::new();
        eval(model, &options, &mut |_, answer| {
            tokens.extend_from_slice(answer);
            Ok(())
        })
        .unwrap();
        tokens
    };
    let (one, other) = (answers(one), answers(other));
    (one.iter().zip(&other).filter(|(one, other)| one == other).count(), one.len())
}

#[test]
fn tract_refuses_bf16() {
    let (_scratch, artifact) = compiled_as(&tiny_scenes(), Precision::Bf16.into());
    let refused = Model::open(&artifact, &opening("tract")).err().map(|error| error.to_string());
    assert!(refused.is_some_and(|text| text.contains("hint: ")));
}

/// Next tokens of an artifact against PyTorch's, over all cases.
fn next_tokens(artifact: &Path, golden: &Golden) -> Divergence {
    let model = open(artifact, "native");
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for case in golden.cases() {
        found.extend(forward(&model, golden, &case).1);
        expected.extend(golden.f32(&case, "logits").unwrap());
    }
    divergence(&found, &expected, model.manifest().config.language.vocabulary).unwrap()
}

/// Share of the bundled prompts that are answered as PyTorch does.
fn answered_alike(precision: Precision) -> f64 {
    let (_scratch, artifact) = compiled_as(&tiny_scenes(), precision.into());
    let model = open(&artifact, "native");
    let text = fs::read_to_string(tiny_scenes().join("prompts.jsonl")).unwrap();
    let (mut n, mut alike) = (0, 0);
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let segments: Vec<Segment> = serde_json::from_value(line["segments"].clone()).unwrap();
        let mut prompt = PromptFile { segments, ..PromptFile::default() };
        prompt.resolve(&tiny_scenes());
        let max_new_tokens = if line["task"] == "caption" { 8 } else { 1 };
        let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
        let answer = model.generate(&prompt, &options, &mut |_| {}).unwrap();
        n += 1;
        alike += usize::from(answer.text == line["reference_prediction"].as_str().unwrap());
    }
    assert_eq!(n, 736, "bundled prompts are missing");
    alike as f64 / n as f64
}

#[test]
fn the_demo_model_answers_at_every_precision() {
    for (precision, floor) in [
        (Precision::F16, 0.99),
        (Precision::Bf16, 0.98),
        (Precision::Int8, 0.97),
        (Precision::Int4, 0.93),
    ] {
        let share = answered_alike(precision);
        assert!(share >= floor, "{}: {share} of the prompts", precision.name());
    }
}

#[test]
fn larger_blocks_of_int4_take_fewer_bytes_and_lose_more() {
    let golden = golden_folders().into_iter().find(|f| f.ends_with("openflamingo-mpt")).unwrap();
    let with = |int4_block| compiled_as(&golden, Scheme { int4_block, ..Precision::Int4.into() });
    let (small, large, int8) = (with(8), with(32), compiled_as(&golden, Precision::Int8.into()));
    let size =
        |artifact: &Path| fs::metadata(artifact.join("graphs/weights.safetensors")).unwrap().len();
    assert!(size(&large.1) < size(&int8.1));
    let [small, large] = [small.1, large.1].map(|it| next_tokens(&it, &Golden::read(&golden)));
    assert!(small.mean_kl < large.mean_kl, "{small:?} {large:?}");
}
