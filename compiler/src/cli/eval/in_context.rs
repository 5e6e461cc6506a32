//! `flamingoc eval --task`: in-context learning.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use flamingo_runtime::{Artifact, Model, OpenOptions, VisualCache, VisualCacheOptions};
use serde_json::{Value, json};

use super::Asking;
use crate::cli::Outcome;
use crate::cli::output::{Output, count_bar};
use crate::eval::ask::{AskOptions, Asker, Sharing};
use crate::eval::builtin::{TASKS, builtin};
use crate::eval::features::Features;
use crate::eval::journal::Journal;
use crate::eval::page::{eval_page, shown};
use crate::eval::run::{
    self, Ended, Progress, SharingReport, Timing, bad_queries, measure_sharing, outcome,
};
use crate::eval::select::Select;
use crate::eval::task::Task;

/// Numbers of examples if none are given, as in the paper.
const SHOTS: [usize; 5] = [0, 4, 8, 16, 32];
/// Time between two looks at the score so far.
const LOOK: Duration = Duration::from_secs(2);

/// Options of in-context learning.
#[derive(Args)]
pub(super) struct InContext {
    /// In-context learning: task files, or names of scenes-color, scenes-shape, scenes-size,
    /// scenes-place, scenes-bind, scenes-yes-no, scenes-caption, digits, digits-closed
    #[arg(long, value_name = "TASKS", value_delimiter = ',', conflicts_with_all = ["tasks", "split", "blind", "save"])]
    task: Vec<String>,
    /// Which examples: the same for all questions, drawn for each, or those with pictures most like
    /// the question's, the most similar last
    #[arg(long, value_name = "HOW", default_value = "random", value_parser = ["fixed", "random", "rices"], requires = "task")]
    select: String,
    /// Average candidates' likelihoods over up to N orders of the examples
    #[arg(long, value_name = "N", default_value = "1", requires = "task", value_parser = clap::value_parser!(u32).range(1..))]
    ensemble: u32,
    /// Keep answers in this file as they come, and go on from it
    #[arg(long, value_name = "FILE", requires = "task")]
    journal: Option<PathBuf>,
    /// Keep what `--select rices` compares pictures by in this file, and encode none of them again
    /// [default: beside the journal, with `.rices` at its end]
    #[arg(long, value_name = "FILE", requires = "task")]
    rices_cache: Option<PathBuf>,
    /// Stop after so many new answers; the same command goes on
    #[arg(long, value_name = "N", requires = "journal")]
    at_most: Option<usize>,
    /// Write a page with plots, and answers with their pictures
    #[arg(long, value_name = "FILE", requires = "task")]
    report: Option<PathBuf>,
    /// Put each answer into the JSON, for `eval compare`
    #[arg(long, requires = "json")]
    items: bool,
    /// Keep the pictures of zero-shot's two examples where candidates are compared, as OpenFlamingo's
    /// suite does: the question's image token sees the first example's picture
    #[arg(long, requires = "task")]
    reference_bugs: bool,
    /// Time the same questions with examples read once, and with every question a prompt of its own
    #[arg(long, requires = "task", conflicts_with_all = ["journal", "report", "items"])]
    measure_sharing: bool,
}

impl InContext {
    pub(super) fn is_on(&self) -> bool {
        !self.task.is_empty()
    }

    fn select(&self) -> Select {
        match self.select.as_str() {
            "fixed" => Select::Fixed,
            "rices" => Select::Rices,
            _ => Select::Random,
        }
    }

    /// Where RICES keeps what it compares pictures by.
    fn features(&self) -> Result<Features> {
        let beside_journal = || {
            let mut path = self.journal.clone()?.into_os_string();
            path.push(".rices");
            Some(PathBuf::from(path))
        };
        match self.rices_cache.clone().or_else(beside_journal) {
            Some(path) if self.select() == Select::Rices => Features::open(&path),
            _ => Ok(Features::in_memory()),
        }
    }
}

