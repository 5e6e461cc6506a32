//! `flamingoc bench`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use flamingo_models::manifest::{Limits, Manifest};
use flamingo_runtime::profile::Record;
use flamingo_runtime::{Artifact, OpenOptions};

use super::output::{Output, bytes, count_bar};
use super::profile::{Profiling, write_trace};
use super::{EngineOptions, Outcome};
use crate::bench::diff::{Change, Verdict, diff};
use crate::bench::page::bench_page;
use crate::bench::scenario::{SCENARIOS, Scenario, ScenarioResult, Stream};
use crate::bench::{
    BenchOptions, Factor, FewShotOptions, Label, MUCH_OF_OTHERS, Report, StageResult, Variant,
    bench, rounded,
};

/// Time the stages of an artifact and compare them with what the machine can do
#[derive(Args)]
#[command(after_help = "Examples:
  flamingoc bench of-3b.flamingo --images 1,32 --context 128,1024
  flamingoc bench of-3b-int8.flamingo of-3b-int4.flamingo --threads 1,2
  flamingoc bench of-3b.flamingo --images 1,8,32 --baseline reproject,no-cache,ort
  flamingoc bench of-3b.flamingo --scenario all --html of-3b.html
  flamingoc bench of-3b.flamingo --scenario camera-stream --fps 5 --budget-s 20
  flamingoc bench demo.flamingo --images 1 --examples examples.jsonl --shots 32
  flamingoc bench of-3b.flamingo --profile --trace trace.json --json
  flamingoc bench of-3b.flamingo --json > before.json   # and later
  flamingoc bench diff before.json after.json --fail-over 5%

Stages: load; preprocess (a picture file decoded and resized), encode (one picture),
resample (the resampler's part of it), media_kv (keys and values of the gated layers out
of its visual tokens); prefill and decode (one token; of several sequences with
`--batch`), pictures encoded before; the first token of a prompt: first_token (cold:
nothing encoded before), first_token_warm (all but the last picture and the text before
it known), first_token_hot (all of it known); with `--examples` few_shot (a question
after them, from files to the first token, nothing known) and few_shot_bank (the examples
in a bank that was used before; the question's picture is always new). `% of ceiling` is
the share of the measured read bandwidth for decode, and of the measured peak arithmetic
for encode, resample and prefill.

Several artifacts, numbers of threads and engines take turns in one run. Times are shown
with the digits that the median's interval of 95 % supports; `--json` has every sample.

Scenarios take the place of stages:
  caption        a new picture, 4 tokens, an answer of 20
  vqa-4shot      4 examples that stay, a new picture with 12 tokens, an answer of 5
  few-shot-32    32 examples that stay, a new picture with 4 tokens, an answer of 5
  chat           4 questions of 16 tokens about one new picture, answers of 24
  video          a new video of 8 frames with 8 tokens, an answer of 20
  camera-stream  the newest frame with 8 tokens, an answer of 8; counts dropped frames")]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct Bench {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    timing: Timing,
}

#[derive(Subcommand)]
enum Verb {
    Diff(BenchDiff),
}

