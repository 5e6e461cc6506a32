//! `flamingoc bench`: times the stages of an artifact on synthetic inputs, and holds them against
//! what the machine can do, measured in the same run.
//!
//! | stage | one sample is |
//! |---|---|
//! | load | the artifact opened and planned, its files in the page cache |
//! | encode | one picture through the media graph |
//! | resample | the resampler's instructions of one encode; native backend only |
//! | prefill | a prompt over encoded pictures, to the logits of its last token |
//! | decode | one token after a context over encoded pictures |
//! | decode_reprojected | the same with the keys and values of every picture made again; where asked for |
//! | first_token | a prompt and its pictures, nothing encoded before |
//! | first_token_warm | the same where all but the last picture and the text before it are in the caches; native backend only |
//! | few_shot | a question after examples from files, pictures read and decoded, nothing known; where asked for |
//! | few_shot_bank | the same with the examples in a bank that was used before |
//!
//! Bytes and operations are counted by the native plan, also where another engine is timed.

pub mod diff;
mod few_shot;
mod inputs;
mod measure;
pub mod page;
mod process;
mod stages;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flamingo_models::manifest::Manifest;
use flamingo_runtime::machine::Machine;
use flamingo_runtime::profile::{Arithmetic, Record};
use flamingo_runtime::{Artifact, Model, OpenOptions, RunError};
use serde::Serialize;

use crate::profile::main_arithmetic;
use few_shot::FewShot;
use measure::{Limits, Samples, measure, quantile};
use stages::{Case, Inputs, cases, encoded, is_resampler, recorded, timed};

pub use stages::Stage;

/// Cores of other processes above which times are called disturbed.
pub const MUCH_OF_OTHERS: f64 = 0.3;

/// Profiled runs of a stage, of which the fastest is shown.
const PROFILED_RUNS: usize = 5;

/// What is timed, and how long.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Numbers of pictures in prompt and context.
    pub images: Vec<usize>,
    /// Tokens before the one that is decoded.
    pub context: usize,
    /// Tokens of the prompt that is prefilled.
    pub prompt_tokens: usize,
    /// Most samples of a stage.
    pub reps: usize,
    /// Time after which a stage gets no further sample.
    pub budget: Duration,
    /// Seed of inputs and order.
    pub seed: u64,
    /// Engine and threads.
    pub opening: OpenOptions,
    /// Whether to keep the instructions of a run of each stage.
    pub profile: bool,
    /// Whether to time [`Stage::DecodeReprojected`].
    pub reproject: bool,
    /// What to time [`Stage::FewShot`] and [`Stage::FewShotBank`] with.
    pub few_shot: Option<FewShotOptions>,
}

/// Examples that stand before a question.
#[derive(Clone, Debug)]
pub struct FewShotOptions {
    /// Examples as JSON lines, as `bank build` reads them.
    pub examples: PathBuf,
    /// How many, from the first on; `None` for all.
    pub shots: Option<usize>,
}

/// Why nothing was timed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The artifact or its backend refused.
    #[error(transparent)]
    Run(#[from] RunError),
    /// Options that do not fit the artifact, all of them.
    #[error("options do not fit the artifact:\n  {}\n\nhint: `inspect` shows its limits", .0.join("\n  "))]
    Options(Vec<String>),
    /// No profile where one was asked for.
    #[error(
        "`--profile`: backend `{0}` does not tell its instructions\n\nhint: pass `--backend native`"
    )]
    NoProfile(String),
    /// A baseline that the backend cannot be.
    #[error(
        "`--baseline reproject`: backend `{0}` cannot make keys and values alone\n\nhint: pass `--backend native`"
    )]
    NoBaseline(String),
    /// Examples that no question can be made of.
    #[error(
        "{path}: {reason}\n\nhint: one example a line, with a picture and text in the first: \
         {{\"segments\": [{{\"image\": \"a.jpg\"}}, {{\"text\": \"…\"}}]}}"
    )]
    Examples {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// What was measured: the contract of `bench --json`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The machine and its ceilings, the better of before and after.
    pub machine: Machine,
    /// Engine.
    pub backend: String,
    /// Stages, in the order in which they run.
    pub results: Vec<StageResult>,
    /// Largest resident memory while stages ran, mapped weights included.
    pub peak_rss_bytes: Option<u64>,
    /// Resident memory with all sequences and pictures at hand, mapped weights included.
    pub steady_rss_bytes: Option<u64>,
    /// What the model has to say of how it is run: nodes that another execution provider runs.
    pub warnings: Vec<String>,
    /// Memory of caches.
    pub cache_bytes: CacheBytes,
    /// How many times longer the first token takes without a bank, where asked for.
    pub few_shot_factor: Option<f64>,
    /// Instructions of one run of each stage, where asked for.
    #[serde(skip)]
    pub profiles: Vec<Profile>,
}

