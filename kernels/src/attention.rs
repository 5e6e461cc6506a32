//! Bidirectional multi-head attention, and the block of query rows that every form of attention is made of.
#![expect(
    clippy::needless_range_loop,
    reason = "register tiles: several arrays walk by one index, and constant bounds unroll"
)]

use std::ops::Range;

use crate::{
    Kernels,
    arch::{MatrixMut, Simd, Task},
    kv_cache::{HeadKv, KvFormat, LANES, Line, Piece},
    math,
    matrix::Matrix,
    scratch::Scratch,
};

/// Query rows of one task: enough to use each key from the first-level cache several times.
pub(crate) const QUERY_ROWS: usize = 24;

/// Keys whose scores are held at once: all of a picture's tokens, so that vision needs one block. Blocks start at
/// multiples of it, so that a row's sums do not depend on the rows beside it. It is five blocks of a cache.
const KEY_BLOCK: usize = 320;

impl Kernels {
    /// `softmax(scale q kᵀ) v` for each head of `n_groups` independent sequences.
    ///
    /// q and out `[n_groups * q_len, n_heads * head_dim]`; each segment's k and v `[n_groups * segment_len,
    /// n_heads * head_dim]`. The keys of a group are its rows of the first segment, then of the second, and so on
    /// (Perceiver: media, then latents). No keys at all give zero rows.
    ///
    /// # Panics
    /// If the shapes disagree.
    pub fn attention(
        &self,
        q: Matrix<'_>,
        segments: &[(Matrix<'_>, Matrix<'_>)],
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
        let groups: Vec<Vec<(Matrix<'_>, Matrix<'_>)>> = (0..n_groups)
            .map(|group| segments.iter().map(|&kv| rows_of_group(kv, group, n_groups)).collect())
            .collect();
        self.with_packed_kv(&groups, n_heads, head_dim, |packed| {
            let blocks = blocks_of_groups(n_groups, q_len);
            self.attend_blocks(out, &blocks, head_dim, &|block, head, tile| {
                let columns = head * head_dim..(head + 1) * head_dim;
                self.token.run(AttendBlock {
                    q: q.row_range(block.start..block.end).columns(columns),
                    kv: packed.head(block.group, head),
                    n_keys: packed.n_keys(block.group),
                    scale,
                    first_row_keys: None,
                    alibi: None,
                    scratch: &self.scratch,
                    out: tile,
                });
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

fn rows_of_group<'a>(
    (k, v): (Matrix<'a>, Matrix<'a>),
    group: usize,
    n_groups: usize,
) -> (Matrix<'a>, Matrix<'a>) {
    let len = k.rows() / n_groups;
    let rows = group * len..(group + 1) * len;
    (k.row_range(rows.clone()), v.row_range(rows))
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

/// Attention of one head for a block of query rows, by online softmax over blocks of keys.
///
/// A row's result depends on its own query and the keys it sees only: scores, softmax and weighted sum run over the keys
/// in their order, whatever the other rows of the block.
pub(crate) struct AttendBlock<'a> {
    /// `[rows, head_dim]`
    pub(crate) q: Matrix<'a>,
    /// Keys and values of the head.
    pub(crate) kv: HeadKv<'a>,
    /// Keys that there are.
    pub(crate) n_keys: usize,
    /// Factor of the scores.
    pub(crate) scale: f32,
    /// Causal: keys seen by the first row, each next row one more. None: every row sees all.
    pub(crate) first_row_keys: Option<usize>,
    /// Linear position bias.
    pub(crate) alibi: Option<Alibi>,
    /// Memory to work in.
    pub(crate) scratch: &'a Scratch<f32>,
    /// `[rows, head_dim]`
    pub(crate) out: MatrixMut<'a>,
}

/// What a block of rows has summed so far.
struct Running<'a> {
    /// Scores, then weights, of one block of keys, `[rows, KEY_BLOCK]`.
    weights: &'a mut [f32],
    /// Weighted sums of values, `[rows, padded_dim]`.
    sums: &'a mut [f32],
    /// Largest score of each row, `[rows]`.
    largest: &'a mut [f32],
    /// Sum of the weights of each row, `[rows]`.
    totals: &'a mut [f32],
}

impl Task for AttendBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        struct Work<'a, 'b>(AttendBlock<'a>, &'b mut [f32]);
        impl Task for Work<'_, '_> {
            type Output = ();

            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                self.0.attend(s, self.1);
            }
        }
        let len = self.q.rows() * (KEY_BLOCK + self.kv.padded_dim + 2);
        self.scratch.with(len, |memory| s.run(Work(self, memory)));
    }
}

impl AttendBlock<'_> {
    #[inline(always)]
    fn attend<S: Simd>(mut self, s: S, memory: &mut [f32]) {
        let n_rows = self.q.rows();
        let (weights, rest) = memory.split_at_mut(n_rows * KEY_BLOCK);
        let (sums, rest) = rest.split_at_mut(n_rows * self.kv.padded_dim);
        let (largest, totals) = rest.split_at_mut(n_rows);
        sums.fill(0.0);
        largest.fill(f32::NEG_INFINITY);
        totals.fill(0.0);
        let mut running = Running { weights, sums, largest, totals };
        match self.kv.format() {
            KvFormat::F32 => self.attend_keys::<S, [f32; LANES]>(s, &mut running),
            KvFormat::F16 => self.attend_keys::<S, [u16; LANES]>(s, &mut running),
            KvFormat::Int8 => self.attend_keys::<S, [i8; LANES]>(s, &mut running),
        }
        self.write_out(s, &mut running);
    }

