//! Small whole models: a vision block and a resampler block, then gated and self-attention blocks
//! with every kind of positions.

use std::sync::Arc;

use flamingo_ir::op::{
    Activation, Add, Attention, ClassEmbedding, ExpandBatch, FeedForward, FrameEmbedding,
    GatedCrossAttention, Gather, LayerNorm, Linear, MergeFrames, Patches, Position,
    ResamplerAttention, Reshape, RmsNorm, Rounding, SelfAttention, Slice, Split,
};
use flamingo_ir::{Bindings, Dim, Fact, Tensor, ValueId, evaluate_with};
use flamingo_kernels::KvFormat;

use super::{Buffers, Model, Noise, assert_close, check, ids, kernels, run_native};
use crate::backend::{Backend, Media, MediaKv, Sequence, Step, frame_weights};
use crate::native::{NativeBackend, Plans, Text};
use crate::profile::Work;

/// Vision width, latents, inner width, text width, vocabulary, head width of text.
const DIM: usize = 12;
const N_LATENTS: usize = 5;
const INNER: usize = 18;
const WIDTH: usize = 20;
const VOCAB: usize = 31;
const HEAD_DIM: usize = 10;
const N_MAX_FRAMES: usize = 3;

const FULL: LayerNorm = LayerNorm { epsilon: 1e-5, n_heads: 1, scale: true, bias: true };
const BIAS: Linear =
    Linear { activation: None, bias: true, residual: false, rounding: Rounding::None };
const RESIDUAL: Linear =
    Linear { activation: None, bias: false, residual: true, rounding: Rounding::None };

fn feed_forward(activation: Activation, gated: bool) -> FeedForward {
    FeedForward {
        activation,
        gated,
        up_bias: false,
        down_bias: false,
        residual: true,
        rounding: Rounding::None,
    }
}

/// Scaled-down CLIP and resampler: pictures of 8 x 8 pixels in patches of 4.
pub(super) fn media_model() -> Model {
    let mut m = Model::new("media", 11);
    let [n_media, n_frames] = ["n_media", "n_frames"].map(Dim::symbol);
    let picture = [3, 8, 8].map(Dim::from);
    let shape = [&[n_media.clone(), n_frames.clone()], &picture[..]].concat();
    let pixels = m.graph.input("pixel_values", Fact::f32(shape));
    let fact = Fact::f32([n_frames.clone(), N_MAX_FRAMES.into()]);
    let frame_weights = m.graph.input("frame_weights", fact);
    let shape = [&[n_media * n_frames], &picture[..]].concat();
    let pictures = m.add("pictures", Reshape { shape }, &[pixels]);
    let x = vision(&mut m, pictures);
    let table = m.weight("frames", &[N_MAX_FRAMES, DIM]);
    let x = m.add("frames", FrameEmbedding, &[x, frame_weights, table, pixels]);
    let media = m.add("merged", MergeFrames, &[x, pixels]);
    let tokens = resampler(&mut m, media, pixels);
    let weight = m.weight("kv", &[4 * INNER, DIM]);
    let kv = m.add("kv", Linear::default(), &[tokens, weight]);
    let split = Split { axis: 2, sizes: vec![INNER; 4] };
    let parts = m.graph.add_many("kv_parts", split, &[kv]).unwrap();
    m.graph.output("visual_tokens", tokens);
    for (i, pair) in parts.chunks(2).enumerate() {
        m.graph.output(&format!("media_k.{i}"), pair[0]);
        m.graph.output(&format!("media_v.{i}"), pair[1]);
    }
    m
}

