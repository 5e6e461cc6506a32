//! The gate: an artifact of rounded weights against the same model in f32, on prompts that it was not calibrated on.

use std::fmt;

use anyhow::{Result, ensure};
use flamingo_runtime::Model;
use flamingo_runtime::argmax;
use serde::{Deserialize, Serialize};

use crate::calibrate::Example;
use crate::emit::LayerStorage;
use crate::parity::kl_divergence;

/// What rounding did to the answers; next-token distributions are teacher-forced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Prompts compared.
    pub n_examples: usize,
    /// Tokens compared.
    pub n_tokens: usize,
    /// Mean of KL(f32 ‖ rounded), in nats.
    pub mean_kl: f64,
    /// Its quantile of 99 %.
    pub p99_kl: f64,
    /// Share of tokens whose most likely successor is the same.
    pub top1_agreement: f64,
    /// Smallest cosine between the visual tokens of a prompt; 1 without media.
    pub visual_cosine: f64,
    /// Perplexity of the prompts in f32, from the second token on.
    pub perplexity_f32: f64,
    /// The same of the rounded model.
    pub perplexity: f64,
    /// How often tasks are answered right; empty if that was not asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<TaskScore>,
}

/// Share of right answers of one task, in f32 and rounded, on the same prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    /// The task.
    pub task: String,
    /// Examples before the question.
    pub shots: usize,
    /// Prompts.
    pub n: usize,
    /// Of the original.
    pub f32: f64,
    /// Of the rounded model.
    pub rounded: f64,
}

impl TaskScore {
    /// Points in a hundred that were lost.
    pub fn lost(&self) -> f64 {
        100.0 * (self.f32 - self.rounded)
    }
}

/// What rounded weights must keep.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bounds {
    /// Largest mean KL.
    pub max_kl: f64,
    /// Largest loss of a task, in points of a hundred.
    pub max_lost: f64,
}

impl Verdict {
    /// Whether the answers survived. NaN does not.
    pub fn keeps(&self, bounds: &Bounds) -> bool {
        // A hundredth of a point is below one answer of any number of prompts that anybody runs.
        let is_kept = |task: &TaskScore| task.lost() <= bounds.max_lost + 0.01;
        self.mean_kl <= bounds.max_kl && self.tasks.iter().all(is_kept)
    }
}

/// Layers that a refusal names.
const N_NAMED: usize = 5;

/// The answers did not survive.
#[derive(Debug, Clone, Serialize, thiserror::Error)]
pub struct Refused {
    /// What rounding did.
    pub verdict: Verdict,
    /// What it should have kept.
    pub bounds: Bounds,
    /// All rounded layers, those that lost most first.
    pub worst: Vec<LayerStorage>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verdict { mean_kl, n_tokens, n_examples, top1_agreement, .. } = self.verdict;
        writeln!(
            f,
            "the answers changed: mean KL {mean_kl:.1e} of next tokens from f32, of at most {:.1e}; the same best token \
             in {:.1} % of {n_tokens} ({n_examples} prompts). No artifact was written.",
            self.bounds.max_kl,
            100.0 * top1_agreement
        )?;
        for task in self.verdict.tasks.iter().filter(|task| task.lost() > self.bounds.max_lost) {
            let (name, shots, n) = (&task.task, task.shots, task.n);
            let (f32, rounded) = (100.0 * task.f32, 100.0 * task.rounded);
            writeln!(
                f,
                "  {name}, {shots} shots: {f32:.1} % to {rounded:.1} % of {n}, at most {} points",
                self.bounds.max_lost
            )?;
        }
        writeln!(f, "The layers that lost most:")?;
        for layer in self.worst.iter().take(N_NAMED) {
            let db = layer.output_sqnr_db.or(layer.sqnr_db).unwrap_or(f64::INFINITY);
            write!(f, "  {}  {}  signal to noise {db:.1} dB", layer.name, layer.scheme)?;
            match layer.outlier_ratio.filter(|ratio| *ratio > OUTLIERS) {
                Some(ratio) => writeln!(f, ", inputs with a column {ratio:.0} times the median")?,
                None => writeln!(f)?,
            }
        }
        let op = self.worst.first().map_or("NAME", LayerStorage::op);
        write!(
            f,
            "\nhint: pass `--auto-mixed` to store the worst layers finer, `--layer {op}=f32` to choose yourself, or \
             `--max-kl` to allow more"
        )
    }
}

/// Ratio of the largest to the median column from which inputs have outliers: LLM.int8() (section 4) counts magnitudes
/// from 6 on, where most are below 1.
pub const OUTLIERS: f64 = 6.0;

