//! Plans a model for a device before anything is copied there: whether it fits, at which precision, and how long a
//! picture, a prompt and a token will take.
//!
//! Memory is counted from the graphs and the weights themselves ([`Model`]). Times are predictions from a
//! [`roofline`], fitted to what others published of other models on these devices ([`published`]); the error found by
//! leaving devices and models out is the error bar. No figure was measured on a device by this project.

pub mod devices;
pub mod published;
pub mod roofline;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use flamingo_ir::onnx::{ReadLimits, read_onnx, write_onnx};
use flamingo_ir::op::Flavour;
use flamingo_ir::{Graph, Verified};
use flamingo_models::manifest::Limits;
use flamingo_models::{ModelConfig, Source};
use flamingo_runtime::native::{Plans, Text};
use flamingo_runtime::profile::Work;
use flamingo_runtime::{Artifact, KvFormat, LoadedGraphs, PREFILL_TOKENS, default_kv_format};
use serde::Serialize;

use crate::compile::{optimise_stage, precision_of_groups};
use crate::emit::{WEIGHTS, WeightPlan};
use crate::scheme::{LayerGroup, Precision, Scheme};
use devices::{Device, Processor};
use published::{Known, Published};
use roofline::{Efficiency, Errors, Load, Measurement, Stage, fit, held_out, leave_one_out};

/// Precisions that are tried for a device, the finest first.
pub const CANDIDATES: [Precision; 3] = [Precision::F16, Precision::Int8, Precision::Int4];
/// Tokens of the prompt whose prefill is predicted, and before the token that is decoded: those of `bench`.
const TOKENS: usize = 128;

/// A model as it is stored, before or after it is written.
pub struct Model {
    config: ModelConfig,
    /// How the weights of each layer group are stored, as in the manifest.
    precision: BTreeMap<String, String>,
    weight_bytes: u64,
    plans: Plans,
}

/// What a model takes in memory, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Weights.
    pub weights: u64,
    /// Keys and values of one token of text.
    pub token: u64,
    /// Visual tokens, keys and values of one picture.
    pub picture: u64,
    /// Buffers that encode a picture and read a piece of a prompt.
    pub buffers: u64,
}

/// What a model takes on a device, beside what there is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Budget {
    /// Bytes by what they are for.
    pub rows: Vec<(String, u64)>,
    /// Their sum.
    pub needed_bytes: u64,
    /// Memory that the system sees.
    pub visible_bytes: u64,
}

/// Limits that would fit, each with the other as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WouldFit {
    /// Most tokens of a sequence.
    pub max_context: Option<usize>,
    /// Most pictures of a prompt.
    pub max_images: Option<usize>,
}

/// Predicted times of a model on a device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// What is assumed, and what it was checked on.
    pub method: String,
    /// By stage.
    pub stages: Vec<Prediction>,
}

/// The predicted time of a stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// The stage.
    pub stage: Stage,
    /// The same in words, with its sizes.
    pub what: String,
    /// Milliseconds.
    pub ms: f64,
    /// The same, divided by the largest error found.
    pub low_ms: f64,
    /// The same, times the largest error found.
    pub high_ms: f64,
    /// `memory` or `arithmetic`.
    pub bound_by: &'static str,
    /// Why the bars are wider than the errors found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub carried_over: Option<String>,
}

impl Model {
    /// The model of an artifact.
    ///
    /// # Errors
    /// Graphs that the native backend cannot plan.
    pub fn of_artifact(artifact: &Artifact, graphs: &LoadedGraphs) -> Result<Model> {
        let manifest = &artifact.manifest;
        let is_weights = |path: &str| path.rsplit('/').next() == Some(WEIGHTS);
        let weights = manifest.files.iter().filter(|file| is_weights(&file.path));
        Ok(Model {
            config: manifest.config.clone(),
            precision: manifest.precision.clone(),
            weight_bytes: weights.map(|file| file.bytes).fold(0, u64::saturating_add),
            plans: Plans::new(&graphs.media, &graphs.decoder)?,
        })
    }