impl Asking {
    pub(super) fn in_context(&self, output: &mut Output) -> Result<Outcome> {
        let options = AskOptions {
            select: self.in_context.select(),
            ensemble: usize::try_from(self.in_context.ensemble)?,
            seed: self.seed,
            n: usize::try_from(self.n)?,
            reference_bugs: self.in_context.reference_bugs,
            sharing: Sharing::All,
        };
        let shots = if self.shots.is_empty() { SHOTS.to_vec() } else { self.shots.clone() };
        let model = self.caching.open(self.artifact()?, &self.opening)?;
        let tasks = self.read_tasks(&model)?;
        if self.in_context.measure_sharing {
            return self.measure(&model, &tasks, &options, &shots, output);
        }
        let mut journal = match &self.in_context.journal {
            Some(path) => Journal::open(path, &identity(self.artifact()?, &tasks, &options)?)?,
            None => Journal::in_memory(),
        };
        let Some(report) = self.ask(&model, &tasks, &options, &shots, &mut journal, output)? else {
            let n = journal.len();
            output.note(&format!(
                "stopped with {n} answers in the journal; the same command goes on"
            ));
            return Ok(Outcome::Ok);
        };
        output.warnings(&model);
        if let Some(path) = &self.in_context.report {
            let title = self.artifact()?.file_name().unwrap_or_default().to_string_lossy();
            let page =
                eval_page(&title, &options, &report.results, &report.shown, &report.reasons)?;
            fs::write(path, page).with_context(|| format!("cannot write `{}`", path.display()))?;
            output.note(&format!("wrote {}", path.display()));
        }
        self.print(&report, &options, output)
    }

    fn read_tasks(&self, model: &Model) -> Result<Vec<Task>> {
        let read = |name: &String| match TASKS.iter().any(|(known, _)| known == name) {
            false if name.ends_with(".toml") => {
                Task::read(Path::new(name), model.manifest().config.family)
            }
            _ => builtin(name, self.seed),
        };
        let tasks: Vec<Task> = self.in_context.task.iter().map(read).collect::<Result<_>>()?;
        let mut names: Vec<&str> = tasks.iter().map(|task| task.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        ensure!(
            names.len() == tasks.len(),
            "two tasks of one name\n\nhint: give one of them a `name`"
        );
        Ok(tasks)
    }

    /// All answers; `None` if it stopped before.
    fn ask(
        &self,
        model: &Model,
        tasks: &[Task],
        options: &AskOptions,
        shots: &[usize],
        journal: &mut Journal,
        output: &mut Output,
    ) -> Result<Option<Report>> {
        let mut report = Report::default();
        let mut left = self.in_context.at_most.unwrap_or(usize::MAX);
        for task in tasks {
            for (what, bad) in ["examples", "questions"].into_iter().zip(task.bad()) {
                for (reason, n) in bad {
                    report.reasons.push(format!("{}: {n} {what} left out: {reason}", task.name));
                }
            }
            let mut asker =
                Asker::with_features(model, task, options, self.in_context.features()?)?;
            let bar = count_bar();
            let (mut looked, before) = (Instant::now(), journal.len());
            bar.set_length((asker.queries().len() * shots.len()) as u64);
            let ended =
                run::run(&mut asker, shots, journal, left, &mut |progress: &Progress<'_>| {
                    bar.inc(1);
                    if !bar.is_hidden() && looked.elapsed() > LOOK {
                        let (score, low, high) = (progress.so_far)();
                        let [score, low, high] = [score, low, high].map(|x| 100.0 * x);
                        let Progress { task, shots, .. } = progress;
                        bar.set_message(format!(
                            "{task} {shots} shots {score:.1} ({low:.1}–{high:.1})"
                        ));
                        looked = Instant::now();
                    }
                    Ok(())
                });
            bar.finish_and_clear();
            left -= journal.len() - before;
            if ended? == Ended::Stopped {
                return Ok(None);
            }
            report.add(&asker, shots, journal)?;
        }
        report.reasons.iter().for_each(|reason| output.note(reason));
        Ok(Some(report))
    }