/// Compare two runs: was the second slower
///
/// The interval of a ratio is a bootstrap of 99 % over blocks of neighbouring samples. It knows how the samples of a run
/// spread, not what the machine did at another time: take both runs in one quiet hour of one machine. Exit status 1 if a
/// stage is slower, with `--fail-over` by more than that.
#[derive(Args)]
struct BenchDiff {
    /// What `bench --json` wrote before
    before: PathBuf,
    /// What it wrote after
    after: PathBuf,
    /// Slowdown that is no failure yet, as `5%` or `0.05`
    #[arg(long, value_name = "SHARE", value_parser = share)]
    fail_over: Option<f64>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

/// A share from `5%` or `0.05`.
fn share(text: &str) -> Result<f64, String> {
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let share = match text.strip_suffix('%') {
        Some(percent) => number(percent).map(|percent| percent / 100.0),
        None => number(text),
    };
    let share = share.filter(|share| (0.0..=10.0).contains(share));
    share.ok_or_else(|| "expected a share of 0 or more, such as `5%` or `0.05`".to_owned())
}

impl BenchDiff {
    fn run(&self, output: &mut Output) -> Result<Outcome> {
        let found = diff(&self.before, &self.after)?;
        for note in &found.notes {
            output.note(&format!("note: {note}"));
        }
        match self.json {
            true => output.json(&found)?,
            false => {
                let header =
                    ["", "images", "tokens", "batch", "ms", "then", "ratio", "of 99 %", ""];
                output.table(&header, &found.changes.iter().map(change_row).collect::<Vec<_>>())?;
            }
        }
        match found.regressions(self.fail_over).next() {
            None => Ok(Outcome::Ok),
            Some(_) => Ok(Outcome::CheckFailed),
        }
    }
}

fn change_row(change: &Change) -> Vec<String> {
    let variant = change.variant.as_ref().map_or(String::new(), |variant| format!(", {variant}"));
    vec![
        format!("{}{variant}", change.stage),
        change.images.to_string(),
        change.context.to_string(),
        change.batch.to_string(),
        format!("{:.2}", change.before_ms),
        format!("{:.2}", change.after_ms),
        format!("{:.3}", change.ratio),
        format!("{:.3} to {:.3}", change.low, change.high),
        match change.verdict {
            Verdict::Same => "same",
            Verdict::Faster => "faster",
            Verdict::Slower => "SLOWER",
        }
        .to_owned(),
    ]
}

/// What is timed, and how.
#[derive(Args)]
struct Timing {
    /// Artifacts, which take turns
    #[arg(required = true, value_name = "ARTIFACT")]
    artifacts: Vec<PathBuf>,
    /// Numbers of pictures in the text [default: 1, and 32 or as many as fit]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    images: Option<Vec<usize>>,
    /// Numbers of tokens before the decoded one [default: 128 or as many as fit]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    context: Option<Vec<usize>>,
    /// Tokens of the prefilled prompt [default: 128 or as many as fit]
    #[arg(long, value_name = "N")]
    prompt_tokens: Option<usize>,
    /// Numbers of sequences that are decoded in one step
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,
    /// Size of a picture before it is resized
    #[arg(long, value_name = "WIDTHxHEIGHT", default_value = "640x480", value_parser = picture_size)]
    picture: (u32, u32),
    /// Numbers of threads, which take turns [default: one for each physical core]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    threads: Vec<NonZeroUsize>,
    /// Time scenarios in place of stages: `all` that fit, or names
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = scenario_names(),
          conflicts_with_all = ["images", "context", "prompt_tokens", "batch", "baseline", "examples"])]
    scenario: Vec<String>,
    /// Frames a second of `--scenario camera-stream`
    #[arg(long, value_name = "N", default_value = "10", requires = "scenario", value_parser = fps)]
    fps: f64,
    /// Most samples of a stage
    #[arg(long, value_name = "N", default_value = "40")]
    reps: usize,
    /// Seconds after which a stage gets no further sample
    #[arg(long, value_name = "S", default_value = "4")]
    budget_s: f64,
    /// Also time what others do: `reproject` makes the keys and values of every picture again for each token, `no-cache`
    /// reads pictures and text again that were there before, `ort` runs on ONNX Runtime
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = ["reproject", "no-cache", "ort"])]
    baseline: Vec<String>,
    /// Also time the first token after few-shot examples, with and without a bank of them: JSON lines,
    /// as `bank build` reads them
    #[arg(long, value_name = "FILE")]
    examples: Option<PathBuf>,
    /// How many examples [default: all]
    #[arg(long, value_name = "N", requires = "examples")]
    shots: Option<usize>,
    /// Seed of inputs and order
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    #[command(flatten)]
    engine: EngineOptions,
    #[command(flatten)]
    profiling: Profiling,
    /// Also write the report as a page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

/// `640x480`.
fn picture_size(text: &str) -> Result<(u32, u32), String> {
    let side = |text: &str| text.parse().ok().filter(|side| (1..=8192).contains(side));
    let sides = text.split_once('x').and_then(|(w, h)| Some((side(w)?, side(h)?)));
    sides.ok_or_else(|| {
        "expected width and height of 1 to 8192 pixels, such as `640x480`".to_owned()
    })
}

fn scenario_names() -> Vec<&'static str> {
    SCENARIOS.iter().map(|scenario| scenario.name).chain(["all"]).collect()
}

fn fps(text: &str) -> Result<f64, String> {
    let fps = text.parse().ok().filter(|fps| (0.01..=1000.0).contains(fps));
    fps.ok_or_else(|| "expected frames a second, 0.01 to 1000".to_owned())
}