/// Memory of caches, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CacheBytes {
    /// Keys and values of the context's tokens, f32.
    pub kv: usize,
    /// Visual tokens, and keys and values of the gated layers, of one picture.
    pub media_per_image: usize,
}

/// The instructions of a run of a stage.
#[derive(Clone, Debug)]
pub struct Profile {
    /// The stage.
    pub stage: Stage,
    /// Pictures.
    pub images: usize,
    /// Tokens.
    pub context: usize,
    /// The instructions.
    pub records: Vec<Record>,
}

/// Times and rates of a stage.
#[derive(Clone, Debug, Serialize)]
pub struct StageResult {
    /// The stage.
    pub stage: Stage,
    /// Pictures: one for `encode` and `resample`, those in the text for the others.
    pub images: usize,
    /// Tokens of the prompt, or before the decoded one.
    pub context: usize,
    /// Element type of the weights.
    pub precision: String,
    /// Times.
    pub ms: Milliseconds,
    /// Tokens a second of `prefill` and `decode`.
    pub tokens_per_s: Option<f64>,
    /// Bytes of weights that a run reads.
    pub weight_bytes: Option<usize>,
    /// The same in GB (10⁹ bytes) a second.
    pub weight_gb_per_s: Option<f64>,
    /// 10⁹ operations of a run, a multiply-add as two.
    pub gop: Option<f64>,
    /// The same a second.
    pub gop_per_s: Option<f64>,
    /// Share of the ceiling: of read bandwidth for `decode`, of the peak of the main arithmetic for
    /// `encode`, `resample` and `prefill`.
    pub of_ceiling: Option<f64>,
    /// Cores that other processes kept busy meanwhile.
    pub others: Option<f64>,
    /// Each sample, in the order in which they were taken.
    pub samples_ms: Vec<f64>,
}

/// Quantiles of the samples, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Milliseconds {
    /// Half of the samples took no longer.
    pub median: f64,
    /// A tenth took no longer.
    pub p10: f64,
    /// Nine tenths took no longer.
    pub p90: f64,
    /// Samples.
    pub n: usize,
}

