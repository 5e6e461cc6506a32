//! Numbers of weights in panels: to nearest, or as calibration asks, and how much that loses.

use std::iter::Sum;
use std::ops::AddAssign;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use ndarray::{Array, Array2, ArrayView2, Axis, Ix2, IxDyn, Slice};

use super::inputs::{Compensation, Inputs};
use super::threads::{map_in_order, n_cores};
use super::{PANEL_ROWS, PanelFormat};
use crate::Tensor;
use crate::op::OpError;

/// Divisors of a block's largest magnitude that its scale is chosen from: 8 levels below zero and
/// 7 above have no divisor that suits every block.
const INT4_DIVISORS: [f32; 3] = [8.0, 7.5, 7.0];
/// The same where calibration says what an error costs: values that are cut off may cost less than coarse steps.
const INT4_CUTTING: [f32; 8] = [7.0, 7.5, 8.0, 8.5, 9.0, 10.0, 11.0, 12.5];
/// Levels of int4.
const INT4_RANGE: (f32, f32) = (-8.0, 7.0);
/// Divisors of a row's largest magnitude for its scale of bytes.
const INT8_CUTTING: [f32; 6] = [127.0, 132.0, 140.0, 150.0, 165.0, 185.0];

/// What the rounding of a weight is fitted to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Fit<'a> {
    /// The rows that calibration saw; none rounds to nearest.
    pub inputs: Option<&'a Inputs>,
    /// Share of a row's, or block's, largest magnitude that its scale reaches; none chooses it.
    pub reach: Option<f32>,
}

/// How a weight is rounded.
struct Rounder {
    /// What an error in each column costs, `[k]`; none where all cost the same.
    costs: Option<Vec<f32>>,
    compensation: Option<Compensation>,
    /// Share of the largest magnitude that a scale reaches, where it is not chosen by costs.
    reach: Option<f32>,
}

impl Rounder {
    fn new(fit: Fit<'_>, n_threads: usize) -> Rounder {
        let inputs = fit.inputs.filter(|inputs| inputs.n_rows() > 0);
        Rounder {
            costs: inputs.map(Inputs::power),
            compensation: inputs.map(|inputs| Compensation::new(inputs, n_threads)),
            reach: fit.reach,
        }
    }

    /// The scale with the smallest error out of the largest magnitude by each divisor.
    fn scale(&self, values: &[f32], first: usize, divisors: &[f32], range: (f32, f32)) -> f32 {
        let (magnitude, costs) = (largest(values), self.costs.as_deref());
        match (self.reach, divisors) {
            (Some(reach), [divisor, ..]) => return magnitude * reach / divisor,
            (None, [divisor]) => return magnitude / divisor,
            _ => {}
        }
        let error = |scale: f32| -> f32 {
            let error = |value: f32| (value - scale * level(value, scale, range)).powi(2);
            match costs {
                Some(costs) => {
                    sum(values, &costs[first..][..values.len()], |value, cost| error(value) * cost)
                }
                None => sum(values, values, |value, _| error(value)),
            }
        };
        let errors = divisors.iter().map(|divisor| magnitude / divisor).map(|s| (error(s), s));
        errors.min_by(|a, b| a.0.total_cmp(&b.0)).map_or(0.0, |(_, scale)| scale)
    }

    /// Writes the levels of a row; each block of columns has a scale.
    fn levels(
        &self,
        values: &[f32],
        (scales, block): (&[f32], usize),
        range: (f32, f32),
        levels: &mut Vec<f32>,
    ) {
        levels.clear();
        let Some(compensation) = &self.compensation else {
            for (values, scale) in values.chunks(block).zip(scales) {
                levels.extend(values.iter().map(|value| level(*value, *scale, range)));
            }
            return;
        };
        let mut row = values.to_vec();
        compensation.round(&mut row, |col, value| {
            let scale = scales[col / block];
            let level = level(value, scale, range);
            levels.push(level);
            scale * level
        });
    }
}

/// Data and scales of a weight f32 [n, k], rounded for the rows that calibration saw, if it saw any.
pub(super) fn pack(
    format: PanelFormat,
    weight: &Tensor,
    fit: Fit<'_>,
) -> Result<Vec<Tensor>, OpError> {
    pack_on(format, weight, fit, n_cores())
}

