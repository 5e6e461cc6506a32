//! `flamingoc compile`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use flamingo_ir::op::{Flavour, PanelFormat};
use flamingo_models::Source;
use flamingo_runtime::Artifact;
use serde_json::json;

use super::Outcome;
use super::device::{DevicePlan, choose, device_parser};
use super::output::{Output, byte_bar, bytes, count_bar};
use super::source::PartOptions;
use crate::compile::{
    CalibrateOn, CompileOptions, Gate, Progress, Raised, Report, compile_source, limits,
};
use crate::gate::{OUTLIERS, Refused, worst_first};
use crate::observer::Observer;
use crate::origin::Origin;
use crate::passes::{pass_names, pass_reasons};
use crate::plan::Model;
use crate::plan::devices::Device;
use crate::ranges::{HalfRanges, OpRange};
use crate::scheme::{Choice, INT4_BLOCK, Precision, Scheme};
use crate::static_ranges::{StaticRange, StaticRanges};

/// Compile a checkpoint into an artifact
///
/// SOURCE is a recipe `.toml` that names the parts of an OpenFlamingo or a
/// flamingo-pytorch model, a folder with a `recipe.toml`, the Hugging Face folder of an IDEFICS-1 or Otter model, or the
/// name of a model on the Hugging Face hub, `owner/name` or `owner/name@revision`, whose
/// files are downloaded into the cache that Python has, too (HF_HOME, HF_HUB_CACHE,
/// HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT).
#[derive(Args)]
#[command(after_help = after_help())]
pub(super) struct Compile {
    /// Recipe, checkpoint folder, or name on the hub
    source: PathBuf,
    #[command(flatten)]
    parts: PartOptions,
    /// Where to write the artifact [default: SOURCE's name with .flamingo]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// How weights are stored [default: f32; with `--device` the finest of f16, int8 and int4 that fits]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// Refuse what does not fit this device, and predict how long it takes there
    #[arg(long, value_name = "NAME", value_parser = device_parser())]
    device: Option<&'static Device>,
    /// Columns of a row that share a scale in int4: 32 or 128
    #[arg(long, value_name = "N", value_parser = int4_block)]
    int4_block: Option<usize>,
    /// Prompts that int8 and int4 are fitted to, one in JSON a line [default: generated ones]
    #[arg(long, value_name = "FILE.jsonl")]
    calibrate: Option<PathBuf>,
    /// Round int8 and int4 to nearest
    #[arg(long, conflicts_with = "calibrate")]
    no_calibration: bool,
    /// Keep what calibration saw in this file, and read it the next time
    #[arg(long, value_name = "FILE", conflicts_with = "no_calibration")]
    calibration_cache: Option<PathBuf>,
    /// Round activations of int8 for TensorRT to levels of a range that this chooses, written as Q/DQ; linears that would
    /// change the answers keep f16 activations [default: all do]
    #[arg(long, value_name = "OBSERVER", conflicts_with = "no_calibration")]
    observer: Option<Observer>,
    /// Largest mean KL of next tokens from f32, in nats [default: f16 1e-4, bf16 1e-3, int8 0.01, int4 0.05]
    #[arg(long, value_name = "X", value_parser = max_kl)]
    max_kl: Option<f64>,
    /// Ask these tasks, too, which may lose 0.5 points in a hundred (int4 1.5): `demo`, or `demo:N` for N prompts of each
    /// instead of 200
    #[arg(long, value_name = "TASKS", value_parser = eval_prompts)]
    eval: Option<usize>,
    /// Store the layers that lose most finer, until the KL holds
    #[arg(long)]
    auto_mixed: bool,
    /// Measure what each layer does alone, too; makes and runs an artifact for each
    #[arg(long)]
    each_layer: bool,
    /// Take rounded weights without comparing their answers with f32
    #[arg(long, conflicts_with_all = ["max_kl", "auto_mixed", "each_layer", "eval"])]
    no_gate: bool,
    /// Store one layer differently: f32, f16, bf16, int8 or int4, and `:reach=R` to scale a row so that R of its
    /// largest magnitude still fits; repeatable
    #[arg(long, value_name = "NAME=FORMAT", value_parser = layer)]
    layer: Vec<(String, Choice)>,
    /// What the artifact is for, beside the CPU: graphs in f16 for ONNX Runtime's CUDA provider, or for TensorRT 10.3 and
    /// 10.15; repeatable, all share one weight file
    ///
    /// Graphs for GPUs are first run in f32 over some prompts, on all cores, to find what f16 cannot hold: half a minute
    /// for `of-mini` on two cores, longer for a released model. `--no-calibration` leaves that out.
    #[arg(long, value_enum, default_value = "cpu")]
    target: Vec<Target>,
    /// Most tokens of a sequence [default: what the language model was made for]
    #[arg(long, value_name = "N")]
    max_context: Option<usize>,
    /// Most pictures and videos of a prompt
    #[arg(long, value_name = "N", default_value = "64")]
    max_images: usize,
    /// Write the graphs' text after this pass (`source` for before the first)
    #[arg(long, value_name = "PASS")]
    dump_after: Option<String>,
    /// Where `--dump-after` writes
    #[arg(long, value_name = "DIR", default_value = ".")]
    dump_dir: PathBuf,
    /// Replace an artifact that is there
    #[arg(long)]
    overwrite: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Target {
    Cpu,
    Cuda,
    Tensorrt,
}

impl Target {
    fn flavours(self) -> &'static [Flavour] {
        match self {
            Target::Cpu => &[],
            Target::Cuda => &[Flavour::Cuda],
            Target::Tensorrt => &[Flavour::Trt10_3, Flavour::Trt10_15],
        }
    }
}

