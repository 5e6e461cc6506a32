//! Keys and values in the order in which attention reads them: of the decoder's own tokens, and for one call of others.
//!
//! Keys lie in panels of 16, `[n_kv_heads, capacity / 16, head_dim, 16]`, so that one vector holds an element of 16 keys
//! and scores need no sums across lanes. Values lie in rows, `[n_kv_heads, capacity, head_dim]`, each padded to a
//! multiple of 16 columns.

use std::fmt;

use half::slice::HalfFloatSliceExt;

use crate::{arch::Simd, math, matrix::Matrix};

/// Keys of a panel, and the columns that rows of values are padded to a multiple of.
pub(crate) const LANES: usize = KV_SLOTS;

/// What a cache's tokens are padded to a multiple of.
pub const KV_SLOTS: usize = 16;

/// How cached numbers are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// As computed.
    #[default]
    F32,
    /// IEEE half precision.
    F16,
    /// Signed bytes with one scale for each key and each value of a head: largest magnitude / 127.
    Int8,
}

impl KvFormat {
    /// Every format.
    pub const ALL: [KvFormat; 3] = [KvFormat::F32, KvFormat::F16, KvFormat::Int8];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            KvFormat::F32 => "f32",
            KvFormat::F16 => "f16",
            KvFormat::Int8 => "int8",
        }
    }

    /// The format called `name`.
    pub fn from_name(name: &str) -> Option<KvFormat> {
        KvFormat::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Bytes of keys and values of one token with `n_kv_heads` heads of `head_dim`.
    pub fn token_bytes(self, n_kv_heads: usize, head_dim: usize) -> usize {
        let elements = n_kv_heads * (head_dim + head_dim.next_multiple_of(LANES));
        match self {
            KvFormat::F32 => 4 * elements,
            KvFormat::F16 => 2 * elements,
            KvFormat::Int8 => elements + 8 * n_kv_heads,
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Numbers of keys or of values.
#[derive(Clone, Debug, PartialEq)]
enum Numbers {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Int8 { bytes: Vec<i8>, scales: Vec<f32> },
}

impl Numbers {
    fn new(format: KvFormat, n_elements: usize, n_scales: usize) -> Numbers {
        match format {
            KvFormat::F32 => Numbers::F32(vec![0.0; n_elements]),
            KvFormat::F16 => Numbers::F16(vec![0; n_elements]),
            KvFormat::Int8 => {
                Numbers::Int8 { bytes: vec![0; n_elements], scales: vec![0.0; n_scales] }
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Numbers::F32(numbers) => size_of_val(numbers.as_slice()),
            Numbers::F16(halves) => size_of_val(halves.as_slice()),
            Numbers::Int8 { bytes, scales } => bytes.len() + size_of_val(scales.as_slice()),
        }
    }

    /// Writes a row at every `step`-th element from `start`; `slot` is the place of its scale.
    fn write(&mut self, row: &[f32], start: usize, step: usize, slot: usize) {
        match self {
            Numbers::F32(numbers) => {
                for (place, value) in numbers[start..].iter_mut().step_by(step).zip(row) {
                    *place = *value;
                }
            }
            Numbers::F16(halves) => {
                let mut places = halves[start..].iter_mut().step_by(step);
                for values in row.chunks(LANES) {
                    let mut rounded = [half::f16::ZERO; LANES];
                    rounded[..values.len()].convert_from_f32_slice(values);
                    for (rounded, place) in rounded[..values.len()].iter().zip(&mut places) {
                        *place = rounded.to_bits();
                    }
                }
            }
            Numbers::Int8 { bytes, scales } => {
                let scale = scale_of_bytes(row);
                scales[slot] = scale;
                let divisor = if scale > 0.0 { scale } else { 1.0 };
                for (place, value) in bytes[start..].iter_mut().step_by(step).zip(row) {
                    *place = math::byte_from_f32(value / divisor).cast_signed();
                }
            }
        }
    }

    fn read(&self, element: usize, slot: usize) -> f32 {
        match self {
            Numbers::F32(numbers) => numbers[element],
            Numbers::F16(halves) => half::f16::from_bits(halves[element]).to_f32(),
            Numbers::Int8 { bytes, scales } => f32::from(bytes[element]) * scales[slot],
        }
    }

    /// Elements `start..start + len`, and scales `slot..slot + n_slots` if there are any.
    fn view(&self, start: usize, len: usize, slot: usize, n_slots: usize) -> NumbersView<'_> {
        match self {
            Numbers::F32(numbers) => NumbersView::F32(&numbers[start..start + len]),
            Numbers::F16(halves) => NumbersView::F16(&halves[start..start + len]),
            Numbers::Int8 { bytes, scales } => NumbersView::Int8 {
                bytes: &bytes[start..start + len],
                scales: &scales[slot..slot + n_slots],
            },
        }
    }
}

/// Largest magnitude / 127; NaN if a number is not finite.
fn scale_of_bytes(row: &[f32]) -> f32 {
    let (mut largest, mut flaw) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    for values in row.chunks(LANES) {
        for ((largest, flaw), value) in largest.iter_mut().zip(&mut flaw).zip(values) {
            *largest = if value.abs() > *largest { value.abs() } else { *largest };
            *flaw += value * 0.0;
        }
    }
    largest.into_iter().fold(0.0, f32::max) / 127.0 + flaw.into_iter().sum::<f32>()
}

/// Keys or values of one head.
#[derive(Clone, Copy)]
pub(crate) enum NumbersView<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
    Int8 { bytes: &'a [i8], scales: &'a [f32] },
}

impl<'a> NumbersView<'a> {
    /// Scales of rows, if rows have them.
    #[inline(always)]
    pub(crate) fn scales(&self) -> Option<&'a [f32]> {
        match self {
            NumbersView::F32(_) | NumbersView::F16(_) => None,
            NumbersView::Int8 { scales, .. } => Some(scales),
        }
    }
}

/// Sixteen numbers of a cache.
pub(crate) trait Line: Copy {
    /// The numbers, without their scale.
    fn load<S: Simd>(&self, s: S) -> S::Wide;
}

impl Line for [f32; LANES] {
    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> S::Wide {
        s.wide_load(self)
    }
}

impl Line for [u16; LANES] {
    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> S::Wide {
        s.wide_from_f16(self)
    }
}

impl Line for [i8; LANES] {
    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> S::Wide {
        s.wide_from_i8(self)
    }
}

/// Keys and values of one head, as attention reads them.
#[derive(Clone, Copy)]
pub(crate) struct HeadKv<'a> {
    /// `[panels, head_dim, 16]`
    pub(crate) k: NumbersView<'a>,
    /// `[tokens, padded_dim]`
    pub(crate) v: NumbersView<'a>,
    pub(crate) head_dim: usize,
    /// Columns of a row of values, a multiple of 16.
    pub(crate) padded_dim: usize,
}