    /// Over all keys: softmax block by block, each in the pieces in which its keys and values lie.
    #[inline(always)]
    fn attend_keys<S: Simd, L: Line>(&self, s: S, running: &mut Running<'_>) {
        let n_rows = self.q.rows();
        let n_keys = self.n_visible(n_rows.saturating_sub(1));
        for start in (0..n_keys).step_by(KEY_BLOCK) {
            let keys = start..n_keys.min(start + KEY_BLOCK);
            for piece in self.kv.pieces(keys.clone()) {
                self.write_scores::<S, L>(s, &piece, start, running.weights);
            }
            for row in 0..n_rows {
                self.weigh(s, row, keys.clone(), running);
            }
            for piece in self.kv.pieces(keys) {
                if let Some(scales) = piece.v.scales() {
                    self.scale_weights(s, &piece, scales, start, running.weights);
                }
                for rows in tiles_of_rows::<S>(n_rows) {
                    self.sum_values::<S, L>(s, &piece, start, rows, running);
                }
            }
        }
    }

    /// Keys that a row sees.
    #[inline(always)]
    fn n_visible(&self, row: usize) -> usize {
        self.first_row_keys.map_or(self.n_keys, |first| self.n_keys.min(first + row))
    }

    /// Keys of a range that a row sees.
    #[inline(always)]
    fn n_visible_of(&self, row: usize, keys: &Range<usize>) -> usize {
        self.n_visible(row).clamp(keys.start, keys.end) - keys.start
    }

    /// `scores = q kᵀ`, whole panels of keys; scores count from key `first_key`.
    #[inline(always)]
    fn write_scores<S: Simd, L: Line>(
        &self,
        s: S,
        piece: &Piece<'_>,
        first_key: usize,
        scores: &mut [f32],
    ) {
        let panels = Panels {
            k: L::lines(piece.k),
            scales: piece.k.scales(),
            n_panels: piece.keys.len().div_ceil(LANES),
            first: (piece.keys.start - first_key) / LANES,
        };
        let n_rows = self.q.rows();
        let mut row = 0;
        while row < n_rows {
            row += match (n_rows - row, S::IS_WIDE) {
                (8.., true) => self.score_tile::<S, L, 8, 2>(s, panels, row, scores),
                (4.., true) => self.score_tile::<S, L, 4, 4>(s, panels, row, scores),
                (4.., false) => self.score_tile::<S, L, 4, 1>(s, panels, row, scores),
                (2.., true) => self.score_tile::<S, L, 2, 4>(s, panels, row, scores),
                (2.., false) => self.score_tile::<S, L, 2, 2>(s, panels, row, scores),
                (_, true) => self.score_tile::<S, L, 1, 4>(s, panels, row, scores),
                (_, false) => self.score_tile::<S, L, 1, 2>(s, panels, row, scores),
            };
        }
    }

