//! The same model on every engine: native kernels, ONNX Runtime, tract.
#![cfg(all(feature = "ort", feature = "tract"))]

#[path = "engines/model.rs"]
mod model;

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use flamingo_ir::op::Flavour;
use flamingo_runtime::backend::{Backend, BackendError, Media, MediaKv, Sequence, Step};
use flamingo_runtime::native::NativeBackend;
use flamingo_runtime::ort::{ExecutionProvider, OrtBackend, OrtOptions};
use flamingo_runtime::tract::TractBackend;

use model::{FRAME_ELEMENTS, Model, VOCABULARY, noise};

/// Native first: the others are compared with it.
struct Engines {
    names: Vec<&'static str>,
    backends: Vec<Box<dyn Backend>>,
}

impl Engines {
    fn sequences(&self) -> Vec<Box<dyn Sequence>> {
        self.backends.iter().map(|backend| backend.new_sequence(40).unwrap()).collect()
    }
}

fn library() -> PathBuf {
    match std::env::var_os("FLAMINGO_TEST_ORT_LIB") {
        Some(path) => PathBuf::from(path),
        None => panic!("FLAMINGO_TEST_ORT_LIB is not set\n\nhint: run `cargo xtask test`"),
    }
}

fn options(execution_provider: ExecutionProvider) -> OrtOptions {
    OrtOptions { library: Some(library()), execution_provider, ..OrtOptions::default() }
}

/// The engines with one model for all tests.
fn engines() -> &'static Engines {
    static ENGINES: OnceLock<Engines> = OnceLock::new();
    ENGINES.get_or_init(|| engines_of(&Model::new(true)))
}

/// The portable graphs in a folder of their own.
fn files() -> (tempfile::TempDir, [PathBuf; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let paths = Model::new(true).write(folder.path(), Flavour::Portable);
    (folder, paths)
}

fn engines_of(model: &Model) -> Engines {
    let folder = tempfile::tempdir().unwrap();
    let weights = Arc::new(model.weights.clone());
    let native = NativeBackend::new(&model.media, &model.decoder, weights, None).unwrap();
    let mut names = vec!["native"];
    let mut backends: Vec<Box<dyn Backend>> = vec![Box::new(native)];
    for flavour in Flavour::ALL {
        let [media, decoder] = model.write(folder.path(), flavour);
        let ort = OrtBackend::open(&media, &decoder, &options(ExecutionProvider::Cpu)).unwrap();
        backends.push(Box::new(ort));
        names.push(flavour.name());
    }
    let [media, decoder] = model.write(folder.path(), Flavour::Portable);
    backends.push(Box::new(TractBackend::open(&media, &decoder).unwrap()));
    names.push("tract");
    Engines { names, backends }
}

/// Fails unless what the engine `name` found is within 1e-4 of the largest magnitude (floor 1e-6) of `expected`; engines
/// that compute in f16, within 3e-3: three of its steps.
#[track_caller]
fn assert_close(name: &str, what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{name}: {what}: length");
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let is_half = Flavour::from_name(name).is_some_and(|flavour| flavour.half().is_some());
    let bound = if is_half { 3e-3 * largest } else { (1e-4 * largest).max(1e-6) };
    let error = |(a, b): (&f32, &f32)| if a.is_finite() { (a - b).abs() } else { f32::INFINITY };
    let errors = found.iter().zip(expected).map(error).enumerate();
    let Some((worst, error)) = errors.max_by(|a, b| a.1.total_cmp(&b.1)) else { return };
    let (a, b) = (found[worst], expected[worst]);
    assert!(
        error <= bound,
        "{name}: {what}: element {worst}: expected {b}, found {a}; off by {error}, bound {bound}"
    );
}

/// Encodes on every engine; returns native's media, which all others agree with.
#[track_caller]
fn encode(engines: &Engines, n_media: usize, n_frames: usize) -> Vec<Arc<Media>> {
    let pixels = noise(5, n_media * n_frames * FRAME_ELEMENTS);
    let mut all = engines.backends.iter().map(|b| b.encode(&pixels, n_media, n_frames).unwrap());
    let native = all.next().unwrap();
    for (name, media) in engines.names[1..].iter().zip(all) {
        assert_eq!(media.len(), n_media);
        for (found, expected) in media.iter().zip(&native) {
            assert_eq!((found.n_latents, found.blocks.len()), (expected.n_latents, 1));
            let what = format!("{n_frames} frames");
            assert_close(name, &what, &found.visual_tokens, &expected.visual_tokens);
            assert_close(name, &what, &found.blocks[0].keys(), &expected.blocks[0].keys());
            assert_close(name, &what, &found.blocks[0].values(), &expected.blocks[0].values());
        }
    }
    native.into_iter().map(Arc::new).collect()
}

/// Sequences that are advanced and cut together.
struct Together<'e> {
    engines: &'e Engines,
    media: Vec<Arc<Media>>,
    sequences: Vec<Box<dyn Sequence>>,
}

