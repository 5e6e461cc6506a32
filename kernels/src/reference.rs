//! The kernels once more as plain loops in f64 on one thread: what they mean, and the oracle of their tests.

use crate::{
    Activation, Convolution, Matrix, PANEL_ROWS, PanelFormat, Panels, Position, SelfAttention,
};

/// `act(x Wᵀ + bias) + residual`, `[m, n]`; arguments as in [`Kernels::linear`](crate::Kernels::linear).
pub fn linear(
    x: Matrix<'_>,
    weight: Matrix<'_>,
    bias: Option<&[f32]>,
    activation: Option<Activation>,
    residual: Option<Matrix<'_>>,
) -> Vec<f64> {
    let mut out = Vec::new();
    for i in 0..x.rows() {
        for j in 0..weight.rows() {
            let sum = dot(x.row(i), weight.row(j)) + bias.map_or(0.0, |bias| f64::from(bias[j]));
            let value = activation.map_or(sum, |activation| activate(activation, sum));
            out.push(value + residual.map_or(0.0, |residual| f64::from(residual.row(i)[j])));
        }
    }
    out
}

/// `act(x Wgᵀ + bg) * (x Wuᵀ + bu)`, `[m, n]`; arguments as in [`Kernels::gated_linear`](crate::Kernels::gated_linear).
pub fn gated_linear(
    x: Matrix<'_>,
    weight: Matrix<'_>,
    bias: Option<&[f32]>,
    activation: Activation,
) -> Vec<f64> {
    let both = linear(x, weight, bias, None, None);
    let n = weight.rows() / 2;
    let gate =
        |row: &[f64]| (0..n).map(|j| activate(activation, row[j]) * row[n + j]).collect::<Vec<_>>();
    if n == 0 { Vec::new() } else { both.chunks(2 * n).flat_map(gate).collect() }
}

/// An activation function of one number.
pub fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Gelu => x * 0.5 * erfc(-x / std::f64::consts::SQRT_2),
        Activation::GeluTanh => {
            let scaled = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            x / (1.0 + (-2.0 * scaled).exp())
        }
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Activation::Relu => {
            if x < 0.0 {
                0.0
            } else {
                x
            }
        }
        Activation::SquaredRelu => {
            if x < 0.0 {
                0.0
            } else {
                x * x
            }
        }
        Activation::Silu => x / (1.0 + (-x).exp()),
    }
}