/// The same on so many threads.
pub(super) fn pack_on(
    format: PanelFormat,
    weight: &Tensor,
    fit: Fit<'_>,
    n_threads: usize,
) -> Result<Vec<Tensor>, OpError> {
    let rows = rows(weight)?;
    let is_rounded = matches!(format, PanelFormat::Int8 | PanelFormat::Int4 { .. });
    if let Some(inputs) = fit.inputs.filter(|inputs| is_rounded && inputs.k() != rows.ncols()) {
        let (found, expected) = (inputs.k(), rows.ncols());
        return Err(failed(&format!("calibrated on {found} columns, expected {expected}")));
    }
    let rounder = Rounder::new(if is_rounded { fit } else { Fit::default() }, n_threads);
    let packed = match format {
        PanelFormat::F16 => pack_f16(rows, n_threads)?,
        PanelFormat::Bf16 => pack_bf16(rows, n_threads)?,
        PanelFormat::Int8 => pack_int8(rows, &rounder, n_threads),
        PanelFormat::Int4 { block } => pack_int4(rows, block, &rounder, n_threads)?,
    };
    packed.into_iter().collect::<Option<Vec<Tensor>>>().ok_or_else(|| failed("other shapes"))
}

fn failed(reason: &str) -> OpError {
    OpError::Evaluation(format!("PackPanels: {reason}"))
}

fn rows(weight: &Tensor) -> Result<ArrayView2<'_, f32>, OpError> {
    let array = weight.as_f32().and_then(|array| array.view().into_dimensionality::<Ix2>().ok());
    array.ok_or_else(|| failed("expected f32 [n, k]"))
}

macro_rules! tensor {
    ($variant:ident, $shape:expr, $data:expr) => {
        Array::from_shape_vec(IxDyn(&$shape), $data)
            .ok()
            .map(|array| Tensor::$variant(array.into_shared()))
    };
}

fn n_panels(rows: ArrayView2<'_, f32>) -> usize {
    rows.nrows().div_ceil(PANEL_ROWS)
}

/// Calls `work` with the place in the panel and the values of each row that the weight has of a panel.
fn each_row(rows: ArrayView2<'_, f32>, panel: usize, mut work: impl FnMut(usize, &[f32])) {
    let first = panel * PANEL_ROWS;
    let mut copy = Vec::new();
    for row in first..rows.nrows().min(first + PANEL_ROWS) {
        let values = rows.row(row);
        let values = match values.as_slice() {
            Some(values) => values,
            None => {
                copy.clear();
                copy.extend(values.iter().copied());
                &copy
            }
        };
        work(row - first, values);
    }
}

/// Puts a row into a panel, `N` columns of it together.
fn put<T: Copy, const N: usize>(panel: &mut [T], row: usize, groups: impl Iterator<Item = [T; N]>) {
    let panel = panel.as_chunks_mut::<N>().0.chunks_exact_mut(PANEL_ROWS);
    panel.zip(groups).for_each(|(rows, group)| rows[row] = group);
}

/// Numbers of half precision, `N` columns of a row together; `convert` makes them of each row.
fn pack_halves<T: Copy + Default + Send, const N: usize>(
    rows: ArrayView2<'_, f32>,
    n_threads: usize,
    convert: impl Fn(&[f32], &mut [T]) -> Result<(), OpError> + Sync,
) -> Result<Vec<T>, OpError> {
    let k = rows.ncols().next_multiple_of(N);
    let mut data = vec![T::default(); n_panels(rows) * k * PANEL_ROWS];
    let panels = data.chunks_mut((k * PANEL_ROWS).max(1)).enumerate();
    let done = map_in_order(panels, n_threads, |(panel, data)| {
        let mut halves = vec![T::default(); k];
        let mut result = Ok(());
        each_row(rows, panel, |row, values| {
            if result.is_ok() {
                result = convert(values, &mut halves[..values.len()]);
            }
            put::<T, N>(data, row, halves.as_chunks().0.iter().copied());
        });
        result
    });
    done.into_iter().collect::<Result<(), OpError>>().map(|()| data)
}

fn pack_f16(rows: ArrayView2<'_, f32>, n_threads: usize) -> Result<Vec<Option<Tensor>>, OpError> {
    let data = pack_halves::<f16, 1>(rows, n_threads, |values, halves| {
        halves.convert_from_f32_slice(values);
        let lost = |(value, half): (&f32, &f16)| value.is_finite() && half.is_infinite();
        match values.iter().zip(&*halves).position(|(value, half)| lost((value, half))) {
            None => Ok(()),
            Some(at) => Err(failed(&format!(
                "{:e} is too large for f16\n\nhint: pass `--precision bf16`",
                values[at]
            ))),
        }
    })?;
    Ok(vec![tensor!(F16, [n_panels(rows), rows.ncols(), PANEL_ROWS], data)])
}

