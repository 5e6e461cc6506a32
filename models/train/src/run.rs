//! A training run: three stages after each other, saved on the way, measured at the end.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use flamingo_scenes::Split;
use flamingo_scenes::episode::Task;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::checkpoint::{self, Position};
use crate::export::export;
use crate::optimiser::Optimiser;
use crate::plot;
use crate::recipe::Recipe;
use crate::stage::contrastive::ContrastiveStage;
use crate::stage::flamingo::{FlamingoStage, How, MEASURED, accuracy};
use crate::stage::language::LanguageStage;
use crate::stage::{Losses, Stage};
use crate::weights::Weights;

/// Gradients are cut to this norm.
const CLIP: f64 = 1.0;
/// AdamW's decay rates of its moments.
const BETAS: (f32, f32) = (0.9, 0.98);
/// Time between two checkpoints.
const SAVE_EVERY: Duration = Duration::from_secs(60);
/// Steps between two lines of metrics.
const REPORT_EVERY: usize = 20;

/// What a run is asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where everything is written.
    pub folder: PathBuf,
    /// Threads.
    pub threads: usize,
    /// Prompts of each task that are answered at the end.
    pub measured: usize,
    /// Stop after this many steps of this run, saved.
    pub stop_after: Option<usize>,
}

/// Trains, or goes on where a run of the same recipe in the same folder stopped. Returns what the final
/// accuracies are, or nothing if the run was told to stop before.
///
/// # Errors
/// Another recipe's run in the folder; files that cannot be written.
pub fn train(recipe: &Recipe, options: &Options) -> Result<Option<Value>> {
    fs::create_dir_all(&options.folder)
        .with_context(|| format!("cannot make `{}`", options.folder.display()))?;
    let mut run = Run::open(recipe, options)?;
    let mut contrastive = ContrastiveStage::new(recipe, options.threads);
    if !run.stage(&mut contrastive, || contrastive_start(recipe))? {
        return Ok(None);
    }
    let mut language = LanguageStage::new(recipe, options.threads);
    let start = LanguageStage::new(recipe, options.threads).start();
    if !run.stage(&mut language, || start)? {
        return Ok(None);
    }
    let frozen = run.weights.clone();
    let mut flamingo = FlamingoStage::new(recipe, &frozen, options.threads);
    if !run.stage(&mut flamingo, || FlamingoStage::start(recipe))? {
        return Ok(None);
    }
    export(&options.folder, recipe, &run.weights)?;
    let result = run.measure()?;
    plot::curves(&options.folder.join("metrics.jsonl"), &options.folder.join("curves.svg"))?;
    Ok(Some(result))
}

fn contrastive_start(recipe: &Recipe) -> Weights {
    ContrastiveStage::new(recipe, 1).start()
}

struct Run<'a> {
    recipe: &'a Recipe,
    options: &'a Options,
    weights: Weights,
    optimiser: Optimiser,
    position: Position,
    metrics: File,
    steps_left: usize,
}

/// Stages in order.
const STAGES: [&str; 3] = ["contrastive", "language", "flamingo"];

