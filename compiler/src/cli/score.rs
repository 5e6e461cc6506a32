//! `flamingoc score`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use flamingo_runtime::{Limits, Score as Likelihood, Shots};

use super::bank::Shooting;
use super::output::Output;
use super::prompt::PromptArgs;
use super::{Caching, Opening, Outcome};

/// Compare how likely continuations of a prompt are: closed-ended questions
#[derive(Args)]
#[command(after_help = "Examples:
  flamingoc score demo.flamingo --prompt \"<image>what color ?\" --image a.png \\
    --candidate red --candidate blue
  flamingoc score demo.flamingo --bank bank/ --shots 8 --permutations 6 --prompt \"<image>\" \
    --image a.png --candidates labels.txt
  flamingoc score demo.flamingo --prompt-file p.json --candidates labels.txt --per-token --json

The prompt is read once, the candidates in common passes over the weights. A candidate's tokens are
those of its text on its own: begin it with a space where the model expects one.")]
pub(super) struct Score {
    /// The artifact
    artifact: PathBuf,
    #[command(flatten)]
    prompt: PromptArgs,
    /// A continuation; repeat it for more
    #[arg(long, value_name = "TEXT")]
    candidate: Vec<String>,
    /// A file with a continuation on each line
    #[arg(long, value_name = "FILE")]
    candidates: Option<PathBuf>,
    /// Rank by the mean log-likelihood of a token, not by the sum
    #[arg(long)]
    per_token: bool,
    #[command(flatten)]
    shooting: Shooting,
    /// With a bank: average over up to N orders of the examples
    #[arg(long, value_name = "N", default_value = "1", requires = "bank")]
    permutations: NonZeroUsize,
    /// Seed of `--select random` and of the orders
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    caching: Caching,
    /// Print as JSON, in the order given
    #[arg(long)]
    json: bool,
}

impl Score {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        let prompt = self.prompt.read()?;
        let candidates = self.all_candidates()?;
        let model = self.caching.open(&self.artifact, &self.opening)?;
        let (prompt, _) = self.prompt.in_form(prompt, &model);
        let verify = self.opening.engine.verify;
        let n_orders = self.permutations.get();
        let orders = self.shooting.orders(&model, &prompt, self.seed, n_orders, verify)?;
        let scores = model.score_after(&orders, &prompt, &candidates, &Limits::default())?;
        output.warnings(&model);
        let key = |score: &Likelihood| match self.per_token {
            true => score.per_token(),
            false => score.log_likelihood,
        };
        let shares = softmax(&scores.iter().map(key).collect::<Vec<f64>>());
        let mut ranking: Vec<usize> = (0..scores.len()).collect();
        ranking.sort_by(|a, b| key(&scores[*b]).total_cmp(&key(&scores[*a])).then(a.cmp(b)));
        if self.json {
            let row = |((text, score), share): ((&String, &Likelihood), &f64)| {
                serde_json::json!({
                    "text": text,
                    "log_likelihood": score.log_likelihood,
                    "n_tokens": score.n_tokens,
                    "per_token": score.per_token(),
                    "share": share,
                })
            };
            let rows: Vec<_> = candidates.iter().zip(&scores).zip(&shares).map(row).collect();
            let mut value = serde_json::json!({ "best": ranking[0], "candidates": rows });
            if self.shooting.is_on() {
                let numbers: Vec<&[usize]> = orders.iter().map(Shots::numbers).collect();
                value["bank"] = serde_json::json!({ "orders": numbers });
            }
            output.json(&value)?;
            return Ok(Outcome::Ok);
        }
        let row = |index: usize| {
            let score = &scores[index];
            vec![
                candidates[index].clone(),
                format!("{:.3}", score.log_likelihood),
                score.n_tokens.to_string(),
                format!("{:.3}", score.per_token()),
                format!("{:.1}", 100.0 * shares[index]),
            ]
        };
        let header = ["candidate", "log-likelihood", "tokens", "per token", "share %"];
        output.table(&header, &ranking.into_iter().map(row).collect::<Vec<_>>())?;
        Ok(Outcome::Ok)
    }

    fn all_candidates(&self) -> Result<Vec<String>> {
        let mut candidates = self.candidate.clone();
        if let Some(path) = &self.candidates {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("{}: cannot be read", path.display()))?;
            candidates.extend(text.lines().filter(|line| !line.is_empty()).map(str::to_owned));
        }
        if candidates.is_empty() {
            bail!("no candidates\n\nhint: pass `--candidate TEXT` or `--candidates FILE`")
        }
        Ok(candidates)
    }
}

/// Shares of all, from log-likelihoods.
fn softmax(logs: &[f64]) -> Vec<f64> {
    let max = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logs.iter().map(|log| (log - max).exp()).sum();
    logs.iter().map(|log| (log - max).exp() / total).collect()
}
