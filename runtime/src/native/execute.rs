//! Runs one instruction: resolves its views and calls the kernel.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use flamingo_kernels::{
    Activation, Kernels, KvCache, KvFormat, Matrix, MatrixMut, Panels, SelfAttention, Weight,
};
use smallvec::SmallVec;

use super::plan::{Action, MediaInput, PanelPlaces, Part, Plan, Source, View, WeightOperand};
use super::size::{Size, Sizes};
use super::stage::Span;
use super::work::Tally;
use crate::backend::{Media, MediaKv};

/// Rows without a medium between rows with one that are computed rather than cut out: below this
/// a second pass over the weights costs more than the rows.
const MIN_GAP: usize = 16;

/// Why a view could not be resolved: the plan and what it runs on disagree.
#[derive(Debug, PartialEq)]
pub(super) struct Unresolved;

/// A tensor of the weight file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stored<'a> {
    /// f32 numbers.
    Numbers(&'a [f32]),
    /// Anything else.
    Bytes(&'a [u8]),
}

impl<'a> Stored<'a> {
    fn numbers(self) -> Option<&'a [f32]> {
        match self {
            Stored::Numbers(numbers) => Some(numbers),
            Stored::Bytes(_) => None,
        }
    }

    fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Stored::Numbers(_) => None,
            Stored::Bytes(bytes) => Some(bytes),
        }
    }
}

/// What instructions read.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) plan: &'a Plan,
    pub(super) sizes: &'a Sizes,
    pub(super) weights: &'a [Stored<'a>],
    /// By input; empty where an input is not of numbers.
    pub(super) numbers: &'a [&'a [f32]],
    /// By input; empty where an input is not of indices.
    pub(super) indices: &'a [&'a [i64]],
    pub(super) media: &'a [Arc<Media>],
    pub(super) media_time: &'a [u32],
    /// Pairs of a new token and a token that it may see.
    pub(super) n_scores: usize,
    pub(super) slots: &'a [Vec<f32>],
}

/// A resolved view.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    /// From the first element of row 0 on.
    data: &'a [f32],
    pub(super) rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    pub(super) fn matrix(&self) -> Matrix<'a> {
        Matrix::strided(self.data, self.rows, self.cols, self.stride)
    }

    pub(super) fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.cols]
    }

    pub(super) fn range(&self, range: Range<usize>) -> Rows<'a> {
        let data = if range.is_empty() { &[] } else { &self.data[range.start * self.stride..] };
        Rows { data, rows: range.len(), ..*self }
    }

    fn columns(&self, range: Range<usize>) -> Rows<'a> {
        let data = if self.rows == 0 { &[] } else { &self.data[range.start..] };
        Rows { data, cols: range.len(), ..*self }
    }

    /// Each of `n` equal parts of a row as a row, where the rows are dense.
    fn parts(&self, n: usize) -> Option<Rows<'a>> {
        let is_dense = self.rows <= 1 || self.stride == self.cols;
        let cols = self.cols / n;
        is_dense.then_some(Rows { data: self.data, rows: self.rows * n, cols, stride: cols })
    }
}