/// The plan of what was written, which `--auto-mixed` may have stored finer than was asked.
fn plan(artifact: &Path, device: &'static Device) -> Result<DevicePlan> {
    let artifact = Artifact::open(artifact, false)?;
    let model = Model::of_artifact(&artifact, &artifact.load()?)?;
    DevicePlan::new(&model, &artifact.manifest.limits, device)
}

/// What the gate refused is a failed check, other errors are errors.
fn refused(error: anyhow::Error, json: bool, output: &mut Output) -> Result<Outcome> {
    let refused = error.downcast::<Refused>()?;
    output.note(&format!("error: {refused}"));
    if json {
        output.json(&json!({"artifact": null, "verdict": "fail", "gate": refused}))?;
    }
    Ok(Outcome::CheckFailed)
}

fn show_verdict(report: &Report, output: &mut Output) -> Result<()> {
    let quantisation = &report.quantisation;
    for Raised { layer, from, to, mean_kl } in &quantisation.raised {
        output.line(&format!("{layer}: {from} to {to}, at a mean KL of {mean_kl:.1e}"))?;
    }
    let (Some(verdict), Some(bounds)) = (&quantisation.verdict, quantisation.bounds) else {
        return Ok(());
    };
    output.line(&format!(
        "next tokens against f32: mean KL {:.1e} of at most {:.1e}, the same best token in {:.1} % of {}; \
         perplexity {:.3}, in f32 {:.3}",
        verdict.mean_kl,
        bounds.max_kl,
        100.0 * verdict.top1_agreement,
        verdict.n_tokens,
        verdict.perplexity,
        verdict.perplexity_f32
    ))?;
    for task in &verdict.tasks {
        let (name, shots, n) = (&task.task, task.shots, task.n);
        let (f32, rounded) = (100.0 * task.f32, 100.0 * task.rounded);
        output.line(&format!(
            "{name}, {shots} shots: {rounded:.1} % right, in f32 {f32:.1} %, of {n}"
        ))?;
    }
    for layer in worst_first(&quantisation.layers) {
        if let Some(ratio) = layer.outlier_ratio.filter(|ratio| *ratio > OUTLIERS) {
            let name = &layer.name;
            output.line(&format!("{name}: inputs have a column {ratio:.0} times the median"))?;
        }
    }
    Ok(())
}

/// How many linears have ranges of activations, what that costs, and which do not.
fn show_static(ranges: &StaticRanges, output: &mut Output) -> Result<()> {
    let left_out: Vec<&StaticRange> =
        ranges.linears.iter().filter(|linear| !linear.is_static).collect();
    output.line(&format!(
        "TensorRT: {} of {} linears of bytes have static ranges ({}); mean KL {:.1e} of at most {:.1e}, the same best token \
         in {:.1} % of {}",
        ranges.linears.len() - left_out.len(),
        ranges.linears.len(),
        ranges.observer,
        ranges.mean_kl,
        ranges.max_kl,
        100.0 * ranges.top1_agreement,
        ranges.n_tokens
    ))?;
    if left_out.is_empty() {
        return Ok(());
    }
    let row = |linear: &&StaticRange| {
        vec![
            linear.linear.clone(),
            format!("{:.1}", linear.sqnr_db),
            format!("{:.3}", linear.largest),
        ]
    };
    let rows: Vec<Vec<String>> = left_out.iter().map(row).collect();
    output.table(&["activations that stay f16", "SQNR, dB", "largest"], &rows)
}

