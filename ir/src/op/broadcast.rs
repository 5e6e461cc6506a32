//! NumPy broadcasting of symbolic shapes.

use super::{OpError, input_error};
use crate::{Dim, Fact};

/// The shape that `left` and `right` broadcast to
/// (<https://onnx.ai/onnx/repo-docs/Broadcasting.html>).
pub(crate) fn broadcast(left: &Fact, right: &Fact) -> Result<Vec<Dim>, OpError> {
    let rank = left.rank().max(right.rank());
    let dim = |fact: &Fact, axis: usize| match (axis + fact.rank()).checked_sub(rank) {
        Some(own_axis) => fact.shape[own_axis].clone(),
        None => Dim::from(1),
    };
    let one = Dim::from(1);
    let mut shape = Vec::with_capacity(rank);
    for axis in 0..rank {
        let (a, b) = (dim(left, axis), dim(right, axis));
        match () {
            () if a == b || b == one => shape.push(a),
            () if a == one => shape.push(b),
            () => {
                let expected = format!("a shape that broadcasts with {left}");
                return Err(input_error(1, "right operand", &expected, right));
            }
        }
    }
    Ok(shape)
}
