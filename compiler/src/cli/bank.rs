//! `flamingoc bank build`, and the options of verbs that put examples of a bank before a prompt.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use flamingo_runtime::{Answer, Bank as Examples, BankReport, Model, PromptFile, Selection, Shots};
use serde_json::{Value, json};

use super::output::{Output, bytes, count_bar};
use super::{Opening, Outcome};

/// Read few-shot examples once, for any number of prompts
#[derive(Args)]
pub(super) struct Bank {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    Build(Build),
}

/// Read examples and keep what is known of them in a folder
#[derive(Args)]
#[command(after_help = "Examples:
  flamingoc bank build demo.flamingo examples.jsonl -o bank/
  flamingoc run demo.flamingo --bank bank/ --shots 8 --prompt \"<image>\" --image a.png

One example a line, in the segments of prompt files; paths are relative to the file:
  {\"segments\": [{\"image\": \"a.jpg\"}, {\"text\": \"Output: a cat.\"}, {\"end_of_chunk\": true}]}

A bank serves the artifact, instruction set and `--kv` that it was made with.")]
struct Build {
    /// The artifact
    artifact: PathBuf,
    /// The examples
    examples: PathBuf,
    /// The bank's folder, which must not exist
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Leave out lines that cannot be used, and say how many
    #[arg(long)]
    skip_bad: bool,
    #[command(flatten)]
    opening: Opening,
    /// Print what was written as JSON
    #[arg(long)]
    json: bool,
}

impl Bank {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        match self.action {
            Action::Build(build) => build.run(output),
        }
    }
}

impl Build {
    fn run(self, output: &mut Output) -> Result<Outcome> {
        let model = Model::open(&self.artifact, &self.opening.options())?;
        let bar = count_bar();
        bar.set_message("examples");
        let mut progress = |done: usize, total: usize| {
            bar.set_length(u64::try_from(total).unwrap_or(u64::MAX));
            bar.set_position(u64::try_from(done).unwrap_or(u64::MAX));
        };
        let report =
            Examples::build(&model, &self.examples, &self.output, self.skip_bad, &mut progress);
        bar.finish_and_clear();
        let report = report?;
        for problem in &report.skipped {
            output.note(&format!("left out: {problem}"));
        }
        match self.json {
            true => output.json(&self.to_json(&report))?,
            false => output.line(&self.to_text(&report))?,
        }
        Ok(Outcome::Ok)
    }

    fn to_text(&self, report: &BankReport) -> String {
        let BankReport { n_examples, n_media, n_prefix_examples, n_prefix_tokens, .. } = report;
        let skipped = match report.skipped.len() {
            0 => String::new(),
            n => format!(", {n} lines left out"),
        };
        format!(
            "{}: {n_examples} examples with {n_media} pictures and videos, {}{skipped}\n\
             keys and values of {n_prefix_tokens} tokens of the first {n_prefix_examples} examples",
            self.output.display(),
            bytes(report.bytes)
        )
    }

    fn to_json(&self, report: &BankReport) -> Value {
        json!({
            "bank": self.output.display().to_string(),
            "examples": report.n_examples,
            "skipped": report.skipped,
            "media": report.n_media,
            "prefix_examples": report.n_prefix_examples,
            "prefix_tokens": report.n_prefix_tokens,
            "bytes": report.bytes,
        })
    }
}

/// Options of verbs that put examples of a bank before a prompt.
#[derive(Args, Clone)]
pub(super) struct Shooting {
    /// Put examples of this bank before the prompt
    #[arg(long, value_name = "DIR")]
    bank: Option<PathBuf>,
    /// How many examples [default: all]
    #[arg(long, value_name = "N", requires = "bank")]
    shots: Option<usize>,
    /// Which: the first, any (`--seed`), or those with pictures most like the prompt's
    #[arg(long, value_name = "HOW", default_value = "fixed", requires = "bank",
          value_parser = ["fixed", "random", "rices"])]
    select: String,
    /// Leave out the examples' pictures and keep their text
    #[arg(long, requires = "bank")]
    text_only: bool,
}

impl Shooting {
    /// The examples that stand before a prompt.
    pub(super) fn shots(
        &self,
        model: &Model,
        prompt: &PromptFile,
        seed: u64,
        verify: bool,
    ) -> Result<Shots> {
        let orders = self.orders(model, prompt, seed, 1, verify)?;
        Ok(orders.into_iter().next().unwrap_or_default())
    }

    /// The same examples in up to `n` orders.
    pub(super) fn orders(
        &self,
        model: &Model,
        prompt: &PromptFile,
        seed: u64,
        n: usize,
        verify: bool,
    ) -> Result<Vec<Shots>> {
        let Some(dir) = &self.bank else { return Ok(vec![Shots::default()]) };
        let bank = Examples::open(dir, model)?;
        if verify {
            bank.verify()?;
        }
        let selection = match self.select.as_str() {
            "random" => Selection::Random { seed },
            "rices" => Selection::Rices,
            _ => Selection::Fixed,
        };
        let shots = bank.choose(self.shots.unwrap_or(bank.len()), selection, prompt)?;
        let orders = bank.permutations(&shots, n, seed)?;
        let shown = |shots: Shots| if self.text_only { shots.text_only() } else { shots };
        Ok(orders.into_iter().map(shown).collect())
    }

    /// Whether there is a bank.
    pub(super) fn is_on(&self) -> bool {
        self.bank.is_some()
    }

    /// The answer for machines, with the examples that were chosen if there is a bank.
    pub(super) fn to_json(&self, answer: &Answer, shots: &Shots) -> Value {
        let mut value = answer.to_json();
        if let Some(object) = value.as_object_mut().filter(|_| self.bank.is_some()) {
            let examples = shots.numbers();
            object.insert("bank".into(), json!({"shots": examples.len(), "examples": examples}));
        }
        value
    }
}
