//! Each op alone, over ugly sizes, against its reference.

use flamingo_ir::op::{
    Activate, Activation, Add, Attention, ChannelGate, ClassEmbedding, Concat, Convolution,
    CrossAttention, ExpandBatch, FeedForward, FrameEmbedding, GatedCrossAttention, Gather,
    LayerNorm, Linear, MeanPool, MergeFrames, Mul, Op, Patches, PictureMean, Position,
    ResamplerAttention, Reshape, RmsNorm, Rounding, SelfAttention, Slice, Split,
};
use flamingo_ir::{Dim, Fact, Tensor, ValueId};

use super::{Model, Noise, check, ids};

const ACTIVATIONS: [Activation; 6] = [
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::QuickGelu,
    Activation::Relu,
    Activation::SquaredRelu,
    Activation::Silu,
];

/// Checks `op` alone: inputs of the given shapes as inputs of the graph, then as weights but for
/// the first.
#[track_caller]
fn check_op(op: impl Into<Op>, shapes: &[&[usize]]) {
    let op = op.into();
    let mut noise = Noise::new(7);
    let inputs: Vec<Tensor> = shapes.iter().map(|shape| noise.tensor(shape)).collect();
    let mut model = Model::new("inputs", 1);
    let names = ["a", "b", "c", "d", "e", "f"];
    let ids: Vec<ValueId> =
        inputs.iter().zip(names).map(|(t, name)| model.graph.input(name, t.fact())).collect();
    finish(&mut model, op.clone(), &ids);
    check(&model, &inputs);
    let mut model = Model::new("weights", 1);
    let mut ids = vec![model.graph.input("a", inputs[0].fact())];
    ids.extend(shapes.iter().zip(names).skip(1).map(|(shape, name)| model.weight(name, shape)));
    finish(&mut model, op, &ids);
    check(&model, &inputs[..1]);
}

fn finish(model: &mut Model, op: Op, ids: &[ValueId]) {
    let outputs = model.graph.add_many("node", op, ids).unwrap();
    for (i, output) in outputs.into_iter().enumerate() {
        model.graph.output(&format!("y{i}"), output);
    }
}

#[test]
fn linear() {
    for (m, k, n) in [(1, 1, 1), (1, 33, 70), (3, 17, 9), (7, 64, 65)] {
        check_op(Linear::default(), &[&[m, k], &[n, k]]);
        let op = Linear { residual: true, ..Linear::default() };
        check_op(op, &[&[m, k], &[n, k], &[m, n]]);
        for activation in ACTIVATIONS {
            let op = Linear {
                activation: Some(activation),
                bias: true,
                residual: true,
                ..Linear::default()
            };
            check_op(op, &[&[2, m, k], &[n, k], &[n], &[2, m, n]]);
        }
    }
}

#[test]
fn activate() {
    for activation in ACTIVATIONS {
        check_op(Activate { activation }, &[&[3, 5, 19]]);
    }
}

#[test]
fn feed_forward() {
    for (bias, residual) in [(false, false), (true, true), (false, true)] {
        let op = |gated| FeedForward {
            activation: Activation::Silu,
            gated,
            up_bias: bias,
            down_bias: bias,
            residual,
            rounding: Rounding::None,
        };
        let (m, d, f) = (5, 13, 37);
        for gated in [false, true] {
            let up = if gated { 2 * f } else { f };
            let all: [(bool, &[usize]); 6] = [
                (true, &[m, d]),
                (true, &[up, d]),
                (bias, &[up]),
                (true, &[d, f]),
                (bias, &[d]),
                (residual, &[m, d]),
            ];
            let shapes: Vec<&[usize]> = all.iter().filter(|s| s.0).map(|s| s.1).collect();
            check_op(op(gated), &shapes);
        }
    }
}

