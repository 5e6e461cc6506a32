//! Seeded weights, made in chunks straight into a file.
//!
//! A tensor's values depend on the seed and its name only: ChaCha8, keyed by their BLAKE3 hash,
//! gives 64 bits per value; the value is the sum of the four 16-bit parts, brought to mean 0 and
//! variance 1. A sum of four uniforms is close to normal (excess kurtosis −0.3, nothing beyond
//! 3.46 standard deviations), needs no table and no transcendental function, and gives the same
//! bits on every machine.

use std::io::{self, Write};

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::tensor::{Fill, Spread, TensorSpec};

/// Values made at a time; bounds the memory that a tensor of any size needs.
const CHUNK: usize = 1 << 15;
/// 64 random bits per value.
const RANDOM_BYTES: usize = 8;
/// Mean of the sum of four 16-bit numbers.
const SUM_MEAN: i32 = 2 * 65_535;
/// 1 ÷ standard deviation of that sum: √(12 / (4·(65536² − 1))).
const SUM_SCALE: f32 = 1.0 / 37_837.227;

/// How numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    F32,
    F16,
    Bf16,
}

impl Storage {
    /// Bytes of one value.
    pub(super) fn value_bytes(self) -> usize {
        match self {
            Storage::F32 => 4,
            Storage::F16 | Storage::Bf16 => 2,
        }
    }

    /// A number as it is stored.
    pub(super) fn bytes_of(self, value: f32) -> Vec<u8> {
        match self {
            Storage::F32 => value.to_le_bytes().to_vec(),
            Storage::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
            Storage::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        }
    }

    /// Name in a safetensors header.
    pub(super) fn safetensors_name(self) -> &'static str {
        match self {
            Storage::F32 => "F32",
            Storage::F16 => "F16",
            Storage::Bf16 => "BF16",
        }
    }

    /// Name in a Hugging Face config.
    pub(super) fn torch_name(self) -> &'static str {
        match self {
            Storage::F32 => "float32",
            Storage::F16 => "float16",
            Storage::Bf16 => "bfloat16",
        }
    }
}

/// Makes the tensors of one checkpoint and reports how far it is.
pub(super) struct Generator<'a> {
    seed: u64,
    spread: Spread,
    done_bytes: u64,
    total_bytes: u64,
    progress: &'a mut dyn FnMut(u64, u64),
    random: Vec<u8>,
    values: Vec<f32>,
}

impl<'a> Generator<'a> {
    /// `total_bytes`: of all tensors that will be written.
    pub(super) fn new(
        seed: u64,
        spread: Spread,
        total_bytes: u64,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        let random = vec![0; CHUNK * RANDOM_BYTES];
        Self {
            seed,
            spread,
            done_bytes: 0,
            total_bytes,
            progress,
            random,
            values: vec![0.0; CHUNK],
        }
    }

    /// Writes the little-endian values of one tensor. Equal names in different parts differ.
    pub(super) fn write(
        &mut self,
        part: &str,
        spec: &TensorSpec,
        storage: Storage,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        let mut rng = ChaCha8Rng::from_seed(key(self.seed, part, &spec.values_of));
        let (mean, deviation) = spec.mean_and_deviation(&self.spread);
        let outliers = Outliers::of(spec, &self.spread).filter(|_| self.spread.outliers);
        let heights = outliers.map(|_| heights(self.seed, spec.shape[0])).unwrap_or_default();
        let mut left = spec.n_values();
        while left > 0 {
            let n_values = left.min(CHUNK);
            let random = &mut self.random[..n_values * RANDOM_BYTES];
            rng.fill_bytes(random);
            let values = &mut self.values[..n_values];
            fill_normal(random, mean, deviation, values);
            if let Some(outliers) = outliers {
                outliers.put(values, spec.n_values() - left, deviation, &heights);
            }
            write_values(values, storage, out)?;
            left -= n_values;
            self.done_bytes += (n_values * storage.value_bytes()) as u64;
            (self.progress)(self.done_bytes, self.total_bytes);
        }
        Ok(())
    }
}

/// How outliers of the residual stream show in a tensor. In trained transformers a few channels are many times as large
/// as the others from an early layer on, the same ones in every layer and nearly the same for every token, and the scales
/// of norms are small there (T. Dettmers et al., LLM.int8(), 2022, section 4; M. Sun et al., Massive Activations, 2024).
#[derive(Clone, Copy, Debug, PartialEq)]
enum Outliers {
    /// Rows of `fan_in` are of one sign, and their sum such that their channel is as high as its outlier: [`HIDDEN`]
    /// hidden channels add up.
    Written { fan_in: usize, sum_per_height: f32 },
    /// A norm divides by them, and makes up for what they add to the norm of the others; its outputs are `sharpness`
    /// times as large as without.
    Read { sharpness: f32 },
}

