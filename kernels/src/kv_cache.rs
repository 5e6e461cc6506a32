//! Keys and values in the order in which attention reads them: of the decoder's own tokens, and for one call of others.
//!
//! Keys lie in panels of 16, `[n_kv_heads, tokens / 16, head_dim, 16]`, so that one vector holds an element of 16 keys
//! and scores need no sums across lanes. Values lie in rows, `[n_kv_heads, tokens, head_dim]`, each padded to a multiple
//! of 16 columns. A cache is a table of blocks of tokens, which forks of a sequence share until one of them writes.

mod numbers;

use std::ops::Range;
use std::sync::Arc;

use crate::matrix::Matrix;
pub use numbers::KvFormat;
use numbers::Numbers;
pub(crate) use numbers::{Line, NumbersView};

/// Keys of a panel, and the columns that rows of values are padded to a multiple of.
pub(crate) const LANES: usize = KV_SLOTS;

/// Keys of a panel: tokens of a medium are padded to a multiple of it.
pub const KV_SLOTS: usize = 16;

/// Tokens of a block of a cache: four panels, so that attention scores a block in one go, and a fifth of its softmax
/// block. Smaller ones would make more pieces of each pass; larger ones cost more to copy when a fork first writes.
pub const KV_BLOCK: usize = 64;

/// Keys and values of one head, as attention reads them: in one piece, or in blocks of tokens.
#[derive(Clone, Copy)]
pub(crate) struct HeadKv<'a> {
    pub(crate) pieces: Pieces<'a>,
    pub(crate) head_dim: usize,
    /// Columns of a row of values, a multiple of 16.
    pub(crate) padded_dim: usize,
}

/// Where the numbers of a head lie.
#[derive(Clone, Copy)]
pub(crate) enum Pieces<'a> {
    /// In f32: keys `[panels, head_dim, 16]` and values `[tokens, padded_dim]`.
    One { k: NumbersView<'a>, v: NumbersView<'a> },
    /// The blocks of a cache, and the head.
    Blocks { cache: &'a KvCache, head: usize },
}

/// Consecutive keys and values of a head that lie together.
#[derive(Clone)]
pub(crate) struct Piece<'a> {
    /// Which keys.
    pub(crate) keys: Range<usize>,
    /// From the first key's panel on, `[panels, head_dim, 16]`.
    pub(crate) k: NumbersView<'a>,
    /// From the first key on, `[tokens, padded_dim]`.
    pub(crate) v: NumbersView<'a>,
}

impl<'a> HeadKv<'a> {
    /// How the numbers are stored.
    pub(crate) fn format(&self) -> KvFormat {
        match self.pieces {
            Pieces::One { .. } => KvFormat::F32,
            Pieces::Blocks { cache, .. } => cache.shape.format,
        }
    }

    /// The keys of a range, piece by piece; it starts with a panel.
    pub(crate) fn pieces(&self, keys: Range<usize>) -> impl Iterator<Item = Piece<'a>> {
        let (kv, mut start) = (*self, keys.start);
        std::iter::from_fn(move || {
            (start < keys.end).then(|| {
                let piece = kv.piece(start..keys.end);
                start = piece.keys.end;
                piece
            })
        })
    }

    /// The first piece of a range of keys.
    fn piece(&self, keys: Range<usize>) -> Piece<'a> {
        let (block, first, keys) = match self.pieces {
            Pieces::One { k, v } => ((k, v), keys.start, keys),
            Pieces::Blocks { cache, head } => {
                let block = keys.start / cache.shape.block_len;
                let first = block * cache.shape.block_len;
                let end = keys.end.min(first + cache.shape.block_len);
                (cache.blocks[block].head(head), keys.start - first, keys.start..end)
            }
        };
        Piece {
            k: block.0.skip(first / LANES * self.head_dim * LANES, first),
            v: block.1.skip(first * self.padded_dim, first),
            keys,
        }
    }
}

/// What a block holds; its slots are `[n_kv_heads, block_len]`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Shape {
    format: KvFormat,
    n_kv_heads: usize,
    head_dim: usize,
    /// Tokens of a block, a multiple of 16.
    block_len: usize,
}

impl Shape {
    /// Columns of a row of values.
    fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// First element of a key.
    fn k_start(&self, slot: usize) -> usize {
        slot / LANES * LANES * self.head_dim + slot % LANES
    }

    /// First element of a value.
    fn v_start(&self, slot: usize) -> usize {
        slot * self.padded_dim()
    }
}

/// Keys and values of some tokens of one layer, all heads: the unit in which caches share memory.
#[derive(Clone, Debug, PartialEq)]
struct Block {
    shape: Shape,
    /// `[n_kv_heads, block_len / 16, head_dim, 16]`
    k: Numbers,
    /// `[n_kv_heads, block_len, padded_dim]`
    v: Numbers,
}