/// Complementary error function: Maclaurin series of erf below 3, continued fraction above.
pub fn erfc(z: f64) -> f64 {
    if z < 0.0 {
        return 2.0 - erfc(-z);
    }
    if z < 3.0 {
        let (mut term, mut sum) = (z, z);
        for n in 1..100 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return 1.0 - sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    let tail = (1..=60).rev().fold(z, |tail, n| z + f64::from(n) / 2.0 / tail);
    (-z * z).exp() / (tail * std::f64::consts::PI.sqrt())
}

/// A convolution, `[output pixels, c_out]`; arguments as in [`Kernels::convolution`](crate::Kernels::convolution).
pub fn convolution(
    x: Matrix<'_>,
    weight: Matrix<'_>,
    bias: Option<&[f32]>,
    activation: Option<Activation>,
    geometry: &Convolution,
) -> Vec<f64> {
    let Convolution { input, output, window, stride, padding, n_groups } = *geometry;
    let (n_in, n_out) = (x.cols() / n_groups, weight.rows() / n_groups);
    let pixel = |row: usize, col: usize, channel: usize| {
        let row = row.checked_sub(padding[0]).filter(|row| *row < input[0]);
        let col = col.checked_sub(padding[1]).filter(|col| *col < input[1]);
        row.zip(col).map_or(0.0, |(row, col)| f64::from(x.row(row * input[1] + col)[channel]))
    };
    let mut out = Vec::new();
    for at in 0..output[0] * output[1] {
        let (row, col) = (at / output[1] * stride, at % output[1] * stride);
        for j in 0..weight.rows() {
            let mut sum = bias.map_or(0.0, |bias| f64::from(bias[j]));
            for (place, &weight) in weight.row(j).iter().enumerate() {
                let (place, channel) = (place / n_in, place % n_in);
                let (down, right) = (place / window[1], place % window[1]);
                let channel = j / n_out * n_in + channel;
                sum += f64::from(weight) * pixel(row + down, col + right, channel);
            }
            out.push(activation.map_or(sum, |activation| activate(activation, sum)));
        }
    }
    out
}

/// Mean of the rows, `[c]`.
pub fn mean_of_rows(x: Matrix<'_>) -> Vec<f64> {
    let column = |j: usize| (0..x.rows()).map(move |i| f64::from(x.row(i)[j]));
    (0..x.cols()).map(|j| column(j).sum::<f64>() / x.rows() as f64).collect()
}

/// Means of squares, `[output pixels, c]`; arguments as in [`Kernels::mean_pool`](crate::Kernels::mean_pool).
pub fn mean_pool(x: Matrix<'_>, [height, width]: [usize; 2], side: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for (top, left) in (0..height)
        .step_by(side)
        .flat_map(|top| (0..width).step_by(side).map(move |left| (top, left)))
    {
        for j in 0..x.cols() {
            let pixels = (0..height * width)
                .filter(|at| at / width / side * side == top && at % width / side * side == left);
            let values: Vec<f64> = pixels.map(|at| f64::from(x.row(at)[j])).collect();
            out.push(values.iter().sum::<f64>() / values.len() as f64);
        }
    }
    out
}

/// Channels times their gates, `[pixels, c]`; arguments as in
/// [`Kernels::gate_channels`](crate::Kernels::gate_channels).
pub fn gate_channels(
    x: Matrix<'_>,
    gates: &[f32],
    gain: f32,
    residual: Option<Matrix<'_>>,
) -> Vec<f64> {
    let mut out = Vec::new();
    for i in 0..x.rows() {
        for (j, gate) in gates.iter().enumerate() {
            let gated =
                f64::from(x.row(i)[j]) * f64::from(gain) / (1.0 + (-f64::from(*gate)).exp());
            out.push(gated + residual.map_or(0.0, |residual| f64::from(residual.row(i)[j])));
        }
    }
    out
}

/// Layer normalisation, `[rows, cols]`; arguments as in [`Kernels::layer_norm`](crate::Kernels::layer_norm).
pub fn layer_norm(
    x: Matrix<'_>,
    scale: Option<&[f32]>,
    bias: Option<&[f32]>,
    epsilon: f32,
) -> Vec<f64> {
    norm(x, true, scale, bias, epsilon)
}

/// Root-mean-square normalisation, `[rows, cols]`; arguments as in [`Kernels::rms_norm`](crate::Kernels::rms_norm).
pub fn rms_norm(x: Matrix<'_>, scale: Option<&[f32]>, epsilon: f32) -> Vec<f64> {
    norm(x, false, scale, None, epsilon)
}

fn norm(
    x: Matrix<'_>,
    is_centred: bool,
    scale: Option<&[f32]>,
    bias: Option<&[f32]>,
    epsilon: f32,
) -> Vec<f64> {
    let mut out = Vec::new();
    for i in 0..x.rows() {
        let n = x.cols() as f64;
        let mean =
            if is_centred { x.row(i).iter().copied().map(f64::from).sum::<f64>() / n } else { 0.0 };
        let centred: Vec<f64> = x.row(i).iter().map(|&value| f64::from(value) - mean).collect();
        let variance = centred.iter().map(|value| value * value).sum::<f64>() / n;
        for (j, value) in centred.iter().enumerate() {
            let scaled = value / (variance + f64::from(epsilon)).sqrt()
                * scale.map_or(1.0, |s| f64::from(s[j]));
            out.push(scaled + bias.map_or(0.0, |bias| f64::from(bias[j])));
        }
    }
    out
}

/// Attention, `[n_groups * q_len, n_heads * head_dim]`; arguments as in [`Kernels::attention`](crate::Kernels::attention).
pub fn attention(
    q: Matrix<'_>,
    segments: &[(Matrix<'_>, Matrix<'_>)],
    n_groups: usize,
    n_heads: usize,
    scale: f32,
) -> Vec<f64> {
    let (q_len, head_dim) = (q.rows() / n_groups, q.cols() / n_heads);
    let mut out = Vec::new();
    for row in 0..q.rows() {
        for head in 0..n_heads {
            let columns = head * head_dim..(head + 1) * head_dim;
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for (k, v) in segments {
                let len = k.rows() / n_groups;
                let group = row / q_len;
                keys.extend((group * len..(group + 1) * len).map(|i| &k.row(i)[columns.clone()]));
                values.extend((group * len..(group + 1) * len).map(|i| &v.row(i)[columns.clone()]));
            }
            let query = &q.row(row)[columns];
            let scores = keys.iter().map(|key| dot(query, key) * f64::from(scale)).collect();
            out.extend(weighted_sum(scores, &values, head_dim));
        }
    }
    out
}

/// Causal self-attention from an empty cache, `[m, n_heads * head_dim]`: row `i` sees the rows `0..=i`.
pub fn self_attention(
    q: Matrix<'_>,
    k: Matrix<'_>,
    v: Matrix<'_>,
    attributes: &SelfAttention,
) -> Vec<f64> {
    let head_dim = attributes.head_dim;
    let head_of = |matrix: Matrix<'_>, row: usize, head: usize| -> Vec<f64> {
        matrix.row(row)[head * head_dim..(head + 1) * head_dim]
            .iter()
            .copied()
            .map(f64::from)
            .collect()
    };
    let mut out = Vec::new();
    for row in 0..q.rows() {
        for head in 0..attributes.n_heads {
            let kv_head = head * attributes.n_kv_heads / attributes.n_heads;
            let query = rotated(&attributes.position, head_of(q, row, head), row);
            let score = |key: usize| {
                let k = rotated(&attributes.position, head_of(k, key, kv_head), key);
                let product: f64 = query.iter().zip(&k).map(|(a, b)| a * b).sum();
                product * f64::from(attributes.scale) + bias(&attributes.position, head, row, key)
            };
            let values: Vec<&[f32]> = (0..=row)
                .map(|key| &v.row(key)[kv_head * head_dim..(kv_head + 1) * head_dim])
                .collect();
            out.extend(weighted_sum((0..=row).map(score).collect(), &values, head_dim));
        }
    }
    out
}

