//! The numbers of a cache: formats, writing with rounding, and reading in lines of 16.

use std::fmt;

use half::slice::HalfFloatSliceExt;

use super::LANES;
use crate::{arch::Simd, math};

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

    /// Bytes of a cache of `n_rows` rows in one block, as [`KvCache::from_rows`](super::KvCache::from_rows) makes it.
    pub fn rows_bytes(self, n_kv_heads: usize, head_dim: usize, n_rows: usize) -> usize {
        self.token_bytes(n_kv_heads, head_dim) * n_rows.next_multiple_of(LANES).max(LANES)
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Numbers of keys or of values.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Numbers {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Int8 { bytes: Vec<i8>, scales: Vec<f32> },
}

impl Numbers {
    pub(super) fn new(format: KvFormat, n_elements: usize, n_scales: usize) -> Numbers {
        match format {
            KvFormat::F32 => Numbers::F32(vec![0.0; n_elements]),
            KvFormat::F16 => Numbers::F16(vec![0; n_elements]),
            KvFormat::Int8 => {
                Numbers::Int8 { bytes: vec![0; n_elements], scales: vec![0.0; n_scales] }
            }
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Numbers::F32(numbers) => size_of_val(numbers.as_slice()),
            Numbers::F16(halves) => size_of_val(halves.as_slice()),
            Numbers::Int8 { bytes, scales } => bytes.len() + size_of_val(scales.as_slice()),
        }
    }

    /// Appends all numbers, little-endian; of bytes the scales follow.
    pub(super) fn append_to(&self, out: &mut Vec<u8>) {
        match self {
            Numbers::F32(numbers) => out.extend(numbers.iter().flat_map(|v| v.to_le_bytes())),
            Numbers::F16(halves) => out.extend(halves.iter().flat_map(|v| v.to_le_bytes())),
            Numbers::Int8 { bytes, scales } => {
                out.extend(bytes.iter().map(|byte| byte.cast_unsigned()));
                out.extend(scales.iter().flat_map(|v| v.to_le_bytes()));
            }
        }
    }

    /// Takes its numbers off `bytes`, as [`Numbers::append_to`] wrote them; whether there were enough.
    pub(super) fn fill_from(&mut self, bytes: &mut &[u8]) -> bool {
        let n_bytes = self.bytes();
        let Some(own) = bytes.split_off(..n_bytes) else { return false };
        let floats = |own: &[u8], numbers: &mut [f32]| {
            for (place, value) in numbers.iter_mut().zip(own.as_chunks::<4>().0) {
                *place = f32::from_le_bytes(*value);
            }
        };
        match self {
            Numbers::F32(numbers) => floats(own, numbers),
            Numbers::F16(halves) => {
                for (place, value) in halves.iter_mut().zip(own.as_chunks::<2>().0) {
                    *place = u16::from_le_bytes(*value);
                }
            }
            Numbers::Int8 { bytes, scales } => {
                let (own, of_scales) = own.split_at(bytes.len());
                for (place, value) in bytes.iter_mut().zip(own) {
                    *place = value.cast_signed();
                }
                floats(of_scales, scales);
            }
        }
        true
    }

    /// Writes a row at every `step`-th element from `start`; `slot` is the place of its scale.
    pub(super) fn write(&mut self, row: &[f32], start: usize, step: usize, slot: usize) {
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

    pub(super) fn read(&self, element: usize, slot: usize) -> f32 {
        match self {
            Numbers::F32(numbers) => numbers[element],
            Numbers::F16(halves) => half::f16::from_bits(halves[element]).to_f32(),
            Numbers::Int8 { bytes, scales } => f32::from(bytes[element]) * scales[slot],
        }
    }

    /// Elements `start..start + len`, and scales `slot..slot + n_slots` if there are any.
    pub(super) fn view(
        &self,
        start: usize,
        len: usize,
        slot: usize,
        n_slots: usize,
    ) -> NumbersView<'_> {
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
    /// Without the first elements, and without the scales of the first rows.
    pub(super) fn skip(self, n_elements: usize, n_slots: usize) -> NumbersView<'a> {
        match self {
            NumbersView::F32(numbers) => NumbersView::F32(&numbers[n_elements..]),
            NumbersView::F16(halves) => NumbersView::F16(&halves[n_elements..]),
            NumbersView::Int8 { bytes, scales } => {
                NumbersView::Int8 { bytes: &bytes[n_elements..], scales: &scales[n_slots..] }
            }
        }
    }

    /// Scales of rows, if rows have them.
    #[inline(always)]
    pub(crate) fn scales(&self) -> Option<&'a [f32]> {
        match self {
            NumbersView::F32(_) | NumbersView::F16(_) => None,
            NumbersView::Int8 { scales, .. } => Some(scales),
        }
    }
}

const MIXED: &str = "the pieces of a cache have one format";

/// Sixteen numbers of a cache.
pub(crate) trait Line: Copy {
    /// The numbers in lines of 16.
    ///
    /// # Panics
    /// If they are of another type.
    fn lines<'a>(numbers: NumbersView<'a>) -> &'a [Self];

    /// The numbers, without their scale.
    fn load<S: Simd>(&self, s: S) -> S::Wide;
}

impl Line for [f32; LANES] {
    #[inline(always)]
    fn lines<'a>(numbers: NumbersView<'a>) -> &'a [Self] {
        let NumbersView::F32(numbers) = numbers else { unreachable!("{MIXED}") };
        numbers.as_chunks().0
    }

    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> S::Wide {
        s.wide_load(self)
    }
}

impl Line for [u16; LANES] {
    #[inline(always)]
    fn lines<'a>(numbers: NumbersView<'a>) -> &'a [Self] {
        let NumbersView::F16(numbers) = numbers else { unreachable!("{MIXED}") };
        numbers.as_chunks().0
    }

    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> S::Wide {
        s.wide_from_f16(self)
    }
}

impl Line for [i8; LANES] {
    #[inline(always)]
    fn lines<'a>(numbers: NumbersView<'a>) -> &'a [Self] {
        let NumbersView::Int8 { bytes: numbers, .. } = numbers else { unreachable!("{MIXED}") };
        numbers.as_chunks().0
    }

    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> S::Wide {
        s.wide_from_i8(self)
    }
}
