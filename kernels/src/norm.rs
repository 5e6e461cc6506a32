//! Layer normalisation and root-mean-square normalisation over rows.

use crate::{
    Kernels,
    arch::{MatrixMut, Simd, Task},
    math,
    matrix::Matrix,
};

impl Kernels {
    /// `out = (x - mean) / sqrt(variance + epsilon) * scale + bias` over each row.
    ///
    /// x and out `[rows, cols]`; scale and bias `[cols]`. Two passes; the variance is the population's.
    ///
    /// # Panics
    /// If the shapes disagree.
    pub fn layer_norm(
        &self,
        x: Matrix<'_>,
        scale: Option<&[f32]>,
        bias: Option<&[f32]>,
        epsilon: f32,
        out: MatrixMut<'_>,
    ) {
        self.norm(x, Norm { is_centred: true, scale, bias, epsilon }, out);
    }

    /// `out = x / sqrt(mean(x²) + epsilon) * scale` over each row.
    ///
    /// x and out `[rows, cols]`; scale `[cols]`.
    ///
    /// # Panics
    /// If the shapes disagree.
    pub fn rms_norm(&self, x: Matrix<'_>, scale: Option<&[f32]>, epsilon: f32, out: MatrixMut<'_>) {
        self.norm(x, Norm { is_centred: false, scale, bias: None, epsilon }, out);
    }

    fn norm(&self, x: Matrix<'_>, norm: Norm<'_>, out: MatrixMut<'_>) {
        assert_eq!((x.rows(), x.cols()), (out.rows(), out.cols()), "norm: shapes of x and out");
        assert!(norm.scale.is_none_or(|scale| scale.len() == out.cols()), "norm: length of scale");
        assert!(norm.bias.is_none_or(|bias| bias.len() == out.cols()), "norm: length of bias");
        self.for_row_blocks(out, &|row, mut tile| {
            tile.copy_from(x.row_range(row..row + tile.rows()));
            self.token.run(NormTile { norm, tile });
        });
    }
}

#[derive(Clone, Copy)]
struct Norm<'a> {
    is_centred: bool,
    scale: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    epsilon: f32,
}

struct NormTile<'a> {
    norm: Norm<'a>,
    tile: MatrixMut<'a>,
}

impl Task for NormTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for i in 0..self.tile.rows() {
            self.norm.apply(simd, self.tile.row_mut(i));
        }
    }
}

impl Norm<'_> {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, row: &mut [f32]) {
        if row.is_empty() {
            return;
        }
        let n = row.len() as f32;
        if self.is_centred {
            math::add_constant(s, row, -(math::sum(s, row) / n));
        }
        let variance = math::sum_of_squares(s, row) / n;
        math::scale_in_place(s, row, 1.0 / (variance + self.epsilon).sqrt());
        if let Some(scale) = self.scale {
            math::multiply_in_place(s, row, scale);
        }
        if let Some(bias) = self.bias {
            math::add_in_place(s, row, bias);
        }
    }
}
