//! Graphs of every op, with inputs, for tests of the forms that a graph can take.

use std::collections::BTreeMap;

use flamingo_ir::onnx::{WeightEntry, WeightLayout};
use flamingo_ir::op::*;
use flamingo_ir::{Bindings, DType, Dim, Fact, Graph, Tensor, ValueId, Weights};

/// What an input of a case holds.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Source {
    /// f32 in −1..1.
    Noise,
    /// f32 in 0.25..1.25.
    Positive,
    /// f32 in −1..1, known at build time.
    Weight,
    /// f32 in −1e-5..1e-5, known at build time: of scales of numbers up to 32 000.
    Scale,
    /// i64 past_len.. .
    Positions,
    /// i64 past_len.. for each row, in every column.
    Rows,
    /// i64 0.. .
    KeyPositions,
    /// i64 0, 1, …, n_media, 0, … .
    MediaTime,
    /// i64 1.. .
    MediaIndex,
    /// Truth values.
    Truth,
    /// bf16 in −1..1, known at build time.
    Bf16Weight,
    /// f16 in −1..1, known at build time.
    F16Weight,
    /// u8.
    Bytes,
    /// i8.
    SignedBytes,
    /// i8 0, known at build time.
    Zero,
    /// i8, known at build time.
    I8Weight,
    /// u8, known at build time.
    U8Weight,
}

use Source::*;

/// One op with its inputs.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) op: Op,
    pub(crate) inputs: Vec<(&'static str, Source, Fact)>,
}

fn case(name: &'static str, op: impl Into<Op>, inputs: &[(&'static str, Source, &str)]) -> Case {
    let fact = |source: Source, shape: &str| {
        let dtype = match source {
            Noise | Positive | Weight | Scale => DType::F32,
            Positions | Rows | KeyPositions | MediaTime | MediaIndex => DType::I64,
            Truth => DType::Bool,
            Bf16Weight => DType::BF16,
            F16Weight => DType::F16,
            SignedBytes | Zero | I8Weight => DType::I8,
            Bytes | U8Weight => DType::U8,
        };
        Fact::new(dtype, dims(shape))
    };
    let inputs = inputs.iter().map(|(name, source, shape)| (*name, *source, fact(*source, shape)));
    Case { name, op: op.into(), inputs: inputs.collect() }
}

fn dims(text: &str) -> Vec<Dim> {
    text.split(", ").filter(|dim| !dim.is_empty()).map(|dim| dim.parse().unwrap()).collect()
}

/// Values of the symbols of all cases: some of the runs have nothing in the past.
pub(crate) fn all_bindings() -> [Bindings; 3] {
    let names = ["text_len", "past_len", "n_media", "n_frames"];
    let bind = |sizes: [usize; 4]| names.map(str::to_owned).into_iter().zip(sizes).collect();
    [bind([3, 2, 2, 2]), bind([1, 0, 1, 1]), bind([5, 0, 3, 2])]
}

