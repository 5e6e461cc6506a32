//! The product of many rows with rows: both operands copied into the order in which register tiles read them.
//!
//! Same sums in the same order as [`dot`], so the same bits; what packing brings is two sequential, aligned streams in
//! place of ten strided ones. A panel holds the rows of one register tile, `[k / LANES, rows, LANES]`, zeros behind the
//! last column.

use crate::{
    Kernels,
    arch::{MAX_X_ROWS, MatrixMut, Simd, Task},
    dot::{K_BLOCK, W_ROWS},
    matrix::Matrix,
};

/// Panels of the rows of `x`, `[panels, k / LANES, X_ROWS, LANES]`; the last panel may have fewer rows.
#[derive(Clone, Copy)]
pub(crate) struct PackedX<'a> {
    data: &'a [f32],
    m: usize,
    k: usize,
    panel_len: usize,
}

/// Panels above which copying both operands costs less than it saves.
const MIN_PANELS: usize = 6;

/// Sizes of a register tile of the instruction set in use.
struct TileShape {
    lanes: usize,
    x_rows: usize,
}

struct FindTileShape;

impl Task for FindTileShape {
    type Output = TileShape;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> TileShape {
        TileShape { lanes: S::LANES, x_rows: S::X_ROWS }
    }
}

impl Kernels {
    /// Calls `body` with `x` packed, if it has enough rows to be worth it.
    pub(crate) fn with_packed_x(&self, x: Matrix<'_>, body: impl FnOnce(Option<PackedX<'_>>)) {
        let TileShape { lanes, x_rows } = self.token.run(FindTileShape);
        let (m, k) = (x.rows(), x.cols());
        if m <= MIN_PANELS * x_rows || k == 0 {
            return body(None);
        }
        let n_panels = m.div_ceil(x_rows);
        let panel_len = x_rows * k.next_multiple_of(lanes);
        self.scratch.with(n_panels * panel_len, |data| {
            let starts: Vec<usize> = (0..n_panels).collect();
            let panels = MatrixMut::new(data, n_panels, panel_len);
            self.pool.run_tiles(panels, &starts, panel_len, &|panel, _, mut tile| {
                let rows = x.row_range(panel * x_rows..m.min((panel + 1) * x_rows));
                self.token.run(PackPanel { rows, n_rows: rows.rows(), panel: tile.row_mut(0) });
            });
            body(Some(PackedX { data, m, k, panel_len }));
        });
    }
}

/// Copies rows into a panel of `n_rows`, rows that are not there as zeros.
struct PackPanel<'a> {
    rows: Matrix<'a>,
    n_rows: usize,
    panel: &'a mut [f32],
}

impl Task for PackPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (panel, _) = s.split_mut(self.panel);
        let n_steps = self.rows.cols().div_ceil(S::LANES);
        for i in 0..self.n_rows {
            let row = if i < self.rows.rows() { self.rows.row(i) } else { &[] };
            let (lanes, rest) = s.split(row);
            let mut places = panel[..n_steps * self.n_rows].iter_mut().skip(i).step_by(self.n_rows);
            for (lane, place) in lanes.iter().zip(&mut places) {
                *place = *lane;
            }
            let mut last = s.load_partial(rest);
            for place in places {
                s.store(last, place);
                last = s.splat(0.0);
            }
        }
    }
}

/// `out = x allᵀ`; x packed, `[m, k]`, all `[n, k]`, out `[m, n]`; `scratch` has [`w_scratch_len`] elements. While it
/// computes it asks for the columns that come next, at last for the first ones of `next`.
#[inline(always)]
pub(crate) fn multiply<S: Simd>(
    s: S,
    x: PackedX<'_>,
    (all, next): (Matrix<'_>, Matrix<'_>),
    scratch: &mut [f32],
    out: &mut MatrixMut<'_>,
) {
    let block = |start: usize| start..x.k.min(start + K_BLOCK);
    for start in (0..x.k).step_by(K_BLOCK) {
        let w = all.columns(block(start));
        let coming = match start + K_BLOCK {
            start if start < x.k => all.columns(block(start)),
            _ => next.columns(block(0)),
        };
        let tile_len = W_ROWS * w.cols().next_multiple_of(S::LANES);
        for (tile, panel) in
            scratch.chunks_exact_mut(tile_len).enumerate().take(w.rows().div_ceil(W_ROWS))
        {
            let rows = w.row_range(tile * W_ROWS..w.rows().min((tile + 1) * W_ROWS));
            PackPanel { rows, n_rows: W_ROWS, panel }.run(s);
        }
        let block = Block { start, len: tile_len / W_ROWS, w: scratch, tile_len };
        let n_tiles = x.m.div_ceil(S::X_ROWS) * w.rows().div_ceil(W_ROWS);
        let mut coming = Prefetch::new(coming, n_tiles);
        for (i, panel) in (0..x.m).step_by(S::X_ROWS).zip(x.data.chunks_exact(x.panel_len)) {
            let coming = &mut coming;
            match S::X_ROWS.min(x.m - i) {
                1 => block.add_panel::<S, 1>(s, panel, i, coming, out),
                2 => block.add_panel::<S, 2>(s, panel, i, coming, out),
                3 => block.add_panel::<S, 3>(s, panel, i, coming, out),
                4 => block.add_panel::<S, 4>(s, panel, i, coming, out),
                5 => block.add_panel::<S, 5>(s, panel, i, coming, out),
                _ => block.add_panel::<S, MAX_X_ROWS>(s, panel, i, coming, out),
            }
        }
    }
}

