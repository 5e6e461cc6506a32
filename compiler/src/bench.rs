//! `flamingoc bench`: times the stages of artifacts on synthetic inputs, and holds them against
//! what the machine can do, measured in the same run.
//!
//! | stage | one sample is |
//! |---|---|
//! | load | the artifact opened and planned, its files in the page cache |
//! | preprocess | a picture file decoded, resized and normalised |
//! | encode | one picture through the media graph |
//! | resample | the resampler's instructions of one encode; native backend only |
//! | media_kv | keys and values of the gated layers out of one picture's visual tokens; native backend only |
//! | prefill | a prompt over encoded pictures, to the logits of its last token |
//! | decode | one token after a context over encoded pictures, of one sequence or of several in one step |
//! | decode_reprojected | the same with the keys and values of every picture made again; where asked for |
//! | first_token | a prompt and its pictures, nothing encoded before: cold |
//! | first_token_warm | the same where all but the last picture and the text before it are in the caches; native backend only |
//! | first_token_hot | the same where all of it is; native backend only |
//! | few_shot | a question after examples from files, pictures read and decoded, nothing known; where asked for |
//! | few_shot_bank | the same with the examples in a bank that was used before |
//!
//! Variants (artifacts, engines, numbers of threads) take turns in one run. Bytes and operations are counted by the native
//! plan, also where another engine is timed. In place of stages, named scenarios (`scenario`) are timed from a picture's
//! pixels to the last token.

mod counts;
pub mod diff;
mod energy;
mod few_shot;
mod inputs;
mod measure;
pub mod page;
mod plots;
mod process;
pub mod scenario;
mod spread;
mod stages;
mod subject;
mod system;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use flamingo_models::manifest::Manifest;
use flamingo_runtime::machine::Machine;
use flamingo_runtime::{Model, OpenOptions, RunError};
use serde::Serialize;

use crate::device::root::Root;
use counts::{Counts, counts, profiles};
use energy::Sensor;
use measure::{Limits, Samples, measure};
use process::MemoryLog;
use scenario::{Scenario, ScenarioResult};
use stages::{Case, timed};
use subject::{Subject, checked_manifest};

pub use counts::Profile;
pub use process::MemoryAt;
pub use spread::{Milliseconds, rounded};
pub use stages::Stage;
pub use subject::{Label, Variant};
pub use system::System;

/// Cores of other processes above which times are called disturbed.
pub const MUCH_OF_OTHERS: f64 = 0.3;

/// What is timed, and how long.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// What takes turns, at least one.
    pub variants: Vec<Variant>,
    /// Numbers of pictures in prompt and context.
    pub images: Vec<usize>,
    /// Numbers of tokens before the one that is decoded.
    pub contexts: Vec<usize>,
    /// Tokens of the prompt that is prefilled.
    pub prompt_tokens: usize,
    /// Numbers of sequences that are decoded in one step.
    pub batches: Vec<usize>,
    /// Width and height of a picture from a file or a camera.
    pub picture: (u32, u32),
    /// Most samples of a stage.
    pub reps: usize,
    /// Time after which a stage gets no further sample.
    pub budget: Duration,
    /// Seed of inputs and order.
    pub seed: u64,
    /// Whether to record several runs of each stage's instructions, and insist on it.
    pub profile: bool,
    /// Whether to time [`Stage::DecodeReprojected`].
    pub reproject: bool,
    /// What to time [`Stage::FewShot`] and [`Stage::FewShotBank`] with.
    pub few_shot: Option<FewShotOptions>,
    /// What to time in place of stages.
    pub scenarios: Vec<Scenario>,
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
    #[error("{path}: options do not fit the artifact:\n  {}\n\nhint: `inspect` shows its limits", .problems.join("\n  "))]
    Options {
        /// The artifact.
        path: PathBuf,
        /// All of them.
        problems: Vec<String>,
    },
    /// Scenarios that need more than the artifact has.
    #[error(
        "{path}: scenarios do not fit the artifact:\n  {}\n\nhint: compile with larger `--max-context` and `--max-images`, or \
         name others", .problems.join("\n  ")
    )]
    Scenarios {
        /// The artifact.
        path: PathBuf,
        /// All of them.
        problems: Vec<String>,
    },
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
    /// The machine and its ceilings with the first variant's threads, the better of before and after.
    pub machine: Machine,
    /// Settings and versions.
    pub system: System,
    /// Engine of the first variant.
    pub backend: String,
    /// Stages, in the order in which they run, variant by variant.
    pub results: Vec<StageResult>,
    /// Scenarios, where asked for.
    pub scenarios: Vec<ScenarioResult>,
    /// What measured energy; none without a sensor.
    pub energy_sensor: Option<String>,
    /// Milliseconds of a sample of nothing: what timing adds to each.
    pub harness_ms: f64,
    /// Largest resident memory while stages ran, mapped weights included.
    pub peak_rss_bytes: Option<u64>,
    /// Resident memory with all sequences and pictures at hand, mapped weights included.
    pub steady_rss_bytes: Option<u64>,
    /// Resident memory over time.
    pub memory: Vec<MemoryAt>,
    /// What the models have to say of how they are run: nodes that another execution provider runs.
    pub warnings: Vec<String>,
    /// Memory of caches of the first variant.
    pub cache_bytes: CacheBytes,
    /// How many times longer the first token takes without a bank, where asked for.
    pub few_shot_factor: Option<f64>,
    /// Instructions of one run of each stage.
    #[serde(skip)]
    pub profiles: Vec<Profile>,
}

