//! A small model of both graphs, its weights, and its files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use flamingo_ir::onnx::{WeightEntry, WeightLayout, write_onnx};
use flamingo_ir::op::{
    Activation, Add, Attention, ClassEmbedding, ExpandBatch, FeedForward, Flavour, FrameEmbedding,
    GatedCrossAttention, Gather, LayerNorm, Linear, MergeFrames, Mul, Op, Patches, Position,
    ResamplerAttention, Reshape, RmsNorm, Rounding, SelfAttention, Split,
};
use flamingo_ir::{Constant, Dim, Fact, Graph, ValueId, Verified, verify};

pub(crate) const FRAME_ELEMENTS: usize = 3 * 8 * 8;
pub(crate) const VOCABULARY: usize = 31;
const VISION: usize = 12;
const INNER: usize = 10;
const WIDTH: usize = 14;
const N_LATENTS: usize = 3;
const WEIGHTS: &str = "weights.safetensors";

/// The two graphs and their weights.
pub(crate) struct Model {
    pub(crate) media: Verified,
    pub(crate) decoder: Verified,
    pub(crate) weights: BTreeMap<String, Vec<f32>>,
}

impl Model {
    /// Without a resampler a medium has as many latents as its frames have tokens.
    pub(crate) fn new(has_resampler: bool) -> Model {
        let (media, mut weights) = media(has_resampler);
        let n_latents = if has_resampler { N_LATENTS.into() } else { Dim::symbol("n_latents") };
        let (decoder, decoder_weights) = decoder(n_latents);
        weights.extend(decoder_weights);
        Model { media, decoder, weights }
    }

    /// Writes weights and both graphs of a flavour; returns the paths of the graphs.
    pub(crate) fn write(&self, folder: &Path, flavour: Flavour) -> [PathBuf; 2] {
        // The first tensor begins somewhere that is aligned to nothing.
        let mut file = vec![0xa5u8; 37];
        let mut places = BTreeMap::new();
        for (name, data) in &self.weights {
            places.insert(name.clone(), u64::try_from(file.len()).unwrap());
            file.extend(data.iter().flat_map(|value| value.to_le_bytes()));
        }
        fs::write(folder.join(WEIGHTS), file).unwrap();
        [("media", &self.media), ("decoder", &self.decoder)].map(|(stage, graph)| {
            let path = folder.join(format!("{stage}.{}.onnx", flavour.name()));
            let bytes = write_onnx(graph, flavour, &self.layout(graph, &places)).unwrap();
            fs::write(&path, bytes).unwrap();
            path
        })
    }

    fn layout(&self, graph: &Graph, places: &BTreeMap<String, u64>) -> WeightLayout {
        let entry = |(id, value): (ValueId, &flamingo_ir::Value)| {
            let Some(Constant::Weight(name)) = &value.constant else { return None };
            let length = u64::try_from(self.weights[name].len() * 4).unwrap();
            Some((id, WeightEntry { name: name.clone(), offset: places[name], length }))
        };
        let entries = graph.values().filter_map(entry).collect();
        WeightLayout { location: WEIGHTS.into(), entries }
    }
}

/// Uniform in -1..1 (splitmix64).
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut number = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| number()).collect()
}

struct Builder {
    graph: Graph,
    weights: BTreeMap<String, Vec<f32>>,
}

impl Builder {
    fn new(name: &str) -> Builder {
        Builder { graph: Graph::new(name), weights: BTreeMap::new() }
    }

    fn weight(&mut self, name: &str, shape: &[usize]) -> ValueId {
        let name = format!("{}.{name}", self.graph.name);
        let seed = name.bytes().fold(1u64, |seed, byte| seed.wrapping_mul(31) + u64::from(byte));
        let spread = if shape.len() == 2 { (3.0 / shape[1] as f32).sqrt() } else { 0.5 };
        let data = noise(seed, shape.iter().product()).iter().map(|value| value * spread).collect();
        self.weights.insert(name.clone(), data);
        self.graph.weight(&name, Fact::f32(shape.iter().copied()))
    }

    fn add(&mut self, name: &str, op: impl Into<Op>, inputs: &[ValueId]) -> ValueId {
        self.graph.add(name, op, inputs).unwrap()
    }

    fn linear(&mut self, name: &str, x: ValueId, shape: [usize; 2]) -> ValueId {
        let weight = self.weight(name, &shape);
        self.add(name, Linear::default(), &[x, weight])
    }