/// Attention of each row to its own medium, `[m, n_heads * head_dim]`; arguments as in
/// [`Kernels::cross_attention`](crate::Kernels::cross_attention).
pub fn cross_attention(
    q: Matrix<'_>,
    media: &[(Matrix<'_>, Matrix<'_>)],
    media_time: &[u32],
    n_heads: usize,
    scale: f32,
) -> Vec<f64> {
    let row_of = |(row, &time): (usize, &u32)| match time {
        0 => vec![0.0; q.cols()],
        _ => attention(
            q.row_range(row..row + 1),
            &media[time as usize - 1..time as usize],
            1,
            n_heads,
            scale,
        ),
    };
    media_time.iter().enumerate().flat_map(row_of).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn bias(position: &Position, head: usize, query: usize, key: usize) -> f64 {
    match position {
        Position::Alibi { slopes } => -f64::from(slopes[head]) * (query as f64 - key as f64),
        Position::None | Position::Rotary { .. } => 0.0,
    }
}

/// `x cos + rotate_half(x) sin` on the first `n_dims` elements.
fn rotated(position: &Position, x: Vec<f64>, row: usize) -> Vec<f64> {
    let Position::Rotary { n_dims, inverse_frequencies } = position else { return x };
    let half = n_dims / 2;
    let mut out = x.clone();
    for i in 0..*n_dims {
        let angle = f64::from(row as f32 * inverse_frequencies[i % half]);
        let other = if i < half { -x[i + half] } else { x[i - half] };
        out[i] = x[i] * angle.cos() + other * angle.sin();
    }
    out
}

fn weighted_sum(scores: Vec<f64>, values: &[&[f32]], head_dim: usize) -> Vec<f64> {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let column =
        |j: usize| weights.iter().zip(values).map(|(w, v)| w * f64::from(v[j])).sum::<f64>() / sum;
    (0..head_dim).map(|j| if scores.is_empty() { 0.0 } else { column(j) }).collect()
}

/// The bytes and scales of a weight in panels.
#[derive(Clone, Debug)]
pub struct PackedWeight {
    format: PanelFormat,
    shape: (usize, usize),
    data: Vec<u8>,
    row_scales: Vec<f32>,
    block_scales: Vec<u8>,
}

impl PackedWeight {
    /// Rounds `weight`, `[n, k]`, to `format`, to nearest.
    ///
    /// # Panics
    /// If the format's block is not a positive multiple of 8.
    pub fn new(format: PanelFormat, weight: Matrix<'_>) -> PackedWeight {
        let (n, k) = (weight.rows(), weight.cols());
        let n_blocks = format.n_blocks(k).expect("a block of whole lines");
        let padded = n.next_multiple_of(PANEL_ROWS);
        let data = vec![0; format.data_bytes(n, k).expect("a weight that fits the memory")];
        let n_scales = if format.has_row_scales() { padded } else { 0 };
        let (row_scales, block_scales) = (vec![0.0; n_scales], vec![0; padded * n_blocks]);
        let mut packed = PackedWeight { format, shape: (n, k), data, row_scales, block_scales };
        if let PanelFormat::Int4 { .. } = format {
            packed.data.fill(0x88);
        }
        for row in 0..n {
            packed.pack_row(row, weight.row(row));
        }
        packed
    }

    /// The weight over these bytes.
    ///
    /// # Panics
    /// Never: the lengths are those of the format.
    pub fn view(&self) -> Panels<'_> {
        let (n, k) = self.shape;
        Panels::new(self.format, n, k, &self.data, &self.row_scales, &self.block_scales)
            .expect("lengths of the format")
    }

    fn pack_row(&mut self, row: usize, values: &[f32]) {
        let (panel, lane) = (row / PANEL_ROWS, row % PANEL_ROWS);
        let panel_bytes = self.data.len() / self.shape.0.div_ceil(PANEL_ROWS);
        let data = &mut self.data[panel * panel_bytes..][..panel_bytes];
        let largest = |values: &[f32]| values.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        match self.format {
            PanelFormat::F16 => {
                for (col, value) in values.iter().enumerate() {
                    let bytes = half::f16::from_f32(*value).to_le_bytes();
                    data[(col * PANEL_ROWS + lane) * 2..][..2].copy_from_slice(&bytes);
                }
            }
            PanelFormat::Bf16 => {
                for (col, value) in values.iter().enumerate() {
                    let bytes = half::bf16::from_f32(*value).to_le_bytes();
                    let at = (col / 2 * PANEL_ROWS + lane) * 4 + col % 2 * 2;
                    data[at..at + 2].copy_from_slice(&bytes);
                }
            }
            PanelFormat::Int8 => {
                let scale = largest(values) / 127.0;
                self.row_scales[row] = scale;
                for (col, value) in values.iter().enumerate() {
                    let value = if scale > 0.0 { value / scale } else { 0.0 };
                    let byte = value.round_ties_even() as i8;
                    data[(col / 4 * PANEL_ROWS + lane) * 4 + col % 4] = byte.cast_unsigned();
                }
            }
            PanelFormat::Int4 { block } => {
                let scale = largest(values) / 7.0 / 255.0;
                self.row_scales[row] = scale;
                let blocks = self.shape.1.div_ceil(block);
                for (idx, values) in values.chunks(block).enumerate() {
                    let whole = |value: f32| if scale > 0.0 { value / scale } else { 0.0 };
                    let block_scale = whole(largest(values) / 7.0).ceil().min(255.0) as u8;
                    self.block_scales[(panel * blocks + idx) * PANEL_ROWS + lane] = block_scale;
                    for (j, value) in values.iter().enumerate() {
                        let value = whole(*value) / f32::from(block_scale.max(1));
                        let nibble = (value.round_ties_even().clamp(-8.0, 7.0) + 8.0) as u8;
                        let col = idx * block + j;
                        let place = &mut data[(col / 8 * PANEL_ROWS + lane) * 4 + col % 4];
                        *place = match col % 8 < 4 {
                            true => *place & 0xF0 | nibble,
                            false => *place & 0x0F | nibble << 4,
                        };
                    }
                }
            }
        }
    }
}

/// The weight as its format rounds it, `[n, k]`.
pub fn unpacked(weight: Panels<'_>) -> Vec<f32> {
    let row = |row| (0..weight.cols()).map(move |col| weight.value(row, col));
    (0..weight.rows()).flat_map(row).collect()
}

/// `x`, `[m, k]`, rounded as products with weights of `format` round it.
pub fn rounded(format: PanelFormat, x: Matrix<'_>) -> Vec<f32> {
    let round_row = |row: &[f32]| -> Vec<f32> {
        match format {
            PanelFormat::F16 => row.to_vec(),
            PanelFormat::Bf16 => {
                row.iter().map(|value| half::bf16::from_f32(*value).to_f32()).collect()
            }
            PanelFormat::Int8 | PanelFormat::Int4 { .. } => {
                let scale = row.iter().fold(0.0_f32, |a, b| a.max(b.abs())) / 127.0;
                let round = |value: &f32| (value / scale).round_ties_even() * scale;
                if scale > 0.0 { row.iter().map(round).collect() } else { vec![0.0; row.len()] }
            }
        }
    };
    (0..x.rows()).flat_map(|i| round_row(x.row(i))).collect()
}
