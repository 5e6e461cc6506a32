//! Every golden checkpoint, compiled, on every engine: visual tokens, logits and greedy tokens
//! are PyTorch's.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use flamingo_models::{Family, media_time};
use flamingo_runtime::backend::{Backend, Media, Step};
use flamingo_runtime::ort::{OrtBackend, OrtOptions};
use flamingo_runtime::{Artifact, GenerateOptions, Model};
use flamingo_tests::{Golden, compiled, golden_folders, opening};
use flamingoc::parity::{F32_BOUND, MIN_COSINE, compare};

/// Near-ties: two logits closer than this part of the largest logit.
const NEAR_TIE: f32 = 1e-4;

fn media(model: &Model, golden: &Golden, case: &str) -> Vec<Arc<Media>> {
    let Some(pixels) = golden.get(case, "pixel_values") else { return Vec::new() };
    let shape = pixels.shape();
    model.encode_pixels(&pixels.to_f32_vec().unwrap(), shape[0], shape[1]).unwrap()
}

/// Visual tokens and logits of one case.
fn check_forward(model: &Model, golden: &Golden, case: &str, label: &str) {
    let media = media(model, golden, case);
    let width = model.manifest().config.vision.width;
    if let Some(reference) = golden.f32(case, "visual_tokens") {
        let found: Vec<f32> = media.iter().flat_map(|m| m.visual_tokens.iter().copied()).collect();
        let comparison = compare("visual tokens", &found, &reference, width).unwrap();
        let fits = comparison.relative_error <= F32_BOUND && comparison.cosine >= MIN_COSINE;
        assert!(fits, "{label}: {comparison:?}");
    }
    let ids = golden.ids(case, "input_ids").unwrap();
    let found = model.logits(&ids, &media).unwrap();
    let reference = golden.f32(case, "logits").unwrap();
    let vocabulary = model.manifest().config.language.vocabulary;
    let comparison = compare("logits", &found, &reference, vocabulary).unwrap();
    assert!(comparison.pass, "{label}: {comparison:?}");
}

/// Greedy tokens; the first difference may only be at a near-tie, seen teacher-forced.
fn check_greedy(model: &Model, golden: &Golden, case: &str, label: &str) {
    let Some(expected) = golden.ids(case, "greedy") else { return };
    let media = media(model, golden, case);
    let ids = golden.ids(case, "input_ids").unwrap();
    let options = GenerateOptions {
        max_new_tokens: expected.len(),
        ignore_stops: true,
        allow_image_token: model.manifest().config.family == Family::Idefics,
        ..GenerateOptions::default()
    };
    let found = model.generate_ids(&ids, &media, &options, &mut |_| {}).unwrap().tokens;
    let Some(at) = (0..expected.len()).find(|i| found.get(*i) != expected.get(*i)) else { return };
    let forced = [ids.as_slice(), &expected[..at]].concat();
    let logits = model.logits(&forced, &media).unwrap();
    let row = &logits[(forced.len() - 1) * model.manifest().config.language.vocabulary..];
    let scale = row.iter().fold(0.0f32, |max, value| max.max(value.abs()));
    let gap = (row[found[at] as usize] - row[expected[at] as usize]).abs();
    assert!(gap <= NEAR_TIE * scale, "{label}: expected {expected:?}, got {found:?}, gap {gap}");
}

fn check(folder: &Path, backend: &str) {
    let (_scratch, artifact) = compiled(folder);
    let model = Model::open(&artifact, &opening(backend))
        .unwrap_or_else(|error| panic!("{} on {backend}: {error}", folder.display()));
    let golden = Golden::read(folder);
    let cases = golden.cases();
    assert!(cases.len() >= 3, "{}: {cases:?}", folder.display());
    for case in cases {
        let label = format!("{} {case} on {backend}", folder.display());
        check_forward(&model, &golden, &case, &label);
        check_greedy(&model, &golden, &case, &label);
    }
}

fn check_all(backend: &str) {
    for folder in golden_folders() {
        check(&folder, backend);
    }
}

/// Visual tokens and logits of a case on any backend.
fn forward(backend: &dyn Backend, model: &Model, golden: &Golden, case: &str) -> Vec<f32> {
    let mut media = Vec::new();
    if let Some(pixels) = golden.get(case, "pixel_values") {
        let shape = pixels.shape();
        media = backend.encode(&pixels.to_f32_vec().unwrap(), shape[0], shape[1]).unwrap();
    }
    let media: Vec<Arc<Media>> = media.into_iter().map(Arc::new).collect();
    let input_ids = golden.ids(case, "input_ids").unwrap();
    let config = &model.manifest().config;
    let media_time = media_time(config.family, &config.tokens, &input_ids);
    let logit_rows: Vec<usize> = (0..input_ids.len()).collect();
    let mut sequence = backend.new_sequence(input_ids.len()).unwrap();
    let step = Step {
        input_ids: &input_ids,
        media_time: &media_time,
        media: &media,
        logit_rows: &logit_rows,
    };
    let logits = sequence.advance(&step).unwrap();
    media.iter().flat_map(|m| m.visual_tokens.iter().copied()).chain(logits).collect()
}

/// `--backend ort` runs the flavour made for it; the portable graphs must do there too, also with media two by two.
#[test]
fn onnx_runtime_runs_the_portable_graphs() {
    let library = opening("ort").ort_library;
    let media_batch = NonZeroUsize::new(2);
    let options = OrtOptions { library, media_batch, ..OrtOptions::default() };
    for folder in golden_folders() {
        let (_scratch, path) = compiled(&folder);
        let model = Model::open(&path, &opening("native")).unwrap();
        let artifact = Artifact::open(&path, true).unwrap();
        let graph = |stage| artifact.graph_path(stage, "portable").unwrap();
        let ort = OrtBackend::open(&graph("media"), &graph("decoder"), &options).unwrap();
        let golden = Golden::read(&folder);
        for case in golden.cases() {
            let found = forward(&ort, &model, &golden, &case);
            let native = forward(model.backend(), &model, &golden, &case);
            let comparison = compare("all outputs", &found, &native, 1).unwrap();
            let fits = comparison.relative_error <= F32_BOUND && comparison.cosine >= MIN_COSINE;
            assert!(fits, "{} {case}: {comparison:?}", folder.display());
        }
    }
}

#[test]
fn native_equals_pytorch() {
    check_all("native");
}

#[test]
fn onnx_runtime_equals_pytorch() {
    check_all("ort");
}

#[test]
fn tract_equals_pytorch() {
    check_all("tract");
}