impl Bench {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        match self.verb {
            Some(Verb::Diff(diff)) => diff.run(output),
            None => self.timing.run(output),
        }
    }
}

impl Timing {
    fn run(self, output: &mut Output) -> Result<Outcome> {
        let Some(first) = self.artifacts.first() else {
            bail!("expected an artifact\n\nhint: see `flamingoc bench --help`");
        };
        let options = self.options(output)?;
        let bar = count_bar();
        let report = bench(&options, &mut |what, done, all| {
            bar.set_message(what);
            bar.set_length(u64::try_from(all).unwrap_or(0));
            bar.set_position(u64::try_from(done).unwrap_or(0));
        })?;
        bar.finish_and_clear();
        warn(&report, output);
        self.show_profiles(&report, output)?;
        if let Some(path) = &self.html {
            let name = first.file_stem().unwrap_or_default().to_string_lossy();
            std::fs::write(path, bench_page(&name, &report)?)
                .with_context(|| format!("{}: cannot write the page", path.display()))?;
        }
        match self.json {
            true => output.json(&report)?,
            false => self.show(&report, output)?,
        }
        Ok(Outcome::Ok)
    }

    fn options(&self, output: &mut Output) -> Result<BenchOptions> {
        let budget = Duration::try_from_secs_f64(self.budget_s).ok();
        let Some(budget) = budget.filter(|budget| !budget.is_zero()) else {
            bail!("`--budget-s`: expected seconds above 0, found {}", self.budget_s);
        };
        let manifest = |path: &PathBuf| anyhow::Ok(Artifact::open(path, false)?.manifest);
        let manifests = self.artifacts.iter().map(manifest).collect::<Result<Vec<_>>>()?;
        let least = |of: fn(&Limits) -> usize| manifests.iter().map(|m| of(&m.limits)).min();
        let max_images = least(|limits| limits.max_images).unwrap_or(0);
        let max_context = least(|limits| limits.max_context).unwrap_or(0);
        let sorted = |mut numbers: Vec<usize>| {
            numbers.sort_unstable();
            numbers.dedup();
            numbers
        };
        let images = self.images.clone();
        let contexts = self.context.clone();
        let few_shot = |examples| FewShotOptions { examples, shots: self.shots };
        Ok(BenchOptions {
            variants: self.variants(),
            images: sorted(images.unwrap_or(vec![1.min(max_images), 32.min(max_images)])),
            contexts: sorted(contexts.unwrap_or(vec![128.min(max_context.saturating_sub(1))])),
            prompt_tokens: self.prompt_tokens.unwrap_or(128.min(max_context)),
            batches: sorted(self.batch.clone()),
            picture: self.picture,
            reps: self.reps,
            budget,
            seed: self.seed,
            profile: self.profiling.is_on(),
            reproject: self.has_baseline("reproject"),
            few_shot: self.examples.clone().map(few_shot),
            scenarios: self.scenarios(&manifests, output),
        })
    }

    fn has_baseline(&self, name: &str) -> bool {
        self.baseline.iter().any(|own| own == name)
    }

    /// Artifacts with each number of threads, and on ONNX Runtime beside each if that is a baseline.
    fn variants(&self) -> Vec<Variant> {
        let threads: Vec<Option<NonZeroUsize>> = match self.threads.as_slice() {
            [] => vec![None],
            given => given.iter().copied().map(Some).collect(),
        };
        let mut variants = Vec::new();
        for artifact in &self.artifacts {
            for n_threads in &threads {
                let opening = self.engine.options(*n_threads);
                let ort = OpenOptions { backend: Some("ort".to_owned()), ..opening.clone() };
                let own = Variant { artifact: artifact.clone(), opening };
                variants.push(own);
                if self.has_baseline("ort") {
                    variants.push(Variant { artifact: artifact.clone(), opening: ort });
                }
            }
        }
        variants
    }