impl<'a> Context<'a> {
    /// Runs `action` into `out`, `[rows, cols]` dense.
    pub(super) fn execute(
        &self,
        action: &Action,
        spans: &mut [Span<'_>],
        out: &mut [f32],
        shape: (usize, usize),
    ) -> Result<(), Unresolved> {
        match action {
            Action::Linear { x, weight, bias, activation, residual, only_seen } => {
                let linear = Linear {
                    x: self.rows(x)?,
                    weight: self.weight(weight)?,
                    bias: self.vector(bias.as_ref())?,
                    activation: *activation,
                    residual: residual.as_ref().map(|view| self.rows(view)).transpose()?,
                };
                self.linear(&linear, *only_seen, out, shape);
            }
            Action::GatedLinear { x, weight, bias, activation } => {
                let (x, weight) = (self.rows(x)?.matrix(), self.weight(weight)?);
                let (bias, out) = (self.vector(bias.as_ref())?, dense(out, shape));
                self.kernels.gated_linear(x, weight, bias, *activation, out);
            }
            Action::Activate { x, activation } => {
                self.kernels.activate(*activation, self.rows(x)?.matrix(), dense(out, shape));
            }
            Action::Norm { x, scale, bias, epsilon, n_heads, is_centred, only_seen } => {
                let norm = Norm {
                    scale: self.vector(scale.as_ref())?,
                    bias: self.vector(bias.as_ref())?,
                    epsilon: *epsilon,
                    n_heads: *n_heads,
                    is_centred: *is_centred,
                };
                self.norm(self.rows(x)?, &norm, *only_seen, out, shape);
            }
            Action::Attention { q, segments, n_groups, n_heads, scale } => {
                let matrices =
                    |[k, v]: &[View; 2]| Ok((self.rows(k)?.matrix(), self.rows(v)?.matrix()));
                let segments = segments.iter().map(matrices).collect::<Result<Vec<_>, _>>()?;
                let (q, out) = (self.rows(q)?.matrix(), dense(out, shape));
                let n_groups = self.sizes.get(*n_groups);
                self.kernels.attention(q, &segments, n_groups, *n_heads, *scale, out);
            }
            Action::SelfAttention { q, k, v, layer, attributes } => {
                self.self_attention([q, k, v], spans, *layer, attributes, (out, shape.1))?;
            }
            Action::CrossAttention { q, media, n_heads, scale } => {
                let (q, out) = (self.rows(q)?.matrix(), dense(out, shape));
                let caches = self.media(*media, *n_heads)?;
                let caches: Vec<&KvCache> = caches.iter().map(AsRef::as_ref).collect();
                let (n_heads, scale) = (*n_heads, *scale);
                self.kernels.cross_attention(q, &caches, self.media_time, n_heads, scale, out);
            }
            Action::Patches { x, channels, height, patch_size } => {
                patches(self.rows(x)?, [*channels, *height, *patch_size], out);
            }
            Action::Convolution { .. }
            | Action::MeanPool { .. }
            | Action::PictureMean { .. }
            | Action::ChannelGate { .. } => self.pictures(action, out, shape)?,
            Action::Add { a, b, repeat } => {
                self.add(self.rows(a)?, self.rows(b)?, self.sizes.get(*repeat), out, shape);
            }
            Action::Mul { a, b } => multiply(self.rows(a)?, self.rows(b)?, out, shape.1),
            Action::Product { a, b } => product(self.rows(a)?, self.rows(b)?, out, shape.1),
            Action::Gather { table, indices } => {
                let input = self.indices.get(indices.input).ok_or(Unresolved)?;
                gather(self.weight(table)?, input, indices.offset, out, shape.1)?;
            }
            Action::Copy { n_blocks, parts } => self.copy(*n_blocks, parts, out)?,
        }
        Ok(())
    }

    /// A dense copy of what a view shows.
    pub(super) fn read(&self, view: &View) -> Result<Vec<f32>, Unresolved> {
        let rows = self.rows(view)?;
        let mut out = Vec::with_capacity(rows.rows.saturating_mul(rows.cols));
        (0..rows.rows).for_each(|i| out.extend_from_slice(rows.row(i)));
        Ok(out)
    }

    pub(super) fn rows(&self, view: &View) -> Result<Rows<'a>, Unresolved> {
        let data: &'a [f32] = match view.source {
            Source::Weight(place) => self.weights.get(place).and_then(|stored| stored.numbers()),
            Source::Literal(place) => self.plan.literals.get(place).map(Vec::as_slice),
            Source::Input(place) => self.numbers.get(place).copied(),
            Source::Buffer(buffer) => {
                let slot = self.plan.slot_of.get(buffer);
                slot.and_then(|slot| self.slots.get(*slot)).map(Vec::as_slice)
            }
        }
        .ok_or(Unresolved)?;
        let [offset, rows, cols, stride] =
            [view.offset, view.rows, view.cols, view.row_stride].map(|size| self.sizes.get(size));
        if rows == 0 || cols == 0 {
            return Ok(Rows { data: &[], rows, cols, stride });
        }
        let len = (rows - 1).checked_mul(stride).and_then(|start| start.checked_add(cols));
        let end = len.and_then(|len| len.checked_add(offset)).ok_or(Unresolved)?;
        Ok(Rows { data: data.get(offset..end).ok_or(Unresolved)?, rows, cols, stride })
    }

    pub(super) fn weight(&self, operand: &WeightOperand) -> Result<Weight<'a>, Unresolved> {
        match operand {
            WeightOperand::Numbers(view) => Ok(self.rows(view)?.matrix().into()),
            WeightOperand::Panels(places) => Ok(self.panels(places)?.into()),
        }
    }

    pub(super) fn panels(&self, places: &PanelPlaces) -> Result<Panels<'a>, Unresolved> {
        let stored = |place: usize| self.weights.get(place).copied().ok_or(Unresolved);
        let data = stored(places.data)?.bytes().ok_or(Unresolved)?;
        let row_scales = match places.row_scales {
            Some(place) => stored(place)?.numbers().ok_or(Unresolved)?,
            None => &[],
        };
        let block_scales = match places.block_scales {
            Some(place) => stored(place)?.bytes().ok_or(Unresolved)?,
            None => &[],
        };
        let (n, k) = (places.n, places.k);
        Panels::new(places.format, n, k, data, row_scales, block_scales).ok_or(Unresolved)
    }

    /// A bias or scale.
    pub(super) fn vector(&self, view: Option<&View>) -> Result<Option<&'a [f32]>, Unresolved> {
        view.map(|view| self.rows(view).map(|rows| rows.data)).transpose()
    }

    /// What the counts of this call depend on.
    pub(super) fn tally(&self) -> Tally<'a> {
        let Context { plan, sizes, media, media_time, n_scores, .. } = *self;
        Tally { plan, sizes, media, media_time, n_scores }
    }

    pub(super) fn stretches(&self, only_seen: bool, n_rows: usize) -> Stretches {
        stretches(self.media_time, only_seen, n_rows)
    }

    fn linear(&self, op: &Linear<'_>, only_seen: bool, out: &mut [f32], shape: (usize, usize)) {
        let (n_rows, cols) = shape;
        let mut done = 0;
        let stretches = self.stretches(only_seen, n_rows);
        for rows in stretches.into_iter().chain(std::iter::once(n_rows..n_rows)) {
            if let Some(residual) = op.residual {
                for i in done..rows.start {
                    out[i * cols..][..cols].copy_from_slice(residual.row(i));
                }
            }
            done = rows.end;
            if rows.is_empty() {
                continue;
            }
            let x = op.x.range(rows.clone()).matrix();
            let residual = op.residual.map(|residual| residual.range(rows.clone()).matrix());
            let out =
                MatrixMut::new(&mut out[rows.start * cols..rows.end * cols], rows.len(), cols);
            self.kernels.linear(x, op.weight, op.bias, op.activation, residual, out);
        }
    }

    fn norm(
        &self,
        x: Rows<'_>,
        norm: &Norm<'_>,
        only_seen: bool,
        out: &mut [f32],
        (n_rows, cols): (usize, usize),
    ) {
        for rows in self.stretches(only_seen, n_rows) {
            let x = x.range(rows.clone());
            let out = &mut out[rows.start * cols..rows.end * cols];
            let part = cols / norm.n_heads;
            if let Some(parts) = x.parts(norm.n_heads) {
                let out = MatrixMut::new(out, parts.rows, part);
                norm.apply(self.kernels, parts.matrix(), out);
                continue;
            }
            for start in (0..cols).step_by(part.max(1)) {
                let out = MatrixMut::strided(&mut out[start..], rows.len(), part, cols);
                norm.apply(self.kernels, x.columns(start..start + part).matrix(), out);
            }
        }
    }

    /// The rows of each sequence over its own cache.
    fn self_attention(
        &self,
        operands: [&View; 3],
        spans: &mut [Span<'_>],
        layer: usize,
        attributes: &SelfAttention,
        (mut out, cols): (&mut [f32], usize),
    ) -> Result<(), Unresolved> {
        let [q, k, v] = operands.map(|view| self.rows(view));
        let operands = [q?, k?, v?];
        let mut first = 0;
        for Span { caches, past_len, n_rows } in spans {
            let rows = first..first + *n_rows;
            first = rows.end;
            let cache = caches.get_mut(layer).ok_or(Unresolved)?;
            let fits = operands.iter().all(|operand| operand.rows >= rows.end);
            let target = out.split_off_mut(..rows.len() * cols).filter(|_| fits);
            let target = MatrixMut::new(target.ok_or(Unresolved)?, rows.len(), cols);
            let [q, k, v] = operands.map(|operand| operand.range(rows.clone()).matrix());
            self.kernels.self_attention(q, k, v, cache, *past_len, attributes, target);
        }
        Ok(())
    }

    /// Keys and values of each medium, where they lie; those that come as rows are packed.
    fn media(
        &self,
        input: MediaInput,
        n_heads: usize,
    ) -> Result<Vec<Cow<'a, KvCache>>, Unresolved> {
        let cache = |media: &'a Arc<Media>| match media.blocks.get(input.block) {
            Some(MediaKv::Cache(cache)) if cache.n_kv_heads() == n_heads => {
                Ok(Cow::Borrowed(cache))
            }
            Some(MediaKv::Rows { k, v }) => {
                let n_latents = k.len() / input.width.max(1);
                let fits = k.len() == v.len() && n_latents * input.width == k.len();
                let rows = |data| Matrix::new(data, n_latents, input.width);
                fits.then(|| KvCache::from_rows(n_heads, rows(k), rows(v), KvFormat::F32))
                    .map(Cow::Owned)
                    .ok_or(Unresolved)
            }
            Some(MediaKv::Cache(_) | MediaKv::None) | None => Err(Unresolved),
        };
        self.media.iter().map(cache).collect()
    }

    fn add(
        &self,
        a: Rows<'_>,
        b: Rows<'_>,
        repeat: usize,
        out: &mut [f32],
        (n_rows, cols): (usize, usize),
    ) {
        // A pass adds all rows of b once, or one row of b to `repeat` rows.
        let pass = if repeat == 1 { b.rows } else { repeat };
        for start in (0..n_rows).step_by(pass.max(1)) {
            let rows = start..n_rows.min(start + pass);
            let b = match repeat {
                1 => b.range(0..rows.len()),
                _ => {
                    Rows { rows: rows.len(), stride: 0, ..b.range(start / repeat % b.rows..b.rows) }
                }
            };
            let out = &mut out[rows.start * cols..rows.end * cols];
            match repeat {
                1 => {
                    let (a, b) = (a.range(rows.clone()).matrix(), b.matrix());
                    self.kernels.add(a, b, MatrixMut::new(out, rows.len(), cols));
                }
                _ => add_rows(a.range(rows), b, out, cols),
            }
        }
    }

    fn copy(&self, n_blocks: Size, parts: &[Part], mut out: &mut [f32]) -> Result<(), Unresolved> {
        let resolve = |part: &Part| {
            let [first, stride, n_rows] =
                [part.first, part.stride, part.n_rows].map(|size| self.sizes.get(size));
            Ok((self.rows(&part.view)?, first, stride, n_rows))
        };
        let parts = parts.iter().map(resolve).collect::<Result<Vec<_>, Unresolved>>()?;
        for block in 0..self.sizes.get(n_blocks) {
            for (rows, first, stride, n_rows) in &parts {
                let start = first + block * stride;
                for i in start..start + n_rows {
                    let (row, rest) = out.split_at_mut_checked(rows.cols).ok_or(Unresolved)?;
                    row.copy_from_slice(rows.row(i));
                    out = rest;
                }
            }
        }
        Ok(())
    }
}