fn tensor(source: Source, fact: &Fact, bindings: &Bindings, seed: usize) -> Tensor {
    let shape: Vec<usize> = fact.shape.iter().map(|dim| dim.evaluate(bindings).unwrap()).collect();
    let n: usize = shape.iter().product();
    let noise = |i: usize| (((i * 7919 + seed * 104_729 + 13) % 1009) as f32 / 504.5) - 1.0;
    let integers = |f: &dyn Fn(usize) -> usize| {
        Tensor::i64(&shape, (0..n).map(|i| i64::try_from(f(i)).unwrap()).collect()).unwrap()
    };
    match source {
        Noise | Weight => Tensor::f32(&shape, (0..n).map(noise).collect()).unwrap(),
        Scale => Tensor::f32(&shape, (0..n).map(|i| 1e-5 * noise(i)).collect()).unwrap(),
        Positive => Tensor::f32(&shape, (0..n).map(|i| noise(i) / 2.0 + 0.75).collect()).unwrap(),
        Positions => integers(&|i| bindings["past_len"] + i),
        Rows => integers(&|i| bindings["past_len"] + i / shape[1]),
        KeyPositions => integers(&|i| i),
        MediaTime => integers(&|i| (i + 1) % (bindings["n_media"] + 1)),
        MediaIndex => integers(&|i| i + 1),
        Truth => {
            let bytes: Vec<u8> = (0..n).map(|i| u8::from(i % 3 == 1)).collect();
            Tensor::from_le_bytes(DType::Bool, &shape, &bytes).unwrap()
        }
        Bf16Weight | F16Weight => {
            let half = |i: usize| match source {
                Bf16Weight => half::bf16::from_f32(noise(i)).to_le_bytes(),
                _ => half::f16::from_f32(noise(i)).to_le_bytes(),
            };
            let bytes: Vec<u8> = (0..n).flat_map(half).collect();
            Tensor::from_stored_bytes(fact.dtype, &shape, &bytes).unwrap()
        }
        Zero => Tensor::from_stored_bytes(fact.dtype, &shape, &vec![0; n]).unwrap(),
        I8Weight | U8Weight | Bytes | SignedBytes => {
            let bytes: Vec<u8> = (0..n).map(|i| (i * 151 + seed).to_le_bytes()[0]).collect();
            Tensor::from_stored_bytes(fact.dtype, &shape, &bytes).unwrap()
        }
    }
}

/// Weights of the cases, by name.
#[derive(Default, Clone)]
pub(crate) struct CaseWeights(pub(crate) BTreeMap<String, Tensor>);

impl Weights for CaseWeights {
    fn tensor(&self, name: &str) -> Result<Tensor, String> {
        self.0.get(name).cloned().ok_or_else(|| format!("no weight `{name}`"))
    }
}

/// A graph of cases, and what it needs to run.
pub(crate) struct Built {
    pub(crate) graph: Graph,
    pub(crate) weights: CaseWeights,
    pub(crate) layout: WeightLayout,
    sources: Vec<(Source, Fact)>,
}

impl Built {
    /// Inputs for the given sizes.
    pub(crate) fn inputs(&self, bindings: &Bindings) -> Vec<Tensor> {
        let sources = self.sources.iter().enumerate();
        sources.map(|(seed, (source, fact))| tensor(*source, fact, bindings, seed)).collect()
    }

    /// The weight file's bytes, in the layout's order.
    pub(crate) fn weight_bytes(&self) -> Vec<u8> {
        self.weights.0.values().flat_map(Tensor::to_le_bytes).collect()
    }
}

/// One graph that applies all `cases`, whose inputs are named `CASE.ROLE`.
pub(crate) fn build(name: &str, cases: &[Case]) -> Built {
    let mut graph = Graph::new(name);
    let (mut weights, mut sources) = (CaseWeights::default(), Vec::new());
    let mut weight_ids: BTreeMap<String, ValueId> = BTreeMap::new();
    for case in cases {
        let mut ids = Vec::new();
        for (role, source, fact) in &case.inputs {
            let name = format!("{}.{role}", case.name);
            ids.push(match source {
                Weight | Scale | Bf16Weight | F16Weight | I8Weight | U8Weight | Zero => {
                    let seed = 1000 + weights.0.len();
                    weights.0.insert(name.clone(), tensor(*source, fact, &Bindings::new(), seed));
                    let id = graph.weight(&name, fact.clone());
                    weight_ids.insert(name, id);
                    id
                }
                _ => {
                    sources.push((*source, fact.clone()));
                    graph.input(&name, fact.clone())
                }
            });
        }
        let outputs = graph.add_many(case.name, case.op.clone(), &ids).unwrap();
        for (index, id) in outputs.into_iter().enumerate() {
            graph.output(&format!("{}.y{index}", case.name), id);
        }
    }
    let mut layout = WeightLayout { location: "weights.bin".into(), ..WeightLayout::default() };
    let mut offset = 0;
    for (name, tensor) in &weights.0 {
        let length = u64::try_from(tensor.to_le_bytes().len()).unwrap();
        layout.entries.insert(weight_ids[name], WeightEntry { name: name.clone(), offset, length });
        offset += length;
    }
    Built { graph, weights, layout, sources }
}

