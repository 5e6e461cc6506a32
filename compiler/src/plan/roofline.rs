//! Times from a roofline: a stage takes as long as reading its bytes or doing its operations takes, whichever is
//! longer, each at a share of the device's peak, and a little for each layer beside:
//!
//! ```text
//! ms = max(bytes / (bandwidth · a), Σ operations / (rate · b)) + layers · c
//! ```
//!
//! a, b and c are fitted on published measurements of other models (`published.toml`), by stage and engine: those with
//! the least squares of ln(predicted / measured) on a grid. How good that is says [`leave_one_out`]: each measurement is
//! predicted from those of other devices, and from those of other models.

use std::collections::{BTreeMap, BTreeSet};

use flamingo_runtime::profile::Arithmetic;
use serde::{Deserialize, Serialize};

use super::devices::Device;

/// A part of what answering a prompt takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// A picture to visual tokens, keys and values.
    Encode,
    /// A prompt, to the logits of its last token.
    Prefill,
    /// One token.
    Decode,
}

/// What one run of a stage reads and computes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Load {
    /// Bytes of weights and caches, once for each pass over them.
    pub bytes: f64,
    /// Operations by kind; a multiply-add is two.
    pub operations: BTreeMap<Arithmetic, f64>,
    /// Layers.
    pub n_layers: usize,
}

/// What a load takes on a device at its peaks, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Floor {
    /// To read its bytes.
    pub reading_ms: f64,
    /// To do its operations.
    pub computing_ms: f64,
    /// Layers.
    pub n_layers: usize,
}

/// How much of a device's peaks an engine reaches.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Efficiency {
    /// Share of the bandwidth.
    pub bandwidth: f64,
    /// Share of the peak rate.
    pub arithmetic: f64,
    /// Beside, for each layer: launches, norms, what is done between products.
    pub layer_ms: f64,
}

/// A published measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// Name of the device.
    pub device: String,
    /// Name of the model, or of its part.
    pub model: String,
    /// What was timed.
    pub stage: Stage,
    /// What it takes at the device's peaks.
    pub floor: Floor,
    /// What it took.
    pub ms: f64,
}

/// How far predictions are from measurements, as factors of at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Errors {
    /// Geometric mean.
    pub mean: f64,
    /// Largest.
    pub worst: f64,
    /// Measurements.
    pub n: usize,
}

impl Stage {
    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Encode => "encode",
            Stage::Prefill => "prefill",
            Stage::Decode => "decode",
        }
    }
}

impl Load {
    /// What it takes on a device at its peaks.
    pub fn floor(&self, device: &Device) -> Floor {
        let computing_s = |(kind, n): (&Arithmetic, &f64)| n / (device.gop_per_s(*kind) * 1e9);
        Floor {
            reading_ms: self.bytes / (device.bandwidth_gb_per_s * 1e6),
            computing_ms: self.operations.iter().map(computing_s).sum::<f64>() * 1e3,
            n_layers: self.n_layers,
        }
    }
}

impl Efficiency {
    /// Predicted time.
    pub fn ms(&self, floor: &Floor) -> f64 {
        let Floor { reading_ms, computing_ms, n_layers } = *floor;
        let longer = (reading_ms / self.bandwidth).max(computing_ms / self.arithmetic);
        longer + n_layers as f64 * self.layer_ms
    }

    /// Whether reading takes longer than computing.
    pub fn is_bound_by_memory(&self, floor: &Floor) -> bool {
        floor.reading_ms / self.bandwidth >= floor.computing_ms / self.arithmetic
    }
}

impl Errors {
    /// Of predictions beside what was measured; none of nothing.
    fn of(pairs: &[(f64, &Measurement)], n: usize) -> Option<Errors> {
        let logs: Vec<f64> = pairs.iter().map(|(ms, row)| (ms / row.ms).ln().abs()).collect();
        let worst = logs.iter().copied().max_by(f64::total_cmp)?;
        let mean = logs.iter().sum::<f64>() / logs.len() as f64;
        Some(Errors { mean: mean.exp(), worst: worst.exp(), n })
    }
}

/// The efficiency with which a stage fits its measurements best; none without a measurement of it, and of decoding,
/// which tells the share of the bandwidth.
pub fn fit(rows: &[&Measurement], stage: Stage) -> Option<Efficiency> {
    let bandwidth = match stage {
        Stage::Decode => None,
        Stage::Encode | Stage::Prefill => Some(fit(rows, Stage::Decode)?.bandwidth),
    };
    let own: Vec<&Measurement> = rows.iter().copied().filter(|row| row.stage == stage).collect();
    let loss = |efficiency: &Efficiency| -> f64 {
        own.iter().map(|row| (efficiency.ms(&row.floor) / row.ms).ln().powi(2)).sum()
    };
    if own.is_empty() {
        return None;
    }
    let hundredths = |from: u32, to: u32| (from..=to).map(|n| f64::from(n) / 100.0);
    let candidate = |share: f64, layer_ms: f64| match bandwidth {
        None => Efficiency { bandwidth: share, arithmetic: 1.0, layer_ms },
        Some(bandwidth) => Efficiency { bandwidth, arithmetic: share, layer_ms },
    };
    hundredths(5, 100)
        .flat_map(|share| hundredths(0, 80).map(move |layer_ms| candidate(share, layer_ms)))
        .map(|efficiency| (loss(&efficiency), efficiency))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, best)| best)
}