fn pack_bf16(rows: ArrayView2<'_, f32>, n_threads: usize) -> Result<Vec<Option<Tensor>>, OpError> {
    let data = pack_halves::<bf16, 2>(rows, n_threads, |values, halves| {
        halves.convert_from_f32_slice(values);
        Ok(())
    })?;
    Ok(vec![tensor!(BF16, [n_panels(rows), rows.ncols().div_ceil(2), PANEL_ROWS, 2], data)])
}

fn largest<'a>(values: impl IntoIterator<Item = &'a f32>) -> f32 {
    values.into_iter().fold(0.0f32, |max, value| max.max(value.abs()))
}

/// The level of `value` at `scale`; 0 where there is no scale.
fn level(value: f32, scale: f32, (min, max): (f32, f32)) -> f32 {
    /// 1.5 · 2²³: numbers of up to 2²² that are added to it lose their fraction, to nearest, ties to even.
    const SHIFT: f32 = 12_582_912.0;
    match scale > 0.0 {
        true => ((value / scale).clamp(min, max) + SHIFT) - SHIFT,
        false => 0.0,
    }
}

/// Σ `term` over pairs, in eight sums side by side, which need not wait for each other.
fn sum<T: Copy + Default + AddAssign + Sum>(
    a: &[f32],
    b: &[f32],
    term: impl Fn(f32, f32) -> T,
) -> T {
    assert_eq!(a.len(), b.len(), "pairs");
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [T::default(); 8];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += term(*a, *b);
        }
    }
    let rest: T = a_rest.iter().zip(b_rest).map(|(a, b)| term(*a, *b)).sum();
    sums.into_iter().chain([rest]).sum()
}

fn pack_int8(
    rows: ArrayView2<'_, f32>,
    rounder: &Rounder,
    n_threads: usize,
) -> Vec<Option<Tensor>> {
    let (panels, n_groups) = (n_panels(rows), rows.ncols().div_ceil(4));
    let panel_len = n_groups * PANEL_ROWS * 4;
    let mut data = vec![0i8; panels * panel_len];
    let mut scales = vec![0.0f32; panels * PANEL_ROWS];
    let range = (-127.0, 127.0);
    let divisors = if rounder.costs.is_some() { &INT8_CUTTING[..] } else { &INT8_CUTTING[..1] };
    let pieces = data.chunks_mut(panel_len.max(1)).zip(scales.chunks_mut(PANEL_ROWS));
    map_in_order(pieces.enumerate(), n_threads, |(panel, (data, scales))| {
        let mut levels = Vec::with_capacity(rows.ncols());
        each_row(rows, panel, |row, values| {
            scales[row] = rounder.scale(values, 0, divisors, range);
            let block = values.len().max(1);
            rounder.levels(values, (&scales[row..=row], block), range, &mut levels);
            levels.resize(n_groups * 4, 0.0);
            let groups = levels.as_chunks::<4>().0.iter();
            put(data, row, groups.map(|levels| levels.map(|level| level as i8)));
        });
    });
    vec![
        tensor!(I8, [panels, n_groups, PANEL_ROWS, 4], data),
        tensor!(F32, [panels, PANEL_ROWS], scales),
    ]
}

/// Largest scale of a block: products with activations within ±127 of a whole row must not leave
/// 32 bits (127 · 8 = 1016).
fn max_block_scale(padded_cols: usize) -> Result<f32, OpError> {
    let limit = (i32::MAX as usize) / padded_cols.saturating_mul(1016);
    match limit {
        0 => Err(failed("the rows are too long for int4\n\nhint: pass `--precision int8`")),
        limit => Ok(limit.min(255) as f32),
    }
}

/// The scales of a row's blocks, as whole steps of the row's scale, which comes second.
fn int4_scales(values: &[f32], block: usize, max_scale: f32, rounder: &Rounder) -> (Vec<f32>, f32) {
    let divisors = if rounder.costs.is_some() { &INT4_CUTTING[..] } else { &INT4_DIVISORS[..] };
    let blocks = values.chunks(block).enumerate();
    let scales: Vec<f32> = blocks
        .map(|(index, values)| rounder.scale(values, index * block, divisors, INT4_RANGE))
        .collect();
    let row_scale = largest(&scales) / max_scale;
    let steps = |scale: &f32| match *scale > 0.0 && row_scale > 0.0 {
        true => (scale / row_scale).round_ties_even().clamp(1.0, max_scale),
        false => 0.0,
    };
    (scales.iter().map(steps).collect(), row_scale)
}

