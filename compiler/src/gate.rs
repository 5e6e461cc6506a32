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
}

/// Layers that a refusal names.
const N_NAMED: usize = 5;

/// The answers did not survive.
#[derive(Debug, Clone, Serialize, thiserror::Error)]
pub struct Refused {
    /// What rounding did.
    pub verdict: Verdict,
    /// Largest mean KL that was allowed.
    pub max_kl: f64,
    /// All rounded layers, those that lost most first.
    pub worst: Vec<LayerStorage>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verdict { mean_kl, n_tokens, n_examples, top1_agreement, .. } = self.verdict;
        writeln!(
            f,
            "the answers changed: mean KL {mean_kl:.1e} of next tokens from f32, of at most {:.1e}; the same best token \
             in {:.1} % of {n_tokens} ({n_examples} prompts). No artifact was written. The layers that lost most:",
            self.max_kl,
            100.0 * top1_agreement
        )?;
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

/// Ratio of the largest to the median column from which inputs have outliers.
pub const OUTLIERS: f64 = 20.0;

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
        let (expected_tokens, expected) = example.run(original)?;
        let (found_tokens, found) = example.run(rounded)?;
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
    fn numbers_are_those_of_closed_forms() {
        assert!((log_probability(&[0.0, 3.0f32.ln()], 1) - 0.75f64.ln()).abs() < 1e-7);
        assert!((cosine(&[1.0, 0.0], &[1.0, 1.0]) - 0.5f64.sqrt()).abs() < 1e-12);
        assert_eq!(cosine(&[0.0], &[0.0]), 1.0);
    }
}
