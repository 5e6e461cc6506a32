//! `published.toml`: measurements that others published, and what the measured models read and compute.

use std::collections::BTreeMap;

use flamingo_runtime::profile::Arithmetic;
use serde::Deserialize;

use super::devices::{Device, Processor};
use super::roofline::{Load, Measurement, Stage};

/// Engines whose measurements are fitted; those of others only test the fit.
const FITTED: [&str; 2] = ["edge-llm", "llama.cpp"];

/// llama.cpp multiplies bytes; a GPU computes in fp16 whatever this says ([`Device::gop_per_s`]).
const BYTES: Arithmetic = Arithmetic::Int8;
/// Patches that become one visual token.
const MERGED: f64 = 4.0;
/// Numbers of a patch: two frames of 16 x 16 pixels in three colours.
const PATCH: f64 = 1536.0;

/// The file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// Shapes of language models.
    language: Vec<Language>,
    /// Shapes of vision encoders.
    encoder: Vec<Encoder>,
    /// Times.
    measured: Vec<Row>,
    /// Memory.
    pub peak: Vec<Peak>,
}

/// A decoder-only transformer with a gated feed-forward.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Language {
    name: String,
    layers: usize,
    width: f64,
    /// Width of all queries.
    query: f64,
    /// Width of all keys.
    kv: f64,
    mlp: f64,
    vocabulary: f64,
    /// Bits of a weight of the layers, scales included.
    bits: f64,
    /// The same of the head.
    head_bits: f64,
}

/// A vision transformer, and the mergers after it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Encoder {
    name: String,
    layers: usize,
    width: f64,
    mlp: f64,
    mergers: f64,
    /// Width of a visual token.
    out: f64,
}

/// One time.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    engine: String,
    device: String,
    stage: Stage,
    model: String,
    tokens: f64,
    weights: String,
    /// Milliseconds, or runs in a second: one of them.
    ms: Option<f64>,
    per_s: Option<f64>,
}

/// Peak memory of a text model with its caches.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peak {
    /// Name of the device.
    pub device: String,
    /// Name of the model.
    pub model: String,
    /// MB.
    pub mb: f64,
}

/// What is known of a kind of processor.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// What predictions are fitted to.
    pub fitted: Vec<Measurement>,
    /// What only tests them.
    pub others: Vec<Measurement>,
    /// How weights of the measured models were stored, by stage.
    pub weights: BTreeMap<Stage, Vec<String>>,
}

impl Published {
    /// The file of this crate.
    pub fn read() -> Published {
        toml::from_str(include_str!("published.toml"))
            .expect("the crate's own file, which a test reads")
    }

    /// What is known of processors of the kind of `device`'s.
    pub fn known_of(&self, device: &Device) -> Known {
        let mut known = Known::default();
        for row in &self.measured {
            let measured = row.device();
            if is_gpu(measured) != is_gpu(device) {
                continue;
            }
            let weights = known.weights.entry(row.stage).or_default();
            weights.extend((!weights.contains(&row.weights)).then(|| row.weights.clone()));
            let rows = match FITTED.contains(&row.engine.as_str()) {
                true => &mut known.fitted,
                false => &mut known.others,
            };
            rows.push(Measurement {
                device: row.device.clone(),
                model: row.model.clone(),
                stage: row.stage,
                floor: self.load(row).floor(measured),
                ms: row.ms(),
            });
        }
        known
    }

    fn load(&self, row: &Row) -> Load {
        match row.stage {
            Stage::Encode => self.encoder(&row.model).load(row.tokens),
            Stage::Prefill => self.language(&row.model).load(row.tokens, 0.0),
            Stage::Decode => self.language(&row.model).load(1.0, row.tokens),
        }
    }

    fn language(&self, name: &str) -> &Language {
        let found = self.language.iter().find(|model| model.name == name);
        found.expect("the crate's own file names its models, which a test reads")
    }

    fn encoder(&self, name: &str) -> &Encoder {
        let found = self.encoder.iter().find(|model| model.name == name);
        found.expect("the crate's own file names its models, which a test reads")
    }

    /// Bytes of a text model with an embedding beside its head, and of keys and values of `n_tokens`.
    pub fn text_model_bytes(&self, name: &str, n_tokens: f64) -> f64 {
        let model = self.language(name);
        model.layer_bytes() + 2.0 * model.head_bytes() + n_tokens * model.cached_token_bytes()
    }
}

impl Language {
    fn layer_weights(&self) -> f64 {
        let attention = 2.0 * self.width * (self.query + self.kv);
        self.layers as f64 * (attention + 3.0 * self.width * self.mlp)
    }

    fn layer_bytes(&self) -> f64 {
        self.layer_weights() * self.bits / 8.0
    }

    fn head_bytes(&self) -> f64 {
        self.width * self.vocabulary * self.head_bits / 8.0
    }

    /// Keys and values in fp16.
    fn cached_token_bytes(&self) -> f64 {
        4.0 * self.layers as f64 * self.kv
    }

    /// `len` new tokens after `past_len`, to the logits of the last; causal attention counts in full.
    fn load(&self, len: f64, past_len: f64) -> Load {
        let products = self.layer_weights() * len + self.width * self.vocabulary;
        let scores = self.layers as f64 * len * (past_len + len) * self.query;
        Load {
            bytes: self.layer_bytes() + self.head_bytes() + past_len * self.cached_token_bytes(),
            operations: [(BYTES, 2.0 * products + 4.0 * scores)].into(),
            n_layers: self.layers,
        }
    }
}

