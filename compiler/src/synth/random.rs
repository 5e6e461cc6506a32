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

use super::tensor::{Spread, TensorSpec};

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
        let channels = spec.channels().filter(|_| self.spread.outliers);
        let factors = channels.map(|n| outlier_factors(self.seed, n)).unwrap_or_default();
        let mut factor = factors.iter().cycle();
        let mut left = spec.n_values();
        while left > 0 {
            let n_values = left.min(CHUNK);
            let random = &mut self.random[..n_values * RANDOM_BYTES];
            rng.fill_bytes(random);
            let values = &mut self.values[..n_values];
            fill_normal(random, mean, deviation, values);
            values.iter_mut().zip(&mut factor).for_each(|(value, factor)| *value *= factor);
            write_values(values, storage, out)?;
            left -= n_values;
            self.done_bytes += (n_values * storage.value_bytes()) as u64;
            (self.progress)(self.done_bytes, self.total_bytes);
        }
        Ok(())
    }
}

/// Factors of the channels of all tensors of a width: one channel in 64 has an outlier, at least two have, and the
/// rest 1. As in trained transformers the same few channels are large in every layer, 8 to 80 times the others with a
/// heavy tail (Pareto with exponent 1.5; T. Dettmers et al., LLM.int8(), 2022, section 4).
fn outlier_factors(seed: u64, n_channels: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::from_seed(key(seed, "outliers", &n_channels.to_string()));
    let mut factors = vec![1.0; n_channels];
    for _ in 0..(n_channels / 64).max(2) {
        let channel = rng.random_range(0..n_channels);
        let tail: f64 = rng.random_range(0.0..1.0);
        factors[channel] = (8.0 * (1.0 - tail).powf(-1.0 / 1.5)).min(80.0) as f32;
    }
    factors
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
    fn outliers_are_the_same_channels_of_every_tensor_and_only_where_channels_are_written() {
        let made = |name: &str, shape: &[usize], fill, outliers| {
            let mut list = TensorList::default();
            list.add(name, shape, fill);
            let (mut bytes, mut ignore) = (Vec::new(), |_, _| ());
            let spread = Spread { outliers, ..Spread::LARGE };
            let mut generator = Generator::new(4, spread, 0, &mut ignore);
            generator.write("part", &list.specs()[0], Storage::F32, &mut bytes).unwrap();
            floats(&bytes)
        };
        let scale = made("norm", &[256], Fill::NormScale, true);
        let large: Vec<usize> = (0..256).filter(|c| scale[*c] > 4.0).collect();
        assert!((2..=4).contains(&large.len()), "{large:?}");
        // Longer than a chunk, whose ends fall between rows.
        let (rows, width) = (300, 256);
        let plain = made("table", &[rows, width], Fill::Embedding, false);
        let table = made("table", &[rows, width], Fill::Embedding, true);
        for (index, (value, plain)) in table.iter().zip(&plain).enumerate() {
            let ratio = value / plain;
            assert_eq!(ratio > 4.0, large.contains(&(index % width)), "{index}: {ratio}");
        }
        let linear = |outliers| made("linear", &[8, 256], Fill::Linear, outliers);
        assert_eq!(linear(true), linear(false));
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
