//! What NFNet encoders are made of beside linear layers: grouped convolutions, means of pixels, and gates that all pixels
//! of a channel share (Brock et al. 2021, High-Performance Large-Scale Image Recognition Without Normalization, §4).
//! Pictures are `[height * width, channels]`, so a convolution of 1 × 1 is a linear layer.

use std::ops::Range;

use crate::{
    Activation, Kernels,
    arch::{MatrixMut, Simd, Task},
    dot,
    linear::Epilogue,
    math::{self, Unary},
    matrix::Matrix,
};

/// Output pixels of one task: enough to use a group's weights from the second-level cache many times.
const TASK_PIXELS: usize = 48;

/// Channels of one task of an average.
const TASK_CHANNELS: usize = 64;

/// Geometry of a convolution. Sizes are `[height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convolution {
    /// Pixels of the input.
    pub input: [usize; 2],
    /// Pixels of the output.
    pub output: [usize; 2],
    /// Pixels that one output pixel sees.
    pub window: [usize; 2],
    /// Pixels from one window to the next, in both directions.
    pub stride: usize,
    /// Rows of zeros above and columns of zeros left of the input; below and right are as many as the windows reach.
    pub padding: [usize; 2],
    /// Channels are cut into as many groups, each with weights of its own.
    pub n_groups: usize,
}

impl Convolution {
    /// The geometry called SAME: ⌈input / stride⌉ windows, the padding halved, the odd pixel behind.
    ///
    /// # Panics
    /// If the stride is 0.
    pub fn same(input: [usize; 2], window: [usize; 2], stride: usize, n_groups: usize) -> Self {
        let output = input.map(|size| size.div_ceil(stride));
        let padding = [0, 1].map(|axis| {
            let reach = output[axis].saturating_sub(1) * stride + window[axis];
            reach.saturating_sub(input[axis]) / 2
        });
        Convolution { input, output, window, stride, padding, n_groups }
    }

    /// Calls `body` with the input pixel, or none outside of it, of each place of the window of output pixel `pixel`.
    fn for_window(&self, pixel: usize, mut body: impl FnMut(Option<usize>)) {
        let first = [pixel / self.output[1], pixel % self.output[1]].map(|at| at * self.stride);
        let inside = |axis: usize, at: usize| {
            at.checked_sub(self.padding[axis]).filter(|at| *at < self.input[axis])
        };
        for row in first[0]..first[0] + self.window[0] {
            for col in first[1]..first[1] + self.window[1] {
                let place = inside(0, row).zip(inside(1, col));
                body(place.map(|(row, col)| row * self.input[1] + col));
            }
        }
    }
}

impl Kernels {
    /// `out = activation(convolution(x, weight) + bias)`.
    ///
    /// x `[input pixels, c_in]`; weight `[c_out, window pixels * c_in / groups]`, columns by row, column, channel; bias
    /// `[c_out]`; out `[output pixels, c_out]`.
    ///
    /// # Panics
    /// If the shapes disagree, or the groups do not divide the channels.
    pub fn convolution(
        &self,
        x: Matrix<'_>,
        weight: Matrix<'_>,
        bias: Option<&[f32]>,
        activation: Option<Activation>,
        geometry: &Convolution,
        out: MatrixMut<'_>,
    ) {
        let (n_pixels, c_out, c_in) = (out.rows(), out.cols(), x.cols());
        let groups = geometry.n_groups;
        assert!(groups > 0 && c_in.is_multiple_of(groups), "convolution: groups of input channels");
        assert!(c_out.is_multiple_of(groups), "convolution: groups of output channels");
        assert_eq!(x.rows(), geometry.input.iter().product(), "convolution: pixels of x");
        assert_eq!(n_pixels, geometry.output.iter().product(), "convolution: pixels of out");
        let (n_in, n_out) = (c_in / groups, c_out / groups);
        let window_len = geometry.window.iter().product::<usize>() * n_in;
        assert_eq!((weight.rows(), weight.cols()), (c_out, window_len), "convolution: weight");
        assert!(bias.is_none_or(|bias| bias.len() == c_out), "convolution: length of bias");
        if n_pixels == 0 || n_out == 0 {
            return;
        }
        let epilogue = Epilogue { bias, activation, residual: None };
        let starts: Vec<usize> = (0..n_pixels).step_by(TASK_PIXELS).collect();
        self.pool.run_tiles(out, &starts, n_out, &|band, col, tile| {
            let n_rows = tile.rows();
            self.scratch.with(n_rows * window_len, |windows| {
                let channels = col / n_out * n_in..(col / n_out + 1) * n_in;
                gather(x.columns(channels), geometry, starts[band], windows);
                self.token.run(ConvolveTile {
                    windows: Matrix::new(windows, n_rows, window_len),
                    weight: weight.row_range(col..col + n_out),
                    epilogue: epilogue.columns(col..col + n_out),
                    tile,
                });
            });
        });
    }

