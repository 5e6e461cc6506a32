//! Positions of a square of patches, resampled to another square as the code that a checkpoint comes with does it:
//! transformers' `interpolate_pos_encoding`, open_clip's `resize_pos_embed`.

use flamingo_ir::op::{Concat, MatMul};
use flamingo_ir::{Graph, GraphError, Tensor, ValueId};

use super::{reshaped, rows};
use crate::config::PositionsConfig;

/// Positions [n_class + old², width] → [n_class + grid², width]. Those of class tokens stay.
pub(super) fn resample(
    graph: &mut Graph,
    positions: ValueId,
    (old, n_class): (&PositionsConfig, usize),
    (grid, width): (usize, usize),
) -> Result<ValueId, GraphError> {
    let n_old = old.grid * old.grid;
    let patches = rows(graph, positions, n_class, n_class + n_old)?;
    let weights = Tensor::f32(&[grid, old.grid], weights(old.grid, grid, old.antialias));
    let weights = weights.ok_or_else(|| GraphError::Structure {
        graph: "media".to_owned(),
        reason: "weights of another size than their shape".to_owned(),
    })?;
    let weights = graph.literal(weights);
    let columns = reshaped(graph, patches, &[old.grid, old.grid * width])?;
    let columns = graph.add("vision.position_rows", MatMul, &[weights, columns])?;
    let columns = reshaped(graph, columns, &[grid, old.grid, width])?;
    let patches = graph.add("vision.position_columns", MatMul, &[weights, columns])?;
    let patches = reshaped(graph, patches, &[grid * grid, width])?;
    if n_class == 0 {
        return Ok(patches);
    }
    let class = rows(graph, positions, 0, n_class)?;
    graph.add("vision.positions", Concat { axis: 0 }, &[class, patches])
}

/// What each of `old` places gives to each of `new`, [new, old]: a cubic convolution (Keys 1981) at the middles of the new
/// places. With antialiasing it is as wide as a new place and takes no place outside, as Pillow's and PyTorch's is; else the
/// outermost places stand for those outside.
fn weights(old: usize, new: usize, antialias: bool) -> Vec<f32> {
    let step = old as f64 / new as f64;
    let (a, wide) = if antialias { (-0.5, step.max(1.0)) } else { (-0.75, 1.0) };
    let row = |place: usize| {
        let middle = (place as f64 + 0.5) * step - 0.5;
        let reach = (2.0 * wide).ceil() as i64 + 1;
        let mut row = vec![0.0; old];
        for at in middle.floor() as i64 - reach..=middle.floor() as i64 + reach {
            let inside = usize::try_from(at.clamp(0, old as i64 - 1)).unwrap_or(0);
            if !antialias || i64::try_from(inside) == Ok(at) {
                row[inside] += cubic((at as f64 - middle) / wide, a);
            }
        }
        let sum: f64 = row.iter().sum();
        row.into_iter().map(move |weight| (weight / sum) as f32).collect::<Vec<f32>>()
    };
    (0..new).flat_map(row).collect()
}

/// Keys' piecewise cubic, 0 from 2 on.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    match x {
        _ if x < 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
        _ if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * a,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Case {
        old: usize,
        new: usize,
        antialias: bool,
        weights: Vec<f32>,
    }

    /// Of OpenCV, whose cubic is PyTorch's without antialiasing, and of Pillow, whose is that with it.
    #[test]
    fn weights_are_those_of_opencv_and_pillow() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("positions.json")).unwrap();
        assert!(cases.len() > 10);
        for Case { old, new, antialias, weights: expected } in cases {
            let found = weights(old, new, antialias);
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert!(
                    (found - expected).abs() < 2e-6,
                    "{old} to {new}, {antialias}: {found}, expected {expected}"
                );
            }
        }
    }
}
