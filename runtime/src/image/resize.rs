//! Bicubic resize with antialiasing, equal to Pillow's `Image.resize(size, BICUBIC)` to the bit.
//!
//! The arithmetic is that of Pillow's 8-bit resampler, written anew: a bicubic kernel (a = -0.5)
//! stretched by the scale when shrinking, weights normalised in f64 and rounded to 22-bit fixed
//! point, a horizontal pass, an 8-bit intermediate, a vertical pass. The horizontal pass comes
//! first always, as in the Pillow versions of the references' time; from 12 on Pillow
//! swaps the passes for some tall shapes, which changes clipped pixels there.
//!
//! Exactness matters because a vision encoder amplifies a level of difference into
//! another answer now and then, which would hide real mistakes in parity tests.
//!
//! Only the wanted window of the result is computed. Output pixels do not depend on one another,
//! so this equals resize-then-crop, and a 1 x 16384 picture costs no more than a square one.

use std::ops::Range;

use super::picture::{Mode, Picture};
use super::{ImageError, MAX_SIDE};

/// Fraction bits of a fixed-point weight: 8 bits of pixel and 2 of headroom leave 22 of an i32.
const PRECISION_BITS: u32 = 22;

/// Half of a unit, so that the final shift rounds.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// A weight is `high * 2^LOW_BITS + low` with both parts in i16: products of i16 pairs are what
/// the baseline SIMD of x86-64 and AArch64 can add up, products of i32 are not.
const LOW_BITS: u32 = 11;

/// Half width of the bicubic kernel in source pixels at scale 1.
const SUPPORT: f64 = 2.0;

/// A rectangle of a resized picture, in its pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    /// First column.
    pub(super) left: usize,
    /// First row.
    pub(super) top: usize,
    /// Columns.
    pub(super) width: usize,
    /// Rows.
    pub(super) height: usize,
}

impl Window {
    /// All of a picture of this width and height.
    pub(super) fn whole((width, height): (usize, usize)) -> Self {
        Self { left: 0, top: 0, width, height }
    }

    fn columns(self) -> Range<usize> {
        self.left..self.left + self.width
    }

    fn rows(self) -> Range<usize> {
        self.top..self.top + self.height
    }
}

/// Resizes the whole picture, in its own mode, as Pillow's `picture.resize((width, height), BICUBIC)`.
///
/// # Errors
/// [`ImageError::TooLarge`] if a side is 0 or beyond [`MAX_SIDE`].
pub fn resize(picture: &Picture, width: usize, height: usize) -> Result<Picture, ImageError> {
    let sides = 1..=MAX_SIDE;
    if !sides.contains(&width) || !sides.contains(&height) {
        return Err(ImageError::TooLarge {
            width: width as u64,
            height: height as u64,
            bytes: (width as u64).saturating_mul(height as u64),
        });
    }
    let size = (width, height);
    Ok(resize_window(picture, size, Window::whole(size)))
}

/// The part `window` of `picture` resized to `size`. The window lies inside `size` and is not empty.
/// A picture that keeps its size is copied, without a trip through premultiplied alpha.
pub(super) fn resize_window(picture: &Picture, size: (usize, usize), window: Window) -> Picture {
    if size == (picture.width(), picture.height()) {
        return cut(picture, window);
    }
    if picture.mode() == Mode::Indexed {
        return nearest(picture, size, window);
    }
    let source = picture.premultiplied();
    let columns = Taps::bicubic(source.width(), size.0, window.columns());
    let rows = Taps::bicubic(source.height(), size.1, window.rows());
    let needed = rows.source_range();
    let narrow = horizontal(&source, &columns, needed.clone());
    let pixels = vertical(&narrow, &rows, needed.start, window.width * source.mode().channels());
    let resized = picture_of(window, source.mode(), pixels);
    resized.unpremultiplied().into_owned()
}

/// Weights of every output pixel of a window, along one axis.
struct Taps {
    /// Source pixels of each output pixel.
    sources: Vec<Range<usize>>,
    /// Weights of all output pixels, one after the other, as many as each has sources.
    high: Vec<i16>,
    low: Vec<i16>,
}

impl Taps {
    fn bicubic(source_len: usize, output_len: usize, window: Range<usize>) -> Self {
        let scale = source_len as f64 / output_len as f64;
        let stretch = scale.max(1.0);
        let support = SUPPORT * stretch;
        let mut taps =
            Self { sources: Vec::with_capacity(window.len()), high: Vec::new(), low: Vec::new() };
        let mut weights = Vec::new();
        for output in window {
            let center = (output as f64 + 0.5) * scale;
            // A negative float becomes 0 in the conversion.
            let start = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(source_len);
            weights.clear();
            weights
                .extend((start..end).map(|x| kernel((x as f64 - center + 0.5) * (1.0 / stretch))));
            taps.push(start..end, &weights);
        }
        taps
    }

    fn push(&mut self, sources: Range<usize>, weights: &[f64]) {
        let total = weights.iter().fold(0.0, |sum, weight| sum + weight);
        for weight in weights {
            let share = if total == 0.0 { *weight } else { weight / total };
            let scaled = share * f64::from(1 << PRECISION_BITS);
            let fixed = (scaled + 0.5_f64.copysign(scaled)) as i32;
            // A normalised bicubic weight stays below 2, so `high` stays below 2^12.
            self.high.push((fixed / (1 << LOW_BITS)) as i16);
            self.low.push((fixed % (1 << LOW_BITS)) as i16);
        }
        self.sources.push(sources);
    }

