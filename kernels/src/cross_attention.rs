//! Gated cross-attention of text rows to the latents of their own medium.

use crate::{
    Kernels,
    arch::MatrixMut,
    attention::{AttendBlock, RowBlock, push_blocks},
    kv_cache::KvCache,
    matrix::Matrix,
};

impl Kernels {
    /// `softmax(scale q kᵀ) v` where row `r` sees the latents of medium `media_time[r]` only.
    ///
    /// q and out `[m, n_heads * head_dim]`; `media[i]` the keys and values of a medium, all of its latents, as
    /// [`KvCache::from_rows`] makes them; `media_time[r]` counts from 1, and 0 means none: an exactly zero row. Runs of
    /// equal `media_time` are processed together; a row's bits do not depend on them.
    ///
    /// # Panics
    /// If the shapes disagree or a `media_time` exceeds the number of media.
    pub fn cross_attention(
        &self,
        q: Matrix<'_>,
        media: &[&KvCache],
        media_time: &[u32],
        n_heads: usize,
        scale: f32,
        out: MatrixMut<'_>,
    ) {
        let width = out.cols();
        assert_eq!(
            (q.rows(), q.cols()),
            (out.rows(), width),
            "cross-attention: shapes of q and out"
        );
        assert_eq!(media_time.len(), out.rows(), "cross-attention: length of media_time");
        assert!(n_heads > 0 && width.is_multiple_of(n_heads), "cross-attention: heads");
        let head_dim = width / n_heads;
        for cache in media {
            let heads = (cache.n_kv_heads(), cache.head_dim());
            assert_eq!(heads, (n_heads, head_dim), "cross-attention: heads of k and v");
        }
        let media_of_row = |&time: &u32| time as usize;
        assert!(
            media_time.iter().all(|time| media_of_row(time) <= media.len()),
            "cross-attention: media_time"
        );
        let blocks = blocks_of_media(media_time);
        self.attend_blocks(out, &blocks, head_dim, &|block, head, mut tile| {
            let Some(medium) = block.group.checked_sub(1) else {
                return (0..tile.rows()).for_each(|i| tile.row_mut(i).fill(0.0));
            };
            let columns = head * head_dim..(head + 1) * head_dim;
            self.token.run(AttendBlock {
                q: q.row_range(block.start..block.end).columns(columns),
                kv: media[medium].head(head),
                n_keys: media[medium].capacity(),
                scale,
                first_row_keys: None,
                alibi: None,
                scratch: &self.scratch,
                out: tile,
            });
        });
    }
}

/// Runs of equal `media_time`, cut into blocks; the group is the `media_time`.
fn blocks_of_media(media_time: &[u32]) -> Vec<RowBlock> {
    let (mut blocks, mut start) = (Vec::new(), 0);
    for run in media_time.chunk_by(|a, b| a == b) {
        push_blocks(&mut blocks, start, start + run.len(), run[0] as usize);
        start += run.len();
    }
    blocks
}