fn vision(m: &mut Model, pictures: ValueId) -> ValueId {
    let patches = m.add("patches", Patches { patch_size: 4 }, &[pictures]);
    let weight = m.weight("patch", &[DIM, 48]);
    let x = m.add("embedded", Linear::default(), &[patches, weight]);
    let (class, positions) = (m.weight("class", &[DIM]), m.weight("positions", &[5, DIM]));
    let x = m.add("tokens", ClassEmbedding, &[x, class, positions]);
    let (scale, bias) = (m.weight("norm.scale", &[DIM]), m.weight("norm.bias", &[DIM]));
    let y = m.add("norm", FULL, &[x, scale, bias]);
    let (weight, bias) = (m.weight("qkv", &[3 * DIM, DIM]), m.weight("qkv.bias", &[3 * DIM]));
    let qkv = m.add("qkv", BIAS, &[y, weight, bias]);
    let split = Split { axis: 2, sizes: vec![DIM; 3] };
    let parts = m.graph.add_many("split", split, &[qkv]).unwrap();
    let mixed = m.add("attention", Attention { n_heads: 3, scale: 0.5 }, &parts);
    let weight = m.weight("out", &[DIM, DIM]);
    let x = m.add("attended", RESIDUAL, &[mixed, weight, x]);
    let (up, down) = (m.weight("up", &[48, DIM]), m.weight("down", &[DIM, 48]));
    let x = m.add("mlp", feed_forward(Activation::QuickGelu, false), &[x, up, down, x]);
    m.add("patch_tokens", Slice { axis: 1, start: 1, end: 5 }, &[x])
}

fn resampler(m: &mut Model, media: ValueId, pixels: ValueId) -> ValueId {
    let latents = m.weight("latents", &[N_LATENTS, DIM]);
    let latents = m.add("latents", ExpandBatch, &[latents, pixels]);
    let plain = LayerNorm { epsilon: 1e-5, n_heads: 1, scale: false, bias: false };
    let [x, y] = [media, latents].map(|value| m.add("resampler.norm", plain.clone(), &[value]));
    let project = |m: &mut Model, name: &str, rows, x| {
        let weight = m.weight(name, &[rows, DIM]);
        m.add(name, Linear::default(), &[x, weight])
    };
    let media_kv = project(m, "media_kv", 2 * INNER, x);
    let latent_qkv = project(m, "latent_qkv", 3 * INNER, y);
    let mut split = |value, n| {
        let op = Split { axis: 2, sizes: vec![INNER; n] };
        m.graph.add_many("resampler.split", op, &[value]).unwrap()
    };
    let (media, own) = (split(media_kv, 2), split(latent_qkv, 3));
    let op = ResamplerAttention { n_heads: 2, scale: 0.3 };
    let mixed = m.add("resampled", op, &[own[0], media[0], media[1], own[1], own[2]]);
    let weight = m.weight("resampler.out", &[DIM, INNER]);
    let latents = m.add("resampler.attended", RESIDUAL, &[mixed, weight, latents]);
    let (up, down) = (m.weight("resampler.up", &[24, DIM]), m.weight("resampler.down", &[DIM, 24]));
    let op = feed_forward(Activation::Gelu, false);
    let latents = m.add("resampler.mlp", op, &[latents, up, down, latents]);
    let (scale, bias) = (m.weight("last.scale", &[DIM]), m.weight("last.bias", &[DIM]));
    m.add("visual_tokens", FULL, &[latents, scale, bias])
}