    /// The model that `compile` would make of a source. Reads no tensor but gates.
    ///
    /// # Errors
    /// A source that cannot be compiled.
    pub fn of_source(source: &Source, scheme: &Scheme) -> Result<Model> {
        let graphs = source.graphs()?;
        let optimised = |graph: Graph| optimise_stage(graph, source, scheme, None, None);
        let (media, decoder) = (optimised(graphs.media)?.0, optimised(graphs.decoder)?.0);
        let stages = [&media, &decoder];
        let weights = WeightPlan::new(&stages)?;
        let as_read = |index: usize| -> Result<Verified> {
            let bytes = write_onnx(stages[index], Flavour::Portable, weights.layout(index))?;
            Ok(read_onnx(&bytes, &ReadLimits::default())?.graph)
        };
        let read = [as_read(0)?, as_read(1)?];
        Ok(Model {
            config: source.config.clone(),
            precision: precision_of_groups(&stages),
            weight_bytes: weights.total_bytes(),
            plans: Plans::new(&read[0], &read[1])?,
        })
    }

    fn kv_format(&self) -> KvFormat {
        default_kv_format(&self.precision)
    }

    /// What it takes in memory.
    ///
    /// # Errors
    /// If a size overflows.
    pub fn needs(&self) -> Result<Needs> {
        let format = self.kv_format();
        let buffers = self.picture_buffer_bytes()?;
        Ok(Needs {
            weights: self.weight_bytes,
            token: to_u64(self.plans.token_bytes(format)),
            picture: to_u64(self.plans.picture_bytes(format)),
            buffers: buffers.saturating_add(self.text_buffer_bytes(PREFILL_TOKENS)?),
        })
    }

    /// Bytes of the buffers that encode a picture.
    ///
    /// # Errors
    /// If a size overflows.
    pub fn picture_buffer_bytes(&self) -> Result<u64> {
        Ok(to_u64(self.plans.picture_buffer_bytes()?))
    }

    /// Bytes of the buffers that read so many tokens at once.
    ///
    /// # Errors
    /// If a size overflows.
    pub fn text_buffer_bytes(&self, len: usize) -> Result<u64> {
        Ok(to_u64(self.plans.text_buffer_bytes(Text { len, past_len: 0 })?))
    }

    /// How long its stages will take on a device.
    ///
    /// # Errors
    /// If a size overflows.
    pub fn forecast(&self, limits: &Limits, device: &Device) -> Result<Forecast> {
        let known = Published::read().known_of(device);
        let [encode, prefill, decode] = [Stage::Encode, Stage::Prefill, Stage::Decode]
            .map(|stage| Basis::of(&known, stage).context("a stage that nothing was published of"));
        let (encode, prefill, decode) = (encode?, prefill?, decode?);
        let len = TOKENS.min(limits.max_context);
        let past_len = TOKENS.min(limits.max_context.saturating_sub(1));
        let (picture, resampler) = self.picture_loads()?;
        let prompt = self.text_load(Text { len, past_len: 0 })?;
        let token = self.text_load(Text { len: 1, past_len })?;
        let predict = |what: &str, basis: &Basis, load: &Load, reason: Option<&str>| {
            let mut reasons = basis.reasons(self.format_of(basis.stage));
            reasons.extend(reason.map(str::to_owned));
            basis.predict(what.to_owned(), &load.floor(device), reasons)
        };
        let resampler = resampler.map(|load| {
            predict("of it the resampler", &encode, &load, Some("no resampler was measured"))
        });
        let stages = [predict("encode one picture", &encode, &picture, None)].into_iter();
        let stages = stages.chain(resampler).chain([
            predict(&format!("prefill of {len} tokens"), &prefill, &prompt, None),
            predict(&format!("decode after {past_len} tokens"), &decode, &token, None),
        ]);
        Ok(Forecast {
            method: method(device, &[&encode, &prefill, &decode]),
            stages: stages.collect(),
        })
    }