/// Measures the machine and times the stages of the artifact at `path`. `on_progress` is told what
/// is going on, samples done and samples to do.
///
/// # Errors
/// Options that the artifact has no room for, or an artifact that cannot be opened or run.
pub fn bench(
    path: &Path,
    options: &BenchOptions,
    on_progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<Report, BenchError> {
    let manifest = Artifact::open(path, options.opening.verify).map_err(RunError::from)?.manifest;
    check_options(&manifest, options)?;
    on_progress("measuring the machine", 0, 0);
    let machine = Machine::measure(options.opening.n_threads).map_err(RunError::from)?;
    process::reset_peak_memory();
    let limits = Limits { reps: options.reps, budget: options.budget, seed: options.seed };
    let load = time_load(path, options, &limits, on_progress)?;

    let model = Model::open(path, &options.opening)?;
    if options.reproject && model.backend().token_format().is_none() {
        return Err(BenchError::NoBaseline(model.backend().name().to_owned()));
    }
    let inputs = Inputs::new(&manifest, options);
    let media = encoded(&model, &inputs, options.images.iter().copied().max().unwrap_or(0).max(1))?;
    let media_per_image = media.first().map_or(0, |medium| medium.bytes());
    let few_shot = options.few_shot.as_ref();
    let few_shot = few_shot.map(|few_shot| FewShot::new(path, &options.opening, few_shot));
    let few_shot = few_shot.transpose()?;
    let mut cases = cases(&model, &inputs, &media, options.reproject)?;
    if let Some(few_shot) = &few_shot {
        cases.extend(few_shot.cases()?);
    }
    let mut runs: Vec<measure::Run<'_>> = Vec::new();
    for case in &mut cases {
        runs.push(Box::new(|| (case.run)()));
    }
    let samples = measure(&mut runs, &limits, &mut |done, all| on_progress("timing", done, all))?;
    drop(runs);
    let (peak_rss_bytes, steady_rss_bytes) = (process::peak_memory(), process::resident_memory());

    on_progress("counting", 0, 0);
    let profiles = profiles(path, options, &model, &inputs, &mut cases)?;
    on_progress("measuring the machine", 0, 0);
    let again = Machine::measure(options.opening.n_threads).map_err(RunError::from)?;
    let machine = machine.max(&again);
    let mut results = vec![result(&manifest, &machine, (Stage::Load, 0, 0), &load, None)];
    for (case, samples) in cases.iter().zip(&samples) {
        let counts = counts(&profiles, case);
        let place = (case.stage, case.images, case.context);
        results.push(result(&manifest, &machine, place, samples, counts));
    }
    Ok(Report {
        machine,
        backend: model.backend().name().to_owned(),
        warnings: model.take_warnings(),
        few_shot_factor: factor(&results, Stage::FewShot, Stage::FewShotBank),
        results,
        peak_rss_bytes,
        steady_rss_bytes,
        cache_bytes: CacheBytes { kv: model.kv_bytes(options.context), media_per_image },
        profiles: if options.profile { profiles } else { Vec::new() },
    })
}

/// Refuses what the artifact has no room for, all at once.
fn check_options(manifest: &Manifest, options: &BenchOptions) -> Result<(), BenchError> {
    let mut problems = Vec::new();
    let mut check = |is_fine: bool, flag: &str, expected: String, found: String| {
        if !is_fine {
            problems.push(format!("`--{flag}`: expected {expected}, found {found}"));
        }
    };
    let limits = &manifest.limits;
    let most = options.images.iter().copied().max();
    let found = options.images.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let expected = format!("numbers up to {}", limits.max_images);
    check(most.is_some_and(|most| most <= limits.max_images), "images", expected, found);
    let image_len = inputs::image_tokens(&manifest.config.tokens).len();
    let needed = most.unwrap_or(0).saturating_mul(image_len).max(1);
    for (flag, tokens, room) in [
        ("context", options.context, limits.max_context.saturating_sub(1)),
        ("prompt-tokens", options.prompt_tokens, limits.max_context),
    ] {
        let expected = format!("{needed} (for the pictures) to {room} tokens");
        check((needed..=room).contains(&tokens), flag, expected, tokens.to_string());
    }
    check(options.reps > 0, "reps", "1 or more".into(), options.reps.to_string());
    match problems.is_empty() {
        true => Ok(()),
        false => Err(BenchError::Options(problems)),
    }
}

fn time_load(
    path: &Path,
    options: &BenchOptions,
    limits: &Limits,
    on_progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<Samples, RunError> {
    let opening = OpenOptions { verify: false, ..options.opening.clone() };
    let mut load: [measure::Run<'_>; 1] = [Box::new(|| timed(|| Model::open(path, &opening)))];
    let on_sample = &mut |done, all| on_progress("loading", done, all);
    Ok(measure(&mut load, limits, on_sample)?.pop().unwrap_or_default())
}

/// The instructions of a run of each stage but `load` and `first_token`; empty where there is no
/// native plan.
fn profiles(
    path: &Path,
    options: &BenchOptions,
    model: &Model,
    inputs: &Inputs,
    own: &mut [Case<'_>],
) -> Result<Vec<Profile>, BenchError> {
    if model.backend().set_profiling(false) {
        return Ok(record_all(model, own, if options.profile { PROFILED_RUNS } else { 1 })?);
    }
    if options.profile {
        return Err(BenchError::NoProfile(model.backend().name().to_owned()));
    }
    let opening = OpenOptions {
        n_threads: options.opening.n_threads,
        kv_format: options.opening.kv_format,
        ..OpenOptions::default()
    };
    let Ok(native) = Model::open(path, &opening) else { return Ok(Vec::new()) };
    let most = options.images.iter().copied().max().unwrap_or(0).max(1);
    let media = encoded(&native, inputs, most)?;
    Ok(record_all(&native, &mut cases(&native, inputs, &media, false)?, 1)?)
}

fn record_all(
    model: &Model,
    cases: &mut [Case<'_>],
    n_runs: usize,
) -> Result<Vec<Profile>, RunError> {
    let mut profiles = Vec::new();
    for case in cases {
        let has_none = [
            Stage::Load,
            Stage::Resample,
            Stage::DecodeReprojected,
            Stage::FirstToken,
            Stage::FirstTokenWarm,
            Stage::FewShot,
            Stage::FewShotBank,
        ];
        if has_none.contains(&case.stage) {
            continue;
        }
        let mut runs = Vec::new();
        for _ in 0..n_runs {
            runs.extend(recorded(model, &mut case.run)?);
        }
        let total = |records: &Vec<Record>| records.iter().map(|r| r.duration).sum::<Duration>();
        let records = runs.into_iter().min_by_key(total).unwrap_or_default();
        let Case { stage, images, context, .. } = *case;
        profiles.push(Profile { stage, images, context, records });
    }
    Ok(profiles)
}

/// What a run reads and computes.
#[derive(Clone, Copy, Debug)]
struct Counts {
    weight_bytes: usize,
    operations: u64,
    arithmetic: Arithmetic,
}

/// How many times the median of `than` goes into that of `slow`.
fn factor(results: &[StageResult], slow: Stage, than: Stage) -> Option<f64> {
    let median = |stage| Some(results.iter().find(|result| result.stage == stage)?.ms.median);
    Some(median(slow)? / median(than)?)
}

impl Report {
    /// By number of pictures: how many times longer a token takes that makes all their keys and values again.
    pub fn reprojection_factors(&self) -> Vec<(usize, f64)> {
        let of = |stage| self.results.iter().filter(move |result| result.stage == stage);
        let factor = |again: &StageResult| {
            let cached = of(Stage::Decode).find(|result| result.images == again.images)?;
            Some((again.images, again.ms.median / cached.ms.median))
        };
        of(Stage::DecodeReprojected).filter_map(factor).collect()
    }
}

impl Counts {
    fn new<'r>(records: impl Iterator<Item = &'r Record>) -> Counts {
        let records: Vec<Record> = records.cloned().collect();
        Counts {
            weight_bytes: records.iter().map(|record| record.work.weight_bytes).sum(),
            operations: records.iter().map(|record| record.work.operations).sum(),
            arithmetic: main_arithmetic(&records),
        }
    }
}

/// Counts of a case; those of `first_token` are its encodes and its prefill.
fn counts(profiles: &[Profile], case: &Case<'_>) -> Option<Counts> {
    let of = |stage: Stage, images: usize| {
        profiles.iter().find(|profile| profile.stage == stage && profile.images == images)
    };
    let encode = || of(Stage::Encode, 1).map(|profile| &profile.records);
    match case.stage {
        Stage::Load
        | Stage::DecodeReprojected
        | Stage::FirstTokenWarm
        | Stage::FewShot
        | Stage::FewShotBank => None,
        Stage::Encode => Some(Counts::new(encode()?.iter())),
        Stage::Resample => {
            Some(Counts::new(encode()?.iter().filter(|record| is_resampler(record))))
        }
        stage @ (Stage::Prefill | Stage::Decode) => {
            Some(Counts::new(of(stage, case.images)?.records.iter()))
        }
        Stage::FirstToken => {
            let prompt = of(Stage::Prefill, case.images)?.records.iter();
            let pictures = std::iter::repeat_n(encode()?, case.images).flatten();
            Some(Counts::new(prompt.chain(pictures)))
        }
    }
}

fn result(
    manifest: &Manifest,
    machine: &Machine,
    (stage, images, context): (Stage, usize, usize),
    samples: &Samples,
    counts: Option<Counts>,
) -> StageResult {
    let [p10, median, p90] = [10, 50, 90].map(|percent| quantile(&samples.ms, percent));
    let per_s = |amount: f64| amount / median.max(1e-9) * 1e3;
    let gb_per_s = counts.map(|counts| per_s(counts.weight_bytes as f64 / 1e9));
    let gop = counts.map(|counts| counts.operations as f64 / 1e9);
    let of_peak =
        || Some(per_s(gop?) / machine.gop_per_s(counts?.arithmetic)).filter(|share| *share > 0.0);
    StageResult {
        stage,
        images,
        context,
        precision: precision(manifest, stage),
        ms: Milliseconds { median, p10, p90, n: samples.ms.len() },
        tokens_per_s: match stage {
            Stage::Prefill => Some(per_s(context as f64)),
            Stage::Decode | Stage::DecodeReprojected => Some(per_s(1.0)),
            Stage::Load
            | Stage::Encode
            | Stage::Resample
            | Stage::FirstToken
            | Stage::FirstTokenWarm
            | Stage::FewShot
            | Stage::FewShotBank => None,
        },
        weight_bytes: counts.map(|counts| counts.weight_bytes),
        weight_gb_per_s: gb_per_s,
        gop,
        gop_per_s: gop.map(per_s),
        of_ceiling: match stage {
            Stage::Decode => gb_per_s.map(|rate| rate / machine.read_gb_per_s),
            Stage::Encode | Stage::Resample | Stage::Prefill => of_peak(),
            Stage::Load
            | Stage::DecodeReprojected
            | Stage::FirstToken
            | Stage::FirstTokenWarm
            | Stage::FewShot
            | Stage::FewShotBank => None,
        },
        others: samples.others(),
        samples_ms: samples.ms.clone(),
    }
}

/// Element types of the weights that a stage reads: one, or all of them by name.
fn precision(manifest: &Manifest, stage: Stage) -> String {
    let groups: &[&str] = match stage {
        Stage::Encode => &["vision", "resampler", "media"],
        Stage::Resample => &["resampler"],
        Stage::Prefill | Stage::Decode | Stage::DecodeReprojected => {
            &["language", "gated", "embedding", "head"]
        }
        Stage::Load
        | Stage::FirstToken
        | Stage::FirstTokenWarm
        | Stage::FewShot
        | Stage::FewShotBank => {
            &["vision", "resampler", "media", "language", "gated", "embedding", "head"]
        }
    };
    let stored = groups.iter().filter_map(|group| manifest.precision.get(*group));
    let formats: BTreeSet<&str> = stored.flat_map(|formats| formats.split('+')).collect();
    formats.into_iter().collect::<Vec<_>>().join("+")
}