/// Two layers, a gated block before each; key heads are shared but for ALiBi.
pub(super) fn decoder_model(position: Position) -> Model {
    let mut m = Model::new("decoder", 12);
    let symbol = Dim::symbol;
    let i64_input = |m: &mut Model, name: &str, dim: Dim| m.graph.input(name, Fact::i64([dim]));
    let input_ids = i64_input(&mut m, "input_ids", symbol("text_len"));
    let positions = i64_input(&mut m, "positions", symbol("text_len"));
    let total_len = symbol("past_len") + symbol("text_len");
    let key_positions = i64_input(&mut m, "key_positions", total_len);
    let media_time = i64_input(&mut m, "media_time", symbol("text_len"));
    let media_index = i64_input(&mut m, "media_index", symbol("n_media"));
    let logit_rows = i64_input(&mut m, "logit_rows", symbol("n_logits"));
    let embedding = m.weight("embedding", &[VOCAB, WIDTH]);
    let mut x = m.add("embedded", Gather, &[embedding, input_ids]);
    if position == Position::None {
        let (table, two) =
            (m.weight("places", &[202, WIDTH]), m.graph.literal(Tensor::scalar_i64(2)));
        let rows = m.add("place_rows", Add, &[positions, two]);
        let rows = m.add("places", Gather, &[table, rows]);
        x = m.add("placed", Add, &[x, rows]);
    }
    let n_kv_heads = if matches!(position, Position::Alibi { .. }) { 2 } else { 1 };
    let attention =
        SelfAttention { n_heads: 2, n_kv_heads, head_dim: HEAD_DIM, scale: 0.4, position };
    let mut presents = Vec::new();
    for layer in 0..2 {
        x = gated_block(&mut m, layer, x, [media_time, media_index]);
        let present;
        (x, present) = text_block(&mut m, layer, x, &attention, [positions, key_positions]);
        presents.push(present);
    }
    let rows = m.add("logit_rows", Gather, &[x, logit_rows]);
    let logits = m.add("head", Linear::default(), &[rows, embedding]);
    m.graph.output("logits", logits);
    for (layer, [k, v]) in presents.into_iter().enumerate() {
        m.graph.output(&format!("present_k.{layer}"), k);
        m.graph.output(&format!("present_v.{layer}"), v);
    }
    m
}

/// Layer 0 as OpenFlamingo has it, layer 1 as IDEFICS.
fn gated_block(m: &mut Model, layer: usize, x: ValueId, media: [ValueId; 2]) -> ValueId {
    let name = |part: &str| format!("gated.{layer}.{part}");
    let is_idefics = layer == 1;
    let scale = m.weight(&name("norm"), &[WIDTH]);
    let op = RmsNorm { epsilon: 1e-6, n_heads: 1, scale: true };
    let y = m.add(&name("norm"), op, &[x, scale]);
    let fact = Fact::f32([Dim::symbol("n_media"), N_LATENTS.into(), INNER.into()]);
    let k = m.graph.input(&format!("media_k.{layer}"), fact.clone());
    let v = m.graph.input(&format!("media_v.{layer}"), fact);
    let mut inputs = vec![y, m.weight(&name("query"), &[INNER, WIDTH])];
    inputs.push(match is_idefics {
        true => m.weight(&name("query_norm"), &[INNER / 2]),
        false => m.weight(&name("query_bias"), &[INNER]),
    });
    inputs.extend([k, v, media[0], media[1], m.weight(&name("out"), &[WIDTH, INNER]), x]);
    let op = GatedCrossAttention {
        n_heads: 2,
        scale: 0.3,
        query_bias: !is_idefics,
        query_norm: is_idefics.then_some(1e-6),
        rounding: Rounding::None,
    };
    let x = m.add(&name("attention"), op, &inputs);
    let f = 28;
    let up = m.weight(&name("up"), &[if is_idefics { 2 * f } else { f }, WIDTH]);
    let down = m.weight(&name("down"), &[WIDTH, f]);
    let activation = if is_idefics { Activation::Silu } else { Activation::Gelu };
    m.add(&name("mlp"), feed_forward(activation, is_idefics), &[x, up, down, x])
}

