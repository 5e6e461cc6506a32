//! Beam search as Hugging Face's `generate` does it, and log-likelihoods of given continuations: forks of one session,
//! advanced in one pass over the weights.

use std::cmp::Ordering;

use crate::answer::{Generated, Limits, Stop};
use crate::backend::{Sequence, Step};
use crate::model::RunError;
use crate::session::Session;

/// Continuations that are scored in one pass: their logits take memory.
const SCORED_TOGETHER: usize = 32;

/// What to search.
#[derive(Clone, Debug)]
pub struct BeamOptions {
    /// Beams; one is greedy search.
    pub n_beams: usize,
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// Scores are divided by the length to this power: above 0 favours long answers.
    pub length_penalty: f64,
    /// No run of so many tokens occurs twice, prompt included; 0 for no such rule.
    pub no_repeat_ngram: usize,
    /// Stop as soon as there are as many answers as beams; else when no beam can become better than the worst of them.
    pub stop_early: bool,
    /// Go on after end-of-chunk and end-of-text tokens.
    pub ignore_stops: bool,
    /// Let the model generate image tokens, which nothing stands behind.
    pub allow_image_token: bool,
    /// When to give up.
    pub limits: Limits,
}

impl Default for BeamOptions {
    fn default() -> BeamOptions {
        BeamOptions {
            n_beams: 3,
            max_new_tokens: 20,
            length_penalty: 1.0,
            no_repeat_ngram: 0,
            stop_early: false,
            ignore_stops: false,
            allow_image_token: false,
            limits: Limits::default(),
        }
    }
}

/// A continuation that is still growing.
struct Beam {
    sequence: Box<dyn Sequence>,
    tokens: Vec<u32>,
    /// Sum of the log-probabilities.
    score: f64,
    /// Log-probabilities of the next token.
    next: Vec<f64>,
}

/// A continuation that has ended.
struct Hypothesis {
    tokens: Vec<u32>,
    score: f64,
    stop: Stop,
}

impl Session {
    /// The best continuation that beam search finds, which becomes part of the session.
    ///
    /// # Errors
    /// If there is nothing to continue; a limit that was reached.
    pub fn search(&mut self, options: &BeamOptions) -> Result<Generated, RunError> {
        let (forbidden, stops) =
            self.special_tokens(options.allow_image_token, options.ignore_stops);
        // One token more than there is room for can be chosen: nothing comes after it.
        let room = (self.max_context() + 1).saturating_sub(self.ids().len());
        let n_most = options.max_new_tokens.min(room);
        let at_end = if n_most < options.max_new_tokens { Stop::Context } else { Stop::Length };
        let next = log_softmax(&self.logits()?);
        self.make_media(&[self.generated_time()])?;
        let (sequence, tokens) = (self.fork_sequence(), Vec::new());
        let mut beams = vec![Beam { sequence, tokens, score: 0.0, next }];
        let mut ended: Vec<Hypothesis> = Vec::new();
        let mut n_steps = 0;
        while n_steps < n_most && options.n_beams > 0 {
            options.limits.check()?;
            for beam in &mut beams {
                let history = [self.ids(), &beam.tokens].concat();
                let repeated = repeated(&history, options.no_repeat_ngram);
                for id in forbidden.iter().chain(&repeated) {
                    if let Some(score) = beam.next.get_mut(*id as usize) {
                        *score = f64::NEG_INFINITY;
                    }
                }
            }
            n_steps += 1;
            let n_candidates = options.n_beams * (stops.len() + 1).max(2);
            let mut chosen = Vec::new();
            for (rank, (score, parent, id)) in best(&beams, n_candidates).into_iter().enumerate() {
                if !stops.contains(&id) {
                    chosen.push((score, parent, id));
                } else if rank < options.n_beams {
                    let tokens = beams[parent].tokens.clone();
                    let score = penalised(score, n_steps, options.length_penalty);
                    ended.push(Hypothesis { tokens, score, stop: Stop::Token(id) });
                }
                if chosen.len() == options.n_beams {
                    break;
                }
            }
            beams = self.grown(beams, &chosen);
            ended.sort_by(|a, b| b.score.total_cmp(&a.score));
            ended.truncate(options.n_beams);
            let hope = beams.iter().map(|beam| beam.score).fold(f64::NEG_INFINITY, f64::max);
            let hope = penalised(hope, n_steps, options.length_penalty);
            let worst = ended.last().map_or(f64::NEG_INFINITY, |ended| ended.score);
            let is_full = ended.len() == options.n_beams;
            if beams.is_empty() || (is_full && (options.stop_early || worst >= hope)) {
                beams.clear();
                break;
            }
            if n_steps < n_most {
                self.step(&mut beams)?;
            }
        }
        ended.extend(beams.into_iter().map(|beam| Hypothesis {
            score: penalised(beam.score, beam.tokens.len(), options.length_penalty),
            tokens: beam.tokens,
            stop: at_end.clone(),
        }));
        ended.sort_by(|a, b| b.score.total_cmp(&a.score));
        let best = ended.into_iter().next();
        let (tokens, stop) = best.map_or((Vec::new(), at_end), |best| (best.tokens, best.stop));
        self.push_generated(&tokens);
        Ok(Generated { tokens, n_steps, stop })
    }

    /// Beams with one more token each; a parent of several is forked.
    fn grown(&self, parents: Vec<Beam>, chosen: &[(f64, usize, u32)]) -> Vec<Beam> {
        let child = |&(score, parent, id): &(f64, usize, u32)| {
            let parent: &Beam = &parents[parent];
            let tokens = [parent.tokens.as_slice(), &[id]].concat();
            Beam { sequence: parent.sequence.fork(), tokens, score, next: Vec::new() }
        };
        chosen.iter().map(child).collect()
    }

