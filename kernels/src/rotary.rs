//! Rotary position embedding, half-split form (`rotate_half`).

use crate::{Kernels, arch::MatrixMut, matrix::Matrix};

/// Which part of a head is rotated, and how fast each pair turns.
#[derive(Clone, Copy)]
pub(crate) struct Rotary<'a> {
    /// Leading elements of each head that are rotated: pair `i` is elements `i` and `i + n_dims / 2`.
    pub(crate) n_dims: usize,
    /// Radians per position, `[n_dims / 2]`.
    pub(crate) inverse_frequencies: &'a [f32],
}

impl Kernels {
    /// Rotates every head of every row; row `i` has position `first_position + i`. x and out `[m, n * head_dim]`.
    pub(crate) fn rotate(
        &self,
        rotary: Rotary<'_>,
        head_dim: usize,
        first_position: usize,
        x: Matrix<'_>,
        out: MatrixMut<'_>,
    ) {
        assert!(
            rotary.n_dims <= head_dim && rotary.n_dims == 2 * rotary.inverse_frequencies.len(),
            "rotary: n_dims"
        );
        self.for_row_blocks(out, &|start, mut tile| {
            tile.copy_from(x.row_range(start..start + tile.rows()));
            for i in 0..tile.rows() {
                let turns = rotary.turns(first_position + start + i);
                for head in tile.row_mut(i).chunks_exact_mut(head_dim) {
                    rotate_head(&turns, &mut head[..rotary.n_dims]);
                }
            }
        });
    }
}

impl Rotary<'_> {
    /// Cosine and sine of each pair at a position; the angle is rounded to f32 first, as in the reference models.
    fn turns(&self, position: usize) -> Vec<(f32, f32)> {
        let turn = |frequency: &f32| {
            let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
            (cos as f32, sin as f32)
        };
        self.inverse_frequencies.iter().map(turn).collect()
    }
}

fn rotate_head(turns: &[(f32, f32)], head: &mut [f32]) {
    let (first, second) = head.split_at_mut(turns.len());
    for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(turns) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