fn text_block(
    m: &mut Model,
    layer: usize,
    x: ValueId,
    op: &SelfAttention,
    [positions, key_positions]: [ValueId; 2],
) -> (ValueId, [ValueId; 2]) {
    let name = |part: &str| format!("text.{layer}.{part}");
    let plain = LayerNorm { epsilon: 1e-5, n_heads: 1, scale: false, bias: false };
    let y = m.add(&name("norm"), plain.clone(), &[x]);
    let (q_width, kv_width) = (op.n_heads * HEAD_DIM, op.n_kv_heads * HEAD_DIM);
    let weight = m.weight(&name("qkv"), &[q_width + 2 * kv_width, WIDTH]);
    let qkv = m.add(&name("qkv"), Linear::default(), &[y, weight]);
    let split = Split { axis: 1, sizes: vec![q_width, kv_width, kv_width] };
    let mut inputs = m.graph.add_many(&name("split"), split, &[qkv]).unwrap();
    let cache = [op.n_kv_heads.into(), Dim::symbol("past_len"), HEAD_DIM.into()];
    for side in ["k", "v"] {
        inputs.push(m.graph.input(&format!("past_{side}.{layer}"), Fact::f32(cache.clone())));
    }
    inputs.extend([positions, key_positions]);
    let outputs = m.graph.add_many(&name("attention"), op.clone(), &inputs).unwrap();
    let weight = m.weight(&name("out"), &[WIDTH, q_width]);
    let x = m.add(&name("attended"), RESIDUAL, &[outputs[0], weight, x]);
    let y = m.add(&name("mlp_norm"), plain, &[x]);
    let (up, down) = (m.weight(&name("up"), &[33, WIDTH]), m.weight(&name("down"), &[WIDTH, 33]));
    let x = m.add(&name("mlp"), feed_forward(Activation::Relu, false), &[y, up, down, x]);
    (x, [outputs[1], outputs[2]])
}

const POSITIONS: [Position; 4] = [
    Position::None,
    Position::Alibi { bias_max: 8.0 },
    Position::Rotary { n_dims: HEAD_DIM, theta: 1e4 },
    Position::Rotary { n_dims: 4, theta: 1e4 },
];

pub(super) fn backend(media: &Model, decoder: &Model, n_threads: usize) -> NativeBackend {
    let mut weights = media.bytes();
    weights.0.extend(decoder.bytes().0);
    let weights = Arc::new(weights);
    NativeBackend::with_kernels(&media.graph, &decoder.graph, weights, kernels(n_threads)).unwrap()
}

/// Inputs of the decoder graph for a prompt without past.
fn prompt_inputs(
    decoder: &Model,
    ids_: &[usize],
    time: &[usize],
    media: &[Arc<Media>],
    rows: &[usize],
) -> Vec<Tensor> {
    let n = ids_.len();
    let input = |name: &str, fact: &Fact| match name {
        "input_ids" => ids(ids_.iter().copied()),
        "positions" | "key_positions" => ids(0..n),
        "media_time" => ids(time.iter().copied()),
        "media_index" => ids(1..=media.len()),
        "logit_rows" => ids(rows.iter().copied()),
        name if name.starts_with("past") => {
            let heads = fact.shape[0].known().unwrap();
            Tensor::f32(&[heads, 0, HEAD_DIM], Vec::new()).unwrap()
        }
        name => {
            let block: usize = name[8..].parse().unwrap();
            let side = |m: &Media| {
                let kv = &m.blocks[block];
                if name.contains("_k.") { kv.keys().into_owned() } else { kv.values().into_owned() }
            };
            let data = media.iter().flat_map(|medium| side(medium)).collect();
            Tensor::f32(&[media.len(), N_LATENTS, INNER], data).unwrap()
        }
    };
    let graph = &decoder.graph;
    graph.inputs().iter().map(|(name, id)| input(name, graph.fact(*id))).collect()
}

/// A prompt: token ids, the medium each token sees, and how many media there are.
struct Prompt {
    ids: Vec<usize>,
    time: Vec<usize>,
    n_media: usize,
}

fn prompts() -> Vec<Prompt> {
    let prompt = |time: Vec<usize>, n_media| {
        let ids = (0..time.len()).map(|i| (i * 7 + 3) % VOCAB).collect();
        Prompt { ids, time, n_media }
    };
    vec![
        prompt(vec![0], 0),
        prompt(vec![0; 9], 0),
        prompt(vec![1, 1, 1], 1),
        prompt(vec![0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3], 3),
        prompt(vec![0, 1, 1, 0, 0, 2, 2], 2),
        prompt((0..70).map(|i| if (8..40).contains(&i) { 0 } else { 1 + i / 60 }).collect(), 2),
    ]
}

fn encoded(backend: &NativeBackend, n_media: usize, n_frames: usize) -> Vec<Arc<Media>> {
    let pixels = Noise::new(20).numbers(n_media * n_frames * 3 * 64);
    let media = backend.encode(&pixels, n_media, n_frames).unwrap();
    media.into_iter().map(Arc::new).collect()
}