/// Operands of a linear layer.
struct Linear<'a> {
    x: Rows<'a>,
    weight: Weight<'a>,
    bias: Option<&'a [f32]>,
    activation: Option<Activation>,
    residual: Option<Rows<'a>>,
}

/// Constants of a normalisation.
struct Norm<'a> {
    scale: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    epsilon: f32,
    n_heads: usize,
    is_centred: bool,
}

impl Norm<'_> {
    fn apply(&self, kernels: &Kernels, x: Matrix<'_>, out: MatrixMut<'_>) {
        match self.is_centred {
            true => kernels.layer_norm(x, self.scale, self.bias, self.epsilon, out),
            false => kernels.rms_norm(x, self.scale, self.epsilon, out),
        }
    }
}

fn dense(out: &mut [f32], (rows, cols): (usize, usize)) -> MatrixMut<'_> {
    MatrixMut::new(out, rows, cols)
}

/// Ranges of rows; of one token without an allocation.
pub(super) type Stretches = SmallVec<[Range<usize>; 2]>;

/// The rows that an action runs over: all, or stretches in which rows see a medium.
pub(super) fn stretches(media_time: &[u32], only_seen: bool, n_rows: usize) -> Stretches {
    match only_seen {
        false => std::iter::once(0..n_rows).collect(),
        true => seen_stretches(media_time),
    }
}