    fn print(&self, report: &Report, options: &AskOptions, output: &mut Output) -> Result<Outcome> {
        if self.json {
            let mut results: Vec<Value> = Vec::new();
            let mut timings: Vec<&Timing> = Vec::new();
            for (outcome, timing) in &report.results {
                let mut value = serde_json::to_value(outcome)?;
                if let Some(object) = value.as_object_mut().filter(|_| !self.in_context.items) {
                    object.shift_remove("items");
                }
                results.push(value);
                timings.push(timing);
            }
            output.json(&json!({
                "select": options.select, "ensemble": options.ensemble, "seed": options.seed,
                "results": results, "left_out": report.reasons, "timings": timings,
            }))?;
            return Ok(Outcome::Ok);
        }
        let percent = |share: f64| format!("{:.1}", 100.0 * share);
        let row = |(outcome, timing): &(run::Outcome, Timing)| {
            vec![
                outcome.task.clone(),
                outcome.metric.clone(),
                outcome.shots.to_string(),
                outcome.n.to_string(),
                outcome.bad.to_string(),
                percent(outcome.score),
                format!("{} – {}", percent(outcome.low), percent(outcome.high)),
                format!("{:.1}", timing.ms),
            ]
        };
        let header = [
            "task",
            "metric",
            "shots",
            "n",
            "bad",
            "score × 100",
            "95 % interval",
            "ms a question",
        ];
        output.table(&header, &report.results.iter().map(row).collect::<Vec<_>>())?;
        Ok(Outcome::Ok)
    }

    fn measure(
        &self,
        model: &Model,
        tasks: &[Task],
        options: &AskOptions,
        shots: &[usize],
        output: &mut Output,
    ) -> Result<Outcome> {
        let visual_cache =
            Some(std::sync::Arc::new(VisualCache::new(&VisualCacheOptions::default())));
        let alone = OpenOptions { prefix_bytes: Some(0), visual_cache, ..self.opening.options() };
        let alone = Model::open(self.artifact()?, &alone)?;
        let mut reports = Vec::new();
        for task in tasks {
            for shots in shots {
                reports.push(measure_sharing(model, &alone, task, options, *shots)?);
            }
        }
        if self.json {
            output.json(&json!({ "sharing": reports }))?;
            return Ok(Outcome::Ok);
        }
        let row = |report: &SharingReport| {
            let SharingReport { shared_s, pictures_shared_s, nothing_shared_s, .. } = report;
            vec![
                report.task.clone(),
                report.shots.to_string(),
                report.n.to_string(),
                format!("{shared_s:.2}"),
                format!("{pictures_shared_s:.2}"),
                format!("{nothing_shared_s:.2}"),
                format!("{:.1} ×", pictures_shared_s / shared_s),
                format!("{:.1} ×", nothing_shared_s / shared_s),
                format!("{:.0e}", report.largest_difference),
            ]
        };
        let header = [
            "task",
            "shots",
            "n",
            "shared s",
            "pictures s",
            "nothing s",
            "saves",
            "saves",
            "difference",
        ];
        output.table(&header, &reports.iter().map(row).collect::<Vec<_>>())?;
        Ok(Outcome::Ok)
    }
}

/// What a run gave.
#[derive(Default)]
struct Report {
    results: Vec<(run::Outcome, Timing)>,
    /// Answers to show, of each task after the most examples.
    shown: Vec<Value>,
    /// What was left out, and why.
    reasons: Vec<String>,
}

impl Report {
    fn add(&mut self, asker: &Asker<'_>, shots: &[usize], journal: &Journal) -> Result<()> {
        for shots in shots {
            self.results.push(outcome(asker, *shots, journal)?);
        }
        for (reason, n) in bad_queries(asker, shots, journal) {
            self.reasons
                .push(format!("{}: {n} questions could not be asked: {reason}", asker.task().name));
        }
        let most = shots.iter().max().copied().unwrap_or(0);
        self.shown.push(shown(asker, most, journal));
        Ok(())
    }
}

/// A hash of what decides the answers: artifact, tasks and options.
fn identity(artifact: &Path, tasks: &[Task], options: &AskOptions) -> Result<String> {
    let artifact = Artifact::open(artifact, false)?;
    let mut hasher = blake3::Hasher::new();
    for file in &artifact.manifest.files {
        hasher.update(file.path.as_bytes()).update(format!(" {:?} ", file).as_bytes());
    }
    for task in tasks {
        hasher.update(task.identity.as_bytes());
    }
    hasher.update(format!("{options:?}").as_bytes());
    Ok(hasher.finalize().to_hex().to_string())
}