/// Key and value cache of one layer: k (after rotary embedding) and v of up to `capacity` tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct KvCache {
    format: KvFormat,
    n_kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    /// Tokens there is room for: the capacity, up to a whole panel.
    n_slots: usize,
    k: Numbers,
    v: Numbers,
}

impl KvCache {
    /// An empty cache for `capacity` tokens, in f32.
    ///
    /// # Panics
    /// If the size overflows; callers bound the capacity before.
    pub fn new(n_kv_heads: usize, head_dim: usize, capacity: usize) -> KvCache {
        KvCache::with_format(n_kv_heads, head_dim, capacity, KvFormat::F32)
    }

    /// An empty cache for `capacity` tokens.
    ///
    /// # Panics
    /// If the size overflows; callers bound the capacity before.
    pub fn with_format(
        n_kv_heads: usize,
        head_dim: usize,
        capacity: usize,
        format: KvFormat,
    ) -> KvCache {
        let size = |columns: usize| {
            let tokens = capacity.checked_next_multiple_of(LANES)?;
            Some((n_kv_heads.checked_mul(tokens)?.checked_mul(columns)?, tokens))
        };
        let sizes = size(head_dim).zip(size(head_dim.next_multiple_of(LANES)));
        let ((k, tokens), (v, _)) = sizes.expect("cache size fits the address space");
        let n_scales = n_kv_heads * tokens;
        KvCache {
            format,
            n_kv_heads,
            head_dim,
            capacity,
            n_slots: tokens,
            k: Numbers::new(format, k, n_scales),
            v: Numbers::new(format, v, n_scales),
        }
    }

    /// A full cache of rows of k and v, both `[len, n_kv_heads * head_dim]`: what cross-attention reads of a medium.
    ///
    /// # Panics
    /// If the shapes disagree, or the columns are not those of whole heads.
    pub fn from_rows(n_kv_heads: usize, k: Matrix<'_>, v: Matrix<'_>, format: KvFormat) -> KvCache {
        assert_eq!((k.rows(), k.cols()), (v.rows(), v.cols()), "cache: shapes of k and v");
        assert!(n_kv_heads > 0 && k.cols().is_multiple_of(n_kv_heads), "cache: heads");
        let mut cache = KvCache::with_format(n_kv_heads, k.cols() / n_kv_heads, k.rows(), format);
        cache.write(0, k, v);
        cache
    }

    /// How its numbers are stored.
    pub fn format(&self) -> KvFormat {
        self.format
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
        self.k.bytes() + self.v.bytes()
    }