/// What of the graphs for GPUs is in f32, or how near the rest comes to the end of f16.
fn show_half(ranges: &HalfRanges, output: &mut Output) -> Result<()> {
    let row = |op: &OpRange| {
        let largest = format!("{:.2e}", op.largest);
        vec![op.value.clone(), largest, op.in_f32.clone().unwrap_or_default()]
    };
    let rows: Vec<Vec<String>> = ranges.in_f32().map(row).collect();
    if !rows.is_empty() {
        return output.table(&["too large for f16 on GPUs", "magnitude", "in f32"], &rows);
    }
    match ranges.largest() {
        Some(op) => output.line(&format!(
            "the largest value in f16 on GPUs is {:.2e}, of `{}`; f16 ends at 65504",
            op.largest, op.value
        )),
        None => Ok(()),
    }
}

fn eval_prompts(text: &str) -> Result<usize, String> {
    let n = match text.split_once(':') {
        None if text == "demo" => Some(200),
        Some(("demo", n)) => n.parse().ok().filter(|n| *n > 0),
        _ => None,
    };
    n.ok_or_else(|| "expected `demo`, or `demo:N` with a number of prompts".to_owned())
}

fn max_kl(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if value >= 0.0 => Ok(value),
        _ => Err("expected a number of nats, 0 or more".to_owned()),
    }
}

fn layer(text: &str) -> Result<(String, Choice), String> {
    let expected = || {
        "expected NAME=FORMAT or NAME=FORMAT:reach=R with a format of f32, f16, bf16, int8, int4/32, int4/128 and \
         0 < R <= 1"
            .to_owned()
    };
    let (name, choice) = text.split_once('=').ok_or_else(expected)?;
    let (format, reach) = match choice.split_once(":reach=") {
        None => (choice, None),
        Some((format, reach)) => {
            let reach = reach.parse().ok().filter(|reach| *reach > 0.0 && *reach <= 1.0);
            (format, Some(reach.ok_or_else(expected)?))
        }
    };
    let format = match format {
        "f32" => None,
        "int4" => Some(PanelFormat::Int4 { block: INT4_BLOCK }),
        name => Some(PanelFormat::from_name(name).ok_or_else(expected)?),
    };
    Ok((name.to_owned(), Choice { format, reach }))
}

fn int4_block(text: &str) -> Result<usize, String> {
    match text {
        "32" => Ok(32),
        "128" => Ok(128),
        _ => Err("expected 32 or 128".to_owned()),
    }
}

fn after_help() -> String {
    let lines: Vec<String> =
        pass_reasons().map(|(name, reason)| format!("  {name}: {reason}")).collect();
    format!(
        "Examples:\n  flamingoc compile models/demo/recipe.toml -o demo.flamingo\n  flamingoc compile \
         openflamingo/OpenFlamingo-3B-vitl-mpt1b -o of-3b.flamingo\n\nPasses:\n{}",
        lines.join("\n")
    )
}

