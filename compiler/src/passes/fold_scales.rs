//! Constant factors next to a linear or a convolution become part of its weight:
//!
//! * (x Wᵀ + b) · c → x (cW)ᵀ + cb, for a number or one factor a feature: the tanh gates;
//! * (x · c) Wᵀ → x (cW)ᵀ for a number, also through means of pixels: what keeps the variance of an NFNet;
//! * the scale of attention scores → the query projection.

use flamingo_ir::op::{Linear, MeanPool, Mul, Op, Reshape};
use flamingo_ir::{Dim, GraphError, Node, Patch, ValueId};

use super::Context;

pub(super) fn run(patch: &mut Patch, _context: &Context) -> Result<(), GraphError> {
    for node in patch.nodes() {
        match &node.op {
            Op::Mul(_) => fold_factor(patch, &node)?,
            Op::Linear(_) | Op::Convolution(_) => fold_input_factor(patch, &node)?,
            Op::Attention(op) if op.scale != 1.0 => {
                let scaled = Op::Attention(flamingo_ir::op::Attention { scale: 1.0, ..op.clone() });
                fold_attention(patch, &node, op.scale, scaled)?;
            }
            Op::SelfAttention(op) if op.scale != 1.0 => {
                let scaled =
                    Op::SelfAttention(flamingo_ir::op::SelfAttention { scale: 1.0, ..op.clone() });
                fold_attention(patch, &node, op.scale, scaled)?;
            }
            Op::CrossAttention(op) if op.scale != 1.0 => {
                let scaled = Op::CrossAttention(flamingo_ir::op::CrossAttention {
                    scale: 1.0,
                    ..op.clone()
                });
                fold_attention(patch, &node, op.scale, scaled)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// A plain linear with weights known at build time that only one node reads.
fn foldable(patch: &Patch, value: ValueId) -> Option<(Node, Linear)> {
    let node = patch.producer(value).filter(|_| patch.is_read_once(value))?;
    match &node.op {
        Op::Linear(linear)
            if linear.activation.is_none()
                && !linear.residual
                && !patch.is_build_time(value)
                && node.inputs[1..].iter().all(|input| patch.is_build_time(*input)) =>
        {
            Some((node.clone(), linear.clone()))
        }
        _ => None,
    }
}

/// The linear with weight and bias multiplied by `factor` ([], [1] or [n]).
fn scaled_linear(
    patch: &mut Patch,
    (node, op): (Node, Linear),
    factor: ValueId,
) -> Result<ValueId, GraphError> {
    let n = patch.fact(node.inputs[1]).shape[0].clone();
    let per_row = patch.fact(factor).shape.as_slice() == [n.clone()] && n.known() != Some(1);
    let column = match per_row {
        true => patch.add("factor_column", Reshape { shape: vec![n, Dim::from(1)] }, &[factor])?,
        false => factor,
    };
    let mut inputs =
        vec![node.inputs[0], patch.add("scaled_weight", Mul, &[node.inputs[1], column])?];
    if op.bias {
        inputs.push(patch.add("scaled_bias", Mul, &[node.inputs[2], factor])?);
    }
    patch.add(&node.name, op, &inputs)
}

fn fold_factor(patch: &mut Patch, node: &Node) -> Result<(), GraphError> {
    let &[left, right] = node.inputs.as_slice() else { return Ok(()) };
    for (value, factor) in [(left, right), (right, left)] {
        let features = patch.fact(value).shape.last().cloned().unwrap_or_default();
        let fits = match patch.fact(factor).shape.as_slice() {
            [] => true,
            [size] => size.known() == Some(1) || *size == features,
            _ => false,
        };
        if !fits || !patch.is_build_time(factor) {
            continue;
        }
        if let Some(linear) = foldable(patch, value) {
            let scaled = scaled_linear(patch, linear, factor)?;
            return patch.replace(node.outputs[0], scaled);
        }
    }
    Ok(())
}

/// The value that `value` is a known number times, and that number.
fn scaled(patch: &Patch, value: ValueId) -> Option<(ValueId, ValueId)> {
    let node = patch.producer(value).filter(|_| !patch.is_build_time(value))?;
    let (Op::Mul(_), &[left, right]) = (&node.op, node.inputs.as_slice()) else { return None };
    let is_number = |factor: ValueId| patch.fact(factor).shape.is_empty();
    [(left, right), (right, left)]
        .into_iter()
        .find(|(_, factor)| patch.is_build_time(*factor) && is_number(*factor))
}

/// Moves a factor of the input into the weight.
fn fold_input_factor(patch: &mut Patch, node: &Node) -> Result<(), GraphError> {
    let [x, weight, rest @ ..] = node.inputs.as_slice() else { return Ok(()) };
    if !patch.is_build_time(*weight) {
        return Ok(());
    }
    let pool = patch.producer(*x).and_then(|before| match before.op {
        Op::MeanPool(MeanPool { window }) => Some((before.name, window, before.inputs[0])),
        _ => None,
    });
    let Some((mut x, factor)) = scaled(patch, pool.as_ref().map_or(*x, |pool| pool.2)) else {
        return Ok(());
    };
    if let Some((name, window, _)) = pool {
        x = patch.add(&name, MeanPool { window }, &[x])?;
    }
    let weight = patch.add("scaled_weight", Mul, &[*weight, factor])?;
    let new = patch.add(&node.name, node.op.clone(), &[&[x, weight], rest].concat())?;
    patch.replace(node.outputs[0], new)
}

fn fold_attention(
    patch: &mut Patch,
    node: &Node,
    scale: f32,
    unscaled: Op,
) -> Result<(), GraphError> {
    let Some(linear) = foldable(patch, node.inputs[0]) else { return Ok(()) };
    let factor = patch.literal(flamingo_ir::Tensor::scalar(scale));
    let mut inputs = node.inputs.clone();
    inputs[0] = scaled_linear(patch, linear, factor)?;
    let outputs = patch.add_many(&node.name, unscaled, &inputs)?;
    for (old, new) in node.outputs.iter().zip(outputs) {
        patch.replace(*old, new)?;
    }
    Ok(())
}
