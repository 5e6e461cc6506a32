//! Causal self-attention of the decoder over its key and value cache.

use crate::{
    Kernels,
    arch::MatrixMut,
    attention::{Alibi, AttendBlock, push_blocks},
    kv_cache::KvCache,
    matrix::Matrix,
    rotary::Rotary,
};

/// How positions enter self-attention.
#[derive(Clone, Debug, PartialEq)]
pub enum Position {
    /// Not here (learned embeddings, added before).
    None,
    /// Linear biases: `-slope * (query_position - key_position)` is added to the scaled score.
    Alibi {
        /// One for each query head, `[n_heads]`.
        slopes: Vec<f32>,
    },
    /// Rotary embedding of q and k, half-split form.
    Rotary {
        /// Leading elements of a head that are rotated; even, at most `head_dim`.
        n_dims: usize,
        /// Radians per position of each pair, `[n_dims / 2]`.
        inverse_frequencies: Vec<f32>,
    },
}

/// Constants of a self-attention layer.
#[derive(Clone, Debug, PartialEq)]
pub struct SelfAttention {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// How positions enter.
    pub position: Position,
}

impl Kernels {
    /// Appends the new rows to the cache at `past_len`, then attends: row `i` sees the keys `0..=past_len + i`.
    ///
    /// q and out `[m, n_heads * head_dim]`; k and v `[m, n_kv_heads * head_dim]`, before rotary embedding; strided views
    /// of one fused matrix will do. A row's bits do not depend on how many rows are processed together.
    ///
    /// # Panics
    /// If the shapes disagree or the rows do not fit the cache.
    #[expect(
        clippy::too_many_arguments,
        reason = "three inputs, a cache and an output, each with its own shape"
    )]
    pub fn self_attention(
        &self,
        q: Matrix<'_>,
        k: Matrix<'_>,
        v: Matrix<'_>,
        cache: &mut KvCache,
        past_len: usize,
        attributes: &SelfAttention,
        out: MatrixMut<'_>,
    ) {
        attributes.check(q, k, v, cache, past_len, &out);
        match &attributes.position {
            Position::None => {
                cache.write(past_len, k, v);
                self.attend_cache(q, cache, past_len, attributes, None, out);
            }
            Position::Alibi { slopes } => {
                cache.write(past_len, k, v);
                self.attend_cache(q, cache, past_len, attributes, Some(slopes), out);
            }
            Position::Rotary { n_dims, inverse_frequencies } => {
                let rotary = Rotary { n_dims: *n_dims, inverse_frequencies };
                let (mut q_data, mut k_data) =
                    (vec![0.0; q.rows() * q.cols()], vec![0.0; k.rows() * k.cols()]);
                let rotate = |x: Matrix<'_>, data: &mut [f32]| {
                    self.rotate(
                        rotary,
                        attributes.head_dim,
                        past_len,
                        x,
                        MatrixMut::new(data, x.rows(), x.cols()),
                    );
                };
                rotate(k, &mut k_data);
                rotate(q, &mut q_data);
                cache.write(past_len, Matrix::new(&k_data, k.rows(), k.cols()), v);
                let q = Matrix::new(&q_data, q.rows(), q.cols());
                self.attend_cache(q, cache, past_len, attributes, None, out);
            }
        }
    }

    fn attend_cache(
        &self,
        q: Matrix<'_>,
        cache: &KvCache,
        past_len: usize,
        attributes: &SelfAttention,
        slopes: Option<&[f32]>,
        out: MatrixMut<'_>,
    ) {
        let head_dim = attributes.head_dim;
        let heads_per_kv = attributes.n_heads / attributes.n_kv_heads;
        let mut blocks = Vec::new();
        push_blocks(&mut blocks, 0, out.rows(), 0);
        self.attend_blocks(out, &blocks, head_dim, &|block, head, tile| {
            let first_position = past_len + block.start;
            self.token.run(AttendBlock {
                q: q.row_range(block.start..block.end)
                    .columns(head * head_dim..(head + 1) * head_dim),
                kv: cache.head(head / heads_per_kv),
                n_keys: past_len + block.end,
                scale: attributes.scale,
                first_row_keys: Some(first_position + 1),
                alibi: slopes.map(|slopes| Alibi { slope: slopes[head], first_position }),
                scratch: &self.scratch,
                out: tile,
            });
        });
    }
}

impl SelfAttention {
    fn check(
        &self,
        q: Matrix<'_>,
        k: Matrix<'_>,
        v: Matrix<'_>,
        cache: &KvCache,
        past_len: usize,
        out: &MatrixMut<'_>,
    ) {
        let (m, kv_width) = (out.rows(), self.n_kv_heads * self.head_dim);
        assert!(self.head_dim > 0 && self.n_kv_heads > 0, "self-attention: heads");
        assert!(
            self.n_heads.is_multiple_of(self.n_kv_heads),
            "self-attention: query heads per key head"
        );
        assert_eq!(out.cols(), self.n_heads * self.head_dim, "self-attention: columns of out");
        assert_eq!((q.rows(), q.cols()), (m, out.cols()), "self-attention: shape of q");
        assert_eq!((k.rows(), k.cols()), (m, kv_width), "self-attention: shape of k");
        assert_eq!((v.rows(), v.cols()), (m, kv_width), "self-attention: shape of v");
        assert_eq!(
            (cache.n_kv_heads(), cache.head_dim()),
            (self.n_kv_heads, self.head_dim),
            "self-attention: cache"
        );
        let total_len = past_len.checked_add(m);
        assert!(
            total_len.is_some_and(|len| len <= cache.capacity()),
            "self-attention: cache capacity"
        );
        if let Position::Alibi { slopes } = &self.position {
            assert_eq!(slopes.len(), self.n_heads, "self-attention: slopes");
        }
    }
}
