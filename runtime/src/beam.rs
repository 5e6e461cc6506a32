//! Beam search as Hugging Face's `generate` does it: forks of a session, advanced in one pass over the weights, with those
//! of other sessions.

use std::cmp::Ordering;

use crate::answer::{GenerateOptions, Generated, Stop};
use crate::backend::{Sequence, Step};
use crate::model::RunError;
use crate::sampling::repeated;
use crate::score::{Question, SCORED_TOGETHER, parts};
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
        let mut search = [Search::new(self, options)?];
        run(&mut search, options)?;
        let [search] = search;
        Ok(search.finish())
    }

    /// Texts that beam search finds after each of several prompts that begin with what the session has, up to the first stop
    /// string; the session stays as it is. Prompts, and then the beams of all, are read in common passes over the weights.
    /// What is found does not depend on the company.
    ///
    /// # Errors
    /// As [`Session::search`]; a question without tokens; an artifact without a tokenizer.
    pub fn search_each(
        &self,
        questions: &[Question],
        options: &GenerateOptions,
    ) -> Result<Vec<String>, RunError> {
        let mut texts = Vec::with_capacity(questions.len());
        let most = (SCORED_TOGETHER / options.beams.n_beams.max(1)).max(1);
        for part in parts(questions, most) {
            let mut sessions = self.read_each(part, &options.limits)?;
            let searches = sessions.iter_mut().map(|session| Search::new(session, options));
            let mut searches: Vec<Search<'_>> = searches.collect::<Result<_, _>>()?;
            run(&mut searches, options)?;
            let found: Vec<Generated> = searches.into_iter().map(Search::finish).collect();
            for (session, generated) in sessions.iter().zip(&found) {
                texts.push(session.text_of(generated, &options.stop_strings)?.0);
            }
        }
        Ok(texts)
    }
}

/// A search for the best continuation of a session.
struct Search<'a> {
    session: &'a mut Session,
    options: &'a GenerateOptions,
    forbidden: Vec<u32>,
    stops: Vec<u32>,
    /// The medium that new tokens see.
    media_time: [u32; 1],
    /// Most new tokens, and why there are no more.
    n_most: usize,
    at_end: Stop,
    beams: Vec<Beam>,
    ended: Vec<Hypothesis>,
    n_steps: usize,
}

/// Runs searches side by side until all are over.
fn run(searches: &mut [Search<'_>], options: &GenerateOptions) -> Result<(), RunError> {
    while searches.iter().any(|search| !search.is_over()) {
        options.limits.check()?;
        searches.iter_mut().filter(|search| !search.is_over()).for_each(Search::choose);
        step(searches)?;
    }
    Ok(())
}

/// Advances all beams of the searches that go on by their last token.
fn step(searches: &mut [Search<'_>]) -> Result<(), RunError> {
    let Some(model) = searches.first().map(|search| search.session.model().clone()) else {
        return Ok(());
    };
    let mut batch: Vec<(&mut dyn Sequence, Step<'_>)> = Vec::new();
    for search in searches.iter_mut().filter(|search| !search.is_over()) {
        let Search { session, beams, media_time, .. } = search;
        for Beam { sequence, tokens, .. } in beams.iter_mut() {
            let step = Step {
                input_ids: &tokens[tokens.len() - 1..],
                media_time: &*media_time,
                media: session.media(),
                logit_rows: &[0],
            };
            batch.push((sequence.as_mut(), step));
        }
    }
    if batch.is_empty() {
        return Ok(());
    }
    let logits = model.backend().advance_together(&mut batch)?;
    let going_on = searches.iter_mut().filter(|search| !search.is_over());
    for (beam, logits) in going_on.flat_map(|search| &mut search.beams).zip(logits) {
        beam.next = log_softmax(&logits);
    }
    Ok(())
}

impl<'a> Search<'a> {
    fn new(session: &'a mut Session, options: &'a GenerateOptions) -> Result<Search<'a>, RunError> {
        let (forbidden, stops) =
            session.special_tokens(options.allow_image_token, options.ignore_stops);
        // One token more than there is room for can be chosen: nothing comes after it.
        let room = (session.max_context() + 1).saturating_sub(session.ids().len());
        let n_most = options.max_new_tokens.min(room);
        let at_end = if n_most < options.max_new_tokens { Stop::Context } else { Stop::Length };
        let next = log_softmax(&session.logits()?);
        let media_time = [session.generated_time()];
        session.make_media(&media_time)?;
        let (sequence, tokens) = (session.fork_sequence(), Vec::new());
        let beams = vec![Beam { sequence, tokens, score: 0.0, next }];
        let (ended, n_steps) = (Vec::new(), 0);
        Ok(Search {
            session,
            options,
            forbidden,
            stops,
            media_time,
            n_most: if options.beams.n_beams == 0 { 0 } else { n_most },
            at_end,
            beams,
            ended,
            n_steps,
        })
    }

    fn is_over(&self) -> bool {
        self.beams.is_empty() || self.n_steps >= self.n_most
    }

    /// Lets the best of all next tokens grow the beams; those that end one are answers.
    fn choose(&mut self) {
        let BeamOptions { n_beams, length_penalty, stop_early } = self.options.beams;
        self.forbid();
        self.n_steps += 1;
        let n_candidates = n_beams * (self.stops.len() + 1).max(2);
        let mut chosen = Vec::new();
        for (rank, (score, parent, id)) in best(&self.beams, n_candidates).into_iter().enumerate() {
            if !self.stops.contains(&id) {
                chosen.push((score, parent, id));
            } else if rank < n_beams {
                let tokens = self.beams[parent].tokens.clone();
                let score = penalised(score, self.n_steps, length_penalty);
                self.ended.push(Hypothesis { tokens, score, stop: Stop::Token(id) });
            }
            if chosen.len() == n_beams {
                break;
            }
        }
        self.beams = grown(std::mem::take(&mut self.beams), &chosen);
        self.ended.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.ended.truncate(n_beams);
        let hope = self.beams.iter().map(|beam| beam.score).fold(f64::NEG_INFINITY, f64::max);
        let hope = penalised(hope, self.n_steps, length_penalty);
        let worst = self.ended.last().map_or(f64::NEG_INFINITY, |ended| ended.score);
        if self.ended.len() == n_beams && (stop_early || worst >= hope) {
            self.beams.clear();
        }
    }

    /// Takes tokens that must not come from what the beams hope for.
    fn forbid(&mut self) {
        for beam in &mut self.beams {
            let history = [self.session.ids(), &beam.tokens].concat();
            let repeated = repeated(&history, self.options.sampling.no_repeat_ngram);
            for id in self.forbidden.iter().chain(&repeated) {
                if let Some(score) = beam.next.get_mut(*id as usize) {
                    *score = f64::NEG_INFINITY;
                }
            }
        }
    }

    /// The best answer, which becomes part of the session.
    fn finish(self) -> Generated {
        let Search { session, options, at_end, beams, mut ended, n_steps, .. } = self;
        ended.extend(beams.into_iter().map(|beam| Hypothesis {
            score: penalised(beam.score, beam.tokens.len(), options.beams.length_penalty),
            tokens: beam.tokens,
            stop: at_end.clone(),
        }));
        ended.sort_by(|a, b| b.score.total_cmp(&a.score));
        let best = ended.into_iter().next();
        let (tokens, stop) = best.map_or((Vec::new(), at_end), |best| (best.tokens, best.stop));
        session.push_generated(&tokens);
        Generated { tokens, n_steps, stop }
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