    /// How the bulk of the weights of a stage is stored.
    fn format_of(&self, stage: Stage) -> &str {
        let group = match stage {
            Stage::Encode => LayerGroup::Vision,
            Stage::Prefill | Stage::Decode => LayerGroup::Language,
        };
        let formats = self.precision.get(group.name()).map_or("f32", String::as_str);
        formats.split(['+', '/']).next().unwrap_or(formats)
    }

    /// Of a picture as a whole, and of its resampler.
    fn picture_loads(&self) -> Result<(Load, Option<Load>)> {
        let work = self.plans.picture_work()?;
        let is_resampler = |(node, _): &&(&str, Work)| {
            LayerGroup::of("media", node) == Some(LayerGroup::Resampler)
        };
        let (vision, resampler) = (&self.config.vision, &self.config.resampler);
        let n_layers = resampler.as_ref().map_or(0, |resampler| resampler.n_layers);
        let own = resampler.is_some().then(|| load(work.iter().filter(is_resampler), n_layers));
        Ok((load(work.iter(), vision.n_layers().saturating_add(n_layers)), own))
    }

    /// Of text that sees a picture, with what it reads of the caches.
    fn text_load(&self, text: Text) -> Result<Load> {
        let (language, gated) = (&self.config.language, &self.config.cross_attention.layers);
        let work = self.plans.text_work(text)?;
        let mut load = load(work.iter(), language.n_layers.saturating_add(gated.len()));
        let format = self.kv_format();
        load.bytes += text.past_len as f64 * self.plans.token_bytes(format) as f64;
        load.bytes += self.plans.picture_bytes(format) as f64;
        Ok(load)
    }
}

fn load<'w>(work: impl Iterator<Item = &'w (&'w str, Work)>, n_layers: usize) -> Load {
    let mut load = Load { n_layers, ..Load::default() };
    for (_, work) in work {
        load.bytes += work.weight_bytes as f64;
        *load.operations.entry(work.arithmetic).or_default() += work.operations as f64;
    }
    load
}

impl Needs {
    /// What it is on a device, with prompts up to `limits`.
    pub fn on(&self, limits: &Limits, device: &Device) -> Budget {
        let Limits { max_context, max_images } = *limits;
        let text = self.token.saturating_mul(to_u64(max_context));
        let pictures = self.picture.saturating_mul(to_u64(max_images));
        let rows = vec![
            ("weights".to_owned(), self.weights),
            (format!("keys and values of {max_context} tokens"), text),
            (format!("visual tokens, keys and values of {max_images} pictures"), pictures),
            (format!("buffers: a picture, {PREFILL_TOKENS} tokens"), self.buffers),
            ("the runtime itself (assumed)".to_owned(), device.runtime_bytes()),
            ("the system (assumed)".to_owned(), device.system_bytes()),
        ];
        let needed_bytes = rows.iter().map(|(_, bytes)| *bytes).fold(0, u64::saturating_add);
        Budget { rows, needed_bytes, visible_bytes: device.visible_bytes }
    }

    /// The largest smaller limits that fit, one at a time.
    pub fn would_fit(&self, limits: &Limits, device: &Device) -> WouldFit {
        let most = |own: u64, without: Limits, now: usize| {
            let rest = self.on(&without, device);
            let room = rest.visible_bytes.checked_sub(rest.needed_bytes)?;
            let most = usize::try_from(room.checked_div(own)?).unwrap_or(usize::MAX);
            (most > 0 && most < now).then_some(most)
        };
        let Limits { max_context, max_images } = *limits;
        WouldFit {
            max_context: most(self.token, Limits { max_context: 0, max_images }, max_context),
            max_images: most(self.picture, Limits { max_context, max_images: 0 }, max_images),
        }
    }
}

impl Budget {
    /// Whether there is as much as it takes.
    pub fn fits(&self) -> bool {
        self.needed_bytes <= self.visible_bytes
    }
}

/// What predictions of a stage stand on.
struct Basis {
    stage: Stage,
    efficiency: Efficiency,
    /// On measurements of the fitted engine that were left out.
    own: Errors,
    /// On measurements of another engine.
    others: Option<Errors>,
    /// How the measured weights were stored.
    weights: Vec<String>,
    /// Whether the measurements are of another stage.
    is_borrowed: bool,
}

