//! norm(x) · s + t, then Wᵀ → norm(x) (W·s)ᵀ + W t: the affine part of a norm becomes part of
//! every linear that reads it.

use flamingo_ir::op::{Add, LayerNorm, Linear, MatMul, Mul, Op, Reshape, RmsNorm};
use flamingo_ir::{Dim, GraphError, Node, Patch, ValueId};

use super::Context;

pub(super) fn run(patch: &mut Patch, _context: &Context) -> Result<(), GraphError> {
    for node in patch.nodes() {
        let plain: Op = match &node.op {
            Op::LayerNorm(norm) if norm.n_heads == 1 && norm.scale => {
                LayerNorm { scale: false, bias: false, ..norm.clone() }.into()
            }
            Op::RmsNorm(norm) if norm.n_heads == 1 && norm.scale => {
                RmsNorm { scale: false, ..norm.clone() }.into()
            }
            _ => continue,
        };
        if patch.is_build_time(node.outputs[0]) || !all_readers_take_it(patch, node.outputs[0]) {
            continue;
        }
        let normed = patch.add(&node.name, plain, &node.inputs[..1])?;
        for reader in patch.readers(node.outputs[0]) {
            fold_into(patch, &reader, normed, node.inputs[1], node.inputs.get(2).copied())?;
        }
    }
    Ok(())
}

/// Whether every reader is a linear whose weight is known and is not also an embedding table
/// (a tied head: folding would double its bytes).
fn all_readers_take_it(patch: &Patch, value: ValueId) -> bool {
    let takes = |reader: &Node| {
        let weights_known = reader.inputs[1..].iter().all(|input| patch.is_build_time(*input));
        let is_table = || {
            let others = patch.readers(reader.inputs[1]);
            others.iter().any(|other| matches!(other.op, Op::Gather(_)))
        };
        matches!(&reader.op, Op::Linear(linear) if !linear.residual)
            && reader.inputs[0] == value
            && weights_known
            && !is_table()
    };
    !patch.is_output(value) && patch.readers(value).iter().all(takes)
}

fn fold_into(
    patch: &mut Patch,
    reader: &Node,
    normed: ValueId,
    scale: ValueId,
    shift: Option<ValueId>,
) -> Result<(), GraphError> {
    let Op::Linear(linear) = &reader.op else { return Ok(()) };
    let weight = reader.inputs[1];
    let [n, k] = [0, 1].map(|axis| patch.fact(weight).shape[axis].clone());
    let mut inputs = vec![normed, patch.add("scaled_weight", Mul, &[weight, scale])?];
    let own_bias = linear.bias.then(|| reader.inputs[2]);
    let shifted = match shift {
        None => None,
        Some(shift) => {
            let column =
                patch.add("shift_column", Reshape { shape: vec![k, Dim::from(1)] }, &[shift])?;
            let product = patch.add("shift_product", MatMul, &[weight, column])?;
            Some(patch.add("shift_row", Reshape { shape: vec![n] }, &[product])?)
        }
    };
    let bias = match (own_bias, shifted) {
        (Some(own), Some(shifted)) => Some(patch.add("bias", Add, &[own, shifted])?),
        (own, shifted) => own.or(shifted),
    };
    inputs.extend(bias);
    let op = Linear { bias: bias.is_some(), ..linear.clone() };
    let new = patch.add(&reader.name, op, &inputs)?;
    patch.replace(reader.outputs[0], new)
}