/// Mean of GELU or ReLU of normal numbers with a standard deviation of about 1; and about the standard deviation of their
/// products with others.
const HIDDEN: f32 = 0.3;
/// Standard deviation of logits that leaves the entropy of a trained model, 3 nats of ln 50 000: ln V − σ² / 2.
const LOGIT: f32 = 4.0;

impl Outliers {
    fn of(spec: &TensorSpec, spread: &Spread) -> Option<Outliers> {
        match spec.fill {
            Fill::OutlierWriter { is_gated } => {
                let fan_in = spec.shape[1];
                // Numbers of both signs add up to the root only.
                let n = if is_gated { (fan_in as f32).sqrt() } else { 1.0 };
                Some(Outliers::Written { fan_in, sum_per_height: n / HIDDEN })
            }
            Fill::OutlierReader => Some(Outliers::Read { sharpness: 1.0 }),
            Fill::FinalNormScale { is_tied } => {
                let logit = match is_tied {
                    true => spread.embedding * (spec.shape[0] as f32).sqrt(),
                    false => spread.linear_gain,
                };
                Some(Outliers::Read { sharpness: LOGIT / logit })
            }
            _ => None,
        }
    }

    /// Changes the values from `first` on; channels are rows of what writes, and elements of what reads.
    fn put(self, values: &mut [f32], first: usize, deviation: f32, heights: &[f32]) {
        let power: f32 = heights.iter().map(|height| height.max(1.0).powi(2)).sum();
        let spread = (power / heights.len().max(1) as f32).sqrt();
        for (index, value) in values.iter_mut().enumerate() {
            let channel = |row: usize| heights[row % heights.len().max(1)];
            *value = match self {
                Outliers::Written { fan_in, sum_per_height } => {
                    match channel((first + index) / fan_in) {
                        0.0 => *value,
                        height => {
                            let one = height * sum_per_height / fan_in as f32;
                            one * (1.0 + 0.1 * *value / deviation)
                        }
                    }
                }
                Outliers::Read { sharpness } => match channel(first + index) {
                    0.0 => *value * spread * sharpness,
                    height => *value * spread * sharpness / height,
                },
            };
        }
    }
}

/// Heights of the outliers of a residual stream of `n_channels`, 0 where there is none: one channel in 64 has one, at
/// least two have, 8 to 80 times the others with a heavy tail (Pareto with exponent 1.5).
fn heights(seed: u64, n_channels: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::from_seed(key(seed, "outliers", &n_channels.to_string()));
    let mut heights = vec![0.0; n_channels];
    for _ in 0..(n_channels / 64).max(2) {
        let channel = rng.random_range(0..n_channels);
        let tail: f64 = rng.random_range(0.0..1.0);
        heights[channel] = (8.0 * (1.0 - tail).powf(-1.0 / 1.5)).min(80.0) as f32;
    }
    heights
}

fn key(seed: u64, part: &str, name: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(part.as_bytes()).update(b"/");
    *hasher.update(name.as_bytes()).finalize().as_bytes()
}

/// Turns eight random bytes into each value.
fn fill_normal(random: &[u8], mean: f32, deviation: f32, values: &mut [f32]) {
    let scale = deviation * SUM_SCALE;
    let (quads, _) = random.as_chunks::<RANDOM_BYTES>();
    for (value, quad) in values.iter_mut().zip(quads) {
        let bits = u64::from_le_bytes(*quad);
        let part = |shift: u32| i32::from((bits >> shift) as u16);
        let sum = part(0) + part(16) + part(32) + part(48) - SUM_MEAN;
        *value = mean + scale * sum as f32;
    }
}

fn write_values(values: &[f32], storage: Storage, out: &mut dyn Write) -> io::Result<()> {
    match storage {
        Storage::F32 => out.write_all(&le_bytes(values.iter().map(|value| value.to_le_bytes()))),
        Storage::F16 => {
            let mut narrow = vec![f16::ZERO; values.len()];
            narrow.convert_from_f32_slice(values);
            out.write_all(&le_bytes(narrow.iter().map(|value| value.to_le_bytes())))
        }
        Storage::Bf16 => {
            let mut narrow = vec![bf16::ZERO; values.len()];
            narrow.convert_from_f32_slice(values);
            out.write_all(&le_bytes(narrow.iter().map(|value| value.to_le_bytes())))
        }
    }
}