impl Basis {
    /// Of a stage; an encoder that nobody measured is taken for a prefill. None without measurements.
    fn of(known: &Known, stage: Stage) -> Option<Basis> {
        let fitted: Vec<&Measurement> = known.fitted.iter().collect();
        let others: Vec<&Measurement> = known.others.iter().collect();
        let Some(efficiency) = fit(&fitted, stage) else {
            let prefill = (stage == Stage::Encode).then(|| Basis::of(known, Stage::Prefill));
            return Some(Basis { stage, is_borrowed: true, ..prefill?? });
        };
        Some(Basis {
            stage,
            efficiency,
            own: leave_one_out(&fitted, stage)?,
            others: held_out(&others, stage, &efficiency),
            weights: known.weights.get(&stage).cloned().unwrap_or_default(),
            is_borrowed: false,
        })
    }

    /// The largest error found.
    fn worst(&self) -> f64 {
        self.others.map_or(1.0, |others| others.worst).max(self.own.worst)
    }

    /// Why a prediction for weights of `format` is less sure than the errors say.
    fn reasons(&self, format: &str) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.is_borrowed {
            reasons.push("no encoder was measured, prefill stands for it".to_owned());
        }
        if !self.weights.iter().any(|known| known == format) {
            reasons.push(format!("weights of {format} were not measured"));
        }
        reasons
    }

    /// What is carried over to what nobody measured has the square of the error.
    fn predict(&self, what: String, floor: &roofline::Floor, reasons: Vec<String>) -> Prediction {
        let ms = self.efficiency.ms(floor);
        let error = match reasons.is_empty() {
            true => self.worst(),
            false => self.worst().powi(2),
        };
        Prediction {
            stage: self.stage,
            what,
            ms,
            low_ms: ms / error,
            high_ms: ms * error,
            bound_by: match self.efficiency.is_bound_by_memory(floor) {
                true => "memory",
                false => "arithmetic",
            },
            carried_over: (!reasons.is_empty()).then(|| reasons.join("; ")),
        }
    }
}

/// What is assumed, and how far predictions were from what others published.
fn method(device: &Device, bases: &[&Basis]) -> String {
    let engine = match device.processor {
        Processor::Gpu { .. } => {
            "times are those of a GPU engine as efficient as TensorRT Edge-LLM 0.9; the native engine runs on the CPU, \
             and takes longer"
        }
        Processor::Cpu { .. } => "times are those of an engine as efficient as llama.cpp",
    };
    let checks = bases.iter().filter(|basis| !basis.is_borrowed).map(|basis| {
        let Errors { mean, worst, n } = basis.own;
        let others = basis.others.map(|others| {
            format!(
                " (another engine's: mean {:.2}, worst {:.2}, {})",
                others.mean, others.worst, others.n
            )
        });
        let others = others.unwrap_or_default();
        format!("{} mean {mean:.2}, worst {worst:.2}, {n} measurements{others}", basis.stage.name())
    });
    let checks = checks.collect::<Vec<_>>().join("; ");
    format!(
        "predictions, never run on this device; {engine}. Factor between prediction and published measurements of \
         other models, device or model left out: {checks}. Where a row says why, nothing alike was measured, and the \
         bars are the factor's square"
    )
}

fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: Needs =
        Needs { weights: 3_000_000_000, token: 1_000_000, picture: 7_000_000, buffers: 50_000_000 };

    fn limits(max_context: usize, max_images: usize) -> Limits {
        Limits { max_context, max_images }
    }

    fn nano() -> &'static Device {
        Device::from_name("orin-nano-8").unwrap()
    }

    /// 3 GB + 2048 MB + 64 · 7 MB + 50 MB, 1.2 GB of runtime, 1 GiB of system; 7620 MiB are seen.
    #[test]
    fn what_is_needed_is_the_sum_of_its_parts() {
        let budget = NEEDS.on(&limits(2048, 64), nano());
        let expected = 3_000_000_000 + 2_048_000_000 + 448_000_000 + 50_000_000 + 1_200_000_000;
        assert_eq!(budget.needed_bytes, expected + (1 << 30));
        assert_eq!(budget.visible_bytes, 7620 << 20);
        assert!(budget.fits());
        assert_eq!(budget.rows.iter().map(|(_, bytes)| bytes).sum::<u64>(), budget.needed_bytes);
    }

    #[test]
    fn smaller_limits_that_fit_are_the_largest_that_do() {
        let wanted = limits(4096, 64);
        assert!(!NEEDS.on(&wanted, nano()).fits());
        let WouldFit { max_context, max_images } = NEEDS.would_fit(&wanted, nano());
        let most = max_context.unwrap();
        assert!(NEEDS.on(&limits(most, 64), nano()).fits());
        assert!(!NEEDS.on(&limits(most + 1, 64), nano()).fits());
        assert_eq!(max_images, None, "4096 tokens do not fit without a picture");
        let large = Needs { weights: 9_000_000_000, ..NEEDS };
        let nothing = WouldFit { max_context: None, max_images: None };
        assert_eq!(large.would_fit(&wanted, nano()), nothing);
        let fits = NEEDS.would_fit(&limits(2048, 64), nano());
        assert_eq!(fits, nothing, "what fits needs no smaller limits");
    }

    #[test]
    fn more_is_never_less_memory() {
        let mut before = 0;
        for (max_context, max_images) in [(1, 0), (1, 1), (9, 1), (9, 2), (2048, 64), (2049, 64)] {
            let needed = NEEDS.on(&limits(max_context, max_images), nano()).needed_bytes;
            assert!(needed > before, "{max_context} tokens, {max_images} pictures");
            before = needed;
        }
        let huge = Needs { token: u64::MAX, ..NEEDS }.on(&limits(usize::MAX, 1), nano());
        assert_eq!((huge.needed_bytes, huge.fits()), (u64::MAX, false));
    }

    /// The golden model in f32 and in 8 bits: what no two tools can disagree about.
    #[test]
    fn a_source_is_counted_as_its_artifact_would_be() {
        let folder =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tiny-scenes/recipe.toml");
        let source = Source::open(folder.as_ref()).unwrap();
        let model = |precision| Model::of_source(&source, &Scheme::from(precision)).unwrap();
        let (f32, int8) = (model(Precision::F32), model(Precision::Int8));
        let (f32_needs, int8_needs) = (f32.needs().unwrap(), int8.needs().unwrap());
        assert!(int8_needs.weights * 10 < f32_needs.weights * 6, "{int8_needs:?} {f32_needs:?}");
        assert!(int8_needs.token < f32_needs.token, "caches are f16 beside rounded weights");
        let scratch = tempfile::tempdir().unwrap();
        let options = crate::compile::CompileOptions {
            flavours: Vec::new(),
            source: folder.into(),
            output: scratch.path().join("a.flamingo"),
            overwrite: false,
            max_context: None,
            max_images: 4,
            scheme: Scheme::from(Precision::Int8),
            calibrate: crate::compile::CalibrateOn::Nothing,
            calibration_cache: None,
            observer: None,
            gate: None,
            dump: None,
        };
        let (manifest, _) = crate::compile::compile(&options, &mut |_| {}).unwrap();
        let artifact = Artifact::open(&options.output, false).unwrap();
        let written = Model::of_artifact(&artifact, &artifact.load().unwrap()).unwrap();
        assert_eq!(written.needs().unwrap(), int8_needs);
        let forecast = |model: &Model| model.forecast(&manifest.limits, nano()).unwrap();
        assert_eq!(forecast(&written), forecast(&int8));
        let f32 = forecast(&f32);
        for (coarse, fine) in forecast(&int8).stages.iter().zip(&f32.stages) {
            assert!(coarse.low_ms < coarse.ms && coarse.ms < coarse.high_ms, "{coarse:?}");
            assert!(coarse.ms <= fine.ms, "{coarse:?} {fine:?}");
        }
        assert_eq!(f32.stages.len(), 4);
        assert!(f32.method.contains("never run on this device"), "{}", f32.method);
    }
}
