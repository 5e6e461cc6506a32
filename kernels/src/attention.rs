//! Bidirectional multi-head attention, and the block of query rows that every form of attention is made of.
#![expect(
    clippy::needless_range_loop,
    reason = "register tiles: several arrays walk by one index, and constant bounds unroll"
)]

use crate::{
    Kernels,
    arch::{MAX_X_ROWS, MatrixMut, Simd, Task},
    dot, math,
    matrix::Matrix,
};

/// Query rows of one task: enough to use each key from the first-level cache several times.
pub(crate) const QUERY_ROWS: usize = 24;

impl Kernels {
    /// `softmax(scale q kᵀ) v` for each head of `n_groups` independent sequences.
    ///
    /// q and out `[n_groups * q_len, n_heads * head_dim]`; each segment's k and v `[n_groups * segment_len,
    /// n_heads * head_dim]`. The keys of a group are its rows of the first segment, then of the second, and so on
    /// (Perceiver: media, then latents). No keys at all give zero rows.
    ///
    /// # Panics
    /// If the shapes disagree.
    pub fn attention<'a>(
        &self,
        q: Matrix<'_>,
        segments: &[(Matrix<'a>, Matrix<'a>)],
        n_groups: usize,
        n_heads: usize,
        scale: f32,
        out: MatrixMut<'_>,
    ) {
        let width = out.cols();
        assert_eq!((q.rows(), q.cols()), (out.rows(), width), "attention: shapes of q and out");
        assert!(
            n_groups > 0 && out.rows().is_multiple_of(n_groups),
            "attention: groups of query rows"
        );
        assert!(n_heads > 0 && width.is_multiple_of(n_heads), "attention: heads");
        for (k, v) in segments {
            assert_eq!((k.cols(), v.cols()), (width, width), "attention: columns of k and v");
            assert_eq!(k.rows(), v.rows(), "attention: rows of k and v");
            assert!(k.rows().is_multiple_of(n_groups), "attention: groups of key rows");
        }
        let (q_len, head_dim) = (out.rows() / n_groups, width / n_heads);
        let plan = blocks_of_groups(n_groups, q_len);
        self.attend_blocks(out, &plan, head_dim, &|block, head, tile| {
            let columns = head * head_dim..(head + 1) * head_dim;
            let keys_of_group = |&(k, v): &(Matrix<'a>, Matrix<'a>)| {
                let len = k.rows() / n_groups;
                let rows = block.group * len..(block.group + 1) * len;
                (
                    k.row_range(rows.clone()).columns(columns.clone()),
                    v.row_range(rows).columns(columns.clone()),
                )
            };
            let segments: Vec<_> = segments.iter().map(keys_of_group).collect();
            self.token.run(AttendBlock {
                q: q.row_range(block.start..block.end).columns(columns.clone()),
                segments: &segments,
                scale,
                first_row_keys: None,
                alibi: None,
                out: tile,
            });
        });
    }

    /// Runs `body` for every block of rows and every head with the block's `[rows, head_dim]` of `out`.
    pub(crate) fn attend_blocks(
        &self,
        out: MatrixMut<'_>,
        blocks: &[RowBlock],
        head_dim: usize,
        body: &(dyn Fn(&RowBlock, usize, MatrixMut<'_>) + Sync),
    ) {
        if head_dim == 0 || out.cols() == 0 {
            return;
        }
        let row_starts: Vec<usize> = blocks.iter().map(|block| block.start).collect();
        self.pool.run_tiles(out, &row_starts, head_dim, &|idx, col, tile| {
            body(&blocks[idx], col / head_dim, tile);
        });
    }
}

/// Consecutive query rows with the same keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowBlock {
    /// First row.
    pub(crate) start: usize,
    /// One past the last row.
    pub(crate) end: usize,
    /// What selects the keys: a group, or a medium.
    pub(crate) group: usize,
}

/// Cuts rows `start..end` into blocks of at most [`QUERY_ROWS`].
pub(crate) fn push_blocks(blocks: &mut Vec<RowBlock>, start: usize, end: usize, group: usize) {
    for start in (start..end).step_by(QUERY_ROWS) {
        blocks.push(RowBlock { start, end: end.min(start + QUERY_ROWS), group });
    }
}