const X: (&str, Source, &str) = ("x", Noise, "text_len, 8");

/// Every standard op of opset 17.
pub(crate) fn standard_cases() -> Vec<Case> {
    let i64_pair = [("a", Positions, "text_len, 1"), ("b", KeyPositions, "past_len + text_len")];
    let pair = [X, ("b", Positive, "8")];
    vec![
        case("add", Add, &pair),
        case("sub", Sub, &pair),
        case("mul", Mul, &pair),
        case("div", Div, &pair),
        case("max", Max, &pair),
        case("neg", Neg, &[X]),
        case("abs", Abs, &[X]),
        case("floor", Floor, &[X]),
        case("round", Round, &[X]),
        case("sqrt", Sqrt, &[("x", Positive, "text_len, 8")]),
        case("erf", Erf, &[X]),
        case("sigmoid", Sigmoid, &[X]),
        case("tanh", Tanh, &[X]),
        case("relu", Relu, &[X]),
        case("cos", Cos, &[X]),
        case("sin", Sin, &[X]),
        case("equal", Equal, &i64_pair),
        case("less", LessOrEqual, &i64_pair),
        case("and", And, &[("a", Truth, "text_len, 1"), ("b", Truth, "4")]),
        case("where", Where, &[("c", Truth, "text_len, 1"), X, ("no", Noise, "1")]),
        case("cast", Cast { dtype: DType::F32 }, &[("x", Positions, "text_len")]),
        case("cast.bf16", Cast { dtype: DType::BF16 }, &[X]),
        case("matmul", MatMul, &[("a", Noise, "2, text_len, 8"), ("b", Weight, "8, 300")]),
        case("softmax", Softmax, &[X]),
        case("mean", ReduceMean, &[X]),
        case("largest", ReduceMax, &[X]),
        case(
            "transpose",
            Transpose { permutation: vec![2, 0, 1] },
            &[("x", Noise, "2, text_len, 4")],
        ),
        case("reshape", Reshape { shape: dims("text_len, 2, 4") }, &[X]),
        case("reshape.flat", Reshape { shape: dims("1, 8*text_len") }, &[X]),
        case(
            "reshape.inner",
            Reshape { shape: dims("2, text_len, n_frames, 1") },
            &[("x", Noise, "1, 2*text_len, n_frames")],
        ),
        case("expand", Expand { shape: dims("2, text_len, 8") }, &[X]),
        case(
            "expand.media",
            Expand { shape: dims("n_media, 3, text_len") },
            &[("x", Noise, "3, 1")],
        ),
        case("concat", Concat { axis: 0 }, &[("a", Noise, "past_len, 8"), X]),
        case("slice", Slice { axis: 1, start: 2, end: 7 }, &[X]),
        case("split", Split { axis: 1, sizes: vec![1, 5, 2] }, &[X]),
        case(
            "scatter",
            ScatterElements,
            &[
                ("data", Noise, "past_len + text_len, 8"),
                ("indices", Rows, "text_len, 8"),
                ("updates", Noise, "text_len, 8"),
            ],
        ),
        case(
            "tensor_scatter",
            TensorScatter,
            &[
                ("cache", Noise, "1, 2, past_len + text_len, 4"),
                ("updates", Noise, "1, 2, text_len, 4"),
                ("places", Positions, "1"),
            ],
        ),
        case("quantised", QuantizeLinear, &[X, ("scale", Scale, ""), ("zero_point", Zero, "")]),
        case(
            "dequantised",
            DequantizeLinear,
            &[("levels", SignedBytes, "text_len, 3"), ("scales", Positive, "text_len")],
        ),
        case("gather", Gather, &[("table", Weight, "50, 8"), ("ids", Positions, "text_len")]),
        case(
            "norm",
            LayerNormalization { epsilon: 1e-5 },
            &[X, ("scale", Positive, "8"), ("bias", Noise, "8")],
        ),
        case(
            "rotary",
            RotaryEmbedding { n_dims: 4 },
            &[
                ("x", Noise, "1, 2, text_len, 8"),
                ("cos", Noise, "1, text_len, 2"),
                ("sin", Noise, "1, text_len, 2"),
            ],
        ),
        case("rms", RmsNormalization { epsilon: 1e-5 }, &[X, ("scale", Positive, "8")]),
        case(
            "heads",
            ScaledDotProductAttention { scale: 0.4 },
            &[
                ("q", Noise, "1, 4, text_len, 8"),
                ("k", Noise, "1, 2, past_len + text_len, 8"),
                ("v", Noise, "1, 2, past_len + text_len, 8"),
                ("bias", Noise, "1, 4, text_len, past_len + text_len"),
            ],
        ),
        case(
            "heads.plain",
            ScaledDotProductAttention { scale: 0.4 },
            &[
                ("q", Noise, "n_media, 2, text_len, 8"),
                ("k", Noise, "n_media, 2, past_len + text_len, 8"),
                ("v", Noise, "n_media, 2, past_len + text_len, 8"),
            ],
        ),
        case("norm.plain", LayerNormalization { epsilon: 1e-5 }, &[X, ("scale", Weight, "8")]),
        case(
            "conv",
            Conv { strides: [2, 1], pads: [0, 1, 2, 1], n_groups: 3 },
            &[
                ("x", Noise, "n_media, 6, 7, 5"),
                ("weight", Weight, "9, 2, 3, 2"),
                ("bias", Weight, "9"),
            ],
        ),
        case(
            "conv.plain",
            Conv { strides: [1, 1], pads: [0; 4], n_groups: 1 },
            &[("x", Noise, "n_media*n_frames, 3, 4, 6"), ("weight", Weight, "5, 3, 1, 1")],
        ),
        case(
            "pool",
            AveragePool { window: 2, missing: [1, 0] },
            &[("x", Noise, "n_media*n_frames, 3, 7, 6")],
        ),
        case("pool.all", GlobalAveragePool, &[("x", Noise, "n_media*n_frames, 3, 7, 6")]),
    ]
}