/// Advances a sequence by `ids`; logits of every token.
fn advance(
    sequence: &mut dyn Sequence,
    ids: &[usize],
    time: &[usize],
    media: &[Arc<Media>],
) -> Vec<f32> {
    let to_u32 = |values: &[usize]| -> Vec<u32> { values.iter().map(|v| *v as u32).collect() };
    let (input_ids, media_time) = (to_u32(ids), to_u32(time));
    let logit_rows: Vec<usize> = (0..ids.len()).collect();
    let step =
        Step { input_ids: &input_ids, media_time: &media_time, media, logit_rows: &logit_rows };
    sequence.advance(&step).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn media_graph_is_the_reference() {
    let model = media_model();
    for (n_media, n_frames) in [(1, 1), (3, 1), (2, 3), (1, 5)] {
        let pixels = Noise::new(13).tensor(&[n_media, n_frames, 3, 8, 8]);
        let weights = frame_weights(n_frames, N_MAX_FRAMES);
        let weights = Tensor::f32(&[n_frames, N_MAX_FRAMES], weights).unwrap();
        check(&model, &[pixels, weights]);
    }
}

#[test]
fn decoder_graph_is_the_reference() {
    let media_model = media_model();
    for position in POSITIONS {
        let model = decoder_model(position);
        let backend = backend(&media_model, &model, 1);
        for prompt in prompts() {
            let media = encoded(&backend, prompt.n_media, 1);
            let last = prompt.ids.len() - 1;
            let rows_cases: [&[usize]; 3] = [&[last], &[], &[last, 0]];
            for rows in rows_cases {
                check(&model, &prompt_inputs(&model, &prompt.ids, &prompt.time, &media, rows));
            }
        }
    }
}

#[test]
fn encode_gives_each_medium_what_the_graph_gives_all() {
    let (media_model, decoder) = (media_model(), decoder_model(Position::None));
    let backend = backend(&media_model, &decoder, 2);
    let pixels = Noise::new(20).tensor(&[3, 2, 3, 8, 8]);
    let weights = Tensor::f32(&[2, N_MAX_FRAMES], frame_weights(2, N_MAX_FRAMES)).unwrap();
    let expected = evaluate_with(&media_model.graph, &[pixels, weights], &media_model).unwrap();
    let media = encoded(&backend, 3, 2);
    let join = |part: &dyn Fn(&Media) -> Vec<f32>| -> Vec<f32> {
        media.iter().flat_map(|medium| part(medium)).collect()
    };
    let found = [
        join(&|m| m.visual_tokens.clone()),
        join(&|m| m.blocks[0].keys().into_owned()),
        join(&|m| m.blocks[0].values().into_owned()),
        join(&|m| m.blocks[1].keys().into_owned()),
        join(&|m| m.blocks[1].values().into_owned()),
    ];
    for (found, expected) in found.iter().zip(&expected) {
        assert_close("media", found, &expected.to_f32_vec().unwrap());
    }
    assert_eq!(media[0].n_latents, N_LATENTS);
    assert!(backend.encode(&[], 0, 1).unwrap().is_empty());
}

#[test]
fn media_of_kept_tokens_are_those_of_the_pixels_to_the_bit() {
    for (format, is_rounded) in
        [(KvFormat::F32, false), (KvFormat::F16, true), (KvFormat::Int8, true)]
    {
        let backend = backend(&media_model(), &decoder_model(Position::None), 2);
        let backend = backend.with_kv_format(format);
        for medium in encoded(&backend, 2, 2) {
            let tokens = medium.visual_tokens.clone();
            let halves = tokens.iter().all(|v| half::f16::from_f32(*v).to_f32() == *v);
            assert_eq!(halves, is_rounded, "{format}");
            let again = backend.media_from_tokens(tokens, 2).unwrap();
            assert_eq!(again, *medium, "{format}");
        }
        let error = backend.media_from_tokens(vec![0.0; 3], 2).unwrap_err().to_string();
        assert!(error.contains("input `visual_tokens`"), "{error}");
    }
}

#[test]
fn a_sequence_is_the_reference_step_by_step() {
    let media_model = media_model();
    for position in POSITIONS {
        let model = decoder_model(position);
        let backend = backend(&media_model, &model, 2);
        for prompt in prompts() {
            let media = encoded(&backend, prompt.n_media, 1);
            let rows: Vec<usize> = (0..prompt.ids.len()).collect();
            let inputs = prompt_inputs(&model, &prompt.ids, &prompt.time, &media, &rows);
            let expected = evaluate_with(&model.graph, &inputs, &model).unwrap();
            let expected = expected[0].to_f32_vec().unwrap();
            let mut sequence = backend.new_sequence(prompt.ids.len()).unwrap();
            let whole = advance(sequence.as_mut(), &prompt.ids, &prompt.time, &media);
            assert_close("prefill", &whole, &expected);
            for chunk in [1, 2, 5] {
                sequence.truncate(0);
                let mut stepped = Vec::new();
                for (ids, time) in prompt.ids.chunks(chunk).zip(prompt.time.chunks(chunk)) {
                    stepped.extend(advance(sequence.as_mut(), ids, time, &media));
                }
                assert_eq!(bits(&stepped), bits(&whole), "{position:?}, steps of {chunk}");
            }
        }
    }
}

#[test]
fn media_given_as_they_come_are_as_good_as_all_at_once() {
    let (media_model, model) = (media_model(), decoder_model(Position::Alibi { bias_max: 8.0 }));
    let backend = backend(&media_model, &model, 1);
    let media = encoded(&backend, 2, 1);
    let (ids, time) = ([3, 1, 4, 1, 5], [0, 1, 1, 2, 2]);
    let mut sequence = backend.new_sequence(8).unwrap();
    let whole = advance(sequence.as_mut(), &ids, &time, &media);
    let mut other = backend.new_sequence(8).unwrap();
    let first = advance(other.as_mut(), &ids[..3], &time[..3], &media[..1]);
    let second = advance(other.as_mut(), &ids[3..], &time[3..], &media);
    assert_eq!(bits(&[first, second].concat()), bits(&whole));
}

/// Sequences that share a pass see their own pictures and tokens only, and have the bits they have
/// alone; a step that does not fit changes none of them.
#[test]
fn company_changes_no_bit() {
    let (media_model, model) = (media_model(), decoder_model(Position::Alibi { bias_max: 8.0 }));
    let backend = backend(&media_model, &model, 2);
    let media = encoded(&backend, 3, 1);
    let turns: [[Turn<'_>; 2]; 3] = [
        [(&[3, 1, 4], &[0, 1, 2], &media[1..]), (&[1], &[2], &media[1..])],
        [(&[5], &[0], &[]), (&[9, 2, 6], &[0, 1, 1], &media[..1])],
        [(&[8, 7, 6, 5, 4, 3, 2], &[0, 0, 1, 1, 2, 2, 3], &media), (&[2], &[3], &media)],
    ];
    let sequences = || -> Vec<_> { (0..3).map(|_| backend.new_sequence(9).unwrap()).collect() };
    let (mut alone, mut together) = (sequences(), sequences());
    for turn in 0..2 {
        let expected: Vec<Vec<f32>> = alone
            .iter_mut()
            .zip(&turns)
            .map(|(sequence, turns)| sequence.advance(&step(turns[turn])).unwrap())
            .collect();
        let mut batch: Vec<(&mut dyn Sequence, Step<'_>)> = Vec::new();
        for (sequence, turns) in together.iter_mut().zip(&turns) {
            batch.push((sequence.as_mut(), step(turns[turn])));
        }
        batch[1].1.media_time = &[4, 4, 4][..batch[1].1.input_ids.len()];
        let error = backend.advance_together(&mut batch).unwrap_err().to_string();
        assert!(error.contains("media_time") && error.contains("found 4"), "{error}");
        batch[1].1.media_time = turns[1][turn].1;
        let found = backend.advance_together(&mut batch).unwrap();
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(bits(found), bits(expected), "turn {turn}");
        }
    }
    let mut stranger = small_stranger();
    let mut batch: Vec<(&mut dyn Sequence, Step<'_>)> =
        vec![(stranger.as_mut(), step(turns[1][0]))];
    let error = backend.advance_together(&mut batch).unwrap_err().to_string();
    assert!(error.contains("sequences that this backend made"), "{error}");
}

/// Token ids, media times and media of one advance.
type Turn<'a> = (&'a [u32], &'a [u32], &'a [Arc<Media>]);

fn step<'a>((input_ids, media_time, media): Turn<'a>) -> Step<'a> {
    const ROWS: [usize; 7] = [0, 1, 2, 3, 4, 5, 6];
    Step { input_ids, media_time, media, logit_rows: &ROWS[..input_ids.len()] }
}