fn pack_int4(
    rows: ArrayView2<'_, f32>,
    block: usize,
    rounder: &Rounder,
    n_threads: usize,
) -> Result<Vec<Option<Tensor>>, OpError> {
    let (panels, n_blocks) = (n_panels(rows), rows.ncols().div_ceil(block));
    let n_groups = n_blocks * block / 8;
    let max_scale = max_block_scale(n_blocks * block)?;
    let (data_len, blocks_len) = (n_groups * PANEL_ROWS * 4, n_blocks * PANEL_ROWS);
    let mut data = vec![0x88u8; panels * data_len];
    let mut row_scales = vec![0.0f32; panels * PANEL_ROWS];
    let mut block_scales = vec![0u8; panels * blocks_len];
    let scales = row_scales.chunks_mut(PANEL_ROWS).zip(block_scales.chunks_mut(blocks_len.max(1)));
    let pieces = data.chunks_mut(data_len.max(1)).zip(scales).enumerate();
    map_in_order(pieces, n_threads, |(panel, (data, (row_scales, block_scales)))| {
        let mut levels = Vec::with_capacity(rows.ncols());
        each_row(rows, panel, |row, values| {
            let (mut scales, row_scale) = int4_scales(values, block, max_scale, rounder);
            row_scales[row] = row_scale;
            for (index, steps) in scales.iter_mut().enumerate() {
                block_scales[index * PANEL_ROWS + row] = *steps as u8;
                *steps *= row_scale;
            }
            rounder.levels(values, (&scales, block), INT4_RANGE, &mut levels);
            levels.resize(n_groups * 8, 0.0);
            let bytes = |levels: &[f32; 8]| {
                let [a, b, c, d, e, f, g, h] =
                    levels.map(|level| (level as i8 + 8).cast_unsigned());
                [a | e << 4, b | f << 4, c | g << 4, d | h << 4]
            };
            put(data, row, levels.as_chunks::<8>().0.iter().map(bytes));
        });
    });
    Ok(vec![
        tensor!(U8, [panels, n_groups, PANEL_ROWS, 4], data),
        tensor!(F32, [panels, PANEL_ROWS], row_scales),
        tensor!(U8, [panels, n_blocks, PANEL_ROWS], block_scales),
    ])
}

/// Data and scales as slices.
enum Packed<'a> {
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    Int8 { data: &'a [i8], row_scales: &'a [f32] },
    Int4 { data: &'a [u8], row_scales: &'a [f32], block_scales: &'a [u8], block: usize },
}