fn le_bytes<const N: usize>(values: impl Iterator<Item = [u8; N]>) -> Vec<u8> {
    values.collect::<Vec<_>>().into_flattened()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::tensor::{Fill, TensorList};

    fn made(seed: u64, name: &str, n_values: usize, storage: Storage) -> Vec<u8> {
        let mut list = TensorList::default();
        list.add(name, &[n_values], Fill::Latents);
        let mut bytes = Vec::new();
        let mut ignore = |_, _| ();
        let mut generator = Generator::new(seed, Spread::TINY, 0, &mut ignore);
        generator.write("part", &list.specs()[0], storage, &mut bytes).unwrap();
        bytes
    }

    fn floats(bytes: &[u8]) -> Vec<f64> {
        bytes.chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
    }

    #[test]
    fn values_are_close_to_standard_normal() {
        let values = floats(&made(1, "x", 400_000, Storage::F32));
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        let within = values.iter().filter(|v| v.abs() < 1.0).count() as f64 / n;
        let lag = values.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / n;
        assert!(mean.abs() < 0.006, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.01, "variance {variance}");
        assert!((within - 0.667).abs() < 0.01, "share within one deviation {within}");
        assert!(lag.abs() < 0.01, "neighbours correlate: {lag}");
    }

    #[test]
    fn values_depend_on_seed_and_name_not_on_length() {
        let long = made(1, "x", CHUNK + 5, Storage::F32);
        assert_eq!(made(1, "x", CHUNK + 3, Storage::F32)[..], long[..4 * (CHUNK + 3)]);
        assert_ne!(made(2, "x", 9, Storage::F32)[..], long[..36]);
        assert_ne!(made(1, "y", 9, Storage::F32)[..], long[..36]);
    }

    #[test]
    fn outliers_are_the_same_channels_of_what_writes_and_reads_them() {
        let made = |name: &str, shape: &[usize], fill, outliers| {
            let mut list = TensorList::default();
            list.add(name, shape, fill);
            let (mut bytes, mut ignore) = (Vec::new(), |_, _| ());
            let spread = Spread { outliers, ..Spread::LARGE };
            let mut generator = Generator::new(4, spread, 0, &mut ignore);
            generator.write("part", &list.specs()[0], Storage::F32, &mut bytes).unwrap();
            floats(&bytes)
        };
        // Longer than a chunk, whose ends fall within rows.
        let (width, fan_in) = (256, 300);
        let written = made("down", &[width, fan_in], Fill::OutlierWriter { is_gated: false }, true);
        let plain = made("down", &[width, fan_in], Fill::OutlierWriter { is_gated: false }, false);
        let row = |values: &[f64], row: usize| values[row * fan_in..][..fan_in].to_vec();
        let large: Vec<usize> =
            (0..width).filter(|r| row(&written, *r) != row(&plain, *r)).collect();
        assert!((2..=4).contains(&large.len()), "{large:?}");
        let scale = made("norm", &[width], Fill::OutlierReader, true);
        let others = (0..width).filter(|c| !large.contains(c)).map(|c| scale[c]).sum::<f64>();
        let mean = others / (width - large.len()) as f64;
        for channel in large {
            let height = f64::from(HIDDEN) * row(&written, channel).iter().sum::<f64>();
            assert!((7.9..81.0).contains(&height), "{channel}: {height}");
            // After the norm the channel is of the others' size.
            let ratio = scale[channel] * height / mean;
            assert!((0.5..2.0).contains(&ratio), "{channel}: {ratio}");
        }
        for fill in [Fill::Linear, Fill::Embedding, Fill::NormScale] {
            assert_eq!(made("same", &[8, 256], fill, true), made("same", &[8, 256], fill, false));
        }
    }

    #[test]
    fn narrow_storage_rounds_the_same_values() {
        let wide = floats(&made(3, "x", 77, Storage::F32));
        let narrow = made(3, "x", 77, Storage::Bf16);
        for (value, bytes) in wide.iter().zip(narrow.chunks(2)) {
            let rounded = f64::from(bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32());
            assert!((rounded - value).abs() <= value.abs() / 256.0, "{rounded} for {value}");
        }
    }
}