/// Memory of caches, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CacheBytes {
    /// Keys and values of the longest context's tokens.
    pub kv: usize,
    /// Visual tokens, and keys and values of the gated layers, of one picture.
    pub media_per_image: usize,
}

/// Times and rates of a stage.
#[derive(Clone, Debug, Serialize)]
pub struct StageResult {
    /// Artifact, engine and threads.
    #[serde(flatten)]
    pub label: Label,
    /// The stage.
    pub stage: Stage,
    /// Pictures: one for `encode` and `resample`, those in the text for the others.
    pub images: usize,
    /// Tokens of the prompt, or before the decoded one.
    pub context: usize,
    /// Sequences that take a step together.
    pub batch: usize,
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
    /// Joules of a run, of a decode step for all its sequences, where there is a sensor.
    pub joules: Option<f64>,
    /// Share of the ceiling: of read bandwidth for `decode`, of the peak of the main arithmetic for
    /// `encode`, `resample` and `prefill`.
    pub of_ceiling: Option<f64>,
    /// Cores that other processes kept busy meanwhile.
    pub others: Option<f64>,
    /// Each sample, in the order in which they were taken.
    pub samples_ms: Vec<f64>,
}

/// Measures the machine and times the stages of all variants in turn. `on_progress` is told what
/// is going on, samples done and samples to do.
///
/// # Errors
/// Options that an artifact has no room for, or an artifact that cannot be opened or run.
pub fn bench(
    options: &BenchOptions,
    on_progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<Report, BenchError> {
    let mut memory = MemoryLog::start();
    let mut on_progress = |doing, done, all| {
        memory.look(doing);
        on_progress(doing, done, all);
    };
    for Variant { artifact, opening } in &options.variants {
        let manifest = checked_manifest(artifact, opening.verify, options)?;
        scenario::check(artifact, &manifest, &options.scenarios)?;
    }
    on_progress("measuring the machine", 0, 0);
    let mut machines = measured(options, &BTreeMap::new())?;
    process::reset_peak_memory();
    let limits = Limits { reps: options.reps, budget: options.budget, seed: options.seed };
    let loads = time_loads(options, &limits, &mut on_progress)?;
    let open = |v: &Variant| Subject::open(v, &machines[&v.opening.n_threads], options);
    let subjects: Vec<Subject> = options.variants.iter().map(open).collect::<Result<_, _>>()?;

    let scenarios = scenario::time(&subjects, options, &limits, &mut on_progress)?;
    let mut cases = all_cases(&subjects, options)?;
    let (samples, harness_ms) = time_cases(&mut cases, &limits, &mut on_progress)?;
    let (peak_rss_bytes, steady_rss_bytes) = (process::peak_memory(), process::resident_memory());

    on_progress("counting", 0, 0);
    let profiles = profiles(&subjects, &mut cases, options)?;
    on_progress("measuring energy", 0, 0);
    let sensor = Sensor::find(&Root::own());
    let joules = energies(sensor.as_ref(), &mut cases)?;
    on_progress("measuring the machine", 0, 0);
    machines = measured(options, &machines)?;
    let machine = |subject: &Subject| &machines[&subject.opening.n_threads];

    let mut results = Vec::new();
    for (index, (subject, load)) in subjects.iter().zip(&loads).enumerate() {
        results.push(result(subject, machine(subject), (Stage::Load, 0, 0, 1), load, None, None));
        for ((case, samples), joules) in cases.iter().zip(&samples).zip(&joules) {
            if case.subject == index {
                let counts = counts(&profiles, case);
                let place = (case.stage, case.images, case.context, case.batch);
                results.push(result(subject, machine(subject), place, samples, counts, *joules));
            }
        }
    }
    let first = &subjects[0];
    let longest = options.contexts.iter().copied().max().unwrap_or(0);
    Ok(Report {
        machine: machine(first).clone(),
        system: System::read(library_in_use(&subjects)),
        backend: first.label.backend.clone(),
        warnings: subjects.iter().flat_map(|subject| subject.model.take_warnings()).collect(),
        few_shot_factor: factor(&results, Stage::FewShot, Stage::FewShotBank),
        results,
        scenarios,
        energy_sensor: sensor.map(|sensor| sensor.name()),
        harness_ms,
        peak_rss_bytes,
        steady_rss_bytes,
        memory: memory.entries,
        cache_bytes: CacheBytes {
            kv: first.model.kv_bytes(longest),
            media_per_image: first.media.first().map_or(0, |medium| medium.bytes()),
        },
        profiles,
    })
}

type Machines = BTreeMap<Option<NonZeroUsize>, Machine>;

/// The machine by number of threads, the better of now and `before`.
fn measured(options: &BenchOptions, before: &Machines) -> Result<Machines, RunError> {
    let mut machines = Machines::new();
    let threads: BTreeSet<_> = options.variants.iter().map(|v| v.opening.n_threads).collect();
    for n_threads in threads {
        let now = Machine::measure(n_threads)?;
        let best = before.get(&n_threads).map(|before| now.clone().max(before));
        machines.insert(n_threads, best.unwrap_or(now));
    }
    Ok(machines)
}

fn time_loads(
    options: &BenchOptions,
    limits: &Limits,
    on_progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<Vec<Samples>, RunError> {
    let load = |variant: &Variant| -> measure::Run<'static> {
        let opening = OpenOptions { verify: false, ..variant.opening.clone() };
        let path = variant.artifact.clone();
        Box::new(move || timed(|| Model::open(&path, &opening)))
    };
    let mut loads: Vec<measure::Run<'_>> = options.variants.iter().map(load).collect();
    measure(&mut loads, limits, &mut |done, all| on_progress("loading", done, all))
}

/// The stages of all subjects; none where scenarios are timed in their place.
fn all_cases<'s>(
    subjects: &'s [Subject],
    options: &BenchOptions,
) -> Result<Vec<Case<'s>>, BenchError> {
    let mut all = Vec::new();
    if !options.scenarios.is_empty() {
        return Ok(all);
    }
    for (index, subject) in subjects.iter().enumerate() {
        let mut cases = subject.cases(options)?;
        cases.iter_mut().for_each(|case| case.subject = index);
        all.extend(cases);
    }
    Ok(all)
}