#[test]
fn norms() {
    for (n_heads, scale, bias) in
        [(1, true, true), (1, false, false), (3, true, true), (3, true, false)]
    {
        let part = [39 / n_heads];
        let all: [(bool, &[usize]); 3] = [(true, &[2, 5, 39]), (scale, &part), (bias, &part)];
        let shapes: Vec<&[usize]> = all.iter().filter(|s| s.0).map(|s| s.1).collect();
        check_op(LayerNorm { epsilon: 1e-5, n_heads, scale, bias }, &shapes);
        let shapes = &shapes[..1 + usize::from(scale)];
        check_op(RmsNorm { epsilon: 1e-6, n_heads, scale }, shapes);
    }
}

/// Norms per head, attention and activation read columns of a wider matrix in place.
#[test]
fn columns_of_a_fused_projection() {
    let mut model = Model::new("fused", 2);
    let x = model.graph.input("x", Fact::f32([Dim::symbol("n_media"), 5.into(), 7.into()]));
    let weight = model.weight("qkv", &[72, 7]);
    let fused = model.add("qkv", Linear::default(), &[x, weight]);
    let split = Split { axis: 2, sizes: vec![24, 24, 24] };
    let parts = model.graph.add_many("split", split, &[fused]).unwrap();
    let scale = model.weight("scale", &[8]);
    let norm = RmsNorm { epsilon: 1e-6, n_heads: 3, scale: true };
    let q = model.add("q_norm", norm, &[parts[0], scale]);
    let k = model.add("k_act", Activate { activation: Activation::Relu }, &[parts[1]]);
    let op = Attention { n_heads: 3, scale: 0.3 };
    let y = model.add("attention", op, &[q, k, parts[2]]);
    let shape = vec![Dim::symbol("n_media") * Dim::from(5) * Dim::from(2), 12.into()];
    let halves = model.add("halves", Reshape { shape }, &[parts[2]]);
    let tail = model.add("tail", Slice { axis: 2, start: 3, end: 20 }, &[parts[1]]);
    model.graph.output("y", y);
    model.graph.output("halves", halves);
    model.graph.output("tail", tail);
    for n_media in [1, 3] {
        check(&model, &[Noise::new(3).tensor(&[n_media, 5, 7])]);
    }
}

#[test]
fn attention() {
    for (b, s, t, n_heads, d) in [(1, 1, 1, 1, 1), (2, 5, 9, 3, 8), (3, 17, 4, 2, 20)] {
        let (q, kv): (&[usize], &[usize]) = (&[b, s, n_heads * d], &[b, t, n_heads * d]);
        check_op(Attention { n_heads, scale: 0.4 }, &[q, kv, kv]);
        check_op(ResamplerAttention { n_heads, scale: 0.4 }, &[q, kv, kv, q, q]);
    }
}

#[test]
fn media_ops() {
    check_op(Patches { patch_size: 2 }, &[&[3, 2, 4, 6]]);
    check_op(Patches { patch_size: 5 }, &[&[1, 3, 5, 5]]);
    check_op(Patches { patch_size: 3 }, &[&[2, 3, 7, 11]]);
    check_op(ClassEmbedding, &[&[3, 4, 7], &[7], &[5, 7]]);
    check_op(FrameEmbedding, &[&[6, 4, 7], &[3, 5], &[5, 7], &[2, 3, 1, 2, 2]]);
    check_op(MergeFrames, &[&[6, 4, 7], &[2, 3, 1, 2, 2]]);
    check_op(ExpandBatch, &[&[3, 7], &[4, 2]]);
}

#[test]
fn convolutions_of_any_size() {
    for size in [[1, 1], [2, 3], [5, 4], [13, 9]] {
        for (stride, n_groups, n_in, n_out) in [(1, 1, 3, 5), (2, 2, 8, 4), (2, 1, 1, 17)] {
            let (c_in, c_out) = (n_groups * n_in, n_groups * n_out);
            for window in [[3, 3], [2, 1]] {
                let op =
                    |activation, bias| Convolution { window, stride, n_groups, activation, bias };
                let x: &[usize] = &[2, size[0], size[1], c_in];
                let weight: &[usize] = &[c_out, window[0] * window[1] * n_in];
                check_op(op(None, false), &[x, weight]);
                check_op(op(Some(Activation::Gelu), true), &[x, weight, &[c_out]]);
            }
        }
    }
}

