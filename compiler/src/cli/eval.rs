//! `flamingoc eval`.

mod compare;
mod in_context;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};

use super::output::{Output, count_bar};
use super::{Caching, Opening, Outcome};
use crate::eval::{EvalOptions, Score, SplitName, eval, tasks, words};

/// Measure how often a model answers right
///
/// With `--task` in-context learning: examples of a data set stand before each question, and answers
/// are generated, or chosen among candidates by their likelihood. Without, the demo's own prompts:
/// generated pictures of coloured shapes and handwritten digits that no training saw; the model must
/// know their words, as those of `flamingo-train` do.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = "Examples:
  flamingoc eval demo.flamingo
  flamingoc eval demo.flamingo --tasks few_shot,bind --shots 0,2,4,8 --n 1000 --json
  flamingoc eval demo.flamingo --tasks attribute --split unseen
  flamingoc eval demo.flamingo --task scenes-bind,digits --shots 0,2,4,8 --select rices
  flamingoc eval of-3b.flamingo --task vqa.toml --shots 0,4,8 --journal vqa.jsonl --report vqa.html
  flamingoc eval of-3b.flamingo --task vqa.toml --json --items > f16.json   # and of int8, then
  flamingoc eval compare f16.json int8.json
  flamingoc eval demo.flamingo --task scenes-bind --shots 8 --n 1000 --measure-sharing

The demo's own answers are right if all of their words are, generated greedily. Intervals are
Wilson's of right and wrong answers, else a bootstrap's over questions, 95 %.

A task file, with paths relative to it:
  metric = \"vqa\"              # exact, vqa, cider, bleu; of candidates: accuracy, roc_auc
  prompt = { form = \"vqa\" }   # caption, vqa, classify, hateful_memes, dialogue; paper = true;
                              # or query = \"<image>Question:{question} Short answer:\",
                              # answer = \"{answer}\", joiner = \"\\n\", preamble, turn
  support = { file = \"train.jsonl\", images = \"train/\" }   # examples
  queries = { file = \"test.jsonl\", images = \"test/\" }     # questions
  candidates = [\"yes\", \"no\"]; positive = \"yes\"; per_token = true; max_new_tokens = 5; beams = 3
  postprocess = \"vqa\"         # caption, vqa, ok_vqa (stems)
  text_examples = 2; support_size = 2048

Data: lines of JSON (\"image\", \"images\", \"video\" or \"frames\"; \"answer\" or \"answers\";
\"candidates\"; other fields for the template), captions of COCO (.json), VQAv2 (.json with
`annotations` and `image_name`), WebDataset shards (.tar). Bad rows are counted and left out.")]
pub(super) struct Eval {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    asking: Asking,
}

#[derive(Subcommand)]
enum Verb {
    Compare(compare::Compare),
}

#[derive(Args)]
struct Asking {
    /// The artifact
    #[arg(required = true)]
    artifact: Option<PathBuf>,
    /// Tasks of the demo, or `demo` for all
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "demo")]
    tasks: Vec<String>,
    /// Examples before the question, for few_shot, bind and `--task` [default: 0,2,4,8,16,32; with
    /// `--task` 0,4,8,16,32]
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    shots: Vec<usize>,
    /// train, test (digits kept from training) or unseen (pairs of colour and kind, too)
    #[arg(long, default_value = "test")]
    split: SplitName,
    /// Prompts of each task, at most
    #[arg(long, value_name = "N", default_value = "500", value_parser = clap::value_parser!(u32).range(1..))]
    n: u32,
    /// Seed of prompts, pictures, examples and their orders
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    /// Set all visual tokens to 0: what can be known without eyes
    #[arg(long)]
    blind: bool,
    /// Write pictures, prompts, right and given answers to this folder
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    #[command(flatten)]
    in_context: in_context::InContext,
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
        match &self.verb {
            Some(Verb::Compare(compare)) => compare.run(output),
            None => self.asking.run(output),
        }
    }
}

impl Asking {
    fn artifact(&self) -> Result<&Path> {
        self.artifact
            .as_deref()
            .context("expected an artifact\n\nhint: see `flamingoc eval --help`")
    }

    fn run(self, output: &mut Output) -> Result<Outcome> {
        if self.in_context.is_on() {
            return self.in_context(output);
        }
        let options = EvalOptions {
            tasks: tasks(&self.tasks, &self.shots)?,
            split: self.split.0,
            n: usize::try_from(self.n)?,
            seed: self.seed,
            blind: self.blind,
        };
        let model = self.caching.open(self.artifact()?, &self.opening)?;
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