impl Block {
    fn empty(shape: Shape) -> Block {
        let size = |columns: usize| {
            let slots = shape.n_kv_heads.checked_mul(shape.block_len)?;
            Some((slots.checked_mul(columns)?, slots))
        };
        let sizes = size(shape.head_dim).zip(size(shape.padded_dim()));
        let ((k, n_slots), (v, _)) = sizes.expect("block size fits the address space");
        let numbers = |n_elements| Numbers::new(shape.format, n_elements, n_slots);
        Block { shape, k: numbers(k), v: numbers(v) }
    }

    fn bytes(&self) -> usize {
        self.k.bytes() + self.v.bytes()
    }

    /// Writes rows of k and v, `[m, n_kv_heads * head_dim]`, from the token `first` on.
    fn write(&mut self, first: usize, k: Matrix<'_>, v: Matrix<'_>) {
        let Shape { n_kv_heads, head_dim, block_len, .. } = self.shape;
        for head in 0..n_kv_heads {
            let columns = head * head_dim..(head + 1) * head_dim;
            for i in 0..k.rows() {
                let slot = head * block_len + first + i;
                let (k_start, v_start) = (self.shape.k_start(slot), self.shape.v_start(slot));
                self.k.write(&k.row(i)[columns.clone()], k_start, LANES, slot);
                self.v.write(&v.row(i)[columns.clone()], v_start, 1, slot);
            }
        }
    }

    /// Keys and values of one head.
    fn head(&self, head: usize) -> (NumbersView<'_>, NumbersView<'_>) {
        let Shape { head_dim, block_len, .. } = self.shape;
        let slot = head * block_len;
        let (k_len, v_len) = (block_len * head_dim, self.shape.v_start(block_len));
        (
            self.k.view(self.shape.k_start(slot), k_len, slot, block_len),
            self.v.view(self.shape.v_start(slot), v_len, slot, block_len),
        )
    }
}

/// A block of a cache, held so that other caches can have it too.
#[derive(Clone, Debug)]
pub struct SharedBlock(Arc<Block>);

impl SharedBlock {
    /// Memory it holds, in bytes.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// Appends its numbers, keys before values, little-endian, for [`KvCache::block_from_bytes`].
    pub fn append_to(&self, out: &mut Vec<u8>) {
        self.0.k.append_to(out);
        self.0.v.append_to(out);
    }

    /// Tells blocks that exist at the same time apart: equal for the same memory only.
    pub fn id(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}

/// Key and value cache of one layer: k (after rotary embedding) and v of up to `capacity` tokens.
///
/// It is a table of blocks of [`KV_BLOCK`] tokens, each allocated when it is first written. A clone shares them; a write
/// into a block that is shared copies that block first, so that a cache never sees what another writes.
#[derive(Clone, Debug, PartialEq)]
pub struct KvCache {
    shape: Shape,
    capacity: usize,
    blocks: Vec<Arc<Block>>,
}

impl KvCache {
    /// An empty cache for `capacity` tokens, in f32.
    pub fn new(n_kv_heads: usize, head_dim: usize, capacity: usize) -> KvCache {
        KvCache::with_format(n_kv_heads, head_dim, capacity, KvFormat::F32)
    }

    /// An empty cache for `capacity` tokens; it holds no block yet.
    pub fn with_format(
        n_kv_heads: usize,
        head_dim: usize,
        capacity: usize,
        format: KvFormat,
    ) -> KvCache {
        let shape = Shape { format, n_kv_heads, head_dim, block_len: KV_BLOCK };
        KvCache { shape, capacity, blocks: Vec::with_capacity(capacity.div_ceil(KV_BLOCK)) }
    }

    /// A full cache of rows of k and v, both `[len, n_kv_heads * head_dim]`, in one block: what cross-attention reads of
    /// a medium.
    ///
    /// # Panics
    /// If the shapes disagree, or the columns are not those of whole heads.
    pub fn from_rows(n_kv_heads: usize, k: Matrix<'_>, v: Matrix<'_>, format: KvFormat) -> KvCache {
        assert_eq!((k.rows(), k.cols()), (v.rows(), v.cols()), "cache: shapes of k and v");
        assert!(n_kv_heads > 0 && k.cols().is_multiple_of(n_kv_heads), "cache: heads");
        let mut cache = KvCache::with_format(n_kv_heads, k.cols() / n_kv_heads, k.rows(), format);
        cache.shape.block_len = k.rows().next_multiple_of(LANES).max(LANES);
        cache.write(0, k, v);
        cache
    }

    /// How its numbers are stored.
    pub fn format(&self) -> KvFormat {
        self.shape.format
    }

    /// Key and value heads.
    pub fn n_kv_heads(&self) -> usize {
        self.shape.n_kv_heads
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.shape.head_dim
    }

