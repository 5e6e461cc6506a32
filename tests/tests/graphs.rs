//! Graphs of every golden checkpoint: as built they give what PyTorch gave, and the passes leave
//! the meaning.

use std::collections::BTreeMap;
use std::path::Path;

use flamingo_ir::{Graph, Tensor, evaluate_with};
use flamingo_models::{Source, media_time};
use flamingo_tests::{Golden, golden_folders};
use flamingoc::parity::at_their_places;
use flamingoc::passes::optimise;
use flamingoc::scheme::Scheme;

/// Runs a graph on named tensors.
fn run(
    graph: &Graph,
    inputs: &BTreeMap<String, Tensor>,
    source: &Source,
) -> BTreeMap<String, Tensor> {
    let ordered: Vec<Tensor> =
        graph.inputs().iter().map(|(name, _)| inputs[name].clone()).collect();
    let outputs = evaluate_with(graph, &ordered, &source.parts).unwrap();
    graph.outputs().iter().map(|(name, _)| name.clone()).zip(outputs).collect()
}

fn integers(values: impl Iterator<Item = i64>) -> Tensor {
    let values: Vec<i64> = values.collect();
    Tensor::i64(&[values.len()], values).unwrap()
}

/// Visual tokens (if there are media) and logits of one golden case.
fn forward(
    [media, decoder]: [&Graph; 2],
    source: &Source,
    golden: &Golden,
    case: &str,
) -> (Option<Tensor>, Tensor) {
    let ids: Vec<i64> =
        golden.get(case, "input_ids").unwrap().as_i64().unwrap().iter().copied().collect();
    let mut inputs = BTreeMap::new();
    let pixels = golden.get(case, "pixel_values").cloned();
    let size = source.config.vision.image_size;
    // A graph without media still needs one to have shapes; no token sees it.
    let shape = pixels.as_ref().map_or(vec![1, 1, 3, size, size], |p| p.shape().to_vec());
    let blank = || Tensor::f32(&shape, vec![0.0; shape.iter().product()]).unwrap();
    inputs.insert("pixel_values".to_owned(), pixels.clone().unwrap_or_else(blank));
    let max_frames = source.config.resampler.as_ref().map_or(0, |resampler| resampler.max_frames);
    let one_hot = |i: usize| if i / max_frames == i % max_frames { 1.0 } else { 0.0 };
    let weights = (0..shape[1] * max_frames).map(one_hot).collect();
    inputs
        .insert("frame_weights".to_owned(), Tensor::f32(&[shape[1], max_frames], weights).unwrap());
    let mut encoded = run(media, &inputs, source);
    let visual_tokens = encoded.remove("visual_tokens").unwrap();
    for (name, tensor) in encoded {
        inputs.insert(name, at_their_places(source.config.n_places(), tensor).unwrap());
    }
    let tokens: Vec<u32> = ids.iter().map(|id| u32::try_from(*id).unwrap()).collect();
    let time = media_time(source.config.family, &source.config.tokens, &tokens);
    let range = || 0..i64::try_from(ids.len()).unwrap();
    inputs.insert("input_ids".into(), integers(ids.iter().copied()));
    inputs.insert("positions".into(), integers(range()));
    inputs.insert("key_positions".into(), integers(range()));
    inputs.insert("logit_rows".into(), integers(range()));
    inputs.insert("media_time".into(), integers(time.into_iter().map(i64::from)));
    inputs.insert("media_index".into(), integers(1..=i64::try_from(shape[0]).unwrap()));
    let language = &source.config.language;
    let empty = Tensor::f32(&[language.n_kv_heads, 0, language.head_dim], vec![]).unwrap();
    for layer in 0..language.n_layers {
        inputs.insert(format!("past_k.{layer}"), empty.clone());
        inputs.insert(format!("past_v.{layer}"), empty.clone());
    }
    let logits = run(decoder, &inputs, source).remove("logits").unwrap();
    (pixels.map(|_| visual_tokens), logits)
}

/// Largest |a − b| over the largest |b|, with an absolute floor; NaN counts as infinite.
fn relative_error(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.shape(), b.shape());
    let (a, b) = (a.to_f32_vec().unwrap(), b.to_f32_vec().unwrap());
    let scale = b.iter().fold(1e-6f32, |max, value| max.max(value.abs()));
    let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs());
    worst
        .fold(0.0, |max, value| if value.is_nan() { f32::INFINITY } else { max.max(value / scale) })
}

/// One checkpoint: as built against PyTorch, and optimised against as built.
fn check(folder: &Path) {
    let name = folder.file_name().unwrap().to_string_lossy().into_owned();
    let source = Source::open(folder).unwrap_or_else(|error| panic!("{name}: {error}"));
    let graphs = source.graphs().unwrap_or_else(|error| panic!("{name}: {error}"));
    let golden = Golden::read(folder);
    let optimised = |graph: &Graph| {
        optimise(graph.clone(), &source.parts, &Scheme::default(), None, &mut |_, _| {})
            .unwrap_or_else(|e| panic!("{name}: {e}"))
    };
    let (media, media_records) = optimised(&graphs.media);
    let (decoder, decoder_records) = optimised(&graphs.decoder);
    for records in [&media_records, &decoder_records] {
        let total = |index: usize| records[index].ops.values().sum::<usize>();
        let (before, after) = (total(0), total(records.len() - 1));
        assert!(after * 10 < before * 8, "{name}: {after} ops of {before} are left");
    }
    for case in golden.cases() {
        let (tokens, logits) = forward([&graphs.media, &graphs.decoder], &source, &golden, &case);
        let (fast_tokens, fast_logits) = forward([&media, &decoder], &source, &golden, &case);
        for (what, reference, built, fast) in [
            ("visual tokens", golden.get(&case, "visual_tokens"), tokens, fast_tokens),
            ("logits", golden.get(&case, "logits"), Some(logits), Some(fast_logits)),
        ] {
            let (Some(reference), Some(built), Some(fast)) = (reference, built, fast) else {
                continue;
            };
            let error = relative_error(&built, reference);
            assert!(error <= 2e-5, "{name} {case}: {what} differ from PyTorch by {error:e}");
            let error = relative_error(&fast, &built);
            assert!(error <= 2e-5, "{name} {case}: the passes change {what} by {error:e}");
        }
    }
}

#[test]
fn built_graphs_equal_the_reference_and_passes_keep_the_meaning() {
    for folder in golden_folders() {
        check(&folder);
    }
}