impl<'a> Packed<'a> {
    fn new(format: PanelFormat, tensors: &'a [Tensor]) -> Option<Packed<'a>> {
        Some(match (format, tensors) {
            (PanelFormat::F16, [Tensor::F16(data)]) => Packed::F16(data.as_slice()?),
            (PanelFormat::Bf16, [Tensor::BF16(data)]) => Packed::Bf16(data.as_slice()?),
            (PanelFormat::Int8, [Tensor::I8(data), Tensor::F32(scales)]) => {
                Packed::Int8 { data: data.as_slice()?, row_scales: scales.as_slice()? }
            }
            (
                PanelFormat::Int4 { block },
                [Tensor::U8(data), Tensor::F32(row_scales), Tensor::U8(block_scales)],
            ) => Packed::Int4 {
                data: data.as_slice()?,
                row_scales: row_scales.as_slice()?,
                block_scales: block_scales.as_slice()?,
                block,
            },
            _ => return None,
        })
    }

    /// Reads back the `k` numbers of a row; `values` has room for whole groups of eight.
    fn row(&self, row: usize, k: usize, values: &mut [f32]) {
        match self {
            Packed::F16(data) => {
                let halves: Vec<f16> = stored::<_, 1>(data, row, k).flatten().copied().collect();
                halves.convert_to_f32_slice(&mut values[..halves.len()]);
            }
            Packed::Bf16(data) => {
                let halves: Vec<bf16> = stored::<_, 2>(data, row, k).flatten().copied().collect();
                halves.convert_to_f32_slice(&mut values[..halves.len()]);
            }
            Packed::Int8 { data, row_scales } => {
                let scale = row_scales[row];
                let levels = stored::<_, 4>(data, row, k);
                for (values, levels) in values.as_chunks_mut::<4>().0.iter_mut().zip(levels) {
                    *values = levels.map(|level| f32::from(level) * scale);
                }
            }
            Packed::Int4 { data, row_scales, block_scales, block } => {
                let n_blocks = k.div_ceil(*block);
                let bytes = stored::<_, 4>(data, row, n_blocks * block / 2);
                let groups = values.as_chunks_mut::<8>().0.iter_mut().zip(bytes);
                for (group, (values, bytes)) in groups.enumerate() {
                    let block = row / PANEL_ROWS * n_blocks + group * 8 / block;
                    let scale = f32::from(block_scales[block * PANEL_ROWS + row % PANEL_ROWS]);
                    let value = |nibble: u8| (f32::from(nibble) - 8.0) * scale * row_scales[row];
                    let (low, high) = values.split_at_mut(4);
                    low.iter_mut().zip(bytes).for_each(|(v, byte)| *v = value(byte & 15));
                    high.iter_mut().zip(bytes).for_each(|(v, byte)| *v = value(byte >> 4));
                }
            }
        }
    }
}

/// What a row of `len` numbers stored, `N` of them together.
fn stored<T, const N: usize>(data: &[T], row: usize, len: usize) -> impl Iterator<Item = &[T; N]> {
    let n_groups = len.div_ceil(N);
    let groups = data.as_chunks::<N>().0.chunks_exact(PANEL_ROWS);
    groups.skip(row / PANEL_ROWS * n_groups).take(n_groups).map(move |rows| &rows[row % PANEL_ROWS])
}

/// Signal-to-noise ratio of the packed weight, in dB: 10 log₁₀(Σ w² / Σ (w − packed)²). Infinite
/// where nothing was lost.
///
/// # Errors
/// If `packed` is not what `PackPanels` makes of `weight`.
pub fn sqnr_db(format: PanelFormat, weight: &Tensor, packed: &[Tensor]) -> Result<f64, OpError> {
    let rows = rows(weight)?;
    let expected = format.facts(rows.nrows(), rows.ncols());
    let fits = packed.iter().map(Tensor::fact).eq(expected);
    let packed = Packed::new(format, packed).filter(|_| fits);
    let packed = packed.ok_or_else(|| failed("expected the panels of the weight"))?;
    let k = rows.ncols();
    let powers = |panel: usize| {
        let (mut stored, mut powers) = (vec![0.0; k.next_multiple_of(8)], [0.0f64; 2]);
        each_row(rows, panel, |row, values| {
            packed.row(panel * PANEL_ROWS + row, k, &mut stored);
            powers[0] += sum(values, values, |value, _| f64::from(value).powi(2));
            powers[1] += sum(values, &stored[..k], |a, b| (f64::from(a) - f64::from(b)).powi(2));
        });
        powers
    };
    Ok(ratio_db(map_in_order(0..n_panels(rows), n_cores(), powers)))
}

/// Σ signal over Σ noise of rows, in dB; infinite without noise.
fn ratio_db(powers: Vec<[f64; 2]>) -> f64 {
    let sum = |[signal, noise]: [f64; 2], [s, n]: [f64; 2]| [signal + s, noise + n];
    let [signal, noise] = powers.into_iter().fold([0.0; 2], sum);
    if noise > 0.0 { 10.0 * (signal / noise).log10() } else { f64::INFINITY }
}

/// Noise of the products with what calibration saw, in dB below them: 10 log₁₀(Σ (w x)² / Σ ((w − packed) x)²) over
/// rows of the weight and calibration rows x, within blocks of 128 columns. Infinite where nothing was lost.
///
/// # Errors
/// If `packed` is not what `PackPanels` makes of `weight`, or the inputs have other columns.
pub fn output_sqnr_db(
    format: PanelFormat,
    weight: &Tensor,
    packed: &[Tensor],
    inputs: &Inputs,
) -> Result<f64, OpError> {
    let rows = rows(weight)?;
    let expected = format.facts(rows.nrows(), rows.ncols());
    let fits = packed.iter().map(Tensor::fact).eq(expected) && inputs.k() == rows.ncols();
    let packed = Packed::new(format, packed).filter(|_| fits);
    let packed = packed.ok_or_else(|| failed("expected the panels of the weight"))?;
    let k = rows.ncols();
    let powers = |panel: usize| {
        let end = rows.nrows().min((panel + 1) * PANEL_ROWS);
        let values = rows.slice_axis(Axis(0), Slice::from(panel * PANEL_ROWS..end));
        let mut errors = Array2::zeros(values.dim());
        let mut stored = vec![0.0; k.next_multiple_of(8)];
        for (row, mut errors) in errors.rows_mut().into_iter().enumerate() {
            packed.row(panel * PANEL_ROWS + row, k, &mut stored);
            errors.iter_mut().zip(&stored).for_each(|(error, stored)| *error = *stored);
        }
        errors -= &values;
        [inputs.error_power(values), inputs.error_power(errors.view())]
    };
    Ok(ratio_db(map_in_order(0..n_panels(rows), n_cores(), powers)))
}
