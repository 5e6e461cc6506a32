//! Graph builders: a model's arithmetic as its reference writes it, straight from checkpoint
//! tensors. Nothing is fused or folded here; that is the compiler's work.

mod decoder;
mod language;
mod media;
mod nfnet;
mod positions;
mod resampler;
mod vision;

use flamingo_ir::op::{Linear, Reshape, Slice};
use flamingo_ir::{Dim, Graph, GraphError, ValueId};

pub(crate) use decoder::build_decoder;
pub(crate) use media::build_media;

use crate::source::Binder;

/// Names of the tensors of one model part, and where the families differ in spelling.
pub(crate) trait KeyMap {
    /// A tensor of a vision transformer.
    fn vision(&self, key: VisionKey) -> String;
    /// A tensor of an NFNet by its name in timm, which all files have.
    fn nfnet(&self, key: &str) -> String {
        format!("vision_encoder/{key}")
    }
    /// A tensor of the resampler.
    fn resampler(&self, key: ResamplerKey) -> String;
    /// A tensor of the gated block before decoder layer `layer` (the `index`-th block).
    fn gated(&self, index: usize, layer: usize, key: GatedKey) -> String;
    /// A tensor of the language model by its Hugging Face name; `binder` tells what exists.
    fn language(&self, binder: &Binder, key: &str) -> String;
}

/// Tensors of a vision transformer; `usize` is the layer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum VisionKey {
    /// [width].
    ClassToken,
    /// `[1 + patches, width]`, without a class token `[patches, width]`.
    Positions,
    /// `weight` `[width, 3, p, p]` or `bias` `[width]` of the patch embedding.
    Patch(&'static str),
    /// `weight` or `bias` of the norm before the layers.
    PreNorm(&'static str),
    /// `weight` or `bias` of the norm before attention.
    AttentionNorm(usize, &'static str),
    /// `weight` or `bias` of q, k, v together.
    Qkv(usize, &'static str),
    /// `weight` or `bias` of `q`, `k` or `v`.
    Projection(usize, &'static str, &'static str),
    /// `weight` or `bias` of the output projection.
    Output(usize, &'static str),
    /// `weight` or `bias` of the norm before the feed-forward.
    MlpNorm(usize, &'static str),
    /// `weight` or `bias` of the first linear.
    Up(usize, &'static str),
    /// `weight` or `bias` of the second linear.
    Down(usize, &'static str),
    /// `weight` or `bias` of the norm after the layers.
    FinalNorm(&'static str),
}

/// Tensors of a resampler; `usize` is the layer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ResamplerKey {
    /// [n_latents, width].
    Latents,
    /// [max_frames, width].
    FrameEmbeddings,
    /// [max_places, 1, width] (flamingo-pytorch).
    PlaceEmbeddings,
    /// `weight` or `bias` of the norm of the media features.
    MediaNorm(usize, &'static str),
    /// `weight` or `bias` of the norm of the latents.
    LatentsNorm(usize, &'static str),
    /// Query weight.
    Query(usize),
    /// Key and value weight together (OpenFlamingo).
    KeyValue(usize),
    /// Key weight (IDEFICS).
    Key(usize),
    /// Value weight (IDEFICS).
    Value(usize),
    /// `weight` or `bias` of the per-head query norm (IDEFICS).
    QueryNorm(usize, &'static str),
    /// `weight` or `bias` of the per-head key norm (IDEFICS).
    KeyNorm(usize, &'static str),
    /// Output weight.
    Output(usize),
    /// `weight` or `bias` of the norm before the feed-forward.
    MlpNorm(usize, &'static str),
    /// First linear.
    Up(usize),
    /// Second linear.
    Down(usize),
    /// `weight` or `bias` of the last norm.
    FinalNorm(&'static str),
}

/// Tensors of a gated cross-attention block.
#[derive(Clone, Copy, Debug)]
pub(crate) enum GatedKey {
    /// Gate of the attention.
    AttentionGate,
    /// Gate of the feed-forward.
    MlpGate,
    /// `weight` or `bias` of the norm before attention.
    AttentionNorm(&'static str),
    /// Query weight.
    Query,
    /// Key and value weight together (OpenFlamingo).
    KeyValue,
    /// Key weight (IDEFICS).
    Key,
    /// Value weight (IDEFICS).
    Value,
    /// Per-head query norm (IDEFICS).
    QueryNorm,
    /// Per-head key norm (IDEFICS).
    KeyNorm,
    /// Output weight.
    Output,
    /// `weight` or `bias` of the norm before the feed-forward.
    MlpNorm(&'static str),
    /// First linear (of SwiGLU: the one that is not the gate).
    Up,
    /// Gating linear of SwiGLU (IDEFICS).
    Gate,
    /// Second linear.
    Down,
}

/// Rows `start..end` of a weight, cut at build time.
fn rows(
    graph: &mut Graph,
    weight: ValueId,
    start: usize,
    end: usize,
) -> Result<ValueId, GraphError> {
    graph.add("rows", Slice { axis: 0, start, end }, &[weight])
}

/// The same elements under another known shape.
fn reshaped(graph: &mut Graph, x: ValueId, shape: &[usize]) -> Result<ValueId, GraphError> {
    let shape = shape.iter().map(|size| Dim::from(*size)).collect();
    graph.add("reshaped", Reshape { shape }, &[x])
}

/// x Wᵀ, plus the bias if there is one.
fn linear(
    graph: &mut Graph,
    name: &str,
    x: ValueId,
    weight: ValueId,
    bias: Option<ValueId>,
) -> Result<ValueId, GraphError> {
    let op = Linear { bias: bias.is_some(), ..Linear::default() };
    let inputs: Vec<ValueId> = [x, weight].into_iter().chain(bias).collect();
    graph.add(name, op, &inputs)
}
