//! CIDEr-D (Vedantam et al. 2015): likeness of runs of words, weighted by how rare they are among all references.

use std::collections::{BTreeMap, BTreeSet};

use super::TokenisedCaption;
use super::bleu::counts;

/// Longest run of words.
const MAX_N: usize = 4;
/// Spread of the penalty for a difference in length.
const SIGMA: f64 = 6.0;

/// CIDEr-D of each caption; their mean is that of the corpus.
pub(super) fn cider(captions: &[TokenisedCaption]) -> Vec<f64> {
    let frequencies = Frequencies::of(captions);
    let of = |(caption, references): &TokenisedCaption| {
        let own = frequencies.vectors(caption);
        let sum: f64 =
            references.iter().map(|words| likeness(&own, &frequencies.vectors(words))).sum();
        10.0 * sum / references.len().max(1) as f64
    };
    captions.iter().map(of).collect()
}

/// In how many captions' references each run stands.
struct Frequencies<'a> {
    of: BTreeMap<&'a [String], usize>,
    /// Logarithm of the number of captions.
    log_n: f64,
}

/// A text as vectors: for each length of runs their weights, and the vector's length.
struct Vectors<'a> {
    weights: [BTreeMap<&'a [String], f64>; MAX_N],
    norms: [f64; MAX_N],
    /// Runs of two words, which the reference implementation takes for the length.
    len: usize,
}

impl<'a> Frequencies<'a> {
    fn of(captions: &'a [TokenisedCaption]) -> Frequencies<'a> {
        let mut of = BTreeMap::new();
        for (_, references) in captions {
            let runs: BTreeSet<&[String]> = references
                .iter()
                .flat_map(|words| (1..=MAX_N).flat_map(|n| words.windows(n)))
                .collect();
            runs.into_iter().for_each(|run| *of.entry(run).or_insert(0) += 1);
        }
        Frequencies { of, log_n: (captions.len().max(1) as f64).ln() }
    }

    fn vectors<'b>(&self, words: &'b [String]) -> Vectors<'b> {
        let weight = |(run, count): (&'b [String], usize)| {
            let frequency = self.of.get(run).copied().unwrap_or(0).max(1) as f64;
            (run, count as f64 * (self.log_n - frequency.ln()))
        };
        let weights: [BTreeMap<&'b [String], f64>; MAX_N] =
            std::array::from_fn(|n| counts(words, n + 1).into_iter().map(weight).collect());
        let norm = |of: &BTreeMap<&[String], f64>| of.values().map(|w| w * w).sum::<f64>().sqrt();
        let norms = std::array::from_fn(|n| norm(&weights[n]));
        Vectors { weights, norms, len: words.len().saturating_sub(1) }
    }
}

/// Likeness of a caption to a reference: mean over lengths of runs of the clipped cosine, less for another length.
fn likeness(caption: &Vectors<'_>, reference: &Vectors<'_>) -> f64 {
    let delta = caption.len as f64 - reference.len as f64;
    let penalty = (-delta * delta / (2.0 * SIGMA * SIGMA)).exp();
    let cosine = |n: usize| {
        let (norm, other) = (caption.norms[n], reference.norms[n]);
        let shared = |(run, weight): (&&[String], &f64)| {
            let other = reference.weights[n].get(run).copied().unwrap_or(0.0);
            weight.min(other) * other
        };
        let product: f64 = caption.weights[n].iter().map(shared).sum();
        if norm > 0.0 && other > 0.0 { product / (norm * other) } else { product }
    };
    (0..MAX_N).map(cosine).sum::<f64>() * penalty / MAX_N as f64
}
