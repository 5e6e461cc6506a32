//! Linear layers: `act(x Wᵀ + bias) + residual`, and the gated form of SwiGLU blocks.

use std::ops::Range;

use crate::{
    Kernels,
    activation::{Activation, activate_in_place, activate_wide},
    arch::{MatrixMut, Simd, Task},
    dot, math,
    matrix::Matrix,
    packed::{self, PackedX},
    panels::{PanelTile, TASK_PANELS},
    scratch::Scratch,
    weight::{PANEL_ROWS, Panels, Weight},
};

/// Most rows of the weight in one task: with a block of columns they fill half of a small second-level cache.
const MAX_TILE_COLS: usize = 64;

/// Rows of a weight in panels in one task.
const TASK_COLS: usize = TASK_PANELS * PANEL_ROWS;

impl Kernels {
    /// `out = activation(x Wᵀ + bias) + residual`.
    ///
    /// x `[m, k]`; weight `[n, k]`, rows as in the checkpoint; bias `[n]`; residual and out `[m, n]`. Every row of `out`
    /// has the same bits whatever the number of rows and threads.
    ///
    /// # Panics
    /// If the shapes disagree.
    pub fn linear(
        &self,
        x: Matrix<'_>,
        weight: Weight<'_>,
        bias: Option<&[f32]>,
        activation: Option<Activation>,
        residual: Option<Matrix<'_>>,
        out: MatrixMut<'_>,
    ) {
        let (m, n) = (out.rows(), out.cols());
        assert_eq!((x.rows(), x.cols()), (m, weight.cols()), "linear: shape of x");
        assert_eq!(weight.rows(), n, "linear: rows of weight and columns of out");
        assert!(bias.is_none_or(|bias| bias.len() == n), "linear: length of bias");
        assert!(
            residual.is_none_or(|residual| (residual.rows(), residual.cols()) == (m, n)),
            "linear: residual"
        );
        let epilogue = Epilogue { bias, activation, residual };
        match weight {
            Weight::F32(weight) => self.linear_f32(x, weight, epilogue, out),
            Weight::Panels(weight) => self.linear_panels(x, weight, epilogue, out),
        }
    }

    fn linear_f32(
        &self,
        x: Matrix<'_>,
        weight: Matrix<'_>,
        epilogue: Epilogue<'_>,
        out: MatrixMut<'_>,
    ) {
        let (m, tile_cols) = (out.rows(), self.linear_tile_cols(out.cols()));
        self.with_rows(x, |x| {
            self.pool.run_tiles(out, row_starts(m), tile_cols, &|_, col, tile| {
                let cols = col..col + tile.cols();
                self.token.run(Linear {
                    x,
                    weight: weight.row_range(cols.clone()),
                    next: self.rows_of_next_task(weight, &cols),
                    epilogue: epilogue.columns(cols),
                    tile,
                });
            });
        });
    }

    fn linear_panels(
        &self,
        x: Matrix<'_>,
        weight: Panels<'_>,
        epilogue: Epilogue<'_>,
        out: MatrixMut<'_>,
    ) {
        let m = out.rows();
        self.with_panel_x(x, weight.format(), |x| {
            self.pool.run_tiles(out, row_starts(m), TASK_COLS, &|_, col, tile| {
                let epilogue = epilogue.columns(col..col + tile.cols());
                let first_panel = col / PANEL_ROWS;
                PanelTile { x, weight, first_panel, epilogue, tile }.run(self.token);
            });
        });
    }