    /// Those that were named; of `all` those that every artifact has room for.
    fn scenarios(&self, manifests: &[Manifest], output: &mut Output) -> Vec<Scenario> {
        let fits = |scenario: &Scenario| manifests.iter().all(|m| scenario.fits(m));
        let mut scenarios: Vec<Scenario> = match self.scenario.iter().any(|name| name == "all") {
            false => self.scenario.iter().filter_map(|name| Scenario::from_name(name)).collect(),
            true => {
                let (all, without): (Vec<_>, Vec<_>) = SCENARIOS.into_iter().partition(fits);
                for scenario in without {
                    output.note(&format!("note: no room for scenario `{}`", scenario.name));
                }
                all
            }
        };
        for scenario in &mut scenarios {
            scenario.fps = scenario.fps.map(|_| self.fps);
        }
        scenarios
    }

    /// Profiles go to stderr and to a file: stdout is for the result.
    fn show_profiles(&self, report: &Report, output: &mut Output) -> Result<()> {
        for profile in &report.profiles {
            if self.profiling.profile {
                let (stage, images, context) =
                    (profile.stage.name(), profile.images, profile.context);
                output.note(&format!("\n{stage}, {images} images, {context} tokens"));
                super::profile::show(&profile.records, &report.machine, output);
            }
        }
        match &self.profiling.trace {
            Some(path) => {
                let records: Vec<Record> =
                    report.profiles.iter().flat_map(|p| p.records.clone()).collect();
                write_trace(&records, path)
            }
            None => Ok(()),
        }
    }
}

fn warn(report: &Report, output: &mut Output) {
    for warning in &report.warnings {
        output.note(&format!("warning: {warning}"));
    }
    let most = report.results.iter().filter_map(|result| result.others).fold(0.0, f64::max);
    if most > MUCH_OF_OTHERS {
        output.note(&format!(
            "note: other processes kept up to {most:.1} cores busy: times are long, and ceilings low"
        ));
    }
    for result in report.results.iter().filter(|result| result.ms.far_out > 0) {
        let (stage, images) = (result.stage.name(), result.images);
        output.note(&format!(
            "note: {stage}, {images} images: {} of {} samples lie far out, three times the middle half's width above it",
            result.ms.far_out, result.ms.n
        ));
    }
}

impl Timing {
    fn show(&self, report: &Report, output: &mut Output) -> Result<()> {
        output.line(&head(report))?;
        show_stages(report, output)?;
        show_scenarios(report, output)?;
        self.show_factors(report, output)?;
        show_memory(report, output)
    }

    fn show_factors(&self, report: &Report, output: &mut Output) -> Result<()> {
        for Factor { label, images, context, factor, .. } in report.reprojection_factors() {
            let who = variant(report, &label);
            output.line(&format!(
                "\n{images} pictures: {factor:.2} times the time of a token after {context} if keys and values are made again \
                 for each{who}"
            ))?;
        }
        let no_cache =
            if self.has_baseline("no-cache") { report.no_cache_factors() } else { Vec::new() };
        for Factor { label, images, factor, .. } in no_cache {
            let who = variant(report, &label);
            output.line(&format!(
                "\n{images} pictures: {factor:.2} times the time to the first token if pictures and text that were there before \
                 are read again{who}"
            ))?;
        }
        for Factor { label, stage, images, context, factor } in report.engine_factors("ort") {
            let (who, stage) = (variant(report, &label), stage.name());
            output.line(&format!(
                "\n{stage}, {images} pictures, {context} tokens: {factor:.2} times the time on ONNX Runtime{who}"
            ))?;
        }
        if let Some(factor) = report.few_shot_factor {
            output.line(&format!(
                "\nfew-shot examples: {factor:.1} times the time to the first token without a bank of them"
            ))?;
        }
        Ok(())
    }
}

/// `, demo on native with 2 threads` where there are others.
fn variant(report: &Report, label: &Label) -> String {
    let Label { artifact, backend, threads } = label;
    match report.has_variants() {
        true => format!(", {artifact} on {backend} with {threads} threads"),
        false => String::new(),
    }
}

fn head(report: &Report) -> String {
    let machine = &report.machine;
    let rate = |rate: Option<f64>| rate.map_or("none".to_owned(), |rate| format!("{rate:.0}"));
    format!(
        "{}, {}, {} threads, backend {}; {}; flamingoc {}\nmeasured now: read {:.1} GB/s, f32 {:.0} GOP/s, bf16 {}, \
         int8 {}; energy: {}\n",
        machine.cpu,
        machine.isa,
        machine.threads,
        report.backend,
        report.system.line(),
        report.system.flamingoc,
        machine.read_gb_per_s,
        machine.f32_gop_per_s,
        rate(machine.bf16_gop_per_s),
        rate(machine.int8_gop_per_s),
        report.energy_sensor.as_deref().unwrap_or("no sensor"),
    )
}

