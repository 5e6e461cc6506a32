//! Products of rows with rows, `x wᵀ`: the register tile under `linear` and under attention scores.
//!
//! Every output element is computed in one fixed order, whatever the shapes, the tile it falls in and the thread: `k` is
//! cut into blocks of [`K_BLOCK`]; in a block, lane `l` sums the products of columns `l`, `l + LANES`, …; the lanes are
//! summed as a tree; the block sums are added in order. So one row gives the same bits alone and among many.

use crate::{
    arch::{MAX_X_ROWS, MatrixMut, Simd},
    matrix::Matrix,
};

/// Columns summed in registers before they are added to the output: 4 KiB of each row, so that a register tile's rows
/// stay in the first-level cache.
pub(crate) const K_BLOCK: usize = 1024;

/// Rows of `w` in one register tile.
pub(crate) const W_ROWS: usize = 4;

/// `out = x wᵀ`; x `[m, k]`, w `[n, k]`, out `[m, n]`.
///
/// Few rows of x: the rows of w are read once, end to end, from main memory. More: a tile of x rows stays in the
/// first-level cache while a block of w comes from the second.
#[inline(always)]
pub(crate) fn multiply<S: Simd>(s: S, x: Matrix<'_>, w: Matrix<'_>, out: &mut MatrixMut<'_>) {
    let (m, n, k) = (x.rows(), w.rows(), x.cols());
    if k == 0 {
        return (0..m).for_each(|i| out.row_mut(i).fill(0.0));
    }
    if m <= 2 * S::X_ROWS {
        // Each of the tile's rows goes on where the one before it ended: few long streams from main memory.
        let part = n.div_ceil(W_ROWS);
        for j in 0..part {
            for start in (0..k).step_by(K_BLOCK) {
                for i in (0..m).step_by(S::X_ROWS) {
                    Block::new(x, w, start).add_tile(s, i, (j, part), out);
                }
            }
        }
    } else {
        for start in (0..k).step_by(K_BLOCK) {
            for i in (0..m).step_by(S::X_ROWS) {
                for j in (0..n).step_by(W_ROWS) {
                    Block::new(x, w, start).add_tile(s, i, (j, 1), out);
                }
            }
        }
    }
}

/// A block of columns.
struct Block<'a> {
    x: Matrix<'a>,
    w: Matrix<'a>,
    is_first: bool,
}

impl<'a> Block<'a> {
    #[inline(always)]
    fn new(x: Matrix<'a>, w: Matrix<'a>, start: usize) -> Self {
        let end = (start + K_BLOCK).min(x.cols());
        Block { x: x.columns(start..end), w: w.columns(start..end), is_first: start == 0 }
    }

    /// Adds the products of a tile of x rows from `i` on with the rows `j`, `j + step`, … of w, those that there are.
    #[inline(always)]
    fn add_tile<S: Simd>(&self, s: S, i: usize, w: (usize, usize), out: &mut MatrixMut<'_>) {
        match S::X_ROWS.min(self.x.rows() - i) {
            1 => self.add_tile_of::<S, 1>(s, i, w, out),
            2 => self.add_tile_of::<S, 2>(s, i, w, out),
            3 => self.add_tile_of::<S, 3>(s, i, w, out),
            4 => self.add_tile_of::<S, 4>(s, i, w, out),
            5 => self.add_tile_of::<S, 5>(s, i, w, out),
            _ => self.add_tile_of::<S, MAX_X_ROWS>(s, i, w, out),
        }
    }

    #[inline(always)]
    fn add_tile_of<S: Simd, const M: usize>(
        &self,
        s: S,
        i: usize,
        (j, step): (usize, usize),
        out: &mut MatrixMut<'_>,
    ) {
        let last = self.w.rows() - 1;
        let mut w_rows = [self.w.row(last); W_ROWS];
        for (r, row) in w_rows.iter_mut().enumerate() {
            *row = self.w.row((j + r * step).min(last));
        }
        let mut x_rows = [self.x.row(i); M];
        for (r, row) in x_rows.iter_mut().enumerate() {
            *row = self.x.row(i + r);
        }
        let sums = tile_sums(s, x_rows, w_rows);
        for (r, sums) in sums.iter().enumerate() {
            let out = out.row_mut(i + r)[j..].iter_mut().step_by(step);
            for (out, sum) in out.zip(sums) {
                *out = if self.is_first { *sum } else { *out + *sum };
            }
        }
    }
}

/// Products of `M` rows with [`W_ROWS`] rows, all of one length.
#[inline(always)]
fn tile_sums<S: Simd, const M: usize>(
    s: S,
    x: [&[f32]; M],
    w: [&[f32]; W_ROWS],
) -> [[f32; W_ROWS]; M] {
    let (n_lanes, n_rest) = (x[0].len() / S::LANES, x[0].len() % S::LANES);
    let mut sums = [[s.splat(0.0); W_ROWS]; M];
    let (mut x_lanes, mut w_lanes) = ([s.split(x[0]).0; M], [s.split(w[0]).0; W_ROWS]);
    for i in 0..M {
        x_lanes[i] = &s.split(x[i]).0[..n_lanes];
    }
    for j in 0..W_ROWS {
        w_lanes[j] = &s.split(w[j]).0[..n_lanes];
    }
    for p in 0..n_lanes {
        let mut wv = [s.splat(0.0); W_ROWS];
        for j in 0..W_ROWS {
            wv[j] = s.load(&w_lanes[j][p]);
        }
        for i in 0..M {
            let xv = s.load(&x_lanes[i][p]);
            for j in 0..W_ROWS {
                sums[i][j] = s.mul_add(xv, wv[j], sums[i][j]);
            }
        }
    }
    if n_rest > 0 {
        for i in 0..M {
            let xv = s.load_partial(s.split(x[i]).1);
            for j in 0..W_ROWS {
                sums[i][j] = s.mul_add(xv, s.load_partial(s.split(w[j]).1), sums[i][j]);
            }
        }
    }
    let mut reduced = [[0.0; W_ROWS]; M];
    for i in 0..M {
        reduced[i] = s.reduce_add_4(sums[i]);
    }
    reduced
}