    fn gated_linear_panels(
        &self,
        x: Matrix<'_>,
        weight: Panels<'_>,
        bias: Option<&[f32]>,
        activation: Activation,
        out: MatrixMut<'_>,
    ) {
        let (m, n) = (out.rows(), out.cols());
        assert!(n.is_multiple_of(PANEL_ROWS), "gated linear: each half in panels of its own");
        self.with_panel_x(x, weight.format(), |x| {
            self.pool.run_tiles(out, row_starts(m), TASK_COLS, &|_, col, mut tile| {
                let cols = tile.cols();
                let half = |start: usize, activation, tile: MatrixMut<'_>| {
                    let bias = bias.map(|bias| &bias[start..start + cols]);
                    let epilogue = Epilogue { bias, activation, residual: None };
                    let first_panel = start / PANEL_ROWS;
                    PanelTile { x, weight, first_panel, epilogue, tile }.run(self.token);
                };
                self.scratch.with(m * cols, |up| {
                    half(col, Some(activation), tile.reborrow());
                    half(n + col, None, MatrixMut::new(up, m, cols));
                    self.token.run(MultiplyTile { up: Matrix::new(up, m, cols), tile });
                });
            });
        });
    }

    /// `out = activation(x Wgᵀ + bg) * (x Wuᵀ + bu)`.
    ///
    /// x `[m, k]`; weight `[2n, k]` and bias `[2n]`: the gate's rows, then the up rows; out `[m, n]`. In panels n is a
    /// multiple of 16.
    ///
    /// # Panics
    /// If the shapes disagree.
    pub fn gated_linear(
        &self,
        x: Matrix<'_>,
        weight: Weight<'_>,
        bias: Option<&[f32]>,
        activation: Activation,
        out: MatrixMut<'_>,
    ) {
        let (m, n) = (out.rows(), out.cols());
        assert_eq!((x.rows(), x.cols()), (m, weight.cols()), "gated linear: shape of x");
        assert_eq!(weight.rows(), 2 * n, "gated linear: rows of weight and columns of out");
        assert!(bias.is_none_or(|bias| bias.len() == 2 * n), "gated linear: length of bias");
        let weight = match weight {
            Weight::F32(weight) => weight,
            Weight::Panels(weight) => {
                return self.gated_linear_panels(x, weight, bias, activation, out);
            }
        };
        let tile_cols = self.linear_tile_cols(n);
        self.with_rows(x, |x| {
            self.pool.run_tiles(out, row_starts(m), tile_cols, &|_, col, tile| {
                let cols = tile.cols();
                let half = |start: usize| Half {
                    weight: weight.row_range(start..start + cols),
                    bias: bias.map(|bias| &bias[start..start + cols]),
                };
                self.token.run(GatedLinear {
                    x,
                    gate: half(col),
                    up: half(n + col),
                    next: self.rows_of_next_task(weight, &(col..col + cols)),
                    activation,
                    tile,
                });
            });
        });
    }

    fn with_rows(&self, x: Matrix<'_>, body: impl FnOnce(Rows<'_>)) {
        self.with_packed_x(x, |packed| body(Rows { x, packed, scratch: &self.scratch }));
    }

    /// Rows of the weight in the task that the same thread is likely to draw after that of `rows`; none at the end.
    fn rows_of_next_task<'a>(&self, weight: Matrix<'a>, rows: &Range<usize>) -> Matrix<'a> {
        let last = weight.rows();
        let start = last.min(rows.start + rows.len() * self.n_threads());
        weight.row_range(start..last.min(start + rows.len()))
    }

    /// Columns of `out` in one task: a few tasks for each thread, whole register tiles.
    fn linear_tile_cols(&self, n: usize) -> usize {
        let share = n.div_ceil(4 * self.n_threads()).next_multiple_of(dot::W_ROWS);
        share.clamp(dot::W_ROWS, MAX_TILE_COLS)
    }
}

/// One band of all rows; none if there are no rows.
fn row_starts(m: usize) -> &'static [usize] {
    if m == 0 { &[] } else { &[0] }
}

/// The rows that meet the weight, `[m, k]`: packed if there are many.
#[derive(Clone, Copy)]
struct Rows<'a> {
    x: Matrix<'a>,
    packed: Option<PackedX<'a>>,
    scratch: &'a Scratch<f32>,
}

impl Rows<'_> {
    /// `out = x weightᵀ`; `next` is what this thread is likely to read after `weight`.
    #[inline(always)]
    fn multiply<S: Simd>(
        &self,
        s: S,
        weight: Matrix<'_>,
        next: Matrix<'_>,
        out: &mut MatrixMut<'_>,
    ) {
        let Some(packed) = self.packed else {
            return dot::multiply(s, self.x, weight, out);
        };
        type Weights<'a> = (Matrix<'a>, Matrix<'a>);
        struct Multiply<'a, 'b>(PackedX<'a>, Weights<'a>, &'a mut [f32], &'a mut MatrixMut<'b>);
        impl Task for Multiply<'_, '_> {
            type Output = ();

            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                packed::multiply(s, self.0, self.1, self.2, self.3);
            }
        }
        let len = packed::w_scratch_len(weight.rows());
        self.scratch.with(len, |scratch| s.run(Multiply(packed, (weight, next), scratch, out)));
    }
}