    /// Tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Memory of its blocks, in bytes; blocks that other caches hold too count in full.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(|block| block.bytes()).sum()
    }

    /// A block, shared; block `i` of a cache that was not made of rows holds the tokens from `i *` [`KV_BLOCK`] on.
    pub fn share(&self, block_idx: usize) -> Option<SharedBlock> {
        self.blocks.get(block_idx).cloned().map(SharedBlock)
    }

    /// A block of this cache's shape, taken off `bytes` as [`SharedBlock::append_to`] wrote it; `None` if there are too few.
    pub fn block_from_bytes(&self, bytes: &mut &[u8]) -> Option<SharedBlock> {
        let mut block = Block::empty(self.shape);
        let is_whole = block.k.fill_from(bytes) && block.v.fill_from(bytes);
        is_whole.then(|| SharedBlock(Arc::new(block)))
    }

    /// Takes blocks of another cache as its own first ones, and forgets what it held.
    ///
    /// # Panics
    /// If the other cache has other heads, another format or blocks of another size.
    pub fn adopt(&mut self, blocks: &[SharedBlock]) {
        let fits = |block: &SharedBlock| block.0.shape == self.shape;
        assert!(blocks.iter().all(fits), "cache: blocks of another cache");
        self.blocks.clear();
        self.blocks.extend(blocks.iter().map(|block| Arc::clone(&block.0)));
    }

    /// Forgets the tokens of its first block: those that follow move to the front.
    pub fn forget_first_block(&mut self) {
        self.blocks.drain(..self.blocks.len().min(1));
    }

    /// Forgets the tokens from `len` on. Blocks of its own stay for the next tokens; shared ones are let go.
    pub fn truncate(&mut self, len: usize) {
        let n_kept = len.div_ceil(self.shape.block_len).min(self.blocks.len());
        let mut at = 0;
        self.blocks.retain_mut(|block| {
            at += 1;
            at <= n_kept || Arc::get_mut(block).is_some()
        });
    }

    /// Keys of the first `len` tokens, `[n_kv_heads, len, head_dim]`; zeros where none was written.
    ///
    /// # Panics
    /// If `len` exceeds the capacity.
    pub fn keys(&self, len: usize) -> Vec<f32> {
        self.read(len, |block, slot, col| {
            block.k.read(self.shape.k_start(slot) + col * LANES, slot)
        })
    }

    /// Values of the first `len` tokens, `[n_kv_heads, len, head_dim]`; zeros where none was written.
    ///
    /// # Panics
    /// If `len` exceeds the capacity.
    pub fn values(&self, len: usize) -> Vec<f32> {
        self.read(len, |block, slot, col| block.v.read(self.shape.v_start(slot) + col, slot))
    }

    /// Keys of all tokens as [`KvCache::from_rows`] took them, `[capacity, n_kv_heads * head_dim]`.
    pub fn key_rows(&self) -> Vec<f32> {
        self.rows_from_heads(&self.keys(self.capacity))
    }

    /// Values of all tokens as [`KvCache::from_rows`] took them, `[capacity, n_kv_heads * head_dim]`.
    pub fn value_rows(&self) -> Vec<f32> {
        self.rows_from_heads(&self.values(self.capacity))
    }

    fn rows_from_heads(&self, heads: &[f32]) -> Vec<f32> {
        let (len, head_dim) = (self.capacity, self.shape.head_dim);
        let part =
            |token: usize, head: usize| &heads[(head * len + token) * head_dim..][..head_dim];
        let row = |token| (0..self.shape.n_kv_heads).flat_map(move |head| part(token, head));
        (0..len).flat_map(row).copied().collect()
    }

    fn read(&self, len: usize, element: impl Fn(&Block, usize, usize) -> f32) -> Vec<f32> {
        assert!(len <= self.capacity, "cache: {len} tokens of {}", self.capacity);
        let mut out = Vec::with_capacity(self.shape.n_kv_heads * len * self.shape.head_dim);
        for head in 0..self.shape.n_kv_heads {
            for token in 0..len {
                let block = self.blocks.get(token / self.shape.block_len);
                let slot = head * self.shape.block_len + token % self.shape.block_len;
                let number = |col| block.map_or(0.0, |block| element(block, slot, col));
                out.extend((0..self.shape.head_dim).map(number));
            }
        }
        out
    }

