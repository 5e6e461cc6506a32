//! Target shapes of `Reshape` and `Expand` as ONNX inputs.
//!
//! A symbolic dimension is written as 0 (`Reshape`: the operand's size of the same axis), as 1
//! (`Expand`: the operand's size), as −1 (`Reshape`: whatever is left), or is read from the
//! shape of an input, or of a value computed before. −1 stands beside sizes that may be 0 at run time (`past_len`) only if
//! there is no other way: readers reject −1 where the other sizes multiply to 0. (ONNX Runtime's
//! reshape fusion puts −1 for a single size that is read from a shape, so graphs should not
//! reshape values that may be empty to more than one symbolic dimension.)

use crate::op::Op;
use crate::{Dim, Fact};

/// How one dimension of a target is written.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Piece {
    /// A number.
    Number(i64),
    /// The size of an axis of a source.
    Axis {
        /// Position among the sources.
        source: usize,
        /// Its axis.
        axis: usize,
    },
}

/// The pieces of a target shape, or the first dimension that cannot be written. `sources[0]` is
/// the operand's fact, the others are facts of graph inputs and of values computed before.
pub(super) fn pieces(op: &Op, target: &[Dim], sources: &[&Fact]) -> Result<Vec<Piece>, Dim> {
    let operand = sources.first().copied();
    let is_expand = matches!(op, Op::Expand(_));
    let keeps = |index: usize| {
        let own = |fact: &Fact| match is_expand {
            true => (index + fact.rank()).checked_sub(target.len()),
            false => Some(index),
        };
        let same = |fact: &Fact| fact.shape.get(own(fact)?).cloned();
        operand.and_then(same).is_some_and(|dim| dim == target[index])
    };
    let number = |index: usize, dim: &Dim| match dim.known() {
        Some(0) if !is_expand => keeps(index).then_some(0),
        Some(size) => i64::try_from(size).ok(),
        None => keeps(index).then_some(i64::from(is_expand)),
    };
    let numbers: Vec<Option<i64>> =
        target.iter().enumerate().map(|(index, dim)| number(index, dim)).collect();
    let n_open = numbers.iter().filter(|number| number.is_none()).count();
    let others_positive = numbers.iter().all(|number| number.is_none_or(|number| number > 0));
    let mut may_infer = !is_expand;
    let mut pieces = Vec::with_capacity(target.len());
    for (dim, number) in target.iter().zip(numbers) {
        let piece = match number {
            Some(number) => Piece::Number(number),
            None if may_infer && n_open == 1 && others_positive => Piece::Number(-1),
            None => match find(dim, sources) {
                Some(piece) => piece,
                None if may_infer => {
                    may_infer = false;
                    Piece::Number(-1)
                }
                None => return Err(dim.clone()),
            },
        };
        pieces.push(piece);
    }
    Ok(pieces)
}

/// The axis of a source that is exactly `dim`; the operand comes last.
fn find(dim: &Dim, sources: &[&Fact]) -> Option<Piece> {
    let order = (1..sources.len()).chain([0]);
    order.into_iter().find_map(|source| {
        let axis = sources.get(source)?.shape.iter().position(|other| other == dim)?;
        Some(Piece::Axis { source, axis })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Expand, Reshape};

    fn dims(text: &str) -> Vec<Dim> {
        text.split(' ').map(|dim| dim.parse().unwrap()).collect()
    }

    fn check(op: &str, target: &str, sources: &[&str], expected: Result<&str, &str>) {
        let op = match op {
            "expand" => Op::Expand(Expand { shape: Vec::new() }),
            _ => Op::Reshape(Reshape { shape: Vec::new() }),
        };
        let facts: Vec<Fact> = sources.iter().map(|source| Fact::f32(dims(source))).collect();
        let found = pieces(&op, &dims(target), &facts.iter().collect::<Vec<&Fact>>());
        let text = found.map(|pieces| {
            let word = |piece: &Piece| match piece {
                Piece::Number(number) => number.to_string(),
                Piece::Axis { source, axis } => format!("{source}.{axis}"),
            };
            pieces.iter().map(word).collect::<Vec<String>>().join(" ")
        });
        assert_eq!(
            text.map_err(|dim| dim.to_string()),
            expected.map(str::to_owned).map_err(str::to_owned)
        );
    }

    #[test]
    fn targets_use_the_operand_first() {
        check("reshape", "m 2 4", &["m 8"], Ok("0 2 4"));
        check("reshape", "1 m", &["m"], Ok("1 -1"));
        check("reshape", "64*n 8", &["n 64 8"], Ok("-1 8"));
        check("reshape", "n f 4", &["n*f 4", "n f 3"], Ok("1.0 1.1 4"));
        check("reshape", "n 4*f", &["n*f 4", "n f 3"], Ok("1.0 -1"));
        check("reshape", "2 m p", &["1 2*m p", "3 p", "m 3"], Ok("2 2.0 0"));
        check("reshape", "a b", &["a*b"], Err("b"));
        check("expand", "n 1 8", &["8", "n 2 8"], Ok("1.0 1 8"));
        check("expand", "n 8", &["n 8"], Ok("1 8"));
        check("expand", "n 8", &["8"], Err("n"));
    }
}
