//! Numbers of weights in panels: to nearest, or as calibration asks, and how much that loses.

use half::{bf16, f16};
use ndarray::{Array, ArrayView2, Ix2, IxDyn};

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
            let of = |(i, value): (usize, &f32)| {
                let error = (value - scale * level(*value, scale, range)).powi(2);
                costs.map_or(error, |costs| error * costs[first + i])
            };
            values.iter().enumerate().map(of).sum()
        };
        let scales = divisors.iter().map(|divisor| magnitude / divisor);
        scales.min_by(|a, b| error(*a).total_cmp(&error(*b))).unwrap_or(0.0)
    }

    /// The levels of a row, given the scale of each column.
    fn levels(&self, values: &[f32], scale: impl Fn(usize) -> f32, range: (f32, f32)) -> Vec<f32> {
        let Some(compensation) = &self.compensation else {
            let level = |(col, value): (usize, &f32)| level(*value, scale(col), range);
            return values.iter().enumerate().map(level).collect();
        };
        let (mut row, mut levels) = (values.to_vec(), Vec::with_capacity(values.len()));
        compensation.round(&mut row, |col, value| {
            let (scale, level) = (scale(col), level(value, scale(col), range));
            levels.push(level);
            scale * level
        });
        levels
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
        PanelFormat::F16 => pack_f16(rows)?,
        PanelFormat::Bf16 => pack_bf16(rows),
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

fn pack_f16(rows: ArrayView2<'_, f32>) -> Result<Vec<Option<Tensor>>, OpError> {
    let (panels, k) = (n_panels(rows), rows.ncols());
    let mut data = vec![f16::ZERO; panels * k * PANEL_ROWS];
    for ((row, col), value) in rows.indexed_iter() {
        let half = f16::from_f32(*value);
        if value.is_finite() && half.is_infinite() {
            let reason = format!("{value:e} is too large for f16\n\nhint: pass `--precision bf16`");
            return Err(failed(&reason));
        }
        data[(row / PANEL_ROWS * k + col) * PANEL_ROWS + row % PANEL_ROWS] = half;
    }
    Ok(vec![tensor!(F16, [panels, k, PANEL_ROWS], data)])
}

/// Place of a number where `group` columns of a row lie together.
fn place((row, col): (usize, usize), n_groups: usize, group: usize) -> usize {
    let panel_group = row / PANEL_ROWS * n_groups + col / group;
    (panel_group * PANEL_ROWS + row % PANEL_ROWS) * group + col % group
}

fn pack_bf16(rows: ArrayView2<'_, f32>) -> Vec<Option<Tensor>> {
    let (panels, n_groups) = (n_panels(rows), rows.ncols().div_ceil(2));
    let mut data = vec![bf16::ZERO; panels * n_groups * PANEL_ROWS * 2];
    for (at, value) in rows.indexed_iter() {
        data[place(at, n_groups, 2)] = bf16::from_f32(*value);
    }
    vec![tensor!(BF16, [panels, n_groups, PANEL_ROWS, 2], data)]
}

fn largest<'a>(values: impl IntoIterator<Item = &'a f32>) -> f32 {
    values.into_iter().fold(0.0f32, |max, value| max.max(value.abs()))
}

/// The level of `value` at `scale`; 0 where there is no scale.
fn level(value: f32, scale: f32, (min, max): (f32, f32)) -> f32 {
    match scale > 0.0 {
        true => (value / scale).round_ties_even().clamp(min, max),
        false => 0.0,
    }
}

/// The rows of a panel that the weight has, by their place in it.
fn rows_of(rows: &ArrayView2<'_, f32>, panel: usize) -> impl Iterator<Item = (usize, Vec<f32>)> {
    let first = panel * PANEL_ROWS;
    let end = rows.nrows().min(first + PANEL_ROWS);
    (first..end).map(move |row| (row - first, rows.row(row).to_vec()))
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
        for (row, values) in rows_of(&rows, panel) {
            let scale = rounder.scale(&values, 0, divisors, range);
            scales[row] = scale;
            for (col, level) in rounder.levels(&values, |_| scale, range).into_iter().enumerate() {
                data[place((row, col), n_groups, 4)] = level as i8;
            }
        }
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
        for (row, values) in rows_of(&rows, panel) {
            let (steps, row_scale) = int4_scales(&values, block, max_scale, rounder);
            row_scales[row] = row_scale;
            for (index, steps) in steps.iter().enumerate() {
                block_scales[index * PANEL_ROWS + row] = *steps as u8;
            }
            let scale = |col: usize| steps[col / block] * row_scale;
            let levels = rounder.levels(&values, scale, INT4_RANGE);
            for (col, level) in levels.into_iter().enumerate() {
                let nibble = level as i8 + 8;
                let byte = place((row, col / 8 * 4 + col % 4), n_groups, 4);
                let shift = if col % 8 < 4 { 0 } else { 4 };
                data[byte] = data[byte] & !(15 << shift) | nibble.cast_unsigned() << shift;
            }
        }
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

    fn value(&self, (row, col): (usize, usize), k: usize) -> f32 {
        let (panel, lane) = (row / PANEL_ROWS, row % PANEL_ROWS);
        match self {
            Packed::F16(data) => data[(panel * k + col) * PANEL_ROWS + lane].to_f32(),
            Packed::Bf16(data) => data[place((row, col), k.div_ceil(2), 2)].to_f32(),
            Packed::Int8 { data, row_scales } => {
                f32::from(data[place((row, col), k.div_ceil(4), 4)]) * row_scales[row]
            }
            Packed::Int4 { data, row_scales, block_scales, block } => {
                let n_blocks = k.div_ceil(*block);
                let byte = data[place((row, col / 8 * 4 + col % 4), n_blocks * block / 8, 4)];
                let nibble = if col % 8 < 4 { byte & 15 } else { byte >> 4 };
                let at = (panel * n_blocks + col / block) * PANEL_ROWS + lane;
                (f32::from(nibble) - 8.0) * f32::from(block_scales[at]) * row_scales[row]
            }
        }
    }
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
    let powers = |row: usize| {
        let mut powers = [0.0f64; 2];
        for (col, value) in rows.row(row).iter().enumerate() {
            let error = f64::from(*value) - f64::from(packed.value((row, col), rows.ncols()));
            powers[0] += f64::from(*value).powi(2);
            powers[1] += error.powi(2);
        }
        powers
    };
    Ok(ratio_db(map_in_order(0..rows.nrows(), n_cores(), powers)))
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
    let powers = |row: usize| {
        let values = rows.row(row).to_vec();
        let error = |(col, value): (usize, &f32)| value - packed.value((row, col), values.len());
        let error: Vec<f32> = values.iter().enumerate().map(error).collect();
        [inputs.error_power(&values), inputs.error_power(&error)]
    };
    Ok(ratio_db(map_in_order(0..rows.nrows(), n_cores(), powers)))
}
