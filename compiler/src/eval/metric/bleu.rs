//! BLEU (Papineni et al. 2002), of a corpus: what n-grams of all captions share with their references.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Longest run of words that is counted.
const MAX_N: usize = 4;

/// What one caption adds to a corpus, or what a corpus has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BleuCounts {
    /// Words of captions.
    pub len: usize,
    /// Words of the references nearest in length.
    pub reference_len: usize,
    /// Runs of 1, 2, 3 and 4 words.
    pub runs: [usize; MAX_N],
    /// Those of them that a reference has.
    pub shared: [usize; MAX_N],
}

impl BleuCounts {
    /// Counts of one caption. A run counts at most as often as in the reference that has it most often.
    pub fn of(caption: &[String], references: &[Vec<String>]) -> BleuCounts {
        let (mut runs, mut shared) = ([0; MAX_N], [0; MAX_N]);
        for n in 1..=MAX_N {
            runs[n - 1] = (caption.len() + 1).saturating_sub(n);
            let of_references: Vec<_> = references.iter().map(|words| counts(words, n)).collect();
            for (run, count) in counts(caption, n) {
                let most = of_references.iter().filter_map(|own| own.get(run)).max();
                shared[n - 1] += count.min(most.copied().unwrap_or(0));
            }
        }
        let lens = references.iter().map(Vec::len);
        let nearest = lens.min_by_key(|len| (len.abs_diff(caption.len()), *len));
        BleuCounts { len: caption.len(), reference_len: nearest.unwrap_or(0), runs, shared }
    }

    /// Adds those of another caption.
    pub fn add(&mut self, other: &BleuCounts) {
        self.len += other.len;
        self.reference_len += other.reference_len;
        for n in 0..MAX_N {
            self.runs[n] += other.runs[n];
            self.shared[n] += other.shared[n];
        }
    }

    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.reference_len == 0 && self.len == 0
    }

    /// BLEU of runs up to `n` words: the geometric mean of the shared parts, times e^(1 − r/c) for captions that are too
    /// short. 0 where nothing is shared.
    pub fn bleu(&self, n: usize) -> f64 {
        let n = n.clamp(1, MAX_N);
        let parts = self.shared.iter().zip(&self.runs).take(n);
        let product: f64 =
            parts.map(|(shared, runs)| *shared as f64 / (*runs).max(1) as f64).product();
        let shortness = 1.0 - self.reference_len as f64 / self.len.max(1) as f64;
        product.powf(1.0 / n as f64) * shortness.min(0.0).exp()
    }
}

/// How often a text has each run of `n` words.
pub(super) fn counts(words: &[String], n: usize) -> BTreeMap<&[String], usize> {
    let mut counts = BTreeMap::new();
    words.windows(n).for_each(|run| *counts.entry(run).or_insert(0) += 1);
    counts
}
