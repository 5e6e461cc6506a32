//! What this machine can do, measured: the ceilings that timings of an artifact are held against.
#![forbid(unsafe_code)]

use std::fs;
use std::num::NonZeroUsize;

use flamingo_kernels::{Isa, Kernels, probe};
use serde::Serialize;

use crate::backend::BackendError;
use crate::profile::Arithmetic;

/// A processor and its measured ceilings, all threads together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// Name of the processor, as the system tells it.
    pub cpu: String,
    /// Instruction set that the kernels use.
    pub isa: &'static str,
    /// Features of the processor that decide which kernels are fast.
    pub features: Vec<&'static str>,
    /// Threads.
    pub threads: usize,
    /// Sustained read bandwidth, GB/s (10⁹ bytes).
    pub read_gb_per_s: f64,
    /// Peak of f32, GOP/s (10⁹ operations, a multiply-add is two).
    pub f32_gop_per_s: f64,
    /// Peak of bfloat16 dot products, GOP/s; none without an instruction for them.
    pub bf16_gop_per_s: Option<f64>,
    /// Peak of dot products of bytes, GOP/s; none without instructions for them.
    pub int8_gop_per_s: Option<f64>,
}

impl Machine {
    /// Measures this machine on `n_threads`, by default one for each physical core. Takes about
    /// three seconds and 512 MiB.
    ///
    /// # Errors
    /// If the kernels cannot be had.
    pub fn measure(n_threads: Option<NonZeroUsize>) -> Result<Machine, BackendError> {
        let kernels = Kernels::new(n_threads)?;
        let peaks = probe::peaks(&kernels);
        let features = probe::features().into_iter();
        Ok(Machine {
            cpu: cpu_name(),
            isa: kernels.isa().name(),
            features: features.filter(|(_, has)| *has).map(|(name, _)| name).collect(),
            threads: kernels.n_threads(),
            read_gb_per_s: peaks.read_gb_per_s,
            f32_gop_per_s: peaks.f32_gop_per_s,
            bf16_gop_per_s: peaks.bf16_gop_per_s,
            int8_gop_per_s: peaks.int8_gop_per_s,
        })
    }

    /// Every ceiling the larger of two measurements.
    #[must_use]
    pub fn max(self, other: &Machine) -> Machine {
        let larger = |a: Option<f64>, b: Option<f64>| Some(a?.max(b?));
        Machine {
            read_gb_per_s: self.read_gb_per_s.max(other.read_gb_per_s),
            f32_gop_per_s: self.f32_gop_per_s.max(other.f32_gop_per_s),
            bf16_gop_per_s: larger(self.bf16_gop_per_s, other.bf16_gop_per_s),
            int8_gop_per_s: larger(self.int8_gop_per_s, other.int8_gop_per_s),
            ..self
        }
    }

    /// Peak rate of a kind of arithmetic, GOP/s; that of f32 where there is no instruction for it.
    pub fn gop_per_s(&self, arithmetic: Arithmetic) -> f64 {
        let own = match arithmetic {
            Arithmetic::F32 => None,
            Arithmetic::Bf16 => self.bf16_gop_per_s,
            Arithmetic::Int8 => self.int8_gop_per_s,
        };
        own.unwrap_or(self.f32_gop_per_s)
    }
}

/// Instruction sets that kernels are compiled for, by name, and whether this processor has them.
pub fn instruction_sets() -> Vec<(&'static str, bool)> {
    Isa::ALL.map(|isa| (isa.name(), isa.is_available())).to_vec()
}

/// Processor features that decide which kernels are fast, and whether this processor has them.
pub fn features() -> Vec<(&'static str, bool)> {
    probe::features()
}

/// The first model name that the system tells, else the architecture.
fn cpu_name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |line: &str| {
        let (key, value) = line.split_once(':')?;
        matches!(key.trim(), "model name" | "Model").then(|| value.trim().to_owned())
    };
    info.lines().find_map(value).unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_are_the_larger_ones_and_fall_back_to_f32() {
        let slow = Machine {
            cpu: "a".into(),
            isa: "avx2",
            features: vec![],
            threads: 1,
            read_gb_per_s: 2.0,
            f32_gop_per_s: 10.0,
            bf16_gop_per_s: None,
            int8_gop_per_s: Some(30.0),
        };
        let other = Machine { read_gb_per_s: 1.0, int8_gop_per_s: Some(40.0), ..slow.clone() };
        let best = slow.max(&other);
        assert_eq!((best.read_gb_per_s, best.gop_per_s(Arithmetic::Int8)), (2.0, 40.0));
        assert_eq!(best.gop_per_s(Arithmetic::Bf16), 10.0);
        assert_eq!(best.gop_per_s(Arithmetic::F32), 10.0);
    }
}