impl Encoder {
    /// A picture of `n_patches`, with weights in fp16.
    fn load(&self, n_patches: f64) -> Load {
        let (layers, width) = (self.layers as f64, self.width);
        let each_patch = layers * (4.0 * width * width + 2.0 * width * self.mlp) + PATCH * width;
        let merged = MERGED * width;
        let each_token = self.mergers * (merged * merged + merged * self.out);
        let products = each_patch * n_patches + each_token * n_patches / MERGED;
        let scores = layers * n_patches * n_patches * width;
        Load {
            bytes: 2.0 * (each_patch + each_token),
            operations: [(BYTES, 2.0 * products + 4.0 * scores)].into(),
            n_layers: self.layers,
        }
    }
}

impl Row {
    fn device(&self) -> &'static Device {
        let found = Device::from_name(&self.device);
        found.expect("the crate's own file names known devices, which a test reads")
    }

    fn ms(&self) -> f64 {
        let ms = self.ms.or(self.per_s.map(|rate| 1e3 / rate));
        ms.expect("the crate's own file gives each row a time, which a test reads")
    }
}

fn is_gpu(device: &Device) -> bool {
    matches!(device.processor, Processor::Gpu { .. })
}

#[cfg(test)]
mod tests {
    use super::super::roofline::{Errors, fit, held_out, leave_one_out};
    use super::*;

    fn known(device: &str) -> Known {
        Published::read().known_of(Device::from_name(device).unwrap())
    }

    /// Mean and worst error by which measurements are predicted that were left out, as the README states them.
    #[track_caller]
    fn check(errors: Option<Errors>, n: usize, mean: f64, worst: f64) {
        let errors = errors.unwrap();
        let is_within =
            |found: f64, bound: f64| found <= bound && found > 1.0 + 0.8 * (bound - 1.0);
        assert_eq!(errors.n, n, "{errors:?}");
        assert!(is_within(errors.mean, mean) && is_within(errors.worst, worst), "{errors:?}");
    }

    #[test]
    fn measurements_left_out_are_predicted_within_the_stated_error() {
        let jetson = known("orin-nano-8");
        let fitted: Vec<&Measurement> = jetson.fitted.iter().collect();
        check(leave_one_out(&fitted, Stage::Encode), 16, 1.06, 1.16);
        check(leave_one_out(&fitted, Stage::Prefill), 17, 1.11, 1.25);
        check(leave_one_out(&fitted, Stage::Decode), 17, 1.08, 1.21);
        let pi = known("raspberry-pi-5-8");
        let fitted: Vec<&Measurement> = pi.fitted.iter().collect();
        assert_eq!(leave_one_out(&fitted, Stage::Encode), None);
        check(leave_one_out(&fitted, Stage::Prefill), 4, 1.5, 2.2);
        check(leave_one_out(&fitted, Stage::Decode), 4, 1.06, 1.13);
    }

    /// Another engine on the same boards, in power modes that are known.
    #[test]
    fn another_engine_is_predicted_within_the_stated_error() {
        let Known { fitted, others, .. } = known("agx-orin-64");
        let fitted: Vec<&Measurement> = fitted.iter().collect();
        let efficiency = fit(&fitted, Stage::Decode).unwrap();
        let others: Vec<&Measurement> = others.iter().collect();
        check(held_out(&others, Stage::Decode, &efficiency), 14, 1.22, 1.78);
        let (gemma, plain): (Vec<&Measurement>, _) =
            others.iter().partition(|row| row.model.starts_with("Gemma"));
        check(held_out(&plain, Stage::Decode, &efficiency), 10, 1.08, 1.33);
        assert_eq!(gemma.len(), 4);
    }

    #[test]
    fn published_peaks_are_met_within_a_quarter() {
        let published = Published::read();
        for Peak { device, model, mb } in &published.peak {
            let runtime = Device::from_name(device).unwrap().runtime_bytes() as f64;
            let ratio = (published.text_model_bytes(model, 2200.0) + runtime) / (mb * 1e6);
            assert!((0.9..1.25).contains(&ratio), "{model} on {device}: {ratio}");
        }
        assert_eq!(published.peak.len(), 10);
    }

    /// Qwen3-0.6B by hand: a layer has 2·1024·(2048 + 1024) + 3·1024·3072 = 15 728 640 weights.
    #[test]
    fn loads_are_those_of_a_hand() {
        let published = Published::read();
        let Load { bytes, operations, n_layers } = published.language("Qwen3-0.6B").load(1.0, 10.0);
        let weights = 28.0 * 15_728_640.0;
        let head = 1024.0 * 151_936.0;
        assert_eq!(bytes, weights * 4.125 / 8.0 + head * 2.0 + 10.0 * 28.0 * 1024.0 * 4.0);
        let expected = 2.0 * (weights + head) + 28.0 * 4.0 * 11.0 * 2048.0;
        assert_eq!((operations[&BYTES], n_layers), (expected, 28));
        let Load { bytes, .. } = published.encoder("Qwen3.5-0.8B-ViT").load(1060.0);
        let layers = 12.0 * (4.0 * 768.0 * 768.0 + 2.0 * 768.0 * 3072.0) + 1536.0 * 768.0;
        assert_eq!(bytes, 2.0 * (layers + 3072.0 * (3072.0 + 1024.0)));
    }
}