    fn norm(&mut self, name: &str, x: ValueId, width: usize) -> ValueId {
        let (scale, bias) = (
            self.weight(&format!("{name}.s"), &[width]),
            self.weight(&format!("{name}.b"), &[width]),
        );
        let op = LayerNorm { epsilon: 1e-5, n_heads: 1, scale: true, bias: true };
        self.add(name, op, &[x, scale, bias])
    }

    fn feed_forward(
        &mut self,
        name: &str,
        x: ValueId,
        width: usize,
        activation: Activation,
    ) -> ValueId {
        let gated = activation == Activation::Silu;
        let up = self.weight(&format!("{name}.up"), &[if gated { 38 } else { 19 }, width]);
        let down = self.weight(&format!("{name}.down"), &[width, 19]);
        let normed = self.norm(&format!("{name}.norm"), x, width);
        let op = FeedForward {
            activation,
            gated,
            up_bias: false,
            down_bias: false,
            residual: true,
            rounding: Rounding::None,
        };
        self.add(name, op, &[normed, up, down, x])
    }

    fn finish(self) -> (Verified, BTreeMap<String, Vec<f32>>) {
        (verify(self.graph).unwrap(), self.weights)
    }
}

fn media(has_resampler: bool) -> (Verified, BTreeMap<String, Vec<f32>>) {
    let mut b = Builder::new("media");
    let [n_media, n_frames] = ["n_media", "n_frames"].map(Dim::symbol);
    let picture = [3, 8, 8].map(Dim::from);
    let shape = [&[n_media.clone(), n_frames.clone()], &picture[..]].concat();
    let pixels = b.graph.input("pixel_values", Fact::f32(shape));
    let frame_weights = b.graph.input("frame_weights", Fact::f32([n_frames.clone(), 2.into()]));
    let shape = [&[n_media * n_frames], &picture[..]].concat();
    let x = b.add("pictures", Reshape { shape }, &[pixels]);
    let x = b.add("patches", Patches { patch_size: 4 }, &[x]);
    let x = b.linear("embed", x, [VISION, 48]);
    let (class, positions) = (b.weight("class", &[VISION]), b.weight("positions", &[5, VISION]));
    let x = b.add("class_embedding", ClassEmbedding, &[x, class, positions]);
    let x = vision_block(&mut b, x);
    let table = b.weight("frames", &[2, VISION]);
    let x = b.add("frame_embedding", FrameEmbedding, &[x, frame_weights, table, pixels]);
    let x = b.add("merged", MergeFrames, &[x, pixels]);
    let tokens = if has_resampler { resampler(&mut b, x, pixels) } else { x };
    b.graph.output("visual_tokens", tokens);
    for side in ["media_k.0", "media_v.0"] {
        let value = b.linear(side, tokens, [INNER, VISION]);
        b.graph.output(side, value);
    }
    b.finish()
}

fn vision_block(b: &mut Builder, x: ValueId) -> ValueId {
    let normed = b.norm("vision.norm", x, VISION);
    let qkv = b.linear("vision.qkv", normed, [3 * VISION, VISION]);
    let split = Split { axis: 2, sizes: vec![VISION; 3] };
    let parts = b.graph.add_many("vision.split", split, &[qkv]).unwrap();
    let mixed = b.add("vision.attention", Attention { n_heads: 2, scale: 0.4 }, &parts);
    let mixed = b.linear("vision.out", mixed, [VISION, VISION]);
    let x = b.add("vision.residual", Add, &[x, mixed]);
    b.feed_forward("vision.mlp", x, VISION, Activation::QuickGelu)
}

fn resampler(b: &mut Builder, x: ValueId, pixels: ValueId) -> ValueId {
    let latents = b.weight("latents", &[N_LATENTS, VISION]);
    let latents = b.add("latents", ExpandBatch, &[latents, pixels]);
    let mut inputs = vec![b.linear("resampler.q", latents, [VISION, VISION])];
    for (side, value) in [("media", x), ("latent", latents)] {
        for part in ["k", "v"] {
            inputs.push(b.linear(&format!("resampler.{side}_{part}"), value, [VISION, VISION]));
        }
    }
    let op = ResamplerAttention { n_heads: 3, scale: 0.5 };
    let mixed = b.add("resampler.attention", op, &inputs);
    let x = b.add("resampler.residual", Add, &[latents, mixed]);
    b.feed_forward("resampler.mlp", x, VISION, Activation::Gelu)
}

