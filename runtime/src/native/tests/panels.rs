//! Weights in panels: operands of linears and tables, against the definitions in standard ops.

use std::sync::Arc;

use flamingo_ir::op::{
    Activation, Add, FeedForward, Gather, Linear, PanelFormat, Rounding, UnpackPanels,
};
use flamingo_ir::{DType, Dim, Fact, Tensor, evaluate_with};

use super::{Buffers, Model, Noise, check, ids, kernels, run_native};
use crate::backend::BackendError;
use crate::native::NativeStage;

const FORMATS: [PanelFormat; 5] = [
    PanelFormat::F16,
    PanelFormat::Bf16,
    PanelFormat::Int8,
    PanelFormat::Int4 { block: 32 },
    PanelFormat::Int4 { block: 128 },
];

/// Rows of whole numbers with 127 or -127 in each: no rounding of activations changes them.
fn whole_numbers(rows: usize, cols: usize) -> Tensor {
    let mut noise = Noise::new(23);
    let number = |i: usize| match i % cols {
        0 => 127.0 * noise.number().signum(),
        _ => (noise.number() * 127.0).round(),
    };
    Tensor::f32(&[rows, cols], (0..rows * cols).map(number).collect()).unwrap()
}

#[test]
fn linears_read_every_format() {
    for format in FORMATS {
        for (m, k, n) in [(1, 32, 16), (3, 33, 17), (1, 200, 70), (19, 70, 65)] {
            let x = whole_numbers(m, k);
            let mut model = Model::new("panels", 3);
            let input = model.graph.input("x", x.fact());
            let weight = model.packed("w", format, [n, k]);
            let bias = model.weight("bias", &[n]);
            let op = Linear {
                activation: Some(Activation::Relu),
                bias: true,
                residual: false,
                rounding: format.rounding(),
            };
            let y = model.add("y", op, &[input, weight, bias]);
            model.graph.output("y", y);
            check(&model, &[x]);
        }
    }
}

#[test]
fn tables_are_read_by_row() {
    for format in FORMATS {
        let mut model = Model::new("table", 5);
        let indices = model.graph.input("input_ids", Fact::i64([Dim::symbol("text_len")]));
        let table = model.packed("table", format, [21, 40]);
        let rows = model.add("rows", Gather, &[table, indices]);
        model.graph.output("rows", rows);
        check(&model, &[ids([0, 20, 7, 16, 7])]);
    }
}

/// Activations between the two linears are rounded where no test chooses their values: a step of
/// the rounding is allowed for.
#[test]
fn feed_forwards_read_both_weights() {
    for format in FORMATS {
        for gated in [false, true] {
            let (m, d, f) = (5, 40, 48);
            let x = whole_numbers(m, d);
            let mut model = Model::new("feed_forward", 9);
            let input = model.graph.input("x", x.fact());
            let up = model.packed("up", format, [if gated { 2 * f } else { f }, d]);
            let down = model.packed("down", format, [d, f]);
            let op = FeedForward {
                activation: Activation::Silu,
                gated,
                up_bias: false,
                down_bias: false,
                residual: false,
                rounding: format.rounding(),
            };
            let y = model.add("y", op, &[input, up, down]);
            model.graph.output("y", y);
            let expected = evaluate_with(&model.graph, std::slice::from_ref(&x), &model).unwrap();
            let expected = expected[0].to_f32_vec().unwrap();
            let found = run_native(&model, &model.stage(2), &mut Buffers::default(), &[x]);
            let largest = expected.iter().fold(0.0f32, |max, value| max.max(value.abs()));
            for (a, b) in found["y"].iter().zip(&expected) {
                assert!((a - b).abs() <= 0.02 * largest, "{format} gated {gated}: {a} {b}");
            }
        }
    }
}