/// What happens to a product before it is written: `activation(y + bias) + residual`.
#[derive(Clone, Copy)]
pub(crate) struct Epilogue<'a> {
    /// `[n]`
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) activation: Option<Activation>,
    /// `[m, n]`
    pub(crate) residual: Option<Matrix<'a>>,
}

impl<'a> Epilogue<'a> {
    pub(crate) fn columns(&self, cols: Range<usize>) -> Epilogue<'a> {
        Epilogue {
            bias: self.bias.map(|bias| &bias[cols.clone()]),
            activation: self.activation,
            residual: self.residual.map(|residual| residual.columns(cols)),
        }
    }

    /// Applies it to columns `col..` of row `row`.
    #[inline(always)]
    pub(crate) fn apply<S: Simd>(&self, s: S, row: usize, col: usize, values: &mut [f32]) {
        let cols = col..col + values.len();
        if let Some(bias) = self.bias {
            math::add_in_place(s, values, &bias[cols.clone()]);
        }
        if let Some(activation) = self.activation {
            activate_in_place(s, activation, values);
        }
        if let Some(residual) = self.residual {
            math::add_in_place(s, values, &residual.row(row)[cols]);
        }
    }
}

impl Epilogue<'_> {
    /// [`Epilogue::apply`] to the sixteen columns from `col` on, in registers.
    #[inline(always)]
    pub(crate) fn apply_wide<S: Simd>(&self, s: S, row: usize, col: usize, y: S::Wide) -> S::Wide {
        let mut y = y;
        if let Some(bias) = self.bias.and_then(|bias| bias[col..].first_chunk()) {
            y = s.wide_add(y, s.wide_load(bias));
        }
        if let Some(activation) = self.activation {
            y = activate_wide(s, activation, y);
        }
        if let Some(residual) = self.residual.and_then(|r| r.row(row)[col..].first_chunk()) {
            y = s.wide_add(y, s.wide_load(residual));
        }
        y
    }
}

struct Linear<'a> {
    x: Rows<'a>,
    weight: Matrix<'a>,
    next: Matrix<'a>,
    epilogue: Epilogue<'a>,
    tile: MatrixMut<'a>,
}

impl Task for Linear<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        self.x.multiply(simd, self.weight, self.next, &mut self.tile);
        for i in 0..self.tile.rows() {
            self.epilogue.apply(simd, i, 0, self.tile.row_mut(i));
        }
    }
}

/// `tile *= up`
struct MultiplyTile<'a> {
    up: Matrix<'a>,
    tile: MatrixMut<'a>,
}

impl Task for MultiplyTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for i in 0..self.tile.rows() {
            math::multiply_in_place(simd, self.tile.row_mut(i), self.up.row(i));
        }
    }
}

/// The gate's or the up part of a gated layer, `[tile columns, k]`.
struct Half<'a> {
    weight: Matrix<'a>,
    bias: Option<&'a [f32]>,
}

struct GatedLinear<'a> {
    x: Rows<'a>,
    gate: Half<'a>,
    up: Half<'a>,
    next: Matrix<'a>,
    activation: Activation,
    tile: MatrixMut<'a>,
}

impl Task for GatedLinear<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let (rows, cols) = (self.tile.rows(), self.tile.cols());
        let mut up_data = vec![0.0; rows * cols];
        let mut up = MatrixMut::new(&mut up_data, rows, cols);
        self.x.multiply(simd, self.gate.weight, self.up.weight, &mut self.tile);
        self.x.multiply(simd, self.up.weight, self.next, &mut up);
        for i in 0..rows {
            let (gate, up) = (self.tile.row_mut(i), up.row_mut(i));
            if let (Some(gate_bias), Some(up_bias)) = (self.gate.bias, self.up.bias) {
                math::add_in_place(simd, gate, gate_bias);
                math::add_in_place(simd, up, up_bias);
            }
            activate_in_place(simd, self.activation, gate);
            math::multiply_in_place(simd, gate, up);
        }
    }
}