    /// Keys of the first `len` tokens, `[n_kv_heads, len, head_dim]`.
    ///
    /// # Panics
    /// If `len` exceeds the capacity.
    pub fn keys(&self, len: usize) -> Vec<f32> {
        self.read(len, |head, token, col| {
            let (element, slot) = self.k_place(head, token);
            self.k.read(element + col * LANES, slot)
        })
    }

    /// Values of the first `len` tokens, `[n_kv_heads, len, head_dim]`.
    ///
    /// # Panics
    /// If `len` exceeds the capacity.
    pub fn values(&self, len: usize) -> Vec<f32> {
        self.read(len, |head, token, col| {
            let (element, slot) = self.v_place(head, token);
            self.v.read(element + col, slot)
        })
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
        let (len, head_dim) = (self.capacity, self.head_dim);
        let part =
            |token: usize, head: usize| &heads[(head * len + token) * head_dim..][..head_dim];
        let row = |token| (0..self.n_kv_heads).flat_map(move |head| part(token, head));
        (0..len).flat_map(row).copied().collect()
    }

    fn read(&self, len: usize, element: impl Fn(usize, usize, usize) -> f32) -> Vec<f32> {
        assert!(len <= self.capacity, "cache: {len} tokens of {}", self.capacity);
        let mut out = Vec::with_capacity(self.n_kv_heads * len * self.head_dim);
        for head in 0..self.n_kv_heads {
            for token in 0..len {
                out.extend((0..self.head_dim).map(|col| element(head, token, col)));
            }
        }
        out
    }

    /// Overwrites the first tokens: k and v `[n_kv_heads, len, head_dim]`.
    ///
    /// # Panics
    /// If a length differs or exceeds the capacity.
    pub fn write_heads(&mut self, len: usize, k: &[f32], v: &[f32]) {
        let n_elements = self.n_kv_heads * len * self.head_dim;
        assert!(len <= self.capacity && k.len() == n_elements && v.len() == n_elements);
        for row in 0..self.n_kv_heads * len {
            let columns = row * self.head_dim..(row + 1) * self.head_dim;
            self.write_row(row / len, row % len, &k[columns.clone()], &v[columns]);
        }
    }

    /// Writes rows of k and v, `[m, n_kv_heads * head_dim]`, at token `past_len`.
    pub(crate) fn write(&mut self, past_len: usize, k: Matrix<'_>, v: Matrix<'_>) {
        for head in 0..self.n_kv_heads {
            let columns = head * self.head_dim..(head + 1) * self.head_dim;
            for i in 0..k.rows() {
                let (k, v) = (&k.row(i)[columns.clone()], &v.row(i)[columns.clone()]);
                self.write_row(head, past_len + i, k, v);
            }
        }
    }

    fn write_row(&mut self, head: usize, token: usize, k: &[f32], v: &[f32]) {
        let (k_place, v_place) = (self.k_place(head, token), self.v_place(head, token));
        self.k.write(k, k_place.0, LANES, k_place.1);
        self.v.write(v, v_place.0, 1, v_place.1);
    }

    /// First element of a key, and the place of its scale.
    fn k_place(&self, head: usize, token: usize) -> (usize, usize) {
        let slot = head * self.n_slots + token;
        let panel = head * self.n_slots / LANES + token / LANES;
        (panel * self.head_dim * LANES + token % LANES, slot)
    }

    /// First element of a value, and the place of its scale.
    fn v_place(&self, head: usize, token: usize) -> (usize, usize) {
        let slot = head * self.n_slots + token;
        (slot * self.head_dim.next_multiple_of(LANES), slot)
    }

    /// Keys and values of one head.
    pub(crate) fn head(&self, head: usize) -> HeadKv<'_> {
        assert!(head < self.n_kv_heads);
        let (tokens, padded_dim) = (self.n_slots, self.head_dim.next_multiple_of(LANES));
        let [k_len, v_len] = [tokens * self.head_dim, tokens * padded_dim];
        HeadKv {
            k: self.k.view(head * k_len, k_len, head * tokens, tokens),
            v: self.v.view(head * v_len, v_len, head * tokens, tokens),
            head_dim: self.head_dim,
            padded_dim,
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
            let rows: Vec<f32> = (0..len * 15).map(|i| (i as f32).sin()).collect();
            let rows = Matrix::new(&rows, len, 15);
            let full = KvCache::from_rows(n_kv_heads, rows, rows, format);
            assert_eq!((full.capacity(), full.head_dim()), (len, head_dim));
            for read in [full.key_rows(), full.value_rows()] {
                let errors = read.iter().zip(rows.row(0)).map(|(a, b)| (a - b).abs());
                assert!(read.len() == len * 15 && errors.fold(0.0, f32::max) <= bound, "{format}");
            }
            assert_eq!(cache.bytes(), 32 * format.token_bytes(n_kv_heads, head_dim));
        }
    }
}
