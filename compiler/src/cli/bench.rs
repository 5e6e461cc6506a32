//! `flamingoc bench`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use flamingo_runtime::Artifact;
use flamingo_runtime::profile::Record;

use super::output::{Output, bytes, count_bar};
use super::profile::{Profiling, write_trace};
use super::{Opening, Outcome};
use crate::bench::diff::{Change, Verdict, diff};
use crate::bench::page::bench_page;
use crate::bench::{BenchOptions, FewShotOptions, MUCH_OF_OTHERS, Report, StageResult, bench};

/// Time the stages of an artifact and compare them with what the machine can do
#[derive(Args)]
#[command(after_help = "Examples:
  flamingoc bench of-3b.flamingo --images 1,32 --context 128
  flamingoc bench of-3b.flamingo --images 1,8,32 --baseline reproject
  flamingoc bench demo.flamingo --images 1 --examples examples.jsonl --shots 32
  flamingoc bench of-3b.flamingo --profile --trace trace.json --json
  flamingoc bench of-3b.flamingo --html of-3b.html
  flamingoc bench of-3b.flamingo --json > before.json   # and later
  flamingoc bench diff before.json after.json --fail-over 5%

Stages: load, encode (one picture), resample (the resampler's part of it), prefill,
decode (one token, pictures encoded before), first_token (pictures and prompt, nothing
encoded before), first_token_warm (all but the last picture and the text before it known);
with `--examples` few_shot (a question after them, from files to the first token, nothing
known) and few_shot_bank (the examples in a bank that was used before; the question's
picture is always new). `% of ceiling` is the share of the measured read bandwidth for
decode, and of the measured peak arithmetic for encode, resample and prefill.")]
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
                let header = ["", "images", "tokens", "ms", "then", "ratio", "of 99 %", ""];
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
    vec![
        change.stage.clone(),
        change.images.to_string(),
        change.context.to_string(),
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
    /// The artifact
    #[arg(required = true)]
    artifact: Option<PathBuf>,
    /// Numbers of pictures in the text [default: 1, and 32 or as many as fit]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    images: Option<Vec<usize>>,
    /// Tokens before the decoded one [default: 128 or as many as fit]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Tokens of the prefilled prompt [default: 128 or as many as fit]
    #[arg(long, value_name = "N")]
    prompt_tokens: Option<usize>,
    /// Most samples of a stage
    #[arg(long, value_name = "N", default_value = "40")]
    reps: usize,
    /// Seconds after which a stage gets no further sample
    #[arg(long, value_name = "S", default_value = "4")]
    budget_s: f64,
    /// Also time a token as others decode it: `reproject` makes the keys and values of every
    /// picture again for each token
    #[arg(long, value_name = "NAME", value_parser = ["reproject"])]
    baseline: Option<String>,
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
    opening: Opening,
    #[command(flatten)]
    profiling: Profiling,
    /// Also write the report as a page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
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
        let Some(artifact) = &self.artifact else {
            bail!("expected an artifact\n\nhint: see `flamingoc bench --help`");
        };
        let options = self.options(artifact)?;
        let bar = count_bar();
        let report = bench(artifact, &options, &mut |what, done, all| {
            bar.set_message(what);
            bar.set_length(u64::try_from(all).unwrap_or(0));
            bar.set_position(u64::try_from(done).unwrap_or(0));
        })?;
        bar.finish_and_clear();
        warn(&report, output);
        self.show_profiles(&report, output)?;
        if let Some(path) = &self.html {
            let name = artifact.file_stem().unwrap_or_default().to_string_lossy();
            std::fs::write(path, bench_page(&name, &report)?)
                .with_context(|| format!("{}: cannot write the page", path.display()))?;
        }
        match self.json {
            true => output.json(&report)?,
            false => show(&report, output)?,
        }
        Ok(Outcome::Ok)
    }

    fn options(&self, artifact: &Path) -> Result<BenchOptions> {
        let budget = Duration::try_from_secs_f64(self.budget_s).ok();
        let Some(budget) = budget.filter(|budget| !budget.is_zero()) else {
            bail!("`--budget-s`: expected seconds above 0, found {}", self.budget_s);
        };
        let limits = Artifact::open(artifact, false)?.manifest.limits;
        let mut images = match &self.images {
            Some(images) => images.clone(),
            None => vec![1.min(limits.max_images), 32.min(limits.max_images)],
        };
        images.sort_unstable();
        images.dedup();
        let tokens = |given: Option<usize>, room: usize| given.unwrap_or(128.min(room));
        Ok(BenchOptions {
            images,
            context: tokens(self.context, limits.max_context.saturating_sub(1)),
            prompt_tokens: tokens(self.prompt_tokens, limits.max_context),
            reps: self.reps,
            budget,
            seed: self.seed,
            opening: self.opening.options(),
            profile: self.profiling.is_on(),
            reproject: self.baseline.is_some(),
            few_shot: self
                .examples
                .clone()
                .map(|examples| FewShotOptions { examples, shots: self.shots }),
        })
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
}

fn show(report: &Report, output: &mut Output) -> Result<()> {
    let machine = &report.machine;
    let rate = |rate: Option<f64>| rate.map_or("none".to_owned(), |rate| format!("{rate:.0}"));
    output.line(&format!(
        "{}, {}, {} threads, backend {}; measured now: read {:.1} GB/s, f32 {:.0} GOP/s, bf16 {}, \
         int8 {}\n",
        machine.cpu,
        machine.isa,
        machine.threads,
        report.backend,
        machine.read_gb_per_s,
        machine.f32_gop_per_s,
        rate(machine.bf16_gop_per_s),
        rate(machine.int8_gop_per_s),
    ))?;
    let header = [
        "",
        "images",
        "tokens",
        "ms",
        "p10",
        "p90",
        "tokens/s",
        "GB/s",
        "GOP/s",
        "% of ceiling",
        "others",
    ];
    output.table(&header, &report.results.iter().map(row).collect::<Vec<_>>())?;
    for (images, factor) in report.reprojection_factors() {
        output.line(&format!(
            "\n{images} pictures: {factor:.2} times the time of a token if keys and values are made again for each"
        ))?;
    }
    if let Some(factor) = report.few_shot_factor {
        output.line(&format!(
            "\nfew-shot examples: {factor:.1} times the time to the first token without a bank of them"
        ))?;
    }
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

fn row(result: &StageResult) -> Vec<String> {
    let number = |value: Option<f64>, digits: usize| {
        value.map_or(String::new(), |value| format!("{value:.digits$}"))
    };
    vec![
        result.stage.name().to_owned(),
        result.images.to_string(),
        result.context.to_string(),
        format!("{:.2}", result.ms.median),
        format!("{:.2}", result.ms.p10),
        format!("{:.2}", result.ms.p90),
        number(result.tokens_per_s, 1),
        number(result.weight_gb_per_s, 1),
        number(result.gop_per_s, 1),
        number(result.of_ceiling.map(|share| 100.0 * share), 0),
        number(result.others, 2),
    ]
}