/// Samples of each case, and the median time of a sample of nothing among them.
fn time_cases(
    cases: &mut [Case<'_>],
    limits: &Limits,
    on_progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<(Vec<Samples>, f64), RunError> {
    let mut runs: Vec<measure::Run<'_>> = Vec::new();
    for case in cases {
        runs.push(Box::new(|| (case.run)()));
    }
    runs.push(Box::new(|| timed(|| Ok(()))));
    let on_sample = &mut |done, all| on_progress("timing", done, all);
    let mut samples = measure(&mut runs, limits, on_sample)?;
    let harness = samples.pop().map(|nothing| Milliseconds::of(&nothing.ms).median);
    Ok((samples, harness.unwrap_or(f64::NAN)))
}

/// Joules of a run of the cases whose energy is asked for: a picture, a prompt, a token.
fn energies(sensor: Option<&Sensor>, cases: &mut [Case<'_>]) -> Result<Vec<Option<f64>>, RunError> {
    let is_asked = |stage| matches!(stage, Stage::Encode | Stage::Prefill | Stage::Decode);
    let joules = |case: &mut Case<'_>| match sensor {
        Some(sensor) if is_asked(case.stage) => sensor.joules_per_run(&mut case.run),
        _ => Ok(None),
    };
    cases.iter_mut().map(joules).collect()
}

/// ONNX Runtime's library, where a subject runs on it.
fn library_in_use(subjects: &[Subject]) -> Option<String> {
    let on_it = subjects.iter().find(|subject| subject.label.backend == "ort")?;
    library_folder(on_it.opening.ort_library.as_deref())
}

#[cfg(feature = "ort")]
fn library_folder(library: Option<&std::path::Path>) -> Option<String> {
    Some(flamingo_runtime::ort::library_folder(library)?.display().to_string())
}

#[cfg(not(feature = "ort"))]
fn library_folder(_library: Option<&std::path::Path>) -> Option<String> {
    None
}

/// How many times the median of `than` goes into that of `slow`.
fn factor(results: &[StageResult], slow: Stage, than: Stage) -> Option<f64> {
    let median = |stage| Some(results.iter().find(|result| result.stage == stage)?.ms.median);
    Some(median(slow)? / median(than)?)
}

/// A stage of one variant beside the same of another way to do it.
#[derive(Clone, Debug, PartialEq)]
pub struct Factor {
    /// The variant.
    pub label: Label,
    /// The stage.
    pub stage: Stage,
    /// Pictures.
    pub images: usize,
    /// Tokens.
    pub context: usize,
    /// How many times longer the other way takes.
    pub factor: f64,
}

impl Report {
    /// How many times longer each token takes that makes all pictures' keys and values again.
    pub fn reprojection_factors(&self) -> Vec<Factor> {
        self.factors(Stage::Decode, Stage::DecodeReprojected)
    }

    /// How many times longer the first token takes where pictures and text that were there before are read again.
    pub fn no_cache_factors(&self) -> Vec<Factor> {
        self.factors(Stage::FirstTokenWarm, Stage::FirstToken)
    }

    /// How many times longer each stage takes on `engine` than on ours, with equal artifact and threads.
    pub fn engine_factors(&self, engine: &str) -> Vec<Factor> {
        let place = |r: &StageResult| (r.stage, r.images, r.context, r.batch, r.label.threads);
        let ours = self.results.iter().filter(|result| result.label.backend == "native");
        let factor = |own: &StageResult| {
            let is_other = |r: &&StageResult| {
                r.label.backend == engine
                    && r.label.artifact == own.label.artifact
                    && place(r) == place(own)
            };
            Some(own.factor(self.results.iter().find(is_other)?))
        };
        ours.filter_map(factor).collect()
    }

    fn factors(&self, stage: Stage, other_stage: Stage) -> Vec<Factor> {
        let of = |stage| self.results.iter().filter(move |result| result.stage == stage);
        let place = |r: &StageResult| (r.images, r.context, r.batch, r.label.clone());
        let factor = |own: &StageResult| {
            Some(own.factor(of(other_stage).find(|other| place(other) == place(own))?))
        };
        of(stage).filter_map(factor).collect()
    }

    /// Whether results are of several variants.
    pub fn has_variants(&self) -> bool {
        let labels = || {
            let of_stages = self.results.iter().map(|result| &result.label);
            of_stages.chain(self.scenarios.iter().map(|result| &result.label))
        };
        labels().zip(labels().skip(1)).any(|(label, next)| label != next)
    }
}

impl StageResult {
    fn factor(&self, other: &StageResult) -> Factor {
        Factor {
            label: self.label.clone(),
            stage: self.stage,
            images: self.images,
            context: self.context,
            factor: other.ms.median / self.ms.median,
        }
    }
}

fn result(
    subject: &Subject,
    machine: &Machine,
    (stage, images, context, batch): (Stage, usize, usize, usize),
    samples: &Samples,
    counts: Option<Counts>,
    joules: Option<f64>,
) -> StageResult {
    let ms = Milliseconds::of(&samples.ms);
    let per_s = |amount: f64| amount / ms.median.max(1e-9) * 1e3;
    let gb_per_s = counts.map(|counts| per_s(counts.weight_bytes as f64 / 1e9));
    let gop = counts.map(|counts| counts.operations as f64 / 1e9);
    let of_peak =
        || Some(per_s(gop?) / machine.gop_per_s(counts?.arithmetic)).filter(|share| *share > 0.0);
    StageResult {
        label: subject.label.clone(),
        stage,
        images,
        context,
        batch,
        precision: precision(&subject.manifest, stage),
        ms,
        tokens_per_s: match stage {
            Stage::Prefill => Some(per_s(context as f64)),
            Stage::Decode | Stage::DecodeReprojected => Some(per_s(batch as f64)),
            _ => None,
        },
        weight_bytes: counts.map(|counts| counts.weight_bytes),
        weight_gb_per_s: gb_per_s,
        gop,
        gop_per_s: gop.map(per_s),
        of_ceiling: match stage {
            Stage::Decode => gb_per_s.map(|rate| rate / machine.read_gb_per_s),
            Stage::Encode | Stage::Resample | Stage::Prefill => of_peak(),
            _ => None,
        },
        joules,
        others: samples.others(),
        samples_ms: samples.ms.clone(),
    }
}

/// Element types of the weights that a stage reads: one, or all of them by name.
fn precision(manifest: &Manifest, stage: Stage) -> String {
    let groups: &[&str] = match stage {
        Stage::Preprocess => &[],
        Stage::Encode => &["vision", "resampler", "media"],
        Stage::Resample => &["resampler"],
        Stage::MediaKv => &["media"],
        Stage::Prefill | Stage::Decode | Stage::DecodeReprojected | Stage::FirstTokenHot => {
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