    /// Scores of `M` rows from `first_row` on, `P` panels at a time; returns `M`.
    #[inline(always)]
    fn score_tile<S: Simd, L: Line, const M: usize, const P: usize>(
        &self,
        s: S,
        panels: Panels<'_, L>,
        first_row: usize,
        scores: &mut [f32],
    ) -> usize {
        let head_dim = self.kv.head_dim;
        let mut q = [&self.q.row(first_row)[..head_dim]; M];
        for i in 0..M {
            q[i] = &self.q.row(first_row + i)[..head_dim];
        }
        for start in (0..panels.n_panels).step_by(P) {
            let mut sums = [[s.wide_splat(0.0); P]; M];
            let mut lines = [&panels.k[..head_dim]; P];
            for p in 0..P {
                let panel = (start + p).min(panels.n_panels - 1);
                lines[p] = &panels.k[panel * head_dim..][..head_dim];
            }
            for col in 0..head_dim {
                let mut k = [s.wide_splat(0.0); P];
                for p in 0..P {
                    k[p] = lines[p][col].load(s);
                }
                for i in 0..M {
                    let q = s.wide_splat(q[i][col]);
                    for p in 0..P {
                        sums[i][p] = s.wide_mul_add(q, k[p], sums[i][p]);
                    }
                }
            }
            for p in 0..P.min(panels.n_panels - start) {
                let scales = panels.scales.map(|scales| &scales.as_chunks().0[start + p]);
                for i in 0..M {
                    let mut sums = sums[i][p];
                    if let Some(scales) = scales {
                        sums = s.wide_mul(sums, s.wide_load(scales));
                    }
                    let at = (first_row + i) * KEY_BLOCK / LANES + panels.first + start + p;
                    s.wide_store(sums, &mut scores.as_chunks_mut().0[at]);
                }
            }
        }
        M
    }

    /// Scores of one row to weights, and what the row has summed so far brought to their scale.
    #[inline(always)]
    fn weigh<S: Simd>(&self, s: S, row: usize, keys: Range<usize>, running: &mut Running<'_>) {
        let visible = self.n_visible_of(row, &keys);
        if visible == 0 {
            return;
        }
        let weights = &mut running.weights[row * KEY_BLOCK..][..visible];
        match self.alibi {
            None => math::scale_in_place(s, weights, self.scale),
            Some(alibi) => {
                let position = (alibi.first_position + row) as f32;
                let keys = keys.start..keys.start + visible;
                for (score, key) in weights.iter_mut().zip(keys) {
                    *score = *score * self.scale - alibi.slope * (position - key as f32);
                }
            }
        }
        let before = running.largest[row];
        let largest = math::largest(s, weights).max(before);
        let total = math::exp_and_sum(s, weights, largest);
        running.largest[row] = largest;
        running.totals[row] = match keys.start {
            0 => total,
            _ => {
                let fade = (before - largest).exp();
                let sums = &mut running.sums[row * self.kv.padded_dim..][..self.kv.padded_dim];
                math::scale_in_place(s, sums, fade);
                running.totals[row] * fade + total
            }
        };
    }

    /// Weights of a piece's keys times the scales of its values; weights count from `first_key`.
    #[inline(always)]
    fn scale_weights<S: Simd>(
        &self,
        s: S,
        piece: &Piece<'_>,
        scales: &[f32],
        first_key: usize,
        weights: &mut [f32],
    ) {
        for row in 0..self.q.rows() {
            let visible = self.n_visible_of(row, &piece.keys);
            let start = row * KEY_BLOCK + piece.keys.start - first_key;
            math::multiply_in_place(s, &mut weights[start..start + visible], &scales[..visible]);
        }
    }

    /// `sums += weights v` for the rows of one tile: together over the keys of a piece that all of them see, then one by
    /// one. Weights count from `first_key`.
    #[inline(always)]
    fn sum_values<S: Simd, L: Line>(
        &self,
        s: S,
        piece: &Piece<'_>,
        first_key: usize,
        rows: Range<usize>,
        running: &mut Running<'_>,
    ) {
        let values = Values {
            v: L::lines(piece.v),
            n_lines: self.kv.padded_dim / LANES,
            first_weight: piece.keys.start - first_key,
        };
        let common = 0..self.n_visible_of(rows.start, &piece.keys);
        match (rows.len(), S::IS_WIDE) {
            (6, _) => values.add::<S, 6>(s, rows.start, common.clone(), running),
            (4, _) => values.add::<S, 4>(s, rows.start, common.clone(), running),
            (2, _) => values.add::<S, 2>(s, rows.start, common.clone(), running),
            (_, _) => values.add::<S, 1>(s, rows.start, common.clone(), running),
        }
        for row in rows.start + 1..rows.end {
            let rest = common.end..self.n_visible_of(row, &piece.keys);
            values.add::<S, 1>(s, row, rest, running);
        }
    }

