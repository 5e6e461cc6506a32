//! Keys and values of one call, copied into the order in which attention reads them.

use crate::{
    Kernels,
    arch::{MatrixMut, Simd, Task},
    kv_cache::{HeadKv, LANES, NumbersView, Pieces},
    matrix::Matrix,
};

/// Keys and values of several groups (sequences or media), packed for every head.
pub(crate) struct PackedKv<'a> {
    /// For each group, for each head: keys `[panels, head_dim, 16]`, then values `[16 * panels, padded_dim]`.
    data: &'a [f32],
    /// First element, and keys, of each group.
    groups: &'a [(usize, usize)],
    head_dim: usize,
}

impl PackedKv<'_> {
    /// Keys of a group.
    pub(crate) fn n_keys(&self, group: usize) -> usize {
        self.groups[group].1
    }

    /// Keys and values of one head of a group.
    pub(crate) fn head(&self, group: usize, head: usize) -> HeadKv<'_> {
        let (start, n_keys) = self.groups[group];
        let (k_len, v_len) = head_lens(n_keys, self.head_dim);
        let data = &self.data[start + head * (k_len + v_len)..][..k_len + v_len];
        let (k, v) = data.split_at(k_len);
        HeadKv {
            pieces: Pieces::One { k: NumbersView::F32(k), v: NumbersView::F32(v) },
            head_dim: self.head_dim,
            padded_dim: self.head_dim.next_multiple_of(LANES),
        }
    }
}

/// Elements of the keys and of the values of one head.
fn head_lens(n_keys: usize, head_dim: usize) -> (usize, usize) {
    let tokens = n_keys.next_multiple_of(LANES);
    (tokens * head_dim, tokens * head_dim.next_multiple_of(LANES))
}

impl Kernels {
    /// Calls `body` with keys and values packed. The keys of a group are the rows of its first segment, then of the
    /// second, and so on; k and v `[rows, n_heads * head_dim]`.
    pub(crate) fn with_packed_kv(
        &self,
        groups: &[Vec<(Matrix<'_>, Matrix<'_>)>],
        n_heads: usize,
        head_dim: usize,
        body: impl FnOnce(PackedKv<'_>),
    ) {
        let mut places = Vec::with_capacity(groups.len());
        let mut len = 0;
        for group in groups {
            let n_keys = group.iter().map(|(k, _)| k.rows()).sum();
            let (k_len, v_len) = head_lens(n_keys, head_dim);
            places.push((len, n_keys));
            len += n_heads * (k_len + v_len);
        }
        self.scratch.with(len, |data| {
            for (group, (start, n_keys)) in groups.iter().zip(&places) {
                let (k_len, v_len) = head_lens(*n_keys, head_dim);
                let head_len = k_len + v_len;
                if head_len == 0 {
                    continue;
                }
                let rows =
                    MatrixMut::new(&mut data[*start..][..n_heads * head_len], n_heads, head_len);
                let starts: Vec<usize> = (0..n_heads).collect();
                self.pool.run_tiles(rows, &starts, head_len, &|head, _, mut tile| {
                    let (k, v) = tile.row_mut(0).split_at_mut(k_len);
                    self.token.run(PackHead { segments: group, head, head_dim, k, v });
                });
            }
            body(PackedKv { data, groups: &places, head_dim });
        });
    }
}

/// Packs one head of a group.
struct PackHead<'a, 'b> {
    segments: &'a [(Matrix<'b>, Matrix<'b>)],
    head: usize,
    head_dim: usize,
    k: &'a mut [f32],
    v: &'a mut [f32],
}

impl Task for PackHead<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (head_dim, padded_dim) = (self.head_dim, self.head_dim.next_multiple_of(LANES));
        let columns = self.head * head_dim..(self.head + 1) * head_dim;
        let mut token = 0;
        for (k, v) in self.segments {
            for i in 0..k.rows() {
                let (k, v) = (&k.row(i)[columns.clone()], &v.row(i)[columns.clone()]);
                let panel = &mut self.k[token / LANES * head_dim * LANES..][..head_dim * LANES];
                for (place, value) in panel[token % LANES..].iter_mut().step_by(LANES).zip(k) {
                    *place = *value;
                }
                let (row, padding) =
                    self.v[token * padded_dim..][..padded_dim].split_at_mut(head_dim);
                row.copy_from_slice(v);
                padding.fill(0.0);
                token += 1;
            }
        }
    }
}
