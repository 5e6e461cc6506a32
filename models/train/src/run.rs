//! A training run: three stages after each other, saved on the way, measured at the end.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use flamingo_scenes::Split;
use flamingo_scenes::episode::Task;
use flamingo_scenes::random::stream;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::checkpoint::{self, Position};
use crate::export::{LANGUAGE_FILE, VISION_FILE, export};
use crate::optimiser::Optimiser;
use crate::plot;
use crate::recipe::Recipe;
use crate::shards::ShardStream;
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
/// Most prompts of each task in a quick look.
const QUICK: usize = 48;
/// Quick looks in a stage.
const LOOKS: usize = 10;
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
    /// A run or a model whose parts are taken over, and the first stage that is trained.
    pub frozen_from: Option<(PathBuf, FirstStage)>,
    /// Stop after this many steps of this run, saved.
    pub stop_after: Option<usize>,
}

/// The first stage that is trained where what earlier ones make is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum FirstStage {
    /// The vision encoder is taken over
    Language,
    /// The vision encoder and the language model are taken over
    Flamingo,
}

impl FirstStage {
    fn name(self) -> &'static str {
        match self {
            FirstStage::Language => STAGES[1],
            FirstStage::Flamingo => STAGES[2],
        }
    }
}

/// Trains, or goes on where a run of the same recipe in the same folder stopped. Returns what the final
/// accuracies are, or nothing if the run was told to stop before.
///
/// # Errors
/// Another recipe's run in the folder; files that cannot be written; shards that cannot be read, with the sample.
pub fn train(recipe: &Recipe, options: &Options) -> Result<Option<Value>> {
    let streams = ShardStream::open_all(recipe)?;
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
    let mut flamingo = FlamingoStage::new(recipe, &frozen, streams, options.threads);
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

/// What the stages before `first` made in another run's folder, or in that of the model that a run wrote, in the shapes
/// that the recipe asks for.
fn frozen(recipe: &Recipe, folder: &Path, first: FirstStage) -> Result<Weights> {
    let run = folder.join("training.safetensors");
    let weights = match run.exists() {
        true => checkpoint::load(&run)?.0,
        false => {
            let mut weights = checkpoint::read_tensors(&folder.join(VISION_FILE))?;
            weights.extend(checkpoint::read_tensors(&folder.join(LANGUAGE_FILE))?);
            weights
        }
    };
    let mut expected = recipe.vision.start(&mut stream(0, "shapes"));
    if first == FirstStage::Flamingo {
        expected.extend(LanguageStage::new(recipe, 1).start());
    }
    for (name, weight) in expected.iter() {
        let found = weights.iter().find(|(known, _)| *known == name).map(|(_, w)| &w.shape);
        ensure!(
            found == Some(&weight.shape),
            "`{name}`: the recipe asks for {:?}, the run in `{}` has {found:?}",
            weight.shape,
            folder.display()
        );
    }
    Ok(weights.filtered(|name| expected.contains(name)))
}

struct Run<'a> {
    recipe: &'a Recipe,
    options: &'a Options,
    weights: Weights,
    optimiser: Optimiser,
    position: Position,
    metrics: File,
    /// Seconds that the stage took before this process went on with it.
    before: f64,
    /// Accuracies of the last look, for the progress bar.
    looked: String,
    steps_left: usize,
}

/// Stages in order.
const STAGES: [&str; 3] = ["contrastive", "language", "flamingo"];