/// Operators of com.microsoft as ops.
pub(crate) fn contrib_cases() -> Vec<Case> {
    let rows = |name| (name, Noise, "n_media, past_len + text_len, 8");
    vec![
        case("fused", FusedMatMul, &[X, ("weight", Weight, "5, 8")]),
        case(
            "bytes",
            MatMulIntegerToFloat,
            &[
                ("x", Bytes, "text_len, 8"),
                ("weight", U8Weight, "8, 5"),
                ("scale", Weight, ""),
                ("scales", Weight, "5"),
                ("x_zero", U8Weight, ""),
                ("zero", U8Weight, ""),
            ],
        ),
        case(
            "nibbles",
            MatMulNBits { bits: 4, block: 16, n: 5, k: 40 },
            &[
                ("x", Noise, "text_len, 40"),
                ("weight", U8Weight, "5, 3, 8"),
                ("scales", Weight, "15"),
            ],
        ),
        case(
            "blocks_of_bytes",
            MatMulNBits { bits: 8, block: 16, n: 5, k: 40 },
            &[
                ("x", Noise, "text_len, 40"),
                ("weight", U8Weight, "5, 3, 16"),
                ("scales", Scale, "15"),
            ],
        ),
        case(
            "biased_attention",
            BiasedAttention { n_heads: 2, scale: 0.4 },
            &[
                ("q", Noise, "1, text_len, 8"),
                ("k", Noise, "1, past_len + text_len, 8"),
                ("v", Noise, "1, past_len + text_len, 8"),
                ("bias", Noise, "1, 1, text_len, past_len + text_len"),
            ],
        ),
        case(
            "rotary_of_rows",
            RotaryEmbeddingOfRows { n_heads: 2, n_dims: 4 },
            &[
                ("x", Noise, "1, text_len, 16"),
                ("first", KeyPositions, "1"),
                ("cos", Noise, "text_len, 2"),
                ("sin", Noise, "text_len, 2"),
            ],
        ),
        case(
            "skip_norm",
            SkipNormalization { epsilon: 1e-5, simplified: false },
            &[X, ("residual", Noise, "text_len, 8"), ("scale", Positive, "8")],
        ),
        case(
            "skip_rms",
            SkipNormalization { epsilon: 1e-5, simplified: true },
            &[X, ("residual", Noise, "text_len, 8"), ("scale", Positive, "8")],
        ),
        case("ms_gelu", Gelu, &[X]),
        case("ms_quick_gelu", QuickGelu { alpha: 1.702 }, &[X]),
        case(
            "mha",
            MultiHeadAttention { n_heads: 2, scale: 0.4 },
            &[("q", Noise, "n_media, text_len, 8"), rows("k"), rows("v")],
        ),
    ]
}