impl<'a> Run<'a> {
    fn open(recipe: &'a Recipe, options: &'a Options) -> Result<Run<'a>> {
        let text = toml::to_string(recipe)?;
        let hash = blake3::hash(text.as_bytes()).to_hex().to_string();
        let path = options.folder.join("training.safetensors");
        let mut optimiser = Optimiser::new(BETAS);
        let (weights, position) = match path.exists() {
            true => {
                let (weights, moments, position) = checkpoint::load(&path)?;
                ensure!(
                    position.recipe == hash,
                    "`{}` is a run of another recipe\n\nhint: give another folder, or remove this one",
                    options.folder.display()
                );
                optimiser.restore(moments, position.step)?;
                (weights, position)
            }
            false => {
                let stage = STAGES[0].to_owned();
                (Weights::default(), Position { recipe: hash, stage, step: 0 })
            }
        };
        fs::write(options.folder.join("training.toml"), text)?;
        let metrics = open_metrics(&options.folder.join("metrics.jsonl"), &position)?;
        let steps_left = options.stop_after.unwrap_or(usize::MAX);
        Ok(Run { recipe, options, weights, optimiser, position, metrics, steps_left })
    }

    /// Runs what is left of a stage. False if the run has to stop here.
    fn stage(&mut self, stage: &mut dyn Stage, start: impl FnOnce() -> Weights) -> Result<bool> {
        let order = |name: &str| STAGES.iter().position(|known| *known == name);
        if order(stage.name()) < order(&self.position.stage) {
            return Ok(true);
        }
        if self.position.stage != stage.name() {
            self.position =
                Position { stage: stage.name().into(), step: 0, ..self.position.clone() };
            self.optimiser = Optimiser::new(BETAS);
        }
        if self.position.step == 0 {
            self.weights.extend(start());
        }
        let schedule = stage.schedule().clone();
        let bar = bar(stage.name(), schedule.steps as u64);
        let (started, mut saved) = (Instant::now(), Instant::now());
        let mut seen = Recent::default();
        while self.position.step < schedule.steps {
            if self.steps_left == 0 {
                self.save()?;
                bar.abandon();
                return Ok(false);
            }
            let step = self.position.step;
            let (losses, gradients) = stage.step(step, &self.weights)?;
            let total = losses[0].1;
            ensure!(total.is_finite(), "stage {}, step {step}: the loss is {total}", stage.name());
            let rate = schedule.rate(step);
            let rule = |name: &str| stage.rule(name);
            let norm = self.optimiser.step(&mut self.weights, gradients, rate, CLIP, &rule);
            self.position.step += 1;
            self.steps_left -= 1;
            seen.add(losses);
            bar.set_position(self.position.step as u64);
            bar.set_message(format!("loss {:.3}", seen.mean("loss")));
            if self.position.step.is_multiple_of(REPORT_EVERY)
                || self.position.step == schedule.steps
            {
                self.report(stage.name(), &seen, norm, rate, started.elapsed())?;
                seen = Recent::default();
            }
            if saved.elapsed() > SAVE_EVERY {
                self.save()?;
                saved = Instant::now();
            }
        }
        self.save()?;
        bar.finish();
        Ok(true)
    }

    fn save(&mut self) -> Result<()> {
        self.metrics.flush()?;
        let path = self.options.folder.join("training.safetensors");
        checkpoint::save(&path, &self.weights, &self.optimiser, &self.position)
    }

    fn report(
        &mut self,
        stage: &str,
        seen: &Recent,
        norm: f64,
        rate: f64,
        time: Duration,
    ) -> Result<()> {
        let losses: serde_json::Map<String, Value> =
            seen.means().map(|(name, loss)| (name.to_owned(), json!(round(loss)))).collect();
        let mut line = json!({
            "stage": stage, "step": self.position.step, "losses": losses,
            "gradient_norm": round(norm), "learning_rate": rate, "seconds": round(time.as_secs_f64()),
        });
        if stage == "flamingo" {
            line["gates"] = json!(self.gates());
        }
        writeln!(self.metrics, "{line}").context("cannot write metrics.jsonl")
    }

    /// tanh of the gates, attention and feed-forward, layer by layer.
    fn gates(&self) -> Vec<f64> {
        let gates = self.weights.iter().filter(|(name, _)| name.ends_with("_gate"));
        gates
            .map(|(_, w)| {
                let value: Vec<f32> =
                    w.value.clone().into_data().try_into_vec().expect("gates are f32");
                round(f64::from(value[0].tanh()))
            })
            .collect()
    }

    fn measure(&mut self) -> Result<Value> {
        let bar = bar("accuracy", MEASURED.len() as u64);
        let mut results = serde_json::Map::new();
        for task in MEASURED {
            let score = |split, blind, described| {
                let how = How { split, blind, described };
                let count = if blind || described {
                    self.options.measured / 2
                } else {
                    self.options.measured
                };
                let (recipe, weights) = (self.recipe, &self.weights);
                round(accuracy(recipe, weights, task, count.max(1), how, self.options.threads))
            };
            let mut entry = json!({ "score": score(Split::Test, false, false), "blind": score(Split::Test, true, false) });
            if !matches!(task, Task::Caption) {
                entry["in_words"] = json!(score(Split::Test, false, true));
            }
            if matches!(task, Task::Caption | Task::Attribute) {
                entry["unseen_pairs"] = json!(score(Split::Unseen, false, false));
            }
            let name = match task {
                Task::Which(n) | Task::FewShot(n) | Task::Bind(n) => format!("{}/{n}", task.name()),
                _ => task.name().to_owned(),
            };
            results.insert(name, entry);
            bar.inc(1);
        }
        bar.finish();
        let line = json!({ "stage": "accuracy", "n": self.options.measured, "tasks": results });
        writeln!(self.metrics, "{line}").context("cannot write metrics.jsonl")?;
        Ok(line)
    }
}

/// Means of losses since the last report.
#[derive(Default)]
struct Recent {
    sums: Vec<(String, f64, usize)>,
}

impl Recent {
    fn add(&mut self, losses: Losses) {
        for (name, loss) in losses {
            match self.sums.iter_mut().find(|(known, ..)| *known == name) {
                Some((_, sum, count)) => (*sum, *count) = (*sum + loss, *count + 1),
                None => self.sums.push((name, loss, 1)),
            }
        }
    }

    fn means(&self) -> impl Iterator<Item = (&str, f64)> {
        self.sums.iter().map(|(name, sum, count)| (name.as_str(), sum / *count as f64))
    }

    fn mean(&self, name: &str) -> f64 {
        self.means().find(|(known, _)| *known == name).map_or(0.0, |(_, mean)| mean)
    }
}

/// Four digits after the point.
fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// The file of metrics; lines beyond the position, of steps that will run again, are dropped.
fn open_metrics(path: &Path, position: &Position) -> Result<File> {
    let order = |name: &str| STAGES.iter().position(|known| *known == name);
    let mut kept = String::new();
    if path.exists() {
        let file = File::open(path).with_context(|| format!("cannot read `{}`", path.display()))?;
        for line in BufReader::new(file).lines() {
            let line = line?;
            let Ok(value) = serde_json::from_str::<Value>(&line) else {
                bail!("`{}` has a line that is not JSON", path.display());
            };
            let stage = order(value["stage"].as_str().unwrap_or_default());
            let (now, step) = (order(&position.stage), value["step"].as_u64().unwrap_or(u64::MAX));
            if stage < now || (stage == now && step <= position.step as u64) {
                kept.push_str(&line);
                kept.push('\n');
            }
        }
    }
    fs::write(path, kept).with_context(|| format!("cannot write `{}`", path.display()))?;
    let file = OpenOptions::new().append(true).open(path);
    file.with_context(|| format!("cannot open `{}`", path.display()))
}

fn bar(name: &'static str, steps: u64) -> ProgressBar {
    let style = "{prefix:12} {bar:30} {pos}/{len} {msg} [{elapsed} < {eta}]";
    let style = ProgressStyle::with_template(style).expect("a template that parses");
    ProgressBar::new(steps).with_style(style).with_prefix(name)
}