#[test]
fn means_and_gates_of_pictures() {
    for [height, width] in [[1, 1], [4, 6], [5, 3]] {
        let x: &[usize] = &[3, height, width, 19];
        for window in [1, 2, 3] {
            check_op(MeanPool { window }, &[x]);
        }
        check_op(PictureMean, &[x]);
        check_op(ChannelGate { residual: false }, &[x, &[3, 19], &[]]);
        check_op(ChannelGate { residual: true }, &[x, &[3, 19], &[], x]);
    }
}

#[test]
fn parts_and_joins() {
    for (axis, start, end) in [(0, 1, 2), (0, 0, 3), (1, 1, 4), (2, 0, 5), (2, 4, 5), (1, 2, 2)] {
        check_op(Slice { axis, start, end }, &[&[3, 4, 5]]);
    }
    for (axis, sizes) in [(0, vec![1, 2]), (1, vec![1, 0, 3]), (2, vec![2, 3])] {
        check_op(Split { axis, sizes }, &[&[3, 4, 5]]);
    }
    check_op(Concat { axis: 0 }, &[&[1, 4, 5], &[2, 4, 5]]);
    check_op(Concat { axis: 1 }, &[&[2, 1, 5], &[2, 3, 5], &[2, 2, 5]]);
    check_op(Concat { axis: 2 }, &[&[2, 3, 1], &[2, 3, 4]]);
    check_op(Slice { axis: 0, start: 2, end: 5 }, &[&[7]]);
}

#[test]
fn sums_and_products_repeat_whole_rows() {
    let others: [&[usize]; 5] = [&[3, 4, 5], &[4, 5], &[5], &[1, 1, 5], &[1, 4, 5]];
    for other in others {
        check_op(Add, &[&[3, 4, 5], other]);
        check_op(Mul, &[&[3, 4, 5], other]);
    }
    check_op(Add, &[&[5], &[3, 5]]);
}

#[test]
fn gather_reads_rows_of_the_table() {
    let mut model = Model::new("gather", 4);
    let indices = model.graph.input("input_ids", Fact::i64([Dim::symbol("text_len")]));
    let table = model.weight("table", &[6, 9]);
    let rows = model.add("rows", Gather, &[table, indices]);
    model.graph.output("y", rows);
    check(&model, &[ids([5, 0, 0, 3])]);
    check(&model, &[ids([])]);
}

#[test]
fn self_attention() {
    let positions = [
        Position::None,
        Position::Alibi { bias_max: 8.0 },
        Position::Rotary { n_dims: 10, theta: 1e4 },
        Position::Rotary { n_dims: 4, theta: 500.0 },
    ];
    for position in positions {
        for (n_heads, n_kv_heads) in [(1, 1), (3, 3), (6, 2)] {
            let op = SelfAttention { n_heads, n_kv_heads, head_dim: 10, scale: 0.3, position };
            for (past_len, text_len) in [(0, 1), (0, 7), (5, 1), (3, 30)] {
                check_self_attention(&op, past_len, text_len);
            }
        }
    }
}

#[track_caller]
fn check_self_attention(op: &SelfAttention, past_len: usize, text_len: usize) {
    let (text, past) = (Dim::symbol("text_len"), Dim::symbol("past_len"));
    let mut model = Model::new("self_attention", 5);
    let (g, d) = (op.n_kv_heads, op.head_dim);
    let row = |n: usize| Fact::f32([text.clone(), Dim::from(n * d)]);
    let cache = Fact::f32([Dim::from(g), past.clone(), Dim::from(d)]);
    let inputs = [
        ("q", row(op.n_heads)),
        ("k", row(g)),
        ("v", row(g)),
        ("past_k.0", cache.clone()),
        ("past_v.0", cache),
        ("positions", Fact::i64([text.clone()])),
        ("key_positions", Fact::i64([past + text.clone()])),
    ];
    let inputs: Vec<ValueId> =
        inputs.into_iter().map(|(name, fact)| model.graph.input(name, fact)).collect();
    let outputs = model.graph.add_many("attention", op.clone(), &inputs).unwrap();
    for (name, output) in ["y", "present_k.0", "present_v.0"].iter().zip(outputs) {
        model.graph.output(name, output);
    }
    let mut noise = Noise::new(6);
    let tensors = [
        noise.tensor(&[text_len, op.n_heads * d]),
        noise.tensor(&[text_len, g * d]),
        noise.tensor(&[text_len, g * d]),
        noise.tensor(&[g, past_len, d]),
        noise.tensor(&[g, past_len, d]),
        ids(past_len..past_len + text_len),
        ids(0..past_len + text_len),
    ];
    check(&model, &tensors);
}