impl<'e> Together<'e> {
    fn new(engines: &'e Engines, media: Vec<Arc<Media>>) -> Together<'e> {
        Together { engines, media, sequences: engines.sequences() }
    }

    /// Advances all by tokens with these media times, and compares the logits.
    #[track_caller]
    fn advance(&mut self, media_time: &[u32], logit_rows: &[usize]) {
        let len = self.sequences[0].len();
        let id = |i: usize| u32::try_from((7 * (len + i) + 3) % VOCABULARY).unwrap();
        let input_ids: Vec<u32> = (0..media_time.len()).map(id).collect();
        let step = Step { input_ids: &input_ids, media_time, media: &self.media, logit_rows };
        let mut all = self.sequences.iter_mut().map(|sequence| sequence.advance(&step).unwrap());
        let native = all.next().unwrap();
        assert_eq!(native.len(), logit_rows.len() * VOCABULARY);
        for (name, logits) in self.engines.names[1..].iter().zip(all) {
            let what = format!("{len} tokens, then {media_time:?}");
            assert_close(name, &what, &logits, &native);
        }
        let lens: Vec<usize> = self.sequences.iter().map(|sequence| sequence.len()).collect();
        assert_eq!(lens, vec![len + media_time.len(); lens.len()]);
    }

    fn truncate(&mut self, len: usize) {
        self.sequences.iter_mut().for_each(|sequence| sequence.truncate(len));
    }
}

#[test]
fn engines_agree_on_media() {
    let engines = engines();
    for (n_media, n_frames) in [(1, 1), (3, 2), (2, 5)] {
        encode(engines, n_media, n_frames);
    }
}

#[test]
fn engines_agree_on_prompts_steps_and_cuts() {
    let engines = engines();
    let media = encode(engines, 3, 2);
    let mut together = Together::new(engines, media);
    together.advance(&[0, 0, 1, 1, 1, 2, 3, 3, 3], &[0, 4, 8]);
    together.advance(&[3], &[0]);
    together.advance(&[3], &[0]);
    together.advance(&[0], &[0]);
    together.advance(&[2, 3], &[]);
    together.truncate(5);
    together.advance(&[3, 3, 0, 1], &[3, 0]);
    together.truncate(8);
    together.truncate(20);
    together.advance(&[1], &[0]);
    together.truncate(0);
    together.advance(&[0], &[0]);
    together.advance(&[0, 0, 0], &[0, 1, 2]);
    together.truncate(0);
    together.advance(&[2; 33], &[32]);
}

#[test]
fn media_may_have_latents_by_frames() {
    let engines = engines_of(&Model::new(false));
    let mut media = encode(&engines, 2, 3);
    media.extend(encode(&engines, 1, 1));
    assert_eq!([media[0].n_latents, media[2].n_latents], [15, 5]);
    let mut together = Together::new(&engines, media);
    together.advance(&[0, 1, 1, 2], &[0, 3]);
    together.advance(&[3, 3], &[1]);
    together.advance(&[0], &[0]);
    let step =
        Step { input_ids: &[1, 2], media_time: &[2, 3], media: &together.media, logit_rows: &[0] };
    for sequence in &mut together.sequences[1..] {
        let error = sequence.advance(&step).unwrap_err().to_string();
        assert!(error.contains("media: expected 15 visual tokens"), "{error}");
    }
}

#[test]
fn text_needs_no_media() {
    let engines = engines();
    let mut together = Together::new(engines, Vec::new());
    together.advance(&[0, 0, 0, 0], &[3]);
    together.advance(&[0], &[0]);
}

#[test]
fn engines_refuse_in_the_same_words() {
    let engines = engines();
    let media = encode(engines, 2, 1);
    let stunted = MediaKv::Rows { k: vec![0.0; 4], v: vec![0.0; 4] };
    let broken =
        [Arc::clone(&media[0]), Arc::new(Media { blocks: vec![stunted], ..(*media[1]).clone() })];
    let vocabulary = u32::try_from(VOCABULARY).unwrap();
    let fine = Step { input_ids: &[1, 2], media_time: &[0, 2], media: &media, logit_rows: &[1] };
    let many = [0; 41];
    let cases = [
        (Step { input_ids: &[], media_time: &[], ..fine }, "1 token or more"),
        (Step { media_time: &[0], ..fine }, "2 entries"),
        (Step { media_time: &[0, 3], ..fine }, "0 to 2"),
        (Step { logit_rows: &[2], ..fine }, "rows below 2"),
        (Step { input_ids: &many, media_time: &many, ..fine }, "at most 38 more tokens"),
        (Step { input_ids: &[1, vocabulary], ..fine }, "0 to 30"),
        (Step { media: &broken, ..fine }, "3 x 10 elements for medium 2"),
    ];
    let mut sequences: Vec<_> =
        engines.backends.iter().map(|b| b.new_sequence(40).unwrap()).collect();
    let first: Vec<_> = sequences.iter_mut().map(|s| s.advance(&fine).unwrap()).collect();
    for (step, expected) in &cases {
        let refuse = |s: &mut Box<dyn Sequence>| s.advance(step).unwrap_err().to_string();
        let messages: Vec<String> = sequences.iter_mut().map(refuse).collect();
        assert!(messages[0].contains(expected), "{}", messages[0]);
        assert!(messages.iter().all(|message| *message == messages[0]), "{messages:#?}");
    }
    for (sequence, first) in sequences.iter_mut().zip(first) {
        assert_eq!(sequence.len(), 2);
        sequence.truncate(0);
        assert_close("itself", "after errors", &sequence.advance(&fine).unwrap(), &first);
    }
    let messages: Vec<String> = engines
        .backends
        .iter()
        .map(|backend| backend.encode(&[0.0; 5], 1, 1).unwrap_err().to_string())
        .collect();
    assert!(messages.iter().all(|message| *message == messages[0]), "{messages:#?}");
}

#[test]
fn a_provider_that_is_not_there_is_an_error() {
    let (_folder, [media, decoder]) = files();
    for provider in [ExecutionProvider::Cuda, ExecutionProvider::TensorRt] {
        let error = OrtBackend::open(&media, &decoder, &options(provider)).unwrap_err();
        assert!(matches!(error, BackendError::Engine { engine: "ort", .. }), "{error:?}");
        let text = error.to_string();
        let has_words = text.contains("found one without it\n\nhint: ");
        assert!(text.contains(provider.name()) && has_words, "{text}");
    }
}

#[test]
fn a_second_library_is_an_error() {
    let (folder, [media, decoder]) = files();
    OrtBackend::open(&media, &decoder, &options(ExecutionProvider::Cpu)).unwrap();
    let other = folder.path().join("weights.safetensors");
    let options = OrtOptions { library: Some(other), ..OrtOptions::default() };
    let error = OrtBackend::open(&media, &decoder, &options).unwrap_err().to_string();
    assert!(error.contains("expected the library that is in use"), "{error}");
}

#[test]
fn files_that_are_no_graphs_are_errors() {
    let (folder, [media, decoder]) = files();
    let path = |name: &str| folder.path().join(name);
    let open = |media: &PathBuf, decoder: &PathBuf| {
        let ort = OrtBackend::open(media, decoder, &options(ExecutionProvider::Cpu)).unwrap_err();
        [ort.to_string(), TractBackend::open(media, decoder).unwrap_err().to_string()]
    };
    for text in open(&path("weights.safetensors"), &decoder) {
        assert!(text.contains("weights.safetensors: "), "{text}");
    }
    for text in open(&path("missing.onnx"), &decoder) {
        assert!(text.contains("missing.onnx: "), "{text}");
    }
    for text in open(&decoder, &media) {
        assert!(text.contains("input `pixel_values`: expected "), "{text}");
    }
    std::fs::write(path("weights.safetensors"), "short").unwrap();
    for text in open(&media, &decoder) {
        assert!(text.contains(".onnx: "), "{text}");
    }
}
