//! `flamingoc eval`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;

use super::output::{Output, count_bar};
use super::{Caching, Opening, Outcome};
use crate::eval::{EvalOptions, Score, SplitName, eval, tasks, words};

/// Measure how often a model answers right
///
/// The tasks are those of the demo: generated pictures of coloured shapes and handwritten digits that
/// no training saw, with questions, captions, short videos and few-shot prompts. The model must know
/// their words, as those of `flamingo-train` do.
#[derive(Args)]
#[command(after_help = "Examples:
  flamingoc eval demo.flamingo
  flamingoc eval demo.flamingo --tasks few_shot,bind --shots 0,2,4,8 --n 1000 --json
  flamingoc eval demo.flamingo --tasks attribute --split unseen

An answer is right if all of its words are, generated greedily. Intervals are Wilson's, 95 %.")]
pub(super) struct Eval {
    /// The artifact
    artifact: PathBuf,
    /// Tasks, or `demo` for all
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "demo")]
    tasks: Vec<String>,
    /// Examples before the question, for few_shot and bind [default: 0,2,4,8,16,32]
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    shots: Vec<usize>,
    /// train, test (digits kept from training) or unseen (pairs of colour and kind, too)
    #[arg(long, default_value = "test")]
    split: SplitName,
    /// Prompts of each task
    #[arg(long, value_name = "N", default_value = "500", value_parser = clap::value_parser!(u32).range(1..))]
    n: u32,
    /// Seed of prompts and pictures
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    /// Set all visual tokens to 0: what can be known without eyes
    #[arg(long)]
    blind: bool,
    /// Write pictures, prompts, right and given answers to this folder
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    caching: Caching,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

impl Eval {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        let options = EvalOptions {
            tasks: tasks(&self.tasks, &self.shots)?,
            split: self.split.0,
            n: usize::try_from(self.n)?,
            seed: self.seed,
            blind: self.blind,
        };
        let model = self.caching.open(&self.artifact, &self.opening)?;
        let bar = count_bar();
        bar.set_length((options.n * options.tasks.len()) as u64);
        let mut lines = String::new();
        let scores = eval(&model, &options, &mut |question, answer| {
            bar.set_message(question.task.name());
            bar.inc(1);
            if let Some(folder) = &self.save {
                let mut line = question.save(folder)?;
                line["given"] = words(answer).into();
                lines.push_str(&format!("{line}\n"));
            }
            Ok(())
        })?;
        bar.finish_and_clear();
        if let Some(folder) = &self.save {
            let path = folder.join("prompts.jsonl");
            fs::write(&path, lines)
                .with_context(|| format!("cannot write `{}`", path.display()))?;
            output.note(&format!("wrote {}", path.display()));
        }
        if self.json {
            let split = self.split.to_string();
            output.json(
                &serde_json::json!({ "split": split, "blind": self.blind, "results": scores }),
            )?;
            return Ok(Outcome::Ok);
        }
        table(output, &scores)?;
        Ok(Outcome::Ok)
    }
}

/// Scores for people.
pub(super) fn table(output: &mut Output, scores: &[Score]) -> Result<()> {
    let percent = |share: f64| format!("{:.1}", 100.0 * share);
    let row = |score: &Score| {
        let interval = format!("{} – {}", percent(score.low), percent(score.high));
        let (shots, n) = (score.shots.to_string(), score.n.to_string());
        vec![score.task.clone(), shots, n, percent(score.score), interval]
    };
    let rows: Vec<_> = scores.iter().map(row).collect();
    output.table(&["task", "shots", "n", "right %", "95 % interval"], &rows)
}
