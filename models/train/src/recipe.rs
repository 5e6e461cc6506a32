//! The training recipe: a TOML file that decides everything a training run depends on.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use flamingo_scenes::episode::Task;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::model::gated::Gated;
use crate::model::language::Language;
use crate::model::resampler::Resampler;
use crate::model::text::TextEncoder;
use crate::model::vision::Vision;
use crate::optimiser::{Method, Rule};
use crate::stage::is_small;

/// A recipe. Unknown keys are errors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Decides all weights, pictures and prompts.
    pub seed: u64,
    /// Vision encoder.
    pub vision: Vision,
    /// Text side of the contrastive stage.
    pub text: TextEncoder,
    /// Language model.
    pub language: Language,
    /// Perceiver Resampler.
    pub resampler: Resampler,
    /// Gated cross-attention.
    pub gated: Gated,
    /// Stage 1.
    pub contrastive: Contrastive,
    /// Stage 2.
    pub language_training: LanguageTraining,
    /// Stage 3.
    pub flamingo: FlamingoTraining,
    /// Where the recipe lies; its paths are relative to it. No part of what the recipe says.
    #[serde(skip)]
    pub folder: PathBuf,
}

/// How long and how fast a stage learns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// How matrices that multiply are stepped; all other weights are AdamW's.
    #[serde(default)]
    pub optimiser: Method,
    /// Optimiser steps.
    pub steps: usize,
    /// Learning rate after the warm-up.
    pub learning_rate: f64,
    /// Steps over which the rate rises from 0.
    pub warmup: usize,
    /// Share of the steps before which the rate stays at the full one.
    #[serde(default)]
    pub hold: f64,
    /// The rate at the end as a share of the full one, reached along half a cosine; 1 keeps it constant.
    pub final_rate: f64,
    /// Weight decay.
    pub weight_decay: f32,
    /// Pieces a batch is cut into; they are computed side by side.
    pub pieces: usize,
}

/// Stage 1: pictures against captions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contrastive {
    /// Steps and rates.
    pub schedule: Schedule,
    /// Pictures of a step; each piece of the batch has its own negatives.
    pub batch: usize,
    /// Pictures that differ from each other in one fact, beside each other in a batch.
    pub variations: usize,
    /// Weight of the same loss on regions: an object's patches against its colour and kind.
    pub region_weight: f64,
    /// Begins as 1 / temperature; learned.
    pub start_scale: f32,
}

/// Stage 2: the language model on text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageTraining {
    /// Steps and rates.
    pub schedule: Schedule,
    /// Prompts of a step.
    pub batch: usize,
    /// Share of the prompts whose media are described in words.
    pub described: f64,
    /// Weight of words that are no answers; an answer weighs 1.
    pub other_words: f32,
    /// What prompts ask.
    pub tasks: Vec<TaskShare>,
}

/// Stage 3: resampler, gated blocks and `<eoc>`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlamingoTraining {
    /// Steps and rates.
    pub schedule: Schedule,
    /// Multiplies the learning rate of the gates.
    pub gate_rate: f64,
    /// Steps after which the next gated block begins to learn, from the lowest on; 0 lets all begin at once.
    #[serde(default)]
    pub steps_per_block: usize,
    /// Different paintings of the same facts.
    pub paintings: usize,
    /// True sums the gradients of all data sets in each step; false takes one data set a step, in turn.
    #[serde(default = "yes")]
    pub accumulate: bool,
    /// False lets a token see all media before it, for comparison.
    #[serde(default = "yes")]
    pub only_last_image: bool,
    /// The data sets.
    pub data: Vec<DataSet>,
}

fn yes() -> bool {
    true
}

/// One data set of stage 3: generated prompts of `tasks`, or samples of `shards`, one of the two.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSet {
    /// Its name in the metrics.
    pub name: String,
    /// λ: its weight in the loss.
    pub weight: f64,
    /// Prompts of a step.
    pub batch: usize,
    /// Shards and folders of them, relative to the recipe's folder; read in order, and round again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shards: Vec<PathBuf>,
    /// Probability that the words of a sample of pictures look at the next one, not the last one; drawn anew each
    /// time. 0 keeps φ of the shards, as pairs and generated scenes need. Without it, [`DataSet::SHIFT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shift: Option<f64>,
    /// What prompts ask.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<TaskShare>,
}