impl<'a> Run<'a> {
    fn open(recipe: &'a Recipe, options: &'a Options) -> Result<Run<'a>> {
        let text = toml::to_string(recipe)?;
        let hash = blake3::hash(text.as_bytes()).to_hex().to_string();
        let path = options.folder.join("training.safetensors");
        let mut optimiser = Optimiser::new(BETAS, options.threads);
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
            false => match &options.frozen_from {
                Some((other, first)) => {
                    let stage = first.name().to_owned();
                    (frozen(recipe, other, *first)?, Position { recipe: hash, stage, step: 0 })
                }
                None => {
                    let stage = STAGES[0].to_owned();
                    (Weights::default(), Position { recipe: hash, stage, step: 0 })
                }
            },
        };
        fs::write(options.folder.join("training.toml"), text)?;
        let (metrics, before) = open_metrics(&options.folder.join("metrics.jsonl"), &position)?;
        let steps_left = options.stop_after.unwrap_or(usize::MAX);
        let looked = String::new();
        Ok(Run {
            recipe,
            options,
            weights,
            optimiser,
            position,
            metrics,
            before,
            looked,
            steps_left,
        })
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
            self.optimiser = Optimiser::new(BETAS, self.options.threads);
            self.before = 0.0;
            self.looked.clear();
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
            let rule = |name: &str| stage.rule(step, name);
            let norm = self.optimiser.step(&mut self.weights, gradients, rate, CLIP, &rule);
            self.position.step += 1;
            self.steps_left -= 1;
            seen.add(losses);
            bar.set_position(self.position.step as u64);
            bar.set_message(self.message(stage.name(), seen.mean("loss")));
            if self.position.step.is_multiple_of(REPORT_EVERY)
                || self.position.step == schedule.steps
            {
                let seconds = self.before + started.elapsed().as_secs_f64();
                self.report(stage.name(), &seen, norm, rate, seconds)?;
                seen = Recent::default();
            }
            if self.position.step.is_multiple_of(schedule.steps.div_ceil(LOOKS))
                || self.position.step == schedule.steps
            {
                self.look(stage.name())?;
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
        seconds: f64,
    ) -> Result<()> {
        let losses: serde_json::Map<String, Value> =
            seen.means().map(|(name, loss)| (name.to_owned(), json!(round(loss)))).collect();
        let mut line = json!({
            "stage": stage, "step": self.position.step, "losses": losses,
            "gradient_norm": round(norm), "learning_rate": rate, "seconds": round(seconds),
        });
        if stage == "flamingo" {
            line["gates"] = json!(self.gates());
        }
        writeln!(self.metrics, "{line}").context("cannot write metrics.jsonl")
    }

    /// What the progress bar says: the loss, how far the gates are open, the accuracies of the last look.
    fn message(&self, stage: &str, loss: f64) -> String {
        let mut message = format!("loss {loss:.3}");
        if stage == "flamingo" {
            let open: Vec<String> =
                self.gates().iter().map(|g| format!("{:.1}", g.abs())).collect();
            message += &format!(" · gates {}", open.join(" "));
        }
        message + &self.looked
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

    /// Accuracies of all tasks at the end, on pictures that training never saw.
    fn measure(&mut self) -> Result<Value> {
        let bar = bar("accuracy", MEASURED.len() as u64);
        let n = self.options.measured;
        let mut results = serde_json::Map::new();
        for task in MEASURED {
            let score = |n: usize, how| self.accuracy(task, n.max(1), how);
            let mut entry =
                json!({ "score": score(n, How::SEES), "blind": score(n / 2, How::BLIND) });
            if !matches!(task, Task::Caption | Task::Captions(_)) {
                entry["in_words"] = json!(score(n / 2, How::READS));
            }
            if matches!(task, Task::Caption | Task::Attribute) {
                entry["unseen_pairs"] = json!(score(n, How { split: Split::Unseen, ..How::SEES }));
            }
            results.insert(label(task), entry);
            bar.inc(1);
        }
        bar.finish();
        let line = json!({ "stage": "accuracy", "n": n, "tasks": results });
        writeln!(self.metrics, "{line}").context("cannot write metrics.jsonl")?;
        Ok(line)
    }

    /// A quick look at what a stage has learned: tasks, in words for the language model.
    fn look(&mut self, stage: &str) -> Result<()> {
        let how = match stage {
            "language" => How::READS,
            "flamingo" => How::SEES,
            _ => return Ok(()),
        };
        let tasks = MEASURED
            .into_iter()
            .filter(|task| !how.described || !matches!(task, Task::Caption | Task::Captions(_)));
        let n = QUICK.min(self.options.measured.max(1));
        let scores: Vec<(String, f64)> =
            tasks.map(|task| (label(task), self.accuracy(task, n, how))).collect();
        let shown: Vec<String> =
            scores.iter().map(|(name, score)| format!("{name} {:.0}", 100.0 * score)).collect();
        self.looked = format!(" · right % {}", shown.join(" "));
        let scores: serde_json::Map<String, Value> =
            scores.into_iter().map(|(name, score)| (name, json!(score))).collect();
        let line = json!({ "stage": stage, "step": self.position.step, "accuracy": scores });
        writeln!(self.metrics, "{line}").context("cannot write metrics.jsonl")
    }

    fn accuracy(&self, task: Task, n: usize, how: How) -> f64 {
        round(accuracy(self.recipe, &self.weights, task, n, how, self.options.threads))
    }
}

/// A task's name in metrics.
fn label(task: Task) -> String {
    match task.size() {
        Some(size) => format!("{}/{size}", task.name()),
        None => task.name().to_owned(),
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

/// The file of metrics, and the seconds that it gives the position's stage; lines beyond the position, of steps
/// that will run again, are dropped.
fn open_metrics(path: &Path, position: &Position) -> Result<(File, f64)> {
    let order = |name: &str| STAGES.iter().position(|known| *known == name);
    let (mut kept, mut seconds) = (String::new(), 0.0);
    if path.exists() {
        let file = File::open(path).with_context(|| format!("cannot read `{}`", path.display()))?;
        for line in BufReader::new(file).lines() {
            let line = line?;
            let Ok(value) = serde_json::from_str::<Value>(&line) else {
                bail!("`{}` has a line that is not JSON", path.display());
            };
            let stage = order(value["stage"].as_str().unwrap_or_default());
            let (now, step) = (order(&position.stage), value["step"].as_u64().unwrap_or(u64::MAX));
            if stage.is_some() && stage < now || (stage == now && step <= position.step as u64) {
                if stage == now {
                    seconds = value["seconds"].as_f64().unwrap_or(seconds);
                }
                kept.push_str(&line);
                kept.push('\n');
            }
        }
    }
    fs::write(path, kept).with_context(|| format!("cannot write `{}`", path.display()))?;
    let file = OpenOptions::new().append(true).open(path);
    Ok((file.with_context(|| format!("cannot open `{}`", path.display()))?, seconds))
}

fn bar(name: &'static str, steps: u64) -> ProgressBar {
    let style = "{prefix:11} {bar:20} {pos}/{len} [{elapsed} < {eta}] {wide_msg}";
    let style = ProgressStyle::with_template(style).expect("a template that parses");
    ProgressBar::new(steps).with_style(style).with_prefix(name)
}