fn blocks_of_groups(n_groups: usize, q_len: usize) -> Vec<RowBlock> {
    let mut blocks = Vec::new();
    for group in 0..n_groups {
        push_blocks(&mut blocks, group * q_len, (group + 1) * q_len, group);
    }
    blocks
}

/// ALiBi of one head: `-slope * (query_position - key_position)` is added to each score.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alibi {
    /// The head's slope.
    pub(crate) slope: f32,
    /// Position of the block's first query row; keys count from 0.
    pub(crate) first_position: usize,
}

/// Attention of one head for a block of query rows.
///
/// A row's result depends on its own query and the keys it sees only: scores, softmax and weighted sum run over the keys
/// in their order, whatever the other rows of the block.
pub(crate) struct AttendBlock<'a> {
    /// `[rows, head_dim]`
    pub(crate) q: Matrix<'a>,
    /// Keys and values, each `[len, head_dim]`, in order.
    pub(crate) segments: &'a [(Matrix<'a>, Matrix<'a>)],
    /// Factor of the scores.
    pub(crate) scale: f32,
    /// Causal: keys seen by the first row, each next row one more. None: every row sees all.
    pub(crate) first_row_keys: Option<usize>,
    /// Linear position bias.
    pub(crate) alibi: Option<Alibi>,
    /// `[rows, head_dim]`
    pub(crate) out: MatrixMut<'a>,
}

impl Task for AttendBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let n_keys = self.n_visible(self.q.rows().saturating_sub(1));
        let mut weights = vec![0.0; self.q.rows() * n_keys];
        self.write_scores(simd, &mut weights, n_keys);
        for row in 0..self.q.rows() {
            let visible = self.n_visible(row);
            self.normalise(simd, row, &mut weights[row * n_keys..][..visible]);
        }
        for start in (0..self.q.rows()).step_by(S::X_ROWS) {
            self.sum_values(simd, start, &weights, n_keys);
        }
    }
}

impl AttendBlock<'_> {
    fn n_visible(&self, row: usize) -> usize {
        let n_keys = self.segments.iter().map(|(k, _)| k.rows()).sum();
        self.first_row_keys.map_or(n_keys, |first| n_keys.min(first + row))
    }

    /// `scores = q kᵀ`, `[rows, n_keys]`
    #[inline(always)]
    fn write_scores<S: Simd>(&self, s: S, scores: &mut [f32], n_keys: usize) {
        let mut start = 0;
        for (k, _) in self.segments {
            let len = k.rows().min(n_keys - start);
            if len == 0 {
                continue;
            }
            let mut out = MatrixMut::strided(&mut scores[start..], self.q.rows(), len, n_keys);
            dot::multiply(s, self.q, k.row_range(0..len), &mut out);
            start += len;
        }
    }

    /// Scores of one row to softmax weights.
    #[inline(always)]
    fn normalise<S: Simd>(&self, s: S, row: usize, scores: &mut [f32]) {
        match self.alibi {
            None => math::scale_in_place(s, scores, self.scale),
            Some(alibi) => {
                let position = (alibi.first_position + row) as f32;
                for (key, score) in scores.iter_mut().enumerate() {
                    *score = *score * self.scale - alibi.slope * (position - key as f32);
                }
            }
        }
        let largest = math::largest(s, scores);
        let sum = math::exp_and_sum(s, scores, largest);
        math::scale_in_place(s, scores, 1.0 / sum);
    }

    /// `out = weights v` for the rows of one register tile: together over the keys that all of them see, then one by one.
    #[inline(always)]
    fn sum_values<S: Simd>(&mut self, s: S, start: usize, weights: &[f32], n_keys: usize) {
        let n_rows = S::X_ROWS.min(self.q.rows() - start);
        for row in start..start + n_rows {
            self.out.row_mut(row).fill(0.0);
        }
        let common = self.n_visible(start);
        match n_rows {
            1 => self.add_values::<S, 1>(s, start, weights, n_keys, 0..common),
            2 => self.add_values::<S, 2>(s, start, weights, n_keys, 0..common),
            3 => self.add_values::<S, 3>(s, start, weights, n_keys, 0..common),
            4 => self.add_values::<S, 4>(s, start, weights, n_keys, 0..common),
            5 => self.add_values::<S, 5>(s, start, weights, n_keys, 0..common),
            _ => self.add_values::<S, MAX_X_ROWS>(s, start, weights, n_keys, 0..common),
        }
        for row in start..start + n_rows {
            let visible = self.n_visible(row);
            self.add_values::<S, 1>(s, row, weights, n_keys, common..visible);
        }
    }

    /// Adds the weighted values of a range of keys to `M` rows of `out`.
    #[inline(always)]
    fn add_values<S: Simd, const M: usize>(
        &mut self,
        s: S,
        start: usize,
        weights: &[f32],
        n_keys: usize,
        keys: std::ops::Range<usize>,
    ) {
        let mut segment_start = 0;
        for (_, v) in self.segments {
            let from = keys.start.clamp(segment_start, segment_start + v.rows());
            let to = keys.end.clamp(segment_start, segment_start + v.rows());
            if from < to {
                let mut rows = [&weights[..0]; M];
                for (i, row) in rows.iter_mut().enumerate() {
                    *row = &weights[(start + i) * n_keys..][from..to];
                }
                add_segment(
                    s,
                    rows,
                    v.row_range(from - segment_start..to - segment_start),
                    start,
                    &mut self.out,
                );
            }
            segment_start += v.rows();
        }
    }
}