    /// Advances all beams by their last token.
    fn step(&self, beams: &mut [Beam]) -> Result<(), RunError> {
        let media_time = [self.generated_time()];
        let mut batch: Vec<(&mut dyn Sequence, Step<'_>)> = Vec::with_capacity(beams.len());
        for Beam { sequence, tokens, .. } in beams.iter_mut() {
            let step = Step {
                input_ids: &tokens[tokens.len() - 1..],
                media_time: &media_time,
                media: self.media(),
                logit_rows: &[0],
            };
            batch.push((sequence.as_mut(), step));
        }
        let logits = self.model().backend().advance_together(&mut batch)?;
        for (beam, logits) in beams.iter_mut().zip(logits) {
            beam.next = log_softmax(&logits);
        }
        Ok(())
    }

    /// Log-probability of each token of each continuation, after what the session has; the session stays as it is. Their
    /// sum is a continuation's log-likelihood, their mean that of closed-ended tasks with normalised length.
    ///
    /// # Errors
    /// Ids or lengths that do not fit the model; a limit that was reached.
    pub fn score(
        &mut self,
        continuations: &[Vec<u32>],
        limits: &Limits,
    ) -> Result<Vec<Vec<f64>>, RunError> {
        let first = log_softmax(&self.logits()?);
        for ids in continuations {
            self.make_media(&self.given_times(ids))?;
        }
        let mut scores = Vec::with_capacity(continuations.len());
        for part in continuations.chunks(SCORED_TOGETHER) {
            limits.check()?;
            scores.extend(self.score_together(part, &first)?);
        }
        Ok(scores)
    }

    fn score_together(
        &self,
        continuations: &[Vec<u32>],
        first: &[f64],
    ) -> Result<Vec<Vec<f64>>, RunError> {
        let score =
            |scores: &[f64], id: u32| scores.get(id as usize).copied().unwrap_or(f64::NEG_INFINITY);
        let longer: Vec<&[u32]> =
            continuations.iter().map(Vec::as_slice).filter(|ids| ids.len() > 1).collect();
        let times: Vec<Vec<u32>> = longer.iter().map(|ids| self.given_times(ids)).collect();
        let rows: Vec<Vec<usize>> = longer.iter().map(|ids| (0..ids.len() - 1).collect()).collect();
        let mut forks: Vec<_> = longer.iter().map(|_| self.fork_sequence()).collect();
        let mut batch: Vec<(&mut dyn Sequence, Step<'_>)> = Vec::with_capacity(longer.len());
        for (idx, fork) in forks.iter_mut().enumerate() {
            let n = longer[idx].len() - 1;
            let step = Step {
                input_ids: &longer[idx][..n],
                media_time: &times[idx][..n],
                media: self.media(),
                logit_rows: &rows[idx],
            };
            batch.push((fork.as_mut(), step));
        }
        let logits = match batch.is_empty() {
            true => Vec::new(),
            false => self.model().backend().advance_together(&mut batch)?,
        };
        let mut logits = logits.into_iter();
        let scores = |ids: &Vec<u32>| {
            let mut scores: Vec<f64> =
                ids.first().map(|id| score(first, *id)).into_iter().collect();
            if ids.len() > 1 {
                let logits = logits.next().unwrap_or_default();
                let rows = logits.chunks_exact(first.len().max(1)).map(log_softmax);
                scores.extend(rows.zip(&ids[1..]).map(|(row, id)| score(&row, *id)));
            }
            scores
        };
        Ok(continuations.iter().map(scores).collect())
    }
}

fn penalised(score: f64, len: usize, length_penalty: f64) -> f64 {
    score / (len as f64).powf(length_penalty)
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum();
    logits.iter().map(|logit| f64::from(*logit) - largest - sum.ln()).collect()
}

/// The `n` best of all beams' next tokens, best first: score with the beam's, beam, id.
fn best(beams: &[Beam], n: usize) -> Vec<(f64, usize, u32)> {
    let of_beam = |(index, beam): (usize, &'_ Beam)| {
        let score = beam.score;
        let next = (0u32..).zip(beam.next.clone());
        next.map(move |(id, next)| (score + next, index, id))
    };
    let mut all: Vec<(f64, usize, u32)> = beams.iter().enumerate().flat_map(of_beam).collect();
    all.retain(|(score, ..)| *score > f64::NEG_INFINITY);
    let order = |a: &(f64, usize, u32), b: &(f64, usize, u32)| -> Ordering {
        b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2)))
    };
    if n < all.len() {
        all.select_nth_unstable_by(n, order);
        all.truncate(n);
    }
    all.sort_by(order);
    all
}

/// Tokens that would make a run of `n` tokens occur a second time.
fn repeated(history: &[u32], n: usize) -> Vec<u32> {
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
    fn runs_that_occurred_are_not_repeated() {
        assert_eq!(repeated(&[1, 2, 3, 1, 2], 3), [3]);
        assert_eq!(repeated(&[1, 2, 1], 2), [2]);
        assert_eq!(repeated(&[4, 5], 1), [4, 5]);
        assert!(repeated(&[1, 2, 3, 1, 2], 0).is_empty() && repeated(&[1], 2).is_empty());
    }

    #[test]
    fn probabilities_sum_to_one() {
        let sum: f64 = log_softmax(&[1.0, -2.0, 300.0, 299.5]).into_iter().map(f64::exp).sum();
        assert!((sum - 1.0).abs() < 1e-12);
    }
}