/// Lines of a matrix, asked for a share at a time: packing would wait for main memory with nothing else to do.
struct Prefetch<'a> {
    rows: Matrix<'a>,
    next: usize,
    share: usize,
}

impl<'a> Prefetch<'a> {
    /// f32 in a cache line.
    const LINE: usize = 16;

    fn new(rows: Matrix<'a>, n_shares: usize) -> Prefetch<'a> {
        let n_lines = rows.rows() * rows.cols().div_ceil(Self::LINE);
        Prefetch { rows, next: 0, share: n_lines.div_ceil(n_shares) }
    }

    /// Asks for the next share.
    #[inline(always)]
    fn ask<S: Simd>(&mut self, s: S) {
        let in_row = self.rows.cols().div_ceil(Self::LINE);
        let end = (self.next + self.share).min(self.rows.rows() * in_row);
        for line in self.next..end {
            s.prefetch(&self.rows.row(line / in_row)[line % in_row * Self::LINE]);
        }
        self.next = end;
    }
}

/// Elements of scratch that [`multiply`] needs for `n` rows of `w`: one block of columns.
pub(crate) fn w_scratch_len(n: usize) -> usize {
    n.next_multiple_of(W_ROWS) * K_BLOCK
}

/// A block of columns of `w`, packed.
struct Block<'a> {
    /// First column.
    start: usize,
    /// Columns, padded to whole vectors.
    len: usize,
    /// `[tiles, len / LANES, W_ROWS, LANES]`
    w: &'a [f32],
    tile_len: usize,
}

impl Block<'_> {
    /// Adds the block's products with `M` rows of x to rows `i..i + M` of `out`.
    #[inline(always)]
    fn add_panel<S: Simd, const M: usize>(
        &self,
        s: S,
        panel: &[f32],
        i: usize,
        coming: &mut Prefetch<'_>,
        out: &mut MatrixMut<'_>,
    ) {
        let x = &panel[self.start * M..(self.start + self.len) * M];
        let n = out.cols();
        for (j, w) in (0..n).step_by(W_ROWS).zip(self.w.chunks_exact(self.tile_len)) {
            coming.ask(s);
            let sums = tile_sums::<S, M>(s, s.split(x).0, s.split(w).0);
            let n_sums = W_ROWS.min(n - j);
            for (r, sums) in sums.iter().enumerate() {
                let out = &mut out.row_mut(i + r)[j..j + n_sums];
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = if self.start == 0 { *sum } else { *out + *sum };
                }
            }
        }
    }
}

/// Products of the `M` rows of one panel with the [`W_ROWS`] rows of another.
#[inline(always)]
fn tile_sums<S: Simd, const M: usize>(s: S, x: &[S::Lanes], w: &[S::Lanes]) -> [[f32; W_ROWS]; M] {
    let mut sums = [[s.splat(0.0); W_ROWS]; M];
    for (x, w) in x.as_chunks::<M>().0.iter().zip(w.as_chunks::<W_ROWS>().0) {
        let mut wv = [s.splat(0.0); W_ROWS];
        for j in 0..W_ROWS {
            wv[j] = s.load(&w[j]);
        }
        for i in 0..M {
            let xv = s.load(&x[i]);
            for j in 0..W_ROWS {
                sums[i][j] = s.mul_add(xv, wv[j], sums[i][j]);
            }
        }
    }
    let mut reduced = [[0.0; W_ROWS]; M];
    for i in 0..M {
        reduced[i] = s.reduce_add_4(sums[i]);
    }
    reduced
}