/// `out[start + i] += Σ weights[i][key] v[key]`, columns in groups that fit the registers.
#[inline(always)]
fn add_segment<S: Simd, const M: usize>(
    s: S,
    weights: [&[f32]; M],
    v: Matrix<'_>,
    start: usize,
    out: &mut MatrixMut<'_>,
) {
    let n_lanes = v.cols() / S::LANES;
    let mut lane = 0;
    while lane + 4 <= n_lanes {
        add_columns::<S, M, 4>(s, weights, v, lane, start, out);
        lane += 4;
    }
    while lane < n_lanes {
        add_columns::<S, M, 1>(s, weights, v, lane, start, out);
        lane += 1;
    }
    if !v.cols().is_multiple_of(S::LANES) {
        add_last_columns(s, weights, v, start, out);
    }
}

#[inline(always)]
fn add_columns<S: Simd, const M: usize, const N: usize>(
    s: S,
    weights: [&[f32]; M],
    v: Matrix<'_>,
    lane: usize,
    start: usize,
    out: &mut MatrixMut<'_>,
) {
    let mut sums = [[s.splat(0.0); N]; M];
    for i in 0..M {
        let (lanes, _) = s.split(out.row(start + i));
        for j in 0..N {
            sums[i][j] = s.load(&lanes[lane + j]);
        }
    }
    let weights = weights.map(|row| &row[..v.rows()]);
    for key in 0..v.rows() {
        let lanes = &s.split(v.row(key)).0[lane..lane + N];
        let mut values = [s.splat(0.0); N];
        for j in 0..N {
            values[j] = s.load(&lanes[j]);
        }
        for i in 0..M {
            let weight = s.splat(weights[i][key]);
            for j in 0..N {
                sums[i][j] = s.mul_add(weight, values[j], sums[i][j]);
            }
        }
    }
    for i in 0..M {
        let (lanes, _) = s.split_mut(out.row_mut(start + i));
        for j in 0..N {
            s.store(sums[i][j], &mut lanes[lane + j]);
        }
    }
}

#[inline(always)]
fn add_last_columns<S: Simd, const M: usize>(
    s: S,
    weights: [&[f32]; M],
    v: Matrix<'_>,
    start: usize,
    out: &mut MatrixMut<'_>,
) {
    let mut sums = [s.splat(0.0); M];
    for i in 0..M {
        sums[i] = s.load_partial(s.split(out.row(start + i)).1);
    }
    for key in 0..v.rows() {
        let value = s.load_partial(s.split(v.row(key)).1);
        for i in 0..M {
            sums[i] = s.mul_add(s.splat(weights[i][key]), value, sums[i]);
        }
    }
    for i in 0..M {
        s.store_partial(sums[i], s.split_mut(out.row_mut(start + i)).1);
    }
}