fn small_stranger() -> Box<dyn Sequence> {
    let (media_model, model) = (media_model(), decoder_model(Position::None));
    backend(&media_model, &model, 1).new_sequence(9).unwrap()
}

#[test]
fn truncated_sequences_forget() {
    let (media_model, model) = (media_model(), decoder_model(POSITIONS[2]));
    let backend = backend(&media_model, &model, 1);
    let mut sequence = backend.new_sequence(6).unwrap();
    let expected = advance(sequence.as_mut(), &[1, 2, 3, 4], &[0; 4], &[]);
    sequence.truncate(9);
    assert_eq!(sequence.len(), 4);
    sequence.truncate(2);
    advance(sequence.as_mut(), &[9, 8, 7], &[0; 3], &[]);
    sequence.truncate(2);
    let again = advance(sequence.as_mut(), &[3, 4], &[0; 2], &[]);
    assert_eq!(bits(&again), bits(&expected[2 * VOCAB..]));
    assert_eq!((sequence.len(), sequence.max_context()), (4, 6));
}

/// Different lengths on the same buffers, growing and not, give the same bits as fresh ones.
#[test]
fn buffers_grow_and_stay() {
    let model = decoder_model(Position::Alibi { bias_max: 8.0 });
    let backend = backend(&media_model(), &model, 1);
    let (stage, media) = (model.stage(1), encoded(&backend, 3, 1));
    let mut buffers = Buffers::default();
    let mut largest = 0;
    for text_len in [1, 7, 2, 40, 1, 13, 40] {
        let (token_ids, time) = (vec![5; text_len], vec![2; text_len]);
        let inputs = prompt_inputs(&model, &token_ids, &time, &media, &[text_len - 1]);
        let before = buffers.bytes();
        let shared = run_native(&model, &stage, &mut buffers, &inputs);
        let fresh = run_native(&model, &stage, &mut Buffers::default(), &inputs);
        assert_eq!(bits(&shared["logits"]), bits(&fresh["logits"]), "{text_len} tokens");
        largest = largest.max(text_len);
        if text_len < largest {
            assert_eq!(buffers.bytes(), before, "{text_len} tokens after {largest}");
        }
    }
    let sizes = [("n_media", 3), ("text_len", 40), ("past_len", 0), ("n_logits", 1)];
    let bindings: Bindings = sizes.map(|(name, size)| (name.to_owned(), size)).into();
    let memory = stage.memory(&bindings).unwrap();
    assert_eq!(memory.buffer_bytes, buffers.bytes());
    assert!(2 * memory.buffer_bytes < memory.unshared_bytes, "{memory:?}");
    let n_weights: usize = model.weights.values().map(Tensor::n_elements).sum();
    assert_eq!((memory.weight_bytes, memory.literal_bytes), (4 * n_weights, 0));
}