/// Stretches of rows from one that sees a medium to another, without gaps of [`MIN_GAP`] rows
/// that see none.
fn seen_stretches(media_time: &[u32]) -> Stretches {
    let mut stretches = Stretches::new();
    for (row, _) in media_time.iter().enumerate().filter(|(_, time)| **time > 0) {
        match stretches.last_mut() {
            Some(stretch) if row - stretch.end < MIN_GAP => stretch.end = row + 1,
            _ => stretches.push(row..row + 1),
        }
    }
    stretches
}

/// Rows of patches, ordered (channel, y, x) inside a row, from rows of pixels.
fn patches(x: Rows<'_>, [channels, height, size]: [usize; 3], out: &mut [f32]) {
    let (n_down, n_across) = (height / size, x.cols / size);
    for (idx, row) in out.chunks_exact_mut(channels * size * size).enumerate() {
        let (picture, patch) = (idx / (n_down * n_across), idx % (n_down * n_across));
        let (down, across) = (patch / n_across * size, patch % n_across * size);
        for (i, line) in row.chunks_exact_mut(size).enumerate() {
            let (channel, y) = (i / size, i % size);
            let pixels = x.row((picture * channels + channel) * height + down + y);
            line.copy_from_slice(&pixels[across..across + size]);
        }
    }
}