impl DataSet {
    /// `shift` of shards where the recipe does not say it: the paper's for interleaved pages.
    pub const SHIFT: f64 = 0.5;

    fn check(&self) -> Result<()> {
        ensure!(
            self.tasks.is_empty() != self.shards.is_empty(),
            "data set `{}`: expected one of `tasks` and `shards`, got {}",
            self.name,
            if self.tasks.is_empty() { "none" } else { "both" }
        );
        ensure!(
            self.shift.is_none() || !self.shards.is_empty(),
            "data set `{}`: `shift` is for `shards`, not for `tasks`",
            self.name
        );
        ensure!(
            self.shift.is_none_or(|shift| (0.0..=1.0).contains(&shift)),
            "data set `{}`: `shift`: expected a number from 0 to 1",
            self.name
        );
        Ok(())
    }
}

/// A task and how often it comes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskShare {
    /// `caption`, `attribute`, `count`, `pair`, `yes_no`, `video`, `which`, `few_shot`, `bind`, `uneven`,
    /// `alike`, `captions`, `questions`, `repeat`.
    pub task: String,
    /// How often, against the others.
    pub share: f64,
    /// Numbers of pictures (`which`) or examples (`few_shot` and what follows) to choose from.
    #[serde(default)]
    pub sizes: Vec<usize>,
}

impl TaskShare {
    fn task(&self, rng: &mut impl Rng) -> Result<Task> {
        let size = |rng: &mut dyn rand::RngCore| {
            ensure!(!self.sizes.is_empty(), "task `{}` needs `sizes`", self.task);
            Ok(self.sizes[rng.random_range(0..self.sizes.len())])
        };
        Ok(match self.task.as_str() {
            "caption" => Task::Caption,
            "attribute" => Task::Attribute,
            "count" => Task::Count,
            "pair" => Task::Pair,
            "yes_no" => Task::YesNo,
            "video" => Task::Video,
            "which" => Task::Which(size(rng)?),
            "few_shot" => Task::FewShot(size(rng)?),
            "bind" => Task::Bind(size(rng)?),
            "uneven" => Task::Uneven(size(rng)?),
            "alike" => Task::Alike(size(rng)?),
            "captions" => Task::Captions(size(rng)?),
            "questions" => Task::Questions(size(rng)?),
            "repeat" => Task::Repeat,
            other => bail!("unknown task `{other}`"),
        })
    }
}

/// A random task by the shares.
pub fn random_task(tasks: &[TaskShare], rng: &mut impl Rng) -> Result<Task> {
    let total: f64 = tasks.iter().map(|task| task.share).sum();
    let mut left = rng.random_range(0.0..total);
    for task in tasks {
        if left < task.share {
            return task.task(rng);
        }
        left -= task.share;
    }
    tasks.last().context("no tasks")?.task(rng)
}

impl Schedule {
    /// The learning rate of a step, counted from 0.
    pub fn rate(&self, step: usize) -> f64 {
        let warm = ((step + 1) as f64 / self.warmup.max(1) as f64).min(1.0);
        let held = self.hold * self.steps as f64;
        let done = (step as f64 - held).max(0.0) / (self.steps as f64 - held).max(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        self.learning_rate * warm * (self.final_rate + (1.0 - self.final_rate) * cosine)
    }

    /// How a weight is stepped: tables and what is no matrix by AdamW, small weights without decay.
    pub fn rule(&self, name: &str) -> Rule {
        let is_table = name.contains("tokens");
        let multiplies = name.ends_with("weight") && !is_small(name) && !is_table;
        Rule {
            method: if multiplies { self.optimiser } else { Method::AdamW },
            rate: 1.0,
            decay: if is_small(name) { 0.0 } else { self.weight_decay },
        }
    }
}

impl Recipe {
    /// Reads and checks a recipe.
    pub fn read(path: &Path) -> Result<Recipe> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read `{}`", path.display()))?;
        let mut recipe: Recipe =
            toml::from_str(&text).with_context(|| format!("in `{}`", path.display()))?;
        recipe.folder = path.parent().map(Path::to_owned).unwrap_or_default();
        recipe.check().with_context(|| format!("in `{}`", path.display()))?;
        Ok(recipe)
    }