/// What is counted without weights is what a run records, and what its buffers take.
#[test]
fn plans_count_what_a_run_does() {
    let (media_model, decoder) = (media_model(), decoder_model(Position::None));
    let native = backend(&media_model, &decoder, 1);
    let plans = Plans::new(&media_model.graph, &decoder.graph).unwrap();
    let recorded = |run: &mut dyn FnMut()| {
        native.set_profiling(true);
        run();
        let records = native.take_profile().into_iter();
        records.map(|record| (record.node, record.work)).collect::<Vec<_>>()
    };
    let named = |counted: Vec<(&str, Work)>| -> Vec<(String, Work)> {
        counted.into_iter().map(|(node, work)| (node.to_owned(), work)).collect()
    };
    let mut media = Vec::new();
    let found = recorded(&mut || media = encoded(&native, 1, 1));
    assert_eq!(named(plans.picture_work().unwrap()), found);
    let mut sequence = native.new_sequence(9).unwrap();
    for (past_len, len) in [(0, 7), (7, 1)] {
        let (input_ids, media_time) = (vec![3; len], vec![1; len]);
        let step = Step {
            input_ids: &input_ids,
            media_time: &media_time,
            media: &media,
            logit_rows: &[len - 1],
        };
        let found = recorded(&mut || drop(sequence.advance(&step).unwrap()));
        let text = Text { len, past_len };
        assert_eq!(named(plans.text_work(text).unwrap()), found, "{len} after {past_len}");
        assert!(found.iter().any(|(_, work)| work.operations > 0), "{found:?}");
    }
    let buffers = plans.picture_buffer_bytes().unwrap()
        + plans.text_buffer_bytes(Text { len: 7, past_len: 0 }).unwrap();
    assert_eq!(native.memory().unwrap().buffer_bytes, buffers);
    for format in KvFormat::ALL {
        let native = backend(&media_model, &decoder, 1).with_kv_format(format);
        let [medium] = &encoded(&native, 1, 1)[..] else { panic!("one medium") };
        assert_eq!(plans.picture_bytes(format), medium.bytes(), "{format}");
        assert_eq!(plans.token_bytes(format), 2 * format.token_bytes(1, HEAD_DIM), "{format}");
    }
}

