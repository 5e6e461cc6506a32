//! Op(x, W) → Op(x, UnpackPanels(PackPanels(W))), with activations rounded as the format asks: the
//! weights of linears, feed-forwards and gated blocks, and embedding tables.
//!
//! Norms, biases, positions, frame embeddings and latents stay f32, and so do small weights: they
//! are few, and cost nothing.

use std::collections::BTreeMap;

use flamingo_ir::op::{Op, PANEL_ROWS, PackPanels, PanelFormat, UnpackPanels};
use flamingo_ir::{DType, Graph, GraphError, Node, Patch, ValueId};

use super::Context;

/// Smaller weights, by rows or columns, stay f32.
const MIN_SIZE: usize = 16;

/// Weights of more columns stay f32: sums of products of bytes would not fit 32 bits.
const MAX_COLS: usize = 1 << 17;

pub(super) fn run(patch: &mut Patch, context: &Context) -> Result<(), GraphError> {
    let stage = patch.graph().name.clone();
    // A weight with several readers (an embedding that is also the head) is packed once.
    let mut packed = BTreeMap::new();
    for node in patch.nodes() {
        let choice = context.scheme.choice(&stage, &node.name);
        let Some(format) = choice.and_then(|choice| choice.format) else { continue };
        let places = weight_places(patch, &node);
        if places.is_empty() || patch.is_build_time(node.outputs[0]) {
            continue;
        }
        let mut inputs = node.inputs.clone();
        for (place, role) in places {
            let key = (inputs[place], format);
            let unpacked = match packed.get(&key) {
                Some(unpacked) => *unpacked,
                None => pack(patch, inputs[place], format, &format!("{}.{role}", node.name))?,
            };
            packed.insert(key, unpacked);
            inputs[place] = unpacked;
        }
        let new = patch.add(&node.name, rounded(node.op, format), &inputs)?;
        patch.replace(node.outputs[0], new)?;
    }
    Ok(())
}

/// Names that weights have once they are packed, and their values, of a graph in f32.
pub(super) fn packed_names(graph: &mut Graph) -> Vec<(String, ValueId)> {
    let patch = Patch::new(graph);
    let mut names = Vec::new();
    for node in patch.nodes() {
        for (place, role) in weight_places(&patch, &node) {
            names.push((format!("{}.{role}", node.name), node.inputs[place]));
        }
    }
    names
}

/// Inputs of `node` that can be packed, and what they are for; none where one of them cannot, as
/// all weights of an op meet the same rounding.
fn weight_places(patch: &Patch, node: &Node) -> Vec<(usize, &'static str)> {
    let places = match &node.op {
        Op::Linear(_) => vec![(1, "weight")],
        Op::FeedForward(op) => vec![(1, "up"), (2 + usize::from(op.up_bias), "down")],
        Op::GatedCrossAttention(_) => {
            vec![(1, "query_weight"), (node.inputs.len() - 2, "output_weight")]
        }
        Op::Gather(_) => vec![(0, "table")],
        _ => return Vec::new(),
    };
    let halves_are_whole = match &node.op {
        Op::FeedForward(op) if op.gated => {
            let rows = patch.fact(node.inputs[1]).shape[0].known();
            rows.is_some_and(|rows| rows % (2 * PANEL_ROWS) == 0)
        }
        _ => true,
    };
    let fits = |(place, _): &(usize, _)| size(patch, node.inputs[*place]).is_some();
    match halves_are_whole && places.iter().all(fits) {
        true => places,
        false => Vec::new(),
    }
}

/// Rows and columns of a weight that is known and of a size worth packing.
fn size(patch: &Patch, weight: ValueId) -> Option<(usize, usize)> {
    let fact = patch.fact(weight);
    let [n, k] = fact.known_shape()?[..] else { return None };
    let fits = fact.dtype == DType::F32 && n >= MIN_SIZE && (MIN_SIZE..=MAX_COLS).contains(&k);
    (fits && patch.is_build_time(weight)).then_some((n, k))
}

fn pack(
    patch: &mut Patch,
    weight: ValueId,
    format: PanelFormat,
    name: &str,
) -> Result<ValueId, GraphError> {
    let Some((n, k)) = size(patch, weight) else { return Ok(weight) };
    let panels = patch.add_many(&format!("{name}.panels"), PackPanels { format }, &[weight])?;
    patch.add(name, UnpackPanels { format, n, k }, &panels)
}

/// The op with its activations rounded for weights of `format`.
fn rounded(mut op: Op, format: PanelFormat) -> Op {
    match &mut op {
        Op::Linear(op) => op.rounding = format.rounding(),
        Op::FeedForward(op) => op.rounding = format.rounding(),
        Op::GatedCrossAttention(op) => op.rounding = format.rounding(),
        _ => {}
    }
    op
}