#[test]
fn cross_attention() {
    let time = |n: usize, f: fn(usize) -> usize| -> Vec<usize> { (0..n).map(f).collect() };
    let cases = [
        (0, vec![0, 0, 0]),
        (1, vec![0]),
        (1, vec![1]),
        (3, vec![0, 0, 1, 1, 2, 3, 3]),
        (3, vec![3, 0, 0, 1]),
        (2, time(50, |i| if (5..30).contains(&i) { 0 } else { 1 + i / 40 })),
    ];
    for (n_media, media_time) in cases {
        let op = CrossAttention { n_heads: 2, scale: 0.5 };
        check_cross(op.into(), &[&[0, 20]], &[], n_media, &media_time);
        for (query_bias, query_norm) in
            [(false, None), (true, None), (false, Some(1e-6)), (true, Some(1e-6))]
        {
            let rounding = Rounding::None;
            let op =
                GatedCrossAttention { n_heads: 2, scale: 0.5, query_bias, query_norm, rounding };
            let all: [(bool, &[usize]); 4] = [
                (true, &[0, 13]),
                (true, &[20, 13]),
                (query_bias, &[20]),
                (query_norm.is_some(), &[10]),
            ];
            let before: Vec<&[usize]> = all.iter().filter(|s| s.0).map(|s| s.1).collect();
            check_cross(op.into(), &before, &[&[13, 20], &[0, 13]], n_media, &media_time);
        }
    }
}

/// Checks a cross-attention op whose inputs before and after the media have these shapes; rows of
/// size 0 stand for the length of the text.
#[track_caller]
fn check_cross(
    op: Op,
    before: &[&[usize]],
    after: &[&[usize]],
    n_media: usize,
    media_time: &[usize],
) {
    let text_len = media_time.len();
    let mut model = Model::new(op.name(), 8);
    let mut noise = Noise::new(9);
    let mut operand = |model: &mut Model, name: String, shape: &[usize]| match shape {
        [0, width] => {
            let fact = Fact::f32([Dim::symbol("text_len"), Dim::from(*width)]);
            (model.graph.input(&name, fact), Some(noise.tensor(&[text_len, *width])))
        }
        _ => (model.weight(&name, shape), None),
    };
    let mut all: Vec<(ValueId, Option<Tensor>)> = Vec::new();
    all.extend(
        before.iter().enumerate().map(|(i, s)| operand(&mut model, format!("before{i}"), s)),
    );
    let n_media_dim = Dim::symbol("n_media");
    let fact = Fact::f32([n_media_dim.clone(), 5.into(), 20.into()]);
    for (name, seed) in [("media_k.0", 1), ("media_v.0", 2)] {
        let tensor = Noise::new(seed).tensor(&[n_media, 5, 20]);
        all.push((model.graph.input(name, fact.clone()), Some(tensor)));
    }
    let time = model.graph.input("media_time", Fact::i64([Dim::symbol("text_len")]));
    all.push((time, Some(ids(media_time.iter().copied()))));
    all.push((model.graph.input("media_index", Fact::i64([n_media_dim])), Some(ids(1..=n_media))));
    all.extend(after.iter().enumerate().map(|(i, s)| operand(&mut model, format!("after{i}"), s)));
    let (inputs, tensors): (Vec<ValueId>, Vec<Option<Tensor>>) = all.into_iter().unzip();
    let y = model.graph.add("node", op, &inputs).unwrap();
    model.graph.output("y", y);
    check(&model, &tensors.into_iter().flatten().collect::<Vec<_>>());
}