fn self_attention(name: &'static str, n_kv_heads: usize, position: Position) -> Case {
    let (kv, past) = match n_kv_heads {
        4 => ("text_len, 24", "4, past_len, 6"),
        _ => ("text_len, 12", "2, past_len, 6"),
    };
    let op = SelfAttention { n_heads: 4, n_kv_heads, head_dim: 6, scale: 0.3, position };
    case(
        name,
        op,
        &[
            ("q", Noise, "text_len, 24"),
            ("k", Noise, kv),
            ("v", Noise, kv),
            ("past_k", Noise, past),
            ("past_v", Noise, past),
            ("positions", Positions, "text_len"),
            ("key_positions", KeyPositions, "past_len + text_len"),
        ],
    )
}

fn in_place_attention(
    name: &'static str,
    n_kv_heads: usize,
    by_head: bool,
    position: Position,
) -> Case {
    let kv = if n_kv_heads == 4 { "text_len, 24" } else { "text_len, 12" };
    let rows = match (n_kv_heads, by_head) {
        (4, false) => "past_len + 3*text_len, 24",
        (4, true) => "1, 4, past_len + 3*text_len, 6",
        (_, false) => "past_len + 3*text_len, 12",
        (_, true) => "1, 2, past_len + 3*text_len, 6",
    };
    let attention = SelfAttention { n_heads: 4, n_kv_heads, head_dim: 6, scale: 0.3, position };
    case(
        name,
        InPlaceSelfAttention { attention },
        &[
            ("q", Noise, "text_len, 24"),
            ("k", Noise, kv),
            ("v", Noise, kv),
            ("rows_k", Noise, rows),
            ("rows_v", Noise, rows),
            ("positions", Positions, "text_len"),
            ("row_positions", KeyPositions, "past_len + 3*text_len"),
        ],
    )
}

fn gated_cross_attention(name: &'static str, query_bias: bool, query_norm: Option<f32>) -> Case {
    let rounding = if query_bias { Rounding::Int8 } else { Rounding::None };
    let op = GatedCrossAttention { n_heads: 2, scale: 0.5, query_bias, query_norm, rounding };
    let media = |name| (name, Noise, "n_media, 5, 12");
    let mut inputs = vec![X, ("query", Weight, "12, 8")];
    inputs.extend(query_bias.then_some(("query_bias", Weight, "12")));
    inputs.extend(query_norm.map(|_| ("query_scale", Weight, "6")));
    inputs.extend([media("media_k"), media("media_v")]);
    inputs.extend([("media_time", MediaTime, "text_len"), ("media_index", MediaIndex, "n_media")]);
    inputs.extend([("output", Weight, "8, 12"), ("residual", Noise, "text_len, 8")]);
    case(name, op, &inputs)
}