    #[inline(always)]
    fn write_out<S: Simd>(&mut self, s: S, running: &mut Running<'_>) {
        let (padded_dim, head_dim) = (self.kv.padded_dim, self.kv.head_dim);
        for row in 0..self.q.rows() {
            let sums = &mut running.sums[row * padded_dim..][..head_dim];
            if self.n_visible(row) > 0 {
                math::scale_in_place(s, sums, 1.0 / running.totals[row]);
            }
            self.out.row_mut(row).copy_from_slice(sums);
        }
    }
}

/// Panels of keys of one piece.
#[derive(Clone, Copy)]
struct Panels<'a, L> {
    /// `[n_panels, head_dim]`, and more.
    k: &'a [L],
    /// Scales of the keys, if they have them.
    scales: Option<&'a [f32]>,
    n_panels: usize,
    /// Place of the first panel's scores in a row of them.
    first: usize,
}

/// Values of one piece.
struct Values<'a, L> {
    /// `[keys, n_lines]`, and more.
    v: &'a [L],
    n_lines: usize,
    /// Place of the first key's weight in a row of them.
    first_weight: usize,
}

impl<L: Line> Values<'_, L> {
    /// Adds the weighted values of some of the piece's keys to `M` rows of the sums.
    #[inline(always)]
    fn add<S: Simd, const M: usize>(
        &self,
        s: S,
        first_row: usize,
        keys: Range<usize>,
        running: &mut Running<'_>,
    ) {
        if keys.is_empty() {
            return;
        }
        let mut line = 0;
        while line < self.n_lines {
            line += match (self.n_lines - line, S::IS_WIDE) {
                (4.., true) => self.add_lines::<S, M, 4>(s, first_row, keys.clone(), line, running),
                (2.., _) => self.add_lines::<S, M, 2>(s, first_row, keys.clone(), line, running),
                (_, _) => self.add_lines::<S, M, 1>(s, first_row, keys.clone(), line, running),
            };
        }
    }

    /// `sums += weights v` for `M` rows and the columns of `N` lines from `line` on; returns `N`.
    #[inline(always)]
    fn add_lines<S: Simd, const M: usize, const N: usize>(
        &self,
        s: S,
        first_row: usize,
        keys: Range<usize>,
        line: usize,
        running: &mut Running<'_>,
    ) -> usize {
        let first_weight = self.first_weight + keys.start;
        let mut weights = [&running.weights[..0]; M];
        for i in 0..M {
            weights[i] =
                &running.weights[(first_row + i) * KEY_BLOCK + first_weight..][..keys.len()];
        }
        let v = &self.v[keys.start * self.n_lines..keys.end * self.n_lines];
        let place = |i: usize, j: usize| (first_row + i) * self.n_lines + line + j;
        let lines = running.sums.as_chunks_mut().0;
        let mut sums = [[s.wide_splat(0.0); N]; M];
        for i in 0..M {
            for j in 0..N {
                sums[i][j] = s.wide_load(&lines[place(i, j)]);
            }
        }
        for (key, row) in v.chunks_exact(self.n_lines).enumerate() {
            let row = &row[line..line + N];
            let mut values = [s.wide_splat(0.0); N];
            for j in 0..N {
                values[j] = row[j].load(s);
            }
            for i in 0..M {
                let weight = s.wide_splat(weights[i][key]);
                for j in 0..N {
                    sums[i][j] = s.wide_mul_add(weight, values[j], sums[i][j]);
                }
            }
        }
        for i in 0..M {
            for j in 0..N {
                s.wide_store(sums[i][j], &mut lines[place(i, j)]);
            }
        }
        N
    }
}

/// Cuts the rows of a block into tiles whose sums fit the registers.
#[inline(always)]
fn tiles_of_rows<S: Simd>(n_rows: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let len = match (n_rows - start, S::IS_WIDE) {
            (0, _) => return None,
            (6.., true) => 6,
            (4.., true) => 4,
            (2.., _) => 2,
            (_, _) => 1,
        };
        start += len;
        Some(start - len..start)
    })
}