fn add_rows(a: Rows<'_>, b: Rows<'_>, out: &mut [f32], cols: usize) {
    for (i, row) in out.chunks_exact_mut(cols).enumerate() {
        for ((out, a), b) in row.iter_mut().zip(a.row(i)).zip(b.row(i)) {
            *out = a + b;
        }
    }
}

fn multiply(a: Rows<'_>, b: Rows<'_>, out: &mut [f32], cols: usize) {
    for (i, row) in out.chunks_exact_mut(cols).enumerate() {
        for ((out, a), b) in row.iter_mut().zip(a.row(i)).zip(b.row(i % b.rows)) {
            *out = a * b;
        }
    }
}

/// a `[m, k]` times b `[k, n]`.
fn product(a: Rows<'_>, b: Rows<'_>, out: &mut [f32], cols: usize) {
    for (i, row) in out.chunks_exact_mut(cols).enumerate() {
        row.fill(0.0);
        for (j, factor) in a.row(i).iter().enumerate() {
            for (out, b) in row.iter_mut().zip(b.row(j)) {
                *out += factor * b;
            }
        }
    }
}

fn gather(
    table: Weight<'_>,
    indices: &[i64],
    offset: i64,
    out: &mut [f32],
    cols: usize,
) -> Result<(), Unresolved> {
    for (row, index) in out.chunks_exact_mut(cols).zip(indices) {
        let index = index.checked_add(offset).and_then(|index| usize::try_from(index).ok());
        let index = index.filter(|index| *index < table.rows());
        table.read_row(index.ok_or(Unresolved)?, row);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_without_a_medium_are_cut_out_at_the_ends_and_in_long_gaps() {
        assert!(seen_stretches(&[]).is_empty());
        assert!(seen_stretches(&[0, 0, 0]).is_empty());
        assert!(seen_stretches(&[0, 1, 0, 2, 0]).into_iter().eq(std::iter::once(1..4)));
        let gap = |n: usize| [&[1], vec![0; n].as_slice(), &[2]].concat();
        assert_eq!(seen_stretches(&gap(MIN_GAP - 1)).len(), 1);
        assert_eq!(seen_stretches(&gap(MIN_GAP)).as_slice(), [0..1, MIN_GAP + 1..MIN_GAP + 2]);
    }
}