/// Every function op.
pub(crate) fn function_cases() -> Vec<Case> {
    let rotary = Position::Rotary { n_dims: 4, theta: 1e4 };
    let activations = [
        ("activate.gelu", Activation::Gelu),
        ("activate.gelu_tanh", Activation::GeluTanh),
        ("activate.quick_gelu", Activation::QuickGelu),
        ("activate.relu", Activation::Relu),
        ("activate.squared_relu", Activation::SquaredRelu),
        ("activate.silu", Activation::Silu),
    ];
    let mut cases: Vec<Case> = activations
        .map(|(name, activation)| case(name, Activate { activation }, &[X]))
        .into_iter()
        .collect();
    let linear = |activation, bias, residual| {
        let rounding = Rounding::None;
        Linear { activation, bias, residual, rounding }
    };
    let rounded = |rounding| Linear { rounding, ..Linear::default() };
    let feed_forward = |activation, gated, bias, residual| FeedForward {
        activation,
        gated,
        up_bias: bias,
        down_bias: bias,
        residual,
        rounding: if gated { Rounding::Bf16 } else { Rounding::None },
    };
    let residual = ("residual", Noise, "text_len, 8");
    let media = |name, rows| (name, Noise, rows);
    cases.extend([
        case("linear", linear(None, false, false), &[X, ("weight", Weight, "5, 8")]),
        case("linear.int8", rounded(Rounding::Int8), &[X, ("weight", Weight, "5, 8")]),
        case("linear.bf16", rounded(Rounding::Bf16), &[X, ("weight", Weight, "5, 8")]),
        case("unpack.f16", unpack("f16", 21, 7), &[("data", F16Weight, "2, 7, 16")]),
        case("unpack.bf16", unpack("bf16", 21, 7), &[("data", Bf16Weight, "2, 4, 16, 2")]),
        case(
            "unpack.int8",
            unpack("int8", 21, 7),
            &[("data", I8Weight, "2, 2, 16, 4"), ("row_scales", Weight, "2, 16")],
        ),
        case(
            "unpack.int4",
            unpack("int4/16", 32, 37),
            &[
                ("data", U8Weight, "2, 6, 16, 4"),
                ("row_scales", Weight, "2, 16"),
                ("block_scales", U8Weight, "2, 3, 16"),
            ],
        ),
        case(
            "quantised_linear",
            QuantisedLinear {
                linear: Linear { residual: true, ..Linear::default() },
                n: 19,
                k: 70,
                x_scale: 0.01,
            },
            &[
                ("x", Noise, "text_len, 70"),
                ("data", I8Weight, "2, 18, 16, 4"),
                ("row_scales", Scale, "2, 16"),
                ("residual", Noise, "text_len, 19"),
            ],
        ),
        case(
            "panel_linear.int8",
            panel_linear("int8", 21, 7),
            &[
                ("x", Noise, "2, text_len, 7"),
                ("data", I8Weight, "2, 2, 16, 4"),
                ("row_scales", Scale, "2, 16"),
                ("residual", Noise, "2, text_len, 21"),
            ],
        ),
        case(
            "panel_linear.int4",
            panel_linear("int4/16", 32, 37),
            &[
                ("x", Noise, "text_len, 37"),
                ("data", U8Weight, "2, 6, 16, 4"),
                ("row_scales", Scale, "2, 16"),
                ("block_scales", U8Weight, "2, 3, 16"),
                ("residual", Noise, "text_len, 32"),
            ],
        ),
        case(
            "linear.all",
            linear(Some(Activation::Gelu), true, true),
            &[
                ("x", Noise, "2, text_len, 7"),
                ("weight", Weight, "300, 7"),
                ("bias", Weight, "300"),
                ("residual", Noise, "2, text_len, 300"),
            ],
        ),
        case(
            "feed_forward",
            feed_forward(Activation::QuickGelu, false, true, false),
            &[
                X,
                ("up", Weight, "10, 8"),
                ("up_bias", Weight, "10"),
                ("down", Weight, "8, 10"),
                ("down_bias", Weight, "8"),
            ],
        ),
        case(
            "feed_forward.gated",
            feed_forward(Activation::Silu, true, false, true),
            &[X, ("up", Weight, "10, 8"), ("down", Weight, "8, 5"), residual],
        ),
        case(
            "layer_norm",
            LayerNorm { epsilon: 1e-5, n_heads: 1, scale: false, bias: false },
            &[X],
        ),
        case(
            "layer_norm.heads",
            LayerNorm { epsilon: 1e-5, n_heads: 2, scale: true, bias: true },
            &[X, ("scale", Weight, "4"), ("bias", Weight, "4")],
        ),
        case(
            "rms_norm",
            RmsNorm { epsilon: 1e-6, n_heads: 1, scale: true },
            &[X, ("scale", Weight, "8")],
        ),
        case("rms_norm.heads", RmsNorm { epsilon: 1e-6, n_heads: 2, scale: false }, &[X]),
        case(
            "attention",
            Attention { n_heads: 2, scale: 0.25 },
            &[
                media("q", "n_media, 3, 8"),
                media("k", "n_media, n_frames, 8"),
                media("v", "n_media, n_frames, 8"),
            ],
        ),
        case(
            "resampler",
            ResamplerAttention { n_heads: 2, scale: 1.0 },
            &[
                media("q", "n_media, 3, 8"),
                media("media_k", "n_media, 4*n_frames, 8"),
                media("media_v", "n_media, 4*n_frames, 8"),
                media("latent_k", "n_media, 3, 8"),
                media("latent_v", "n_media, 3, 8"),
            ],
        ),
        self_attention("self", 4, Position::None),
        self_attention("self.alibi", 4, Position::Alibi { bias_max: 8.0 }),
        self_attention("self.rotary", 4, Position::Rotary { n_dims: 6, theta: 1e4 }),
        in_place_attention("in_place.alibi", 4, false, Position::Alibi { bias_max: 8.0 }),
        in_place_attention("in_place.rotary", 4, false, rotary),
        in_place_attention("in_place.groups", 2, false, rotary),
        in_place_attention("in_place.alibi.by_head", 4, true, Position::Alibi { bias_max: 8.0 }),
        in_place_attention("in_place.rotary.by_head", 4, true, rotary),
        in_place_attention("in_place.groups.by_head", 2, true, rotary),
        self_attention("self.groups", 2, Position::Rotary { n_dims: 4, theta: 1e4 }),
        case(
            "cross",
            CrossAttention { n_heads: 2, scale: 0.5 },
            &[
                X,
                media("media_k", "n_media, 5, 8"),
                media("media_v", "n_media, 5, 8"),
                ("media_time", MediaTime, "text_len"),
                ("media_index", MediaIndex, "n_media"),
            ],
        ),
        gated_cross_attention("gated", false, None),
        gated_cross_attention("gated.normed", true, Some(1e-6)),
        case("patches", Patches { patch_size: 2 }, &[("x", Noise, "n_media*n_frames, 3, 4, 6")]),
        case(
            "patches.rest",
            Patches { patch_size: 3 },
            &[("x", Noise, "n_media*n_frames, 3, 4, 8")],
        ),
        case(
            "class",
            ClassEmbedding,
            &[
                media("x", "n_media*n_frames, 6, 8"),
                ("class", Weight, "8"),
                ("positions", Weight, "7, 8"),
            ],
        ),
        case(
            "frame",
            FrameEmbedding,
            &[
                media("x", "n_media*n_frames, 6, 8"),
                media("weights", "n_frames, 4"),
                ("table", Weight, "4, 8"),
                media("pixel_values", "n_media, n_frames, 3, 4, 6"),
            ],
        ),
        case(
            "merge",
            MergeFrames,
            &[
                media("x", "n_media*n_frames, 6, 8"),
                media("pixel_values", "n_media, n_frames, 3, 4, 6"),
            ],
        ),
        case(
            "expand_batch",
            ExpandBatch,
            &[("x", Weight, "3, 8"), media("like", "n_media, n_frames, 3, 4, 6")],
        ),
        convolution("convolution.even", [8, 6], 2, 1, false),
        convolution("convolution.odd", [7, 5], 2, 2, true),
        convolution("convolution.kept", [5, 4], 1, 3, true),
        convolution("convolution.far", [9, 10], 4, 1, true),
        convolution("convolution.pixel", [1, 1], 2, 2, true),
        case("mean_pool.even", MeanPool { window: 2 }, &[media("x", "n_media*n_frames, 4, 6, 3")]),
        case("mean_pool.odd", MeanPool { window: 2 }, &[media("x", "n_media*n_frames, 5, 3, 3")]),
        case("mean_pool.pixel", MeanPool { window: 3 }, &[media("x", "n_media, 1, 4, 2")]),
        case("picture_mean", PictureMean, &[media("x", "n_media*n_frames, 5, 3, 4")]),
        channel_gate("channel_gate", false),
        channel_gate("channel_gate.residual", true),
    ]);
    cases
}