    fn check(&self) -> Result<()> {
        use flamingo_scenes::draw;
        let (vision, language) = (&self.vision, &self.language);
        ensure!(
            vision.image_size == draw::SIDE,
            "`vision.image_size`: expected {}, the side of the scenes, got {}",
            draw::SIDE,
            vision.image_size
        );
        let divides = |name: &str, of: usize, by: usize| {
            ensure!(by > 0 && of.is_multiple_of(by), "`{name}`: {by} does not divide {of}");
            Ok(())
        };
        let schedules = [
            ("contrastive", &self.contrastive.schedule),
            ("language_training", &self.language_training.schedule),
            ("flamingo", &self.flamingo.schedule),
        ];
        for (stage, schedule) in schedules {
            let hold = schedule.hold;
            ensure!(
                (0.0..=1.0).contains(&hold),
                "`{stage}.schedule.hold`: expected a share from 0 to 1, got {hold}"
            );
        }
        divides("vision.patch_size", vision.image_size, vision.patch_size)?;
        divides("vision.heads", vision.width, vision.heads)?;
        divides("text.heads", self.text.width, self.text.heads)?;
        divides("language.heads", language.width, language.heads)?;
        ensure!(
            (1..=language.layers).contains(&self.gated.every),
            "`gated.every`: expected 1 to {}, the layers of the language model, got {}",
            language.layers,
            self.gated.every
        );
        divides("two halves of a head", language.width / language.heads, 2)?;
        ensure!(self.resampler.max_frames >= draw::FRAMES, "`resampler.max_frames`: too few");
        let data = &self.flamingo.data;
        ensure!(!data.is_empty(), "`flamingo.data`: at least one data set");
        data.iter().try_for_each(DataSet::check)?;
        ensure!(!self.language_training.tasks.is_empty(), "`language_training.tasks`: no tasks");
        let tasks = data.iter().map(|d| &d.tasks).chain([&self.language_training.tasks]);
        let mut rng = flamingo_scenes::random::stream(0, "check");
        for tasks in tasks {
            for task in tasks {
                ensure!(task.share > 0.0, "task `{}`: `share` must be positive", task.task);
                task.task(&mut rng)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wrong with the tiny recipe if its last data set says this.
    fn error(data: &str) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tiny.toml");
        let text = std::fs::read_to_string(path).unwrap();
        let (head, _) = text.rsplit_once("[[flamingo.data]]").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recipe.toml");
        let set = "[[flamingo.data]]\nname = \"pages\"\nweight = 1.0\nbatch = 2\n";
        std::fs::write(&path, format!("{head}{set}{data}")).unwrap();
        match Recipe::read(&path) {
            Ok(recipe) => {
                assert_eq!(recipe.folder, folder.path());
                String::new()
            }
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn a_rate_rises_stays_and_falls() {
        let schedule = Schedule {
            optimiser: Method::AdamW,
            steps: 100,
            learning_rate: 2.0,
            warmup: 10,
            hold: 0.5,
            final_rate: 0.1,
            weight_decay: 0.0,
            pieces: 1,
        };
        assert_eq!([0, 4, 9, 50].map(|step| schedule.rate(step)), [0.2, 1.0, 2.0, 2.0]);
        assert!((schedule.rate(75) - 1.1).abs() < 1e-9);
        assert!((schedule.rate(100) - 0.2).abs() < 1e-9);
    }

    #[test]
    fn a_data_set_has_tasks_or_shards() {
        let tasks = "tasks = [{ task = \"count\", share = 1.0 }]\n";
        let shards = "shards = [\"pages\", \"more/000001.tar\"]\n";
        assert_eq!(error(tasks), "");
        assert_eq!(error(shards), "");
        assert_eq!(error(&format!("{shards}shift = 0.0")), "");
        for (data, part) in [
            ("", "data set `pages`: expected one of `tasks` and `shards`, got none"),
            (&format!("{tasks}{shards}"), "got both"),
            (&format!("{tasks}shift = 0.5"), "`shift` is for `shards`"),
            (&format!("{shards}shift = 1.5"), "from 0 to 1"),
        ] {
            assert!(error(data).contains(part), "{data}: {}", error(data));
        }
    }
}