fn decoder(n_latents: Dim) -> (Verified, BTreeMap<String, Vec<f32>>) {
    let mut b = Builder::new("decoder");
    let text_len = || Dim::symbol("text_len");
    let [ids, positions, time] = ["input_ids", "positions", "media_time"]
        .map(|name| b.graph.input(name, Fact::i64([text_len()])));
    let total = Dim::symbol("past_len") + text_len();
    let key_positions = b.graph.input("key_positions", Fact::i64([total]));
    let media_index = b.graph.input("media_index", Fact::i64([Dim::symbol("n_media")]));
    let rows = b.graph.input("logit_rows", Fact::i64([Dim::symbol("n_logits")]));
    let fact = Fact::f32([Dim::symbol("n_media"), n_latents, INNER.into()]);
    let media = ["media_k.0", "media_v.0"].map(|name| b.graph.input(name, fact.clone()));
    let table = b.weight("embedding", &[VOCABULARY, WIDTH]);
    let x = b.add("embedding", Gather, &[table, ids]);
    let rotary = SelfAttention {
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 6,
        scale: 0.4,
        position: Position::Rotary { n_dims: 4, theta: 1e4 },
    };
    let alibi = SelfAttention {
        n_heads: 3,
        n_kv_heads: 3,
        head_dim: 4,
        scale: 0.5,
        position: Position::Alibi { bias_max: 8.0 },
    };
    let mut presents = Vec::new();
    // Layers that share masks and biases; some have fewer key heads.
    let shared = SelfAttention { n_heads: 6, ..alibi.clone() };
    let layers =
        [alibi.clone(), alibi.clone(), alibi.clone(), alibi, shared.clone(), rotary, shared];
    let mut x = x;
    for (i, op) in layers.into_iter().enumerate() {
        if i == 1 {
            x = gated(&mut b, x, [media[0], media[1], time, media_index]);
        }
        x = layer(&mut b, i, op, x, [positions, key_positions], &mut presents);
    }
    let x = b.norm("norm", x, WIDTH);
    let x = b.add("rows", Gather, &[x, rows]);
    let logits = b.linear("head", x, [VOCABULARY, WIDTH]);
    b.graph.output("logits", logits);
    for (name, present) in presents {
        b.graph.output(&name, present);
    }
    b.finish()
}

fn layer(
    b: &mut Builder,
    layer: usize,
    op: SelfAttention,
    x: ValueId,
    [positions, key_positions]: [ValueId; 2],
    presents: &mut Vec<(String, ValueId)>,
) -> ValueId {
    let name = |part: &str| format!("{layer}.{part}");
    let cache = Fact::f32([op.n_kv_heads.into(), Dim::symbol("past_len"), op.head_dim.into()]);
    let past = ["k", "v"].map(|side| b.graph.input(&format!("past_{side}.{layer}"), cache.clone()));
    let inner = op.n_heads * op.head_dim;
    let kv = op.n_kv_heads * op.head_dim;
    let normed = b.norm(&name("norm"), x, WIDTH);
    let q = b.linear(&name("q"), normed, [inner, WIDTH]);
    let k = b.linear(&name("k"), normed, [kv, WIDTH]);
    let v = b.linear(&name("v"), normed, [kv, WIDTH]);
    let inputs = [q, k, v, past[0], past[1], positions, key_positions];
    let outputs = b.graph.add_many(&name("attention"), op, &inputs).unwrap();
    for (side, output) in ["k", "v"].iter().zip(&outputs[1..]) {
        presents.push((format!("present_{side}.{layer}"), *output));
    }
    let mixed = b.linear(&name("out"), outputs[0], [WIDTH, inner]);
    let x = b.add(&name("residual"), Add, &[x, mixed]);
    b.feed_forward(&name("mlp"), x, WIDTH, Activation::Silu)
}

fn gated(b: &mut Builder, x: ValueId, media: [ValueId; 4]) -> ValueId {
    let (scale, q) = (b.weight("gated.scale", &[WIDTH]), b.weight("gated.q", &[INNER, WIDTH]));
    let head_scale = b.weight("gated.head", &[INNER / 2]);
    let out = b.weight("gated.out", &[WIDTH, INNER]);
    let normed =
        b.add("gated.norm", RmsNorm { epsilon: 1e-6, n_heads: 1, scale: true }, &[x, scale]);
    let op = GatedCrossAttention {
        n_heads: 2,
        scale: 0.7,
        query_bias: false,
        query_norm: Some(1e-6),
        rounding: Rounding::None,
    };
    let [k, v, time, index] = media;
    let x = b.add("gated.attention", op, &[normed, q, head_scale, k, v, time, index, out, x]);
    let gate = b.weight("gated.gate", &[WIDTH]);
    let y = b.feed_forward("gated.mlp", x, WIDTH, Activation::SquaredRelu);
    let y = b.add("gated.gate", Mul, &[y, gate]);
    b.add("gated.residual", Add, &[x, y])
}
