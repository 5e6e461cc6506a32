//! What loading and running refuse, and in which words.

use std::collections::BTreeMap;
use std::sync::Arc;

use flamingo_ir::op::{Add, Erf, Gather, Linear, Position, Softmax, Tanh};
use flamingo_ir::{Bindings, Dim, Fact, Graph, Tensor};

use super::model::{backend, decoder_model, media_model};
use super::{Buffers, Model, kernels};
use crate::backend::{Backend, BackendError, Media, MediaKv, Step};
use crate::native::{Call, NativeBackend, NativeStage};

fn load(graph: &Graph) -> Result<NativeStage, BackendError> {
    NativeStage::new(graph, Arc::new(BTreeMap::new()), kernels(1))
}

#[track_caller]
fn assert_says(error: impl std::fmt::Display, words: &[&str]) {
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "expected `{word}` in:\n{text}");
    }
}

#[test]
fn all_unsupported_nodes_are_listed_and_their_readers_are_not() {
    let mut graph = Graph::new("media");
    let x = graph.input("x", Fact::f32([2, 2]));
    let a = graph.add("first", Erf, &[x]).unwrap();
    let b = graph.add("reader", Add, &[a, a]).unwrap();
    let c = graph.add("second", Softmax, &[x]).unwrap();
    graph.output("b", b);
    graph.output("c", c);
    let error = load(&graph).unwrap_err();
    let BackendError::Unsupported { nodes, .. } = &error else { panic!("{error}") };
    assert_eq!(nodes.len(), 2);
    assert_says(
        error,
        &["\"first\" (Erf): no kernel; fuse it into `Activate`", "\"second\"", "hint:"],
    );
}

#[test]
fn all_missing_and_misshapen_weights_are_listed() {
    let mut graph = Graph::new("media");
    let x = graph.input("x", Fact::f32([1, 2]));
    let weights = ["a", "b", "c"].map(|name| graph.weight(name, Fact::f32([2, 2])));
    for weight in weights {
        let y = graph.add("linear", Linear::default(), &[x, weight]).unwrap();
        graph.output("y", y);
    }
    let bytes = BTreeMap::from([("a".to_owned(), vec![0.0; 4]), ("b".to_owned(), vec![0.0; 3])]);
    let error = NativeStage::new(&graph, Arc::new(bytes), kernels(1)).unwrap_err();
    let words =
        ["weight `b`: expected 4 f32 elements, found 3", "weight `c`", "found none", "hint:"];
    assert_says(&error, &words);
    assert!(!error.to_string().contains("`a`"), "{error}");
}

#[test]
fn unknown_symbols_and_absurd_sizes_are_refused() {
    let mut graph = Graph::new("media");
    graph.input("x", Fact::f32([Dim::symbol("beams"), Dim::from(2)]));
    let huge = [usize::try_from(u32::MAX).unwrap(), 1 << 30, 1 << 30].map(Dim::from);
    graph.input("y", Fact::f32(huge));
    graph.input("z", Fact::new(flamingo_ir::DType::Bool, [1]));
    assert_says(
        load(&graph).unwrap_err(),
        &["`beams`", "elements, found more", "`z`: expected f32 or i64"],
    );
}

#[test]
fn inputs_of_the_wrong_kind_are_refused() {
    let mut graph = Graph::new("decoder");
    let text = Dim::symbol("text_len");
    let indices = graph.input("input_ids", Fact::i64([text.clone()]));
    let media = graph.input("media_k.0", Fact::f32([Dim::symbol("n_media"), 2.into(), 3.into()]));
    let table = graph.input("table", Fact::f32([4, 3]));
    let sum = graph.add("sum", Add, &[indices, indices]).unwrap();
    let rows = graph.add("rows", Gather, &[table, sum]).unwrap();
    let tanh = graph.add("both", Add, &[media, media]).unwrap();
    graph.output("rows", rows);
    graph.output("tanh", tanh);
    let error = load(&graph).unwrap_err();
    assert_says(error, &["node \"sum\" (Add)", "node \"both\" (Add): input `media_k.0`"]);
}

/// Runs the one-node graph `Gather` with an offset.
fn gather(
    indices: &[i64],
    numbers: &[f32],
    text_len: usize,
) -> Result<Vec<Vec<f32>>, BackendError> {
    let mut graph = Graph::new("decoder");
    let positions = graph.input("positions", Fact::i64([Dim::symbol("text_len")]));
    let table = graph.input("table", Fact::f32([4, 1]));
    let two = graph.literal(Tensor::scalar_i64(-2));
    let moved = graph.add("moved", Add, &[two, positions]).unwrap();
    let rows = graph.add("rows", Gather, &[table, moved]).unwrap();
    graph.output("rows", rows);
    let bindings = Bindings::from([("text_len".to_owned(), text_len)]);
    let call = Call {
        bindings: &bindings,
        numbers: &[("table", numbers)],
        indices: &[("positions", indices)],
        media: &[],
        media_time: &[],
    };
    load(&graph).unwrap().run(&call, &mut [], &mut Buffers::default())
}