    /// Overwrites the first tokens: k and v `[n_kv_heads, len, head_dim]`.
    ///
    /// # Panics
    /// If a length differs or exceeds the capacity.
    pub fn write_heads(&mut self, len: usize, k: &[f32], v: &[f32]) {
        let n_elements = self.shape.n_kv_heads * len * self.shape.head_dim;
        assert!(k.len() == n_elements && v.len() == n_elements, "cache: shapes of k and v");
        let row = |head: usize, token: usize| (head * len + token) * self.shape.head_dim;
        let rows = |data: &[f32]| -> Vec<f32> {
            let of_token = |token| (0..self.shape.n_kv_heads).map(move |head| row(head, token));
            let starts = (0..len).flat_map(of_token);
            starts.flat_map(|start| data[start..start + self.shape.head_dim].to_vec()).collect()
        };
        let (k, v, width) = (rows(k), rows(v), self.shape.n_kv_heads * self.shape.head_dim);
        self.write(0, Matrix::new(&k, len, width), Matrix::new(&v, len, width));
    }

    /// Writes rows of k and v, `[m, n_kv_heads * head_dim]`, at token `past_len`; the tokens from there on are forgotten.
    ///
    /// # Panics
    /// If the rows exceed the capacity or leave a gap.
    pub(crate) fn write(&mut self, past_len: usize, k: Matrix<'_>, v: Matrix<'_>) {
        let end = past_len + k.rows();
        assert!(end <= self.capacity, "cache: {end} tokens of {}", self.capacity);
        let mut token = past_len;
        while token < end {
            let (block_idx, first) = (token / self.shape.block_len, token % self.shape.block_len);
            let n_rows = (self.shape.block_len - first).min(end - token);
            let row = token - past_len;
            let (k, v) = (k.row_range(row..row + n_rows), v.row_range(row..row + n_rows));
            self.own_block(block_idx, first).write(first, k, v);
            token += n_rows;
        }
    }

    /// A block that is this cache's alone: a new one, or a copy of a shared one that keeps the tokens before `first`.
    fn own_block(&mut self, block_idx: usize, first: usize) -> &mut Block {
        assert!(block_idx <= self.blocks.len(), "cache: a gap before block {block_idx}");
        if block_idx == self.blocks.len() {
            self.blocks.push(Arc::new(Block::empty(self.shape)));
        }
        let block = &mut self.blocks[block_idx];
        if first == 0 && Arc::get_mut(block).is_none() {
            *block = Arc::new(Block::empty(self.shape));
        }
        Arc::make_mut(block)
    }

    /// Keys and values of one head.
    pub(crate) fn head(&self, head: usize) -> HeadKv<'_> {
        assert!(head < self.shape.n_kv_heads);
        HeadKv {
            pieces: Pieces::Blocks { cache: self, head },
            head_dim: self.shape.head_dim,
            padded_dim: self.shape.padded_dim(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_in_every_format() {
        for format in KvFormat::ALL {
            let (n_kv_heads, head_dim, len) = (3, 5, 19);
            let mut cache = KvCache::with_format(n_kv_heads, head_dim, len, format);
            let n_elements = n_kv_heads * len * head_dim;
            let k: Vec<f32> = (0..n_elements).map(|i| (i as f32).sin()).collect();
            let v: Vec<f32> = (0..n_elements).map(|i| (i as f32).cos()).collect();
            cache.write_heads(len, &k, &v);
            let bound = match format {
                KvFormat::F32 => 0.0,
                KvFormat::F16 => 5e-4,
                KvFormat::Int8 => 5e-3,
            };
            for (read, written) in [(cache.keys(len), k), (cache.values(len), v)] {
                let errors = read.iter().zip(&written).map(|(a, b)| (a - b).abs());
                assert!(errors.fold(0.0, f32::max) <= bound, "{format}");
            }
            assert_eq!(cache.capacity(), len);
            let mut bytes = Vec::new();
            cache.share(0).unwrap().append_to(&mut bytes);
            assert!(cache.block_from_bytes(&mut &bytes[..bytes.len() - 1]).is_none());
            let mut rest = bytes.as_slice();
            let block = cache.block_from_bytes(&mut rest).unwrap();
            let mut again = KvCache::with_format(n_kv_heads, head_dim, len, format);
            again.adopt(&[block]);
            assert!(rest.is_empty() && again == cache, "{format}");
            let rows: Vec<f32> = (0..len * 15).map(|i| (i as f32).sin()).collect();
            let rows = Matrix::new(&rows, len, 15);
            let full = KvCache::from_rows(n_kv_heads, rows, rows, format);
            assert_eq!((full.capacity(), full.head_dim()), (len, head_dim));
            for read in [full.key_rows(), full.value_rows()] {
                let errors = read.iter().zip(rows.row(0)).map(|(a, b)| (a - b).abs());
                assert!(read.len() == len * 15 && errors.fold(0.0, f32::max) <= bound, "{format}");
            }
            assert_eq!(full.bytes(), 32 * format.token_bytes(n_kv_heads, head_dim));
            assert_eq!(cache.bytes(), KV_BLOCK * format.token_bytes(n_kv_heads, head_dim));
        }
    }
}