/// NaN in the projections of a gated block, and in media that no token sees, reaches nothing.
#[test]
fn what_no_token_sees_is_not_read() {
    let media_model = media_model();
    let clean = decoder_model(Position::None);
    let mut poisoned = decoder_model(Position::None);
    for (name, tensor) in &mut poisoned.weights {
        if name.starts_with("gated") && (name.ends_with("query") || name.ends_with("out")) {
            let n = tensor.n_elements();
            *tensor = Tensor::f32(tensor.shape(), vec![f32::NAN; n]).unwrap();
        }
    }
    let run = |model: &Model, time: &[usize], poison: &[usize]| {
        let backend = backend(&media_model, model, 1);
        let mut media = encoded(&backend, 3, 1);
        for index in poison {
            let medium = Arc::make_mut(&mut media[*index]);
            for block in &mut medium.blocks {
                let nan = vec![f32::NAN; block.lens()[0]];
                *block = MediaKv::Rows { k: nan.clone(), v: nan };
            }
        }
        let mut sequence = backend.new_sequence(4).unwrap();
        bits(&advance(sequence.as_mut(), &[1, 2, 3, 4], time, &media))
    };
    assert_eq!(run(&poisoned, &[0; 4], &[]), run(&clean, &[0; 4], &[]));
    assert_eq!(run(&clean, &[0, 2, 2, 2], &[0, 2]), run(&clean, &[0, 2, 2, 2], &[]));
}

#[test]
fn sequences_on_other_threads_do_not_disturb_each_other() {
    let (media_model, model) = (media_model(), decoder_model(POSITIONS[2]));
    let backend = backend(&media_model, &model, 2);
    let media = encoded(&backend, 1, 1);
    let run = |first: usize| {
        let mut sequence = backend.new_sequence(40).unwrap();
        let steps =
            (0..40).map(|i| advance(sequence.as_mut(), &[(first + i) % VOCAB], &[1], &media));
        bits(&steps.collect::<Vec<_>>().concat())
    };
    let alone: Vec<_> = (0..4).map(run).collect();
    let run = &run;
    let together: Vec<_> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..4).map(|first| scope.spawn(move || run(first))).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
}
