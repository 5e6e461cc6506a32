//! Choosing the next token from logits.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Only the k most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability.
    pub top_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred (CTRL, §4.1).
    pub repetition_penalty: f32,
    /// No run of so many tokens occurs twice, prompt included; 0 for no such rule.
    pub no_repeat_ngram: usize,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> SamplingOptions {
        SamplingOptions {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            no_repeat_ngram: 0,
            seed: 0,
        }
    }
}

/// A random choice of tokens; the same seed and logits give the same tokens.
pub struct Sampler {
    options: SamplingOptions,
    random: ChaCha8Rng,
    /// Tokens with probabilities, kept between calls.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// Begins with the options' seed.
    pub fn new(options: SamplingOptions) -> Sampler {
        let random = ChaCha8Rng::seed_from_u64(options.seed);
        Sampler { options, random, candidates: Vec::new() }
    }

    /// The next token. `logits` is changed: tokens in `forbidden` are never chosen, nor those that
    /// repeat a run of `history`, whose tokens are penalised. Of equal logits the lowest id wins. NaN is never chosen.
    pub fn choose(&mut self, logits: &mut [f32], forbidden: &[u32], history: &[u32]) -> u32 {
        self.penalise(logits, history);
        let repeated = repeated(history, self.options.no_repeat_ngram);
        for id in forbidden.iter().chain(&repeated) {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        match self.options.temperature > 0.0 {
            true => self.sample(logits),
            false => argmax(logits),
        }
    }

    fn penalise(&self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.options.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut seen = history.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    fn sample(&mut self, logits: &[f32]) -> u32 {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| ((logit - max) / self.options.temperature).exp();
        self.candidates.clear();
        let ids = (0u32..).zip(logits).filter(|(_, logit)| **logit > f32::NEG_INFINITY);
        self.candidates.extend(ids.map(|(id, logit)| (id, weight(*logit))));
        self.candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if self.options.top_k > 0 {
            self.candidates.truncate(self.options.top_k);
        }
        let total: f32 = self.candidates.iter().map(|(_, weight)| weight).sum();
        let mut kept = 0.0;
        let mut n_kept = 0;
        for (_, weight) in &self.candidates {
            n_kept += 1;
            kept += weight;
            if kept >= self.options.top_p * total {
                break;
            }
        }
        let mut point = self.random.random::<f32>() * kept;
        for (id, weight) in &self.candidates[..n_kept] {
            point -= weight;
            if point <= 0.0 {
                return *id;
            }
        }
        self.candidates.first().map_or_else(|| argmax(logits), |(id, _)| *id)
    }
}

/// The index of the largest value; the first of equals; NaN never.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0u32, f32::NEG_INFINITY);
    for (id, logit) in (0u32..).zip(logits) {
        if *logit > best.1 {
            best = (id, *logit);
        }
    }
    best.0
}

/// Tokens that would make a run of `n` tokens occur a second time.
pub(crate) fn repeated(history: &[u32], n: usize) -> Vec<u32> {
    if n == 0 || history.len() < n {
        return Vec::new();
    }
    let end = &history[history.len() + 1 - n..];
    history.windows(n).filter(|run| run[..n - 1] == *end).map(|run| run[n - 1]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_the_best_that_is_allowed() {
        let mut sampler = Sampler::new(SamplingOptions::default());
        assert_eq!(sampler.choose(&mut [1.0, 3.0, 3.0], &[], &[]), 1);
        assert_eq!(sampler.choose(&mut [1.0, 3.0, f32::NAN], &[1], &[]), 0);
    }

    #[test]
    fn top_k_and_top_p_leave_the_likely_ones() {
        let counts = |options: SamplingOptions| {
            let mut sampler = Sampler::new(options);
            let mut counts = [0; 4];
            for _ in 0..2000 {
                counts[sampler.choose(&mut [2.0, 1.0, 0.0, -20.0], &[], &[]) as usize] += 1;
            }
            counts
        };
        let plain = SamplingOptions { temperature: 1.0, ..SamplingOptions::default() };
        let all = counts(plain.clone());
        // softmax of (2, 1, 0) is (0.665, 0.245, 0.090).
        assert!((1230..1430).contains(&all[0]) && (400..580).contains(&all[1]), "{all:?}");
        assert_eq!(counts(SamplingOptions { top_k: 1, ..plain.clone() })[0], 2000);
        let top_p = counts(SamplingOptions { top_p: 0.8, ..plain });
        assert!(top_p[0] > 0 && top_p[1] > 0 && top_p[2] == 0, "{top_p:?}");
    }

    #[test]
    fn repetition_is_penalised_either_side_of_zero() {
        let options = SamplingOptions { repetition_penalty: 2.0, ..SamplingOptions::default() };
        let mut sampler = Sampler::new(options);
        assert_eq!(sampler.choose(&mut [3.0, 2.0], &[], &[0]), 1);
        assert_eq!(sampler.choose(&mut [-1.0, -1.5], &[], &[0, 0]), 1);
    }

    #[test]
    fn runs_that_occurred_are_not_repeated() {
        assert_eq!(repeated(&[1, 2, 3, 1, 2], 3), [3]);
        assert_eq!(repeated(&[1, 2, 1], 2), [2]);
        assert_eq!(repeated(&[4, 5], 1), [4, 5]);
        assert!(repeated(&[1, 2, 3, 1, 2], 0).is_empty() && repeated(&[1], 2).is_empty());
    }

    #[test]
    fn seeds_repeat() {
        let options = SamplingOptions { temperature: 1.5, seed: 7, ..SamplingOptions::default() };
        let run = || {
            let mut sampler = Sampler::new(options.clone());
            (0..20).map(|_| sampler.choose(&mut [0.1, 0.2, 0.3], &[], &[])).collect::<Vec<u32>>()
        };
        assert_eq!(run(), run());
    }
}