    /// `mean = mean of the rows of x`.
    ///
    /// x `[pixels, c]`; mean `[c]`, zeros where there are no rows.
    ///
    /// # Panics
    /// If the shapes disagree.
    pub fn mean_of_rows(&self, x: Matrix<'_>, mean: &mut [f32]) {
        assert_eq!(x.cols(), mean.len(), "mean of rows: columns of x");
        let n_channels = mean.len();
        let row = MatrixMut::new(mean, 1, n_channels);
        self.pool.run_tiles(row, &[0], TASK_CHANNELS, &|_, col, mut tile| {
            let x = x.columns(col..col + tile.cols());
            self.token.run(MeanOfRows { x, mean: tile.row_mut(0) });
        });
    }

    /// `out = mean of each square of pixels`; those at the end are of the pixels that they have.
    ///
    /// x `[input pixels, c]`; out `[output pixels, c]`, ⌈size / side⌉ in both directions.
    ///
    /// # Panics
    /// If the shapes disagree, or the side is 0.
    pub fn mean_pool(&self, x: Matrix<'_>, input: [usize; 2], side: usize, out: MatrixMut<'_>) {
        let [height, width] = input;
        let n_across = width.div_ceil(side);
        assert_eq!(x.rows(), height * width, "mean pool: pixels of x");
        assert_eq!(out.rows(), height.div_ceil(side) * n_across, "mean pool: pixels of out");
        assert_eq!(out.cols(), x.cols(), "mean pool: channels");
        self.for_row_blocks(out, &|first, mut tile| {
            for i in 0..tile.rows() {
                let pixel = first + i;
                let [top, left] = [pixel / n_across * side, pixel % n_across * side];
                let rows = top..height.min(top + side);
                let cols = left..width.min(left + side);
                self.token.run(MeanOfSquare { x, width, rows, cols, mean: tile.row_mut(i) });
            }
        });
    }

    /// `out = x * gain σ(gates) + residual`: the end of squeeze-excite (Hu et al. 2018, Squeeze-and-Excitation
    /// Networks, §3).
    ///
    /// x, residual and out `[pixels, c]`; gates `[c]`.
    ///
    /// # Panics
    /// If the shapes disagree.
    pub fn gate_channels(
        &self,
        x: Matrix<'_>,
        gates: &[f32],
        gain: f32,
        residual: Option<Matrix<'_>>,
        out: MatrixMut<'_>,
    ) {
        let shape = (out.rows(), out.cols());
        assert_eq!((x.rows(), x.cols()), shape, "gates: shape of x");
        assert_eq!(gates.len(), out.cols(), "gates: channels");
        assert!(residual.is_none_or(|r| (r.rows(), r.cols()) == shape), "gates: residual");
        self.scratch.with(gates.len(), |factors| {
            factors.copy_from_slice(gates);
            self.token.run(Gates { gates: factors, gain });
            let gates = &*factors;
            self.for_row_blocks(out, &|row, mut tile| {
                let rows = row..row + tile.rows();
                tile.copy_from(x.row_range(rows.clone()));
                let residual = residual.map(|residual| residual.row_range(rows));
                self.token.run(GateTile { gates, residual, tile });
            });
        });
    }
}

