//! Beam search as Hugging Face's `generate` does it: forks of one session, advanced in one pass over the weights.

use std::cmp::Ordering;

use crate::answer::{GenerateOptions, Generated, Stop};
use crate::backend::{Sequence, Step};
use crate::model::RunError;
use crate::sampling::repeated;
use crate::session::Session;

/// How beams are searched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BeamOptions {
    /// Beams; one is no search: tokens are chosen one by one.
    pub n_beams: usize,
    /// Scores are divided by the length to this power: above 0 favours long answers.
    pub length_penalty: f64,
    /// Stop as soon as there are as many answers as beams; else when no beam can become better than the worst of them.
    pub stop_early: bool,
}

impl Default for BeamOptions {
    fn default() -> BeamOptions {
        BeamOptions { n_beams: 1, length_penalty: 1.0, stop_early: false }
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
    /// The best continuation that beam search finds, which becomes part of the session. Of the sampling options, the
    /// rule about repeated runs holds; stop strings are not looked for.
    ///
    /// # Errors
    /// If there is nothing to continue; a limit that was reached.
    pub fn search(&mut self, options: &GenerateOptions) -> Result<Generated, RunError> {
        let beam_options = options.beams;
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
        while n_steps < n_most && beam_options.n_beams > 0 {
            options.limits.check()?;
            for beam in &mut beams {
                let history = [self.ids(), &beam.tokens].concat();
                let repeated = repeated(&history, options.sampling.no_repeat_ngram);
                for id in forbidden.iter().chain(&repeated) {
                    if let Some(score) = beam.next.get_mut(*id as usize) {
                        *score = f64::NEG_INFINITY;
                    }
                }
            }
            n_steps += 1;
            let n_candidates = beam_options.n_beams * (stops.len() + 1).max(2);
            let mut chosen = Vec::new();
            for (rank, (score, parent, id)) in best(&beams, n_candidates).into_iter().enumerate() {
                if !stops.contains(&id) {
                    chosen.push((score, parent, id));
                } else if rank < beam_options.n_beams {
                    let tokens = beams[parent].tokens.clone();
                    let score = penalised(score, n_steps, beam_options.length_penalty);
                    ended.push(Hypothesis { tokens, score, stop: Stop::Token(id) });
                }
                if chosen.len() == beam_options.n_beams {
                    break;
                }
            }
            beams = grown(beams, &chosen);
            ended.sort_by(|a, b| b.score.total_cmp(&a.score));
            ended.truncate(beam_options.n_beams);
            let hope = beams.iter().map(|beam| beam.score).fold(f64::NEG_INFINITY, f64::max);
            let hope = penalised(hope, n_steps, beam_options.length_penalty);
            let worst = ended.last().map_or(f64::NEG_INFINITY, |ended| ended.score);
            let is_full = ended.len() == beam_options.n_beams;
            if beams.is_empty() || (is_full && (beam_options.stop_early || worst >= hope)) {
                beams.clear();
                break;
            }
            if n_steps < n_most {
                self.step(&mut beams)?;
            }
        }
        ended.extend(beams.into_iter().map(|beam| Hypothesis {
            score: penalised(beam.score, beam.tokens.len(), beam_options.length_penalty),
            tokens: beam.tokens,
            stop: at_end.clone(),
        }));
        ended.sort_by(|a, b| b.score.total_cmp(&a.score));
        let best = ended.into_iter().next();
        let (tokens, stop) = best.map_or((Vec::new(), at_end), |best| (best.tokens, best.stop));
        self.push_generated(&tokens);
        Ok(Generated { tokens, n_steps, stop })
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
}

/// Beams with one more token each; a parent of several is forked.
fn grown(parents: Vec<Beam>, chosen: &[(f64, usize, u32)]) -> Vec<Beam> {
    let mut parents: Vec<Option<Beam>> = parents.into_iter().map(Some).collect();
    let mut children = Vec::with_capacity(chosen.len());
    for (place, &(score, parent, id)) in chosen.iter().enumerate() {
        let is_last = chosen[place + 1..].iter().all(|(_, other, _)| *other != parent);
        let parent = &mut parents[parent];
        let beam = if is_last { parent.take() } else { parent.as_ref().map(Beam::fork) };
        children.extend(beam.map(|mut beam| {
            beam.tokens.push(id);
            Beam { score, ..beam }
        }));
    }
    children
}

impl Beam {
    fn fork(&self) -> Beam {
        let tokens = self.tokens.clone();
        Beam { sequence: self.sequence.fork(), tokens, score: self.score, next: Vec::new() }
    }
}

fn penalised(score: f64, len: usize, length_penalty: f64) -> f64 {
    score / (len as f64).powf(length_penalty)
}

/// Log-probabilities of logits.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum();
    let log_sum = sum.ln();
    logits.iter().map(|logit| f64::from(*logit) - largest - log_sum).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one() {
        let sum: f64 = log_softmax(&[1.0, -2.0, 300.0, 299.5]).into_iter().map(f64::exp).sum();
        assert!((sum - 1.0).abs() < 1e-12);
    }
}