/// Columns of a stage's or a scenario's variant, if there are several.
const VARIANT: [&str; 3] = ["artifact", "engine", "threads"];

fn variant_columns(report: &Report, label: &Label) -> Vec<String> {
    match report.has_variants() {
        true => vec![label.artifact.clone(), label.backend.clone(), label.threads.to_string()],
        false => Vec::new(),
    }
}

fn show_stages(report: &Report, output: &mut Output) -> Result<()> {
    let has = |column: fn(&StageResult) -> bool| report.results.iter().any(column);
    let (batches, joules) = (has(|r| r.batch > 1), has(|r| r.joules.is_some()));
    let mut header = vec![""];
    header.extend(VARIANT.into_iter().filter(|_| report.has_variants()));
    header.extend(["images", "tokens"]);
    header.extend(["batch"].into_iter().filter(|_| batches));
    header.extend(["ms", "p10", "p90", "p99", "tokens/s", "GB/s", "GOP/s", "% of ceiling"]);
    header.extend(["joules"].into_iter().filter(|_| joules));
    header.push("others");
    let row = |result: &StageResult| {
        let number = |value: Option<f64>, digits: usize| {
            value.map_or(String::new(), |value| format!("{value:.digits$}"))
        };
        let ms = &result.ms;
        let mut row = vec![result.stage.name().to_owned()];
        row.extend(variant_columns(report, &result.label));
        row.extend([result.images.to_string(), result.context.to_string()]);
        row.extend(batches.then(|| result.batch.to_string()));
        row.push(ms.text(ms.median));
        row.extend([ms.p10, ms.p90, ms.p99].map(|time| ms.text(time)));
        row.push(number(result.tokens_per_s, 1));
        row.push(number(result.weight_gb_per_s, 1));
        row.push(number(result.gop_per_s, 1));
        row.push(number(result.of_ceiling.map(|share| 100.0 * share), 0));
        row.extend(joules.then(|| number(result.joules, 3)));
        row.push(number(result.others, 2));
        row
    };
    output.table(&header, &report.results.iter().map(row).collect::<Vec<_>>())
}

fn show_scenarios(report: &Report, output: &mut Output) -> Result<()> {
    if report.scenarios.is_empty() {
        return Ok(());
    }
    let mut header = vec![""];
    header.extend(VARIANT.into_iter().filter(|_| report.has_variants()));
    header.extend(["answers", "first token, cold", "first token", "p90", "a token", "p90", "p99"]);
    header.extend(["whole answer", "tokens/s", "dropped"]);
    let row = |result: &ScenarioResult| {
        let (first, token) = (&result.first_token_ms, &result.token_ms);
        let about = |value: f64| rounded(value, value / 100.0);
        let mut row = vec![result.scenario.to_owned()];
        row.extend(variant_columns(report, &result.label));
        row.extend([(first.n + 1).to_string(), about(result.cold_first_token_ms)]);
        row.extend([first.text(first.median), first.text(first.p90), token.text(token.median)]);
        row.extend([
            token.text(token.p90),
            token.text(token.p99),
            result.end_to_end_ms.text(result.end_to_end_ms.median),
        ]);
        row.push(format!("{:.1}", result.tokens_per_s));
        let frames = |s: &Stream| format!("{} of {} frames", s.dropped, s.arrived);
        row.push(result.stream.as_ref().map_or(String::new(), frames));
        row
    };
    output.line("\nmilliseconds:")?;
    output.table(&header, &report.scenarios.iter().map(row).collect::<Vec<_>>())
}

fn show_memory(report: &Report, output: &mut Output) -> Result<()> {
    let known = |size: Option<u64>| size.map_or("unknown".to_owned(), bytes);
    let size = |size: usize| bytes(u64::try_from(size).unwrap_or(u64::MAX));
    output.line(&format!(
        "\nmemory: peak {}, steady {}, mapped weights included; keys and values {}, a picture {}",
        known(report.peak_rss_bytes),
        known(report.steady_rss_bytes),
        size(report.cache_bytes.kv),
        size(report.cache_bytes.media_per_image),
    ))
}
