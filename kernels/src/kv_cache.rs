//! Keys and values of the decoder's own tokens.

use crate::matrix::Matrix;

/// Key and value cache of one layer: k (after rotary embedding) and v, each `[n_kv_heads, capacity, head_dim]`, f32.
#[derive(Clone, Debug)]
pub struct KvCache {
    n_kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl KvCache {
    /// An empty cache for `capacity` tokens.
    ///
    /// # Panics
    /// If the size overflows; callers bound the capacity before.
    pub fn new(n_kv_heads: usize, head_dim: usize, capacity: usize) -> KvCache {
        let n_elements = n_kv_heads.checked_mul(capacity).and_then(|n| n.checked_mul(head_dim));
        let n_elements = n_elements.expect("cache size fits the address space");
        KvCache {
            n_kv_heads,
            head_dim,
            capacity,
            k: vec![0.0; n_elements],
            v: vec![0.0; n_elements],
        }
    }

    /// Key and value heads.
    pub fn n_kv_heads(&self) -> usize {
        self.n_kv_heads
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Memory it holds, in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(self.k.as_slice()) + size_of_val(self.v.as_slice())
    }

    /// All keys, `[n_kv_heads, capacity, head_dim]`.
    pub fn k(&self) -> &[f32] {
        &self.k
    }

    /// All values, `[n_kv_heads, capacity, head_dim]`.
    pub fn v(&self) -> &[f32] {
        &self.v
    }

    /// Overwrites the cache with raw keys and values, both `[n_kv_heads, capacity, head_dim]`.
    ///
    /// # Panics
    /// If a length differs.
    pub fn copy_from_slices(&mut self, k: &[f32], v: &[f32]) {
        self.k.copy_from_slice(k);
        self.v.copy_from_slice(v);
    }

    /// First `len` keys and values of one head, each `[len, head_dim]`.
    pub(crate) fn head(&self, head: usize, len: usize) -> (Matrix<'_>, Matrix<'_>) {
        let (start, n_elements) = (head * self.capacity * self.head_dim, len * self.head_dim);
        assert!(head < self.n_kv_heads && len <= self.capacity);
        let of = |data| Matrix::new(data, len, self.head_dim);
        (of(&self.k[start..start + n_elements]), of(&self.v[start..start + n_elements]))
    }

    /// Writes rows of k and v, `[m, n_kv_heads * head_dim]`, at token `past_len`.
    pub(crate) fn write(&mut self, past_len: usize, k: Matrix<'_>, v: Matrix<'_>) {
        for head in 0..self.n_kv_heads {
            let columns = head * self.head_dim..(head + 1) * self.head_dim;
            for i in 0..k.rows() {
                let start = (head * self.capacity + past_len + i) * self.head_dim;
                self.k[start..][..self.head_dim].copy_from_slice(&k.row(i)[columns.clone()]);
                self.v[start..][..self.head_dim].copy_from_slice(&v.row(i)[columns.clone()]);
            }
        }
    }
}