impl Compile {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        self.refuse_what_is_not_there()?;
        let origin = Origin::of(&self.source)?;
        let source = self.parts.open(&origin, output)?;
        let precision = self.precision(&source, output)?;
        let dump = self.dump_after.clone().map(|pass| (pass, self.dump_dir.clone()));
        let targets: BTreeSet<Target> = self.target.iter().copied().collect();
        let options = CompileOptions {
            flavours: targets.iter().flat_map(|target| target.flavours()).copied().collect(),
            output: self.output.clone().unwrap_or_else(|| origin.default_output()),
            source: origin.to_path(),
            overwrite: self.overwrite,
            max_context: self.max_context,
            max_images: self.max_images,
            scheme: self.scheme(precision),
            calibrate: match (self.no_calibration, self.calibrate) {
                (true, _) => CalibrateOn::Nothing,
                (false, Some(file)) => CalibrateOn::File(file),
                (false, None) => CalibrateOn::Bundled,
            },
            calibration_cache: self.calibration_cache,
            observer: self.observer,
            gate: (!self.no_gate).then_some(Gate {
                max_kl: self.max_kl,
                auto_mixed: self.auto_mixed,
                each_layer: self.each_layer,
                eval: self.eval,
            }),
            dump,
        };
        let bar = byte_bar("weights");
        let prompts = count_bar();
        let compiled = compile_source(&source, &options, &mut |progress| match progress {
            Progress::Stage(stage) => bar.println(stage),
            Progress::Bytes(done, total) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            Progress::Prompts(done, total) => {
                prompts.set_length(total as u64);
                prompts.set_position(done as u64);
            }
        });
        bar.finish_and_clear();
        prompts.finish_and_clear();
        let (manifest, report) = match compiled {
            Ok(compiled) => compiled,
            Err(error) => return refused(error, self.json, output),
        };
        for note in &report.notes {
            output.note(&format!("note: {note}"));
        }
        let path = options.output.display().to_string();
        let plan = self.device.map(|device| plan(&options.output, device)).transpose()?;
        let outcome = match plan.as_ref().is_none_or(DevicePlan::fits) {
            true => Outcome::Ok,
            false => Outcome::CheckFailed,
        };
        if self.json {
            let mut written = json!({"artifact": path, "report": report});
            if let Some(plan) = plan {
                written["plan"] = plan.json();
            }
            output.json(&written)?;
            return Ok(outcome);
        }
        let total = manifest.files.iter().map(|file| file.bytes).sum();
        output.line(&format!("{path}: {} in {} files", bytes(total), manifest.files.len() + 1))?;
        let count = |stage: &str, last: bool| {
            let records = &report.passes[stage];
            let record = if last { records.last() } else { records.first() };
            record.map_or(0, |record| record.ops.values().sum::<usize>())
        };
        show_verdict(&report, output)?;
        if let Some(ranges) = &report.f16 {
            show_half(ranges, output)?;
        }
        if let Some(ranges) = &report.quantisation.static_ranges {
            show_static(ranges, output)?;
        }
        for stage in ["media", "decoder"] {
            let (before, after) = (count(stage, false), count(stage, true));
            output
                .line(&format!("{stage}: {before} ops in the source, {after} after the passes"))?;
        }
        if let Some(plan) = plan {
            plan.show(output)?;
        }
        Ok(outcome)
    }

    fn scheme(&self, precision: Precision) -> Scheme {
        Scheme {
            precision,
            int4_block: self.int4_block.unwrap_or(INT4_BLOCK),
            layers: self.layer.iter().cloned().collect(),
        }
    }

    /// The precision asked for, or the finest that fits the device.
    fn precision(&self, source: &Source, output: &mut Output) -> Result<Precision> {
        let Some(device) = self.device else { return Ok(self.precision.unwrap_or_default()) };
        let limits = limits(source, self.max_context, self.max_images)?;
        let scheme = |precision| self.scheme(precision);
        let precision = choose(source, &limits, device, self.precision, &scheme)?;
        output.note(&format!("{} fits {}", precision.name(), device.name));
        Ok(precision)
    }

    fn refuse_what_is_not_there(&self) -> Result<()> {
        let precision = self.precision.unwrap_or_default();
        if self.int4_block.is_some() && precision != Precision::Int4 {
            let precision = precision.name();
            bail!(
                "`--int4-block`: `--precision {precision}` has no blocks\n\n\
                 hint: pass `--precision int4`, or leave the option out"
            );
        }
        let has_bytes = matches!(precision, Precision::Int8 | Precision::Int4)
            || self.device.is_some_and(|_| self.precision.is_none());
        if self.observer.is_some() && !(has_bytes && self.target.contains(&Target::Tensorrt)) {
            bail!(
                "`--observer`: only graphs for TensorRT of int8 or int4 have ranges of activations\n\n\
                 hint: pass `--precision int8 --target tensorrt`, or leave the option out"
            );
        }
        if let Some(pass) = &self.dump_after {
            let known: Vec<&str> = ["source"].into_iter().chain(pass_names()).collect();
            if !known.contains(&pass.as_str()) {
                bail!(
                    "`--dump-after {pass}`: no such pass\n\nhint: choose one of {}",
                    known.join(", ")
                );
            }
        }
        Ok(())
    }
}
