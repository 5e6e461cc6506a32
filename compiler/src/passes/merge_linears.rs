//! Linears of one input become one linear with stacked weights, and a split of its result:
//! q, k, v of a layer; keys and values of every gated layer; of every resampler layer.

use std::collections::BTreeMap;

use flamingo_ir::op::{Concat, Linear, Op, Split};
use flamingo_ir::{GraphError, Node, Patch, Tensor, ValueId};

use super::Context;

pub(super) fn run(patch: &mut Patch, _context: &Context) -> Result<(), GraphError> {
    let mut groups: BTreeMap<ValueId, Vec<Node>> = BTreeMap::new();
    for node in patch.nodes() {
        let Op::Linear(linear) = &node.op else { continue };
        let weights_known = node.inputs[1..].iter().all(|input| patch.is_build_time(*input));
        let plain = linear.activation.is_none() && !linear.residual;
        if plain && weights_known && !patch.is_build_time(node.outputs[0]) {
            groups.entry(node.inputs[0]).or_default().push(node);
        }
    }
    for (x, nodes) in groups {
        if nodes.len() > 1 {
            merge(patch, x, &nodes)?;
        }
    }
    Ok(())
}

fn merge(patch: &mut Patch, x: ValueId, nodes: &[Node]) -> Result<(), GraphError> {
    let weights: Vec<ValueId> = nodes.iter().map(|node| node.inputs[1]).collect();
    let mut sizes = Vec::with_capacity(nodes.len());
    for weight in &weights {
        let Some(rows) = patch.fact(*weight).shape[0].known() else { return Ok(()) };
        sizes.push(rows);
    }
    let name = merged_name(nodes);
    let mut inputs = vec![x, patch.add("stacked_weight", Concat { axis: 0 }, &weights)?];
    let bias = nodes.iter().any(|node| node.inputs.len() > 2);
    if bias {
        let mut parts = Vec::with_capacity(nodes.len());
        for (node, rows) in nodes.iter().zip(&sizes) {
            let zeros = || Tensor::vector(vec![0.0; *rows]);
            parts.push(node.inputs.get(2).copied().unwrap_or_else(|| patch.literal(zeros())));
        }
        inputs.push(patch.add("stacked_bias", Concat { axis: 0 }, &parts)?);
    }
    let merged = patch.add(&name, Linear { bias, ..Linear::default() }, &inputs)?;
    let axis = patch.fact(merged).rank() - 1;
    let parts = patch.add_many(&format!("{name}.split"), Split { axis, sizes }, &[merged])?;
    for (node, part) in nodes.iter().zip(parts) {
        patch.replace(node.outputs[0], part)?;
    }
    Ok(())
}

/// The longest common prefix of the names up to a dot, with what was merged.
fn merged_name(nodes: &[Node]) -> String {
    let first: Vec<&str> = nodes[0].name.split('.').collect();
    let shared = |n: &usize| {
        nodes.iter().all(|node| node.name.split('.').take(*n).eq(first.iter().take(*n).copied()))
    };
    let n = (0..first.len()).rev().find(shared).unwrap_or(0);
    let prefix = first[..n].join(".");
    match prefix.is_empty() {
        true => format!("merged_{}", nodes.len()),
        false => format!("{prefix}.merged_{}", nodes.len()),
    }
}