    /// Every output pixel's sources with their weights, high and low parts.
    fn iter(&self) -> impl Iterator<Item = (Range<usize>, &[i16], &[i16])> {
        let mut start = 0;
        self.sources.iter().map(move |sources| {
            let weights = start..start + sources.len();
            start = weights.end;
            (sources.clone(), &self.high[weights.clone()], &self.low[weights])
        })
    }

    /// From the first to the last source pixel that any output needs.
    fn source_range(&self) -> Range<usize> {
        let start = self.sources.iter().map(|sources| sources.start).min();
        let end = self.sources.iter().map(|sources| sources.end).max();
        start.unwrap_or(0)..end.unwrap_or(0)
    }
}

/// Keys' cubic convolution kernel with a = -0.5, in Pillow's order of operations.
fn kernel(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// Resamples the rows `needed` of `source`: `[needed, columns, channels]`, 8 bits.
fn horizontal(source: &Picture, columns: &Taps, needed: Range<usize>) -> Vec<u8> {
    let n_channels = source.mode().channels();
    let source_row_len = source.width() * n_channels;
    let output_row_len = columns.sources.len() * n_channels;
    let mut output = vec![0; needed.len() * output_row_len];
    let mut plane = vec![0_i16; source.width()];
    let source_rows = source.pixels()[needed.start * source_row_len..].chunks_exact(source_row_len);
    for (row, target) in source_rows.zip(output.chunks_exact_mut(output_row_len)) {
        for channel in 0..n_channels {
            for (value, &level) in plane.iter_mut().zip(row[channel..].iter().step_by(n_channels)) {
                *value = i16::from(level);
            }
            let targets = target[channel..].iter_mut().step_by(n_channels);
            for ((sources, high, low), level) in columns.iter().zip(targets) {
                *level = clip(HALF + dot(&plane[sources], high, low));
            }
        }
    }
    output
}

/// Resamples down the columns of `source`, `[rows from first_row on, row_len]`.
fn vertical(source: &[u8], rows: &Taps, first_row: usize, row_len: usize) -> Vec<u8> {
    let mut output = vec![0; rows.sources.len() * row_len];
    let mut sums = vec![0_i32; row_len];
    for ((sources, high, low), target) in rows.iter().zip(output.chunks_exact_mut(row_len)) {
        sums.fill(HALF);
        let source_rows = source[(sources.start - first_row) * row_len..].chunks_exact(row_len);
        for ((row, high), low) in source_rows.zip(high).zip(low) {
            let weight = (i32::from(*high) << LOW_BITS) + i32::from(*low);
            for (sum, &level) in sums.iter_mut().zip(row) {
                *sum += weight * i32::from(level);
            }
        }
        for (level, &sum) in target.iter_mut().zip(&sums) {
            *level = clip(sum);
        }
    }
    output
}

/// Sum of `pixels * weights`. Splitting changes no bit: integer addition is associative, and
/// both parts carry the sign of the weight, so no partial sum outgrows the whole.
fn dot(pixels: &[i16], high: &[i16], low: &[i16]) -> i32 {
    let mut high_sum = 0_i32;
    let mut low_sum = 0_i32;
    for ((&pixel, &high), &low) in pixels.iter().zip(high).zip(low) {
        high_sum += i32::from(pixel) * i32::from(high);
        low_sum += i32::from(pixel) * i32::from(low);
    }
    (high_sum << LOW_BITS) + low_sum
}

fn clip(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Nearest pixel, stepping through the source by repeated addition as Pillow does.
fn nearest(picture: &Picture, size: (usize, usize), window: Window) -> Picture {
    let columns = nearest_sources(picture.width(), size.0, window.columns());
    let rows = nearest_sources(picture.height(), size.1, window.rows());
    let source = picture.pixels().as_chunks::<4>().0;
    let mut pixels = Vec::with_capacity(4 * window.width * window.height);
    for row in rows {
        let line = &source[row * picture.width()..][..picture.width()];
        for &column in &columns {
            pixels.extend_from_slice(&line[column]);
        }
    }
    picture_of(window, picture.mode(), pixels)
}

fn nearest_sources(source_len: usize, output_len: usize, window: Range<usize>) -> Vec<usize> {
    let step = source_len as f64 / output_len as f64;
    let mut position = step * 0.5;
    let mut sources = Vec::with_capacity(window.len());
    for output in 0..window.end {
        if output >= window.start {
            sources.push((position as usize).min(source_len - 1));
        }
        position += step;
    }
    sources
}

fn cut(picture: &Picture, window: Window) -> Picture {
    let n_channels = picture.mode().channels();
    let lines = picture.pixels().chunks_exact(picture.width() * n_channels);
    let columns = window.left * n_channels..(window.left + window.width) * n_channels;
    let kept = lines.skip(window.top).take(window.height);
    let pixels = kept.flat_map(|line| &line[columns.clone()]).copied().collect();
    picture_of(window, picture.mode(), pixels)
}

fn picture_of(window: Window, mode: Mode, pixels: Vec<u8>) -> Picture {
    Picture::new(window.width, window.height, mode, pixels)
        .expect("the window was computed pixel by pixel")
}