/// Writes the windows of output pixels from `first` on, one a row, zeros outside of the picture.
fn gather(x: Matrix<'_>, geometry: &Convolution, first: usize, windows: &mut [f32]) {
    let n_channels = x.cols();
    let window_len = geometry.window.iter().product::<usize>() * n_channels;
    if window_len == 0 {
        return;
    }
    for (pixel, window) in windows.chunks_exact_mut(window_len).enumerate() {
        let mut places = window.chunks_exact_mut(n_channels);
        geometry.for_window(first + pixel, |input| match (input, places.next()) {
            (Some(input), Some(place)) => place.copy_from_slice(x.row(input)),
            (None, Some(place)) => place.fill(0.0),
            (_, None) => {}
        });
    }
}

/// `tile = epilogue(windows weightᵀ)`
struct ConvolveTile<'a> {
    windows: Matrix<'a>,
    weight: Matrix<'a>,
    epilogue: Epilogue<'a>,
    tile: MatrixMut<'a>,
}

impl Task for ConvolveTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        dot::multiply(simd, self.windows, self.weight, &mut self.tile);
        for i in 0..self.tile.rows() {
            self.epilogue.apply(simd, i, 0, self.tile.row_mut(i));
        }
    }
}

struct MeanOfRows<'a> {
    x: Matrix<'a>,
    mean: &'a mut [f32],
}

impl Task for MeanOfRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.mean.fill(0.0);
        for i in 0..self.x.rows() {
            math::add_in_place(simd, self.mean, self.x.row(i));
        }
        math::scale_in_place(simd, self.mean, 1.0 / self.x.rows().max(1) as f32);
    }
}

/// Mean of the pixels in some rows and columns of a picture.
struct MeanOfSquare<'a> {
    x: Matrix<'a>,
    /// Pixels of a row.
    width: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    mean: &'a mut [f32],
}

impl Task for MeanOfSquare<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.mean.fill(0.0);
        for row in self.rows.clone() {
            for col in self.cols.clone() {
                math::add_in_place(simd, self.mean, self.x.row(row * self.width + col));
            }
        }
        let n_pixels = self.rows.len() * self.cols.len();
        math::scale_in_place(simd, self.mean, 1.0 / n_pixels.max(1) as f32);
    }
}

/// `gates = gain σ(gates)`
struct Gates<'a> {
    gates: &'a mut [f32],
    gain: f32,
}

impl Task for Gates<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        math::map_in_place(simd, self.gates, &Sigmoid);
        math::scale_in_place(simd, self.gates, self.gain);
    }
}

struct Sigmoid;
impl Unary for Sigmoid {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::F) -> S::F {
        let one = s.splat(1.0);
        s.div(one, s.add(one, math::exp(s, s.mul(x, s.splat(-1.0)))))
    }
}

/// `tile = tile * gates + residual`
struct GateTile<'a> {
    gates: &'a [f32],
    residual: Option<Matrix<'a>>,
    tile: MatrixMut<'a>,
}

impl Task for GateTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for i in 0..self.tile.rows() {
            let row = self.tile.row_mut(i);
            math::multiply_in_place(simd, row, self.gates);
            if let Some(residual) = self.residual {
                math::add_in_place(simd, row, residual.row(i));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_padding_is_that_of_the_references() {
        let same = |size, window, stride| {
            let geometry = Convolution::same([size, size], [window, window], stride, 1);
            (geometry.output[0], geometry.padding[0])
        };
        // An even input with a stride of 2 has its one row of zeros behind: timm's `pad_same`.
        assert_eq!(same(320, 3, 2), (160, 0));
        assert_eq!(same(319, 3, 2), (160, 1));
        assert_eq!(same(20, 3, 1), (20, 1));
        assert_eq!(same(7, 1, 2), (4, 0));
        assert_eq!(same(0, 3, 1), (0, 1));
    }
}