#[test]
fn stages_check_lengths_and_ranges() {
    let table = [1.0, 2.0, 3.0, 4.0];
    assert_eq!(gather(&[5, 2], &table, 2).unwrap(), [[4.0, 1.0]]);
    for bad in [1, 6, i64::MIN, i64::MAX] {
        let words = ["input `positions`: expected 2 to 5", &bad.to_string()];
        assert_says(gather(&[2, bad], &table, 2).unwrap_err(), &words);
    }
    assert_says(
        gather(&[2], &table, 2).unwrap_err(),
        &["`positions`: expected 2 elements, found 1"],
    );
    assert_says(
        gather(&[2], &table[..3], 1).unwrap_err(),
        &["`table`: expected 4 elements, found 3"],
    );
    assert_says(gather(&[2], &table, usize::MAX).unwrap_err(), &["expected"]);
}

#[test]
fn unbound_symbols_are_named() {
    let stage = decoder_model(Position::None).stage(1);
    assert_says(stage.memory(&Bindings::new()).unwrap_err(), &["no value of `", "hint:"]);
}

fn small_backend() -> NativeBackend {
    backend(&media_model(), &decoder_model(Position::None), 1)
}

#[test]
fn steps_that_do_not_fit_are_refused_and_change_nothing() {
    let backend = small_backend();
    let media = backend.encode(&[0.5; 192], 1, 1).unwrap().remove(0);
    let mut stunted = media.clone();
    let (mut k, v) =
        (stunted.blocks[1].keys().into_owned(), stunted.blocks[1].values().into_owned());
    k.pop();
    stunted.blocks[1] = MediaKv::Rows { k, v };
    let bare = Media { blocks: Vec::new(), ..media.clone() };
    let [media, stunted, bare] = [media, stunted, bare].map(|medium| [Arc::new(medium)]);
    let step =
        |input_ids, media_time, media| Step { input_ids, media_time, media, logit_rows: &[0] };
    let good = step(&[1], &[1], &media);
    let cases: [(Step<'_>, &[&str]); 8] = [
        (step(&[], &[], &[]), &["input_ids", "expected 1 token"]),
        (step(&[1, 31], &[0, 0], &[]), &["input_ids", "expected 0 to 30, found 31"]),
        (step(&[1, 2], &[0], &[]), &["media_time", "expected 2 entries, found 1"]),
        (step(&[1], &[2], &media), &["media_time", "expected 0 to 1, found 2"]),
        (step(&[1; 4], &[0; 4], &[]), &["at most 3 more tokens", "found 4", "--max-context"]),
        (step(&[1], &[1], &stunted), &["media_k.1", "5 x 18 elements for medium 1", "found 89"]),
        (step(&[1], &[1], &bare), &["media_k.0", "found 0"]),
        (Step { logit_rows: &[1], ..good }, &["logit_rows", "rows below 1, found 1"]),
    ];
    let mut sequence = backend.new_sequence(4).unwrap();
    let first = sequence.advance(&good).unwrap();
    for (step, words) in cases {
        assert_says(sequence.advance(&step).unwrap_err(), words);
        assert_eq!(sequence.len(), 1);
    }
    let second = sequence.advance(&good).unwrap();
    assert_ne!(first, second);
    sequence.truncate(0);
    assert_eq!(sequence.advance(&good).unwrap(), first);
    assert_eq!(sequence.advance(&good).unwrap(), second);
}

#[test]
fn pictures_that_do_not_fit_are_refused() {
    let backend = small_backend();
    let cases =
        [(191, 1, 1), (192, 2, 1), (192, 1, 0), (0, 1, 1), (192, usize::MAX, 2), (192, 0, 1)];
    for (n_elements, n_media, n_frames) in cases {
        let error = backend.encode(&vec![0.0; n_elements], n_media, n_frames).unwrap_err();
        assert_says(error, &["pixel_values: expected", "hint:"]);
    }
}

#[test]
fn contexts_beyond_memory_are_an_error() {
    let backend = small_backend();
    for max_context in [usize::MAX, usize::MAX / 64] {
        let error = backend.new_sequence(max_context).err().unwrap();
        assert_says(error, &["bytes of memory", "--max-context"]);
    }
}

#[test]
fn graphs_that_are_not_an_artifact_are_refused() {
    let (media, decoder) = (media_model(), decoder_model(Position::None));
    let new = |media: &Graph, decoder: &Graph| {
        NativeBackend::with_kernels(media, decoder, Arc::new(BTreeMap::new()), kernels(1))
            .unwrap_err()
    };
    assert_says(
        new(&decoder.graph, &decoder.graph),
        &["graph \"decoder\"", "`pixel_values`", "hint:"],
    );
    assert_says(new(&media.graph, &media.graph), &["`pixel_values`: expected no such input"]);
    let mut tail = Model::new("decoder", 1);
    let rows = tail.graph.input("input_ids", Fact::i64([Dim::symbol("text_len")]));
    let table = tail.weight("table", &[3, 4]);
    let x = tail.add("rows", Gather, &[table, rows]);
    let tanh = tail.add("tanh", Tanh, &[x]);
    tail.graph.output("hidden", tanh);
    assert_says(new(&media.graph, &tail.graph), &["expected logits of rank 2"]);
}