#[test]
fn one_table_serves_the_embedding_and_the_head() {
    let format = PanelFormat::Int8;
    let mut model = Model::new("tied", 5);
    let indices = model.graph.input("input_ids", Fact::i64([Dim::symbol("text_len")]));
    let x = whole_numbers(2, 40);
    let input = model.graph.input("x", x.fact());
    let table = model.packed("table", format, [21, 40]);
    let rows = model.add("rows", Gather, &[table, indices]);
    let op = Linear { rounding: format.rounding(), ..Linear::default() };
    let logits = model.add("logits", op, &[input, table]);
    model.graph.output("rows", rows);
    model.graph.output("logits", logits);
    check(&model, &[ids([3, 1]), x]);
    let memory = model.stage(1).memory(&[("text_len".to_owned(), 2)].into()).unwrap();
    assert_eq!(memory.weight_bytes, 32 * 40 + 32 * 4);
}

fn refusal(model: &Model) -> String {
    let error = NativeStage::new(&model.graph, Arc::new(model.bytes()), kernels(1)).unwrap_err();
    error.to_string()
}

#[test]
fn rounding_and_format_must_agree() {
    for (format, rounding) in
        [(PanelFormat::Int8, Rounding::None), (PanelFormat::F16, Rounding::Bf16)]
    {
        let mut model = Model::new("media", 1);
        let x = model.graph.input("x", Fact::f32([1, 32]));
        let weight = model.packed("w", format, [16, 32]);
        let y = model.add("y", Linear { rounding, ..Linear::default() }, &[x, weight]);
        model.graph.output("y", y);
        let text = refusal(&model);
        let words = format!("a weight of {format} meets activations with `rounding`");
        assert!(text.contains("node \"y\" (Linear)") && text.contains(&words), "{text}");
    }
    let mut model = Model::new("media", 1);
    let x = model.graph.input("x", Fact::f32([1, 32]));
    let weight = model.weight("w", &[16, 32]);
    let op = Linear { rounding: Rounding::Int8, ..Linear::default() };
    let y = model.add("y", op, &[x, weight]);
    model.graph.output("y", y);
    assert!(refusal(&model).contains("a weight of f32 meets"), "{}", refusal(&model));
}

#[test]
fn other_readers_of_panels_are_refused() {
    let mut model = Model::new("media", 1);
    let x = model.graph.input("x", Fact::f32([16, 32]));
    let weight = model.packed("w", PanelFormat::Int8, [16, 32]);
    let y = model.add("sum", Add, &[x, weight]);
    model.graph.output("y", y);
    let text = refusal(&model);
    assert!(text.contains("node \"sum\" (Add): panels are only known to `Linear`"), "{text}");
}

#[test]
fn panels_outside_of_the_weight_file_are_refused() {
    let mut model = Model::new("media", 1);
    let format = PanelFormat::F16;
    let data = model.graph.input("data", Fact::f32([1, 32, 16]));
    let data = model.add("half", flamingo_ir::op::Cast { dtype: DType::F16 }, &[data]);
    let weight = model.add("w", UnpackPanels { format, n: 16, k: 32 }, &[data]);
    let x = model.graph.input("x", Fact::f32([1, 32]));
    let y = model.add("y", Linear::default(), &[x, weight]);
    model.graph.output("y", y);
    let text = refusal(&model);
    assert!(text.contains("panels must lie in the weight file"), "{text}");
}

#[test]
fn tensors_of_another_type_or_size_are_listed() {
    let mut model = Model::new("media", 1);
    let x = model.graph.input("x", Fact::f32([1, 32]));
    let weight = model.packed("w", PanelFormat::Int8, [16, 32]);
    let op = Linear { rounding: Rounding::Int8, ..Linear::default() };
    let y = model.add("y", op, &[x, weight]);
    model.graph.output("y", y);
    let mut stored = model.bytes();
    stored.0.get_mut("w.0").unwrap().0 = DType::U8;
    stored.0.get_mut("w.1").unwrap().2 -= 4;
    let error = NativeStage::new(&model.graph, Arc::new(stored), kernels(1)).unwrap_err();
    assert!(matches!(error, BackendError::Weights { .. }));
    let text = error.to_string();
    for words in ["`w.0`: expected 512 i8 elements, found 512 of u8", "`w.1`: expected 16 f32"] {
        assert!(text.contains(words), "{text}");
    }
}