/// Windows of 3 × 3, each group with 2 channels in and 3 out.
fn convolution(
    name: &'static str,
    [height, width]: [usize; 2],
    stride: usize,
    n_groups: usize,
    is_full: bool,
) -> Case {
    let activation = is_full.then_some(Activation::Gelu);
    let op = Convolution { window: [3, 3], stride, n_groups, activation, bias: is_full };
    let x = format!("n_media*n_frames, {height}, {width}, {}", 2 * n_groups);
    let (weight, bias) = (format!("{}, 18", 3 * n_groups), format!("{}", 3 * n_groups));
    let mut inputs = vec![("x", Noise, x.as_str()), ("weight", Weight, weight.as_str())];
    inputs.extend(is_full.then_some(("bias", Weight, bias.as_str())));
    case(name, op, &inputs)
}

fn channel_gate(name: &'static str, residual: bool) -> Case {
    let picture = |name| (name, Noise, "n_media*n_frames, 3, 2, 4");
    let gates = ("gates", Noise, "n_media*n_frames, 4");
    let mut inputs = vec![picture("x"), gates, ("gain", Weight, "")];
    inputs.extend(residual.then(|| picture("residual")));
    case(name, ChannelGate { residual }, &inputs)
}

fn unpack(format: &str, n: usize, k: usize) -> UnpackPanels {
    UnpackPanels { format: PanelFormat::from_name(format).unwrap(), n, k }
}

fn panel_linear(format: &str, n: usize, k: usize) -> PanelLinear {
    let linear = Linear { residual: true, rounding: Rounding::Int8, ..Linear::default() };
    PanelLinear { linear, weight: unpack(format, n, k) }
}

/// Ops that only build-time graphs have, and no file.
pub(crate) fn build_time_cases() -> Vec<Case> {
    let pack = |name, format| {
        let format = PanelFormat::from_name(format).unwrap();
        case(name, PackPanels { format }, &[("weight", Weight, "19, 70")])
    };
    vec![pack("pack.bf16", "bf16"), pack("pack.int8", "int8"), pack("pack.int4", "int4/32")]
}

/// All cases of ops that files may have.
pub(crate) fn all_cases() -> Vec<Case> {
    standard_cases().into_iter().chain(contrib_cases()).chain(function_cases()).collect()
}
