//! The passes: each moves work to an earlier time or puts work together, and leaves the meaning.

mod drop_zero_gates;
mod fold_norm_affine;
mod fold_scales;
mod fuse;
mod merge_linears;
mod migrate_outliers;
mod quantise;
mod share_common;

use std::collections::BTreeMap;

use flamingo_ir::op::Op;
use flamingo_ir::{Graph, GraphError, Node, Patch, ValueId, Verified, Verifier, Weights};
use serde::{Deserialize, Serialize};

use crate::calibrate::Calibration;
use crate::scheme::Scheme;

/// What passes may look at beside the graph.
struct Context<'a> {
    /// Values of the weights.
    weights: &'a dyn Weights,
    /// How weights are stored.
    scheme: &'a Scheme,
    /// What met each weight, by its name in a graph that was optimised for f32.
    calibration: Option<&'a Calibration>,
}

/// One pass: proposes a patch.
type Rewrite = fn(&mut Patch, &Context) -> Result<(), GraphError>;

/// The passes in their order, with the reason for it.
const PASSES: &[(&str, Rewrite, &str)] = &[
    (
        "drop_zero_gates",
        drop_zero_gates::run,
        "first, so that a branch behind a gate of exactly 0 is gone before anything is folded into it",
    ),
    (
        "fold_scales",
        fold_scales::run,
        "tanh(gate) and attention scales become part of the neighbouring weight",
    ),
    (
        "fold_norm_affine",
        fold_norm_affine::run,
        "norm scale and bias become part of the next linear; norms of one input become equal",
    ),
    (
        "share_common",
        share_common::run,
        "equal nodes become one: the resampler normalises the media once for all its layers",
    ),
    ("fuse_activations", fuse::activations, "before feed-forwards are looked for"),
    ("fuse_residuals", fuse::residuals, "before feed-forwards are looked for"),
    (
        "fuse_feed_forwards",
        fuse::feed_forwards,
        "before linears are merged, whose first half they are",
    ),
    ("fuse_resampler_attention", fuse::resampler_attention, "keys and values are not concatenated"),
    (
        "fuse_gated_cross_attention",
        fuse::gated_cross_attention,
        "before linears are merged: its query projection stays with it, so that rows without a medium cost nothing",
    ),
    (
        "merge_linears",
        merge_linears::run,
        "what still reads one input is one matrix product (q, k, v; keys and values of all gated layers)",
    ),
    (
        "migrate_outliers",
        migrate_outliers::run,
        "after norms were folded and linears merged: all weights that one norm feeds share its factors",
    ),
    (
        "quantise",
        quantise::run,
        "last, so that what is rounded is the weight that the kernels read: folded, fused and merged",
    ),
];

/// Names of the passes, in order.
pub fn pass_names() -> impl Iterator<Item = &'static str> {
    PASSES.iter().map(|(name, _, _)| *name)
}

/// Names and reasons of the passes, in order.
pub fn pass_reasons() -> impl Iterator<Item = (&'static str, &'static str)> {
    PASSES.iter().map(|(name, _, reason)| (*name, *reason))
}

/// Names that weights have once they are packed, and their values, of a graph that was optimised for f32.
pub fn packed_names(graph: &Verified) -> Vec<(String, ValueId)> {
    quantise::packed_names(&mut Graph::clone(graph))
}

/// Packed weights of a graph that was optimised: their names, and the factors that outliers were migrated with.
pub fn packed_weights(graph: &Verified) -> Vec<(String, Option<Vec<f32>>)> {
    let packed = graph.nodes().iter().filter(|node| matches!(node.op, Op::PackPanels(_)));
    let name = |node: &Node| node.name.strip_suffix(".panels").unwrap_or(&node.name).to_owned();
    packed.map(|node| (name(node), migrate_outliers::factors_of(graph, node.inputs[0]))).collect()
}

/// Runtime ops of a graph after a pass.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PassRecord {
    /// The pass, or `source` before the first.
    pub pass: String,
    /// Values it replaced.
    pub replaced: usize,
    /// How often each op occurs among the nodes that run on the device.
    pub ops: BTreeMap<String, usize>,
}

/// Runs all passes; weights are stored as `scheme` says, fitted to what `calibration` saw; `observe` sees the graph
/// after each. The result was verified after each.
pub fn optimise(
    graph: Graph,
    weights: &dyn Weights,
    scheme: &Scheme,
    calibration: Option<&Calibration>,
    observe: &mut dyn FnMut(&str, &Graph),
) -> Result<(Verified, Vec<PassRecord>), GraphError> {
    let mut verifier = Verifier::default();
    let mut verified = verifier.verify(graph)?;
    let context = Context { weights, scheme, calibration };
    let mut records = vec![record("source", 0, &verified)];
    observe("source", &verified);
    for (name, rewrite, _) in PASSES {
        let mut graph = verified.into_inner();
        let mut patch = Patch::new(&mut graph);
        rewrite(&mut patch, &context)?;
        let replaced = patch.apply()?;
        verified = verifier.verify(graph)?;
        records.push(record(name, replaced, &verified));
        observe(name, &verified);
    }
    Ok((verified, records))
}

fn record(pass: &str, replaced: usize, graph: &Graph) -> PassRecord {
    PassRecord { pass: pass.to_owned(), replaced, ops: runtime_ops(graph) }
}

/// How often each op occurs among the nodes that are not computed at build time.
pub fn runtime_ops(graph: &Graph) -> BTreeMap<String, usize> {
    let build_time = graph.build_time_values();
    let mut ops = BTreeMap::new();
    for node in graph.nodes() {
        if !node.outputs.iter().all(|output| build_time.contains(output)) {
            *ops.entry(node.op.name().to_owned()).or_insert(0) += 1;
        }
    }
    ops
}
