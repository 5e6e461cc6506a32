//! x + y · tanh(0) → x: gates that are exactly 0 switch their branch off.
//!
//! The branch is taken to be finite, as the reference computes it: 0 · ∞ would be NaN there.

use flamingo_ir::op::Op;
use flamingo_ir::{GraphError, Patch, ValueId, Weights, fold};

use super::Context;

pub(super) fn run(patch: &mut Patch, context: &Context) -> Result<(), GraphError> {
    for node in patch.nodes() {
        let (Op::Add(_), [left, right]) = (&node.op, node.inputs.as_slice()) else { continue };
        for (kept, branch) in [(*left, *right), (*right, *left)] {
            if is_zero(patch, branch, context.weights)?
                && patch.fact(kept) == patch.fact(node.outputs[0])
            {
                patch.replace(node.outputs[0], kept)?;
                break;
            }
        }
    }
    Ok(())
}

/// Whether `value` is a product with a constant that is zero everywhere.
fn is_zero(patch: &Patch, value: ValueId, weights: &dyn Weights) -> Result<bool, GraphError> {
    let Some(node) = patch.producer(value).filter(|node| matches!(node.op, Op::Mul(_))) else {
        return Ok(false);
    };
    for input in &node.inputs {
        // A gate has at most one value a feature; anything larger is not one.
        let small = patch.fact(*input).n_elements().known().is_some_and(|n| n <= 1 << 16);
        if small && patch.is_build_time(*input) {
            let gate = fold(patch.graph(), *input, weights)?;
            let zero = gate.as_f32().is_some_and(|array| array.iter().all(|value| *value == 0.0));
            if zero {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