/// Rounded layers, those that lost most of their products first.
pub fn worst_first(layers: &[LayerStorage]) -> Vec<LayerStorage> {
    let mut rounded: Vec<LayerStorage> =
        layers.iter().filter(|layer| layer.noise() > 0.0).cloned().collect();
    rounded.sort_by(|a, b| b.noise().total_cmp(&a.noise()));
    rounded
}

/// Compares a rounded model with its f32 original; tells each prompt before it begins.
///
/// # Errors
/// Models of different shapes, or a prompt that does not fit them.
pub fn judge(
    rounded: &Model,
    original: &Model,
    examples: &[Example],
    on_example: &mut dyn FnMut(usize),
) -> Result<Verdict> {
    let vocabulary = original.manifest().config.language.vocabulary;
    let (mut kl, mut equal, mut visual_cosine) = (Vec::new(), 0, 1.0f64);
    let mut losses = [0.0f64; 2];
    let mut n_predicted = 0;
    for (index, example) in examples.iter().enumerate() {
        on_example(index);
        // One model at a time is in memory.
        let (expected_tokens, expected) = example.run(original)?;
        original.backend().release_weights();
        let (found_tokens, found) = example.run(rounded)?;
        rounded.backend().release_weights();
        ensure!(
            found.len() == expected.len() && found_tokens.len() == expected_tokens.len(),
            "the rounded model gives outputs of other sizes than the original"
        );
        if !expected_tokens.is_empty() {
            visual_cosine = visual_cosine.min(cosine(&found_tokens, &expected_tokens));
        }
        let rows = found.chunks(vocabulary).zip(expected.chunks(vocabulary));
        for (position, (found, expected)) in rows.enumerate() {
            kl.push(kl_divergence(found, expected));
            equal += usize::from(argmax(found) == argmax(expected));
            if let Some(next) = example.input_ids.get(position + 1) {
                n_predicted += 1;
                for (loss, logits) in losses.iter_mut().zip([expected, found]) {
                    *loss -= log_probability(logits, *next as usize);
                }
            }
        }
    }
    let n_tokens = kl.len();
    ensure!(n_tokens > 0, "no prompts to judge by");
    kl.sort_by(f64::total_cmp);
    let [perplexity_f32, perplexity] = losses.map(|loss| (loss / n_predicted.max(1) as f64).exp());
    Ok(Verdict {
        n_examples: examples.len(),
        n_tokens,
        mean_kl: kl.iter().sum::<f64>() / n_tokens as f64,
        p99_kl: kl[(n_tokens - 1) * 99 / 100],
        top1_agreement: equal as f64 / n_tokens as f64,
        visual_cosine,
        perplexity_f32,
        perplexity,
        tasks: Vec::new(),
    })
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 1.0 }
}

fn log_probability(logits: &[f32], token: usize) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    logits.get(token).map_or(f64::NAN, |logit| f64::from(logit - max) - sum.ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_keeps_what_its_bounds_ask() {
        let task =
            |rounded| TaskScore { task: "count".into(), shots: 0, n: 200, f32: 0.9, rounded };
        let verdict = |mean_kl, rounded| Verdict {
            n_examples: 1,
            n_tokens: 1,
            mean_kl,
            p99_kl: 0.0,
            top1_agreement: 1.0,
            visual_cosine: 1.0,
            perplexity_f32: 1.0,
            perplexity: 1.0,
            tasks: vec![task(rounded)],
        };
        let bounds = Bounds { max_kl: 0.01, max_lost: 0.5 };
        assert!(verdict(0.01, 0.895).keeps(&bounds));
        assert!(!verdict(0.011, 0.9).keeps(&bounds));
        assert!(!verdict(f64::NAN, 0.9).keeps(&bounds));
        assert!(!verdict(0.0, 0.89).keeps(&bounds));
        let refused = Refused { verdict: verdict(0.0, 0.89), bounds, worst: Vec::new() };
        assert!(
            refused.to_string().contains("count, 0 shots: 90.0 % to 89.0 % of 200"),
            "{refused}"
        );
    }

    #[test]
    fn numbers_are_those_of_closed_forms() {
        assert!((log_probability(&[0.0, 3.0f32.ln()], 1) - 0.75f64.ln()).abs() < 1e-7);
        assert!((cosine(&[1.0, 0.0], &[1.0, 1.0]) - 0.5f64.sqrt()).abs() < 1e-12);
        assert_eq!(cosine(&[0.0], &[0.0]), 1.0);
    }
}