/// Errors where each measurement is predicted from those of other devices, and again from those of other models.
pub fn leave_one_out(rows: &[&Measurement], stage: Stage) -> Option<Errors> {
    let own: Vec<&Measurement> = rows.iter().copied().filter(|row| row.stage == stage).collect();
    let mut pairs = Vec::new();
    for of in [|row: &Measurement| row.device.clone(), |row: &Measurement| row.model.clone()] {
        for left_out in own.iter().map(|row| of(row)).collect::<BTreeSet<_>>() {
            let others: Vec<_> = rows.iter().copied().filter(|row| of(row) != left_out).collect();
            let Some(efficiency) = fit(&others, stage) else { continue };
            let tested = own.iter().filter(|row| of(row) == left_out);
            pairs.extend(tested.map(|row| (efficiency.ms(&row.floor), *row)));
        }
    }
    Errors::of(&pairs, own.len())
}

/// Errors of an efficiency on measurements that it was not fitted to.
pub fn held_out(rows: &[&Measurement], stage: Stage, efficiency: &Efficiency) -> Option<Errors> {
    let own = rows.iter().copied().filter(|row| row.stage == stage);
    let pairs: Vec<_> = own.map(|row| (efficiency.ms(&row.floor), row)).collect();
    Errors::of(&pairs, pairs.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floor(reading_ms: f64, computing_ms: f64, n_layers: usize) -> Floor {
        Floor { reading_ms, computing_ms, n_layers }
    }

    #[test]
    fn the_longer_of_reading_and_computing_counts() {
        let efficiency = Efficiency { bandwidth: 0.5, arithmetic: 0.25, layer_ms: 0.1 };
        assert_eq!(efficiency.ms(&floor(3.0, 1.0, 10)), 7.0);
        assert_eq!(efficiency.ms(&floor(1.0, 3.0, 0)), 12.0);
        assert!(efficiency.is_bound_by_memory(&floor(3.0, 1.0, 10)));
        assert!(!efficiency.is_bound_by_memory(&floor(1.0, 3.0, 0)));
    }

    #[test]
    fn loads_take_what_peaks_allow() {
        let agx = Device::from_name("agx-orin-64").unwrap();
        let operations = [(Arithmetic::F32, 42.75e9), (Arithmetic::Int8, 42.75e9)].into();
        let load = Load { bytes: 204.8e6, operations, n_layers: 3 };
        let Floor { reading_ms, computing_ms, n_layers } = load.floor(agx);
        assert!((reading_ms - 1.0).abs() < 1e-12 && (computing_ms - 2.0).abs() < 1e-12);
        assert_eq!(n_layers, 3);
    }

    /// Measurements that the formula made are fitted exactly, and then predict each other.
    #[test]
    fn the_fit_finds_what_made_the_measurements() {
        let truth = |stage| match stage {
            Stage::Decode => Efficiency { bandwidth: 0.7, arithmetic: 1.0, layer_ms: 0.05 },
            Stage::Encode | Stage::Prefill => {
                Efficiency { bandwidth: 0.7, arithmetic: 0.4, layer_ms: 0.3 }
            }
        };
        let mut rows = Vec::new();
        for (index, (device, model)) in
            [("a", "x"), ("b", "x"), ("a", "y"), ("b", "y"), ("b", "z")].into_iter().enumerate()
        {
            let (scale, n_layers) = ((index + 1) as f64, 3 + 4 * (index % 3));
            for (stage, floor) in [
                (Stage::Decode, floor(8.0 * scale, 0.1, n_layers)),
                (Stage::Prefill, floor(8.0 * scale, 30.0 * scale, n_layers)),
            ] {
                let ms = truth(stage).ms(&floor);
                let (device, model) = (device.to_owned(), model.to_owned());
                rows.push(Measurement { device, model, stage, floor, ms });
            }
        }
        let rows: Vec<&Measurement> = rows.iter().collect();
        for stage in [Stage::Decode, Stage::Prefill] {
            let found = fit(&rows, stage).unwrap();
            let floor = floor(5.0, 50.0, 9);
            assert!((found.ms(&floor) / truth(stage).ms(&floor) - 1.0).abs() < 1e-6, "{found:?}");
            let errors = leave_one_out(&rows, stage).unwrap();
            assert!(errors.n == 5 && errors.worst < 1.001, "{errors:?}");
        }
        assert_eq!(fit(&rows, Stage::Encode), None);
        assert_eq!(leave_one_out(&rows, Stage::Encode), None);
    }
}
