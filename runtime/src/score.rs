//! Log-likelihoods of continuations that share a beginning: how closed-ended tasks are answered (Flamingo paper, §3.1 and
//! appendix on evaluation).

use crate::answer::Limits;
use crate::backend::{Sequence, Step};
use crate::bank::Shots;
use crate::beam::log_softmax;
use crate::model::{Model, RunError};
use crate::prompt::{PromptError, PromptFile};
use crate::session::{Medium, PREFILL_TOKENS, Session};

/// Continuations that are read in one pass: their logits, keys and values take memory.
pub(crate) const SCORED_TOGETHER: usize = 32;

/// How likely a continuation is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Sum of the log-probabilities of its tokens.
    pub log_likelihood: f64,
    /// Its tokens.
    pub n_tokens: usize,
}

impl Score {
    /// Log-probability of a token on average: comparable between continuations of different lengths.
    pub fn per_token(&self) -> f64 {
        self.log_likelihood / self.n_tokens.max(1) as f64
    }
}

impl Model {
    /// Scores continuations of a prompt, in their order. A continuation's tokens are those of its text on its own, without
    /// a beginning token.
    ///
    /// # Errors
    /// Whatever is wrong with the prompt; a continuation without tokens, with an image token, or too long.
    pub fn score(
        &self,
        prompt: &PromptFile,
        continuations: &[String],
        limits: &Limits,
    ) -> Result<Vec<Score>, RunError> {
        self.score_after(&[Shots::default()], prompt, continuations, limits)
    }

    /// As [`Model::score`], after examples of a bank. For several orders of them the log-likelihoods are averaged, which
    /// depends less on the order (Flamingo paper, appendix on evaluation: ensembling over permutations).
    ///
    /// # Errors
    /// As [`Model::score`]; a bank of another model, or one that is damaged.
    pub fn score_after(
        &self,
        orders: &[Shots],
        prompt: &PromptFile,
        continuations: &[String],
        limits: &Limits,
    ) -> Result<Vec<Score>, RunError> {
        let encode = |(index, text): (usize, &String)| {
            let ids = self.tokenizer()?.encode_fast(text.as_str(), false);
            let ids = ids.map_err(|error| PromptError::Tokenizer(error.to_string()))?;
            let ids = ids.get_ids().to_vec();
            let flaw = match ids.contains(&self.manifest().config.tokens.image) {
                _ if ids.is_empty() => "no tokens",
                true => "an image token",
                false => return Ok(ids),
            };
            Err(PromptError::Continuation { index, flaw }.into())
        };
        let ids: Vec<Vec<u32>> =
            continuations.iter().enumerate().map(encode).collect::<Result<_, RunError>>()?;
        let empty = |ids: &Vec<u32>| Score { log_likelihood: 0.0, n_tokens: ids.len() };
        let mut sums: Vec<Score> = ids.iter().map(empty).collect();
        for shots in orders {
            let mut session = self.session()?;
            session.append_after(shots, prompt, limits)?;
            for (sum, scores) in sums.iter_mut().zip(session.score(&ids, limits)?) {
                sum.log_likelihood += scores.iter().sum::<f64>() / orders.len() as f64;
            }
        }
        Ok(sums)
    }
}

/// A prompt after what a session has, and what could follow it.
#[derive(Clone, Debug)]
pub struct Question {
    /// Its tokens, at least one.
    pub ids: Vec<u32>,
    /// Media that stand behind its image tokens, in order.
    pub media: Vec<Medium>,
    /// Continuations to compare; none where text is generated.
    pub continuations: Vec<Vec<u32>>,
}

impl Session {
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
        self.make_media_of(continuations)?;
        let next = log_softmax(&self.logits()?);
        let session: &Session = self;
        let job = |ids| Job { session, ids, next: &next };
        let jobs: Vec<Job<'_>> = continuations.iter().map(Vec::as_slice).map(job).collect();
        score_jobs(&jobs, limits)
    }

    /// As [`Session::score`] of each of several prompts that begin with what the session has: their tokens, and then all
    /// continuations, are read in common passes over the weights. Numbers do not depend on the company.
    ///
    /// # Errors
    /// As [`Session::score`]; a question without tokens.
    pub fn score_each(
        &self,
        questions: &[Question],
        limits: &Limits,
    ) -> Result<Vec<Vec<Vec<f64>>>, RunError> {
        let mut scores = Vec::with_capacity(questions.len());
        for part in parts(questions, SCORED_TOGETHER) {
            scores.extend(self.score_some(part, limits)?);
        }
        Ok(scores)
    }

    /// Sessions that go on with each of these questions, read in one pass over the weights.
    pub(crate) fn read_each(
        &self,
        questions: &[Question],
        limits: &Limits,
    ) -> Result<Vec<Session>, RunError> {
        let fork = |question: &Question| self.fork_with(&question.ids, &question.media);
        let mut forks: Vec<Session> = questions.iter().map(fork).collect::<Result<_, _>>()?;
        Session::read_together(&mut forks, limits)?;
        Ok(forks)
    }

    fn score_some(
        &self,
        questions: &[Question],
        limits: &Limits,
    ) -> Result<Vec<Vec<Vec<f64>>>, RunError> {
        let mut forks = self.read_each(questions, limits)?;
        let mut next = Vec::with_capacity(forks.len());
        for (fork, question) in forks.iter_mut().zip(questions) {
            fork.make_media_of(&question.continuations)?;
            next.push(log_softmax(&fork.logits()?));
        }
        let mut jobs = Vec::new();
        for ((session, next), question) in forks.iter().zip(&next).zip(questions) {
            jobs.extend(question.continuations.iter().map(|ids| Job { session, ids, next }));
        }
        let mut scores = score_jobs(&jobs, limits)?.into_iter();
        let own =
            |question: &Question| scores.by_ref().take(question.continuations.len()).collect();
        Ok(questions.iter().map(own).collect())
    }

    fn make_media_of(&mut self, continuations: &[Vec<u32>]) -> Result<(), RunError> {
        continuations.iter().try_for_each(|ids| self.make_media(&self.given_times(ids)))
    }
}

/// Questions in parts of up to `most`, whose tokens are read in one pass.
pub(crate) fn parts(questions: &[Question], most: usize) -> Vec<&[Question]> {
    let (mut rest, mut parts) = (questions, Vec::new());
    while !rest.is_empty() {
        let mut n_tokens = 0;
        let fits = |question: &&Question| {
            n_tokens += question.ids.len();
            n_tokens <= PREFILL_TOKENS
        };
        let n = rest.iter().take(most).take_while(fits).count().max(1);
        let (part, later) = rest.split_at(n);
        parts.push(part);
        rest = later;
    }
    parts
}

/// A continuation of a session, and the log-probabilities of the session's next token.
struct Job<'a> {
    session: &'a Session,
    ids: &'a [u32],
    next: &'a [f64],
}

fn score_jobs(jobs: &[Job<'_>], limits: &Limits) -> Result<Vec<Vec<f64>>, RunError> {
    let mut scores = Vec::with_capacity(jobs.len());
    for part in jobs.chunks(SCORED_TOGETHER) {
        limits.check()?;
        scores.extend(score_together(part)?);
    }
    Ok(scores)
}

/// Scores continuations in one pass.
fn score_together(jobs: &[Job<'_>]) -> Result<Vec<Vec<f64>>, RunError> {
    let score =
        |scores: &[f64], id: u32| scores.get(id as usize).copied().unwrap_or(f64::NEG_INFINITY);
    let longer: Vec<&Job<'_>> = jobs.iter().filter(|job| job.ids.len() > 1).collect();
    let times: Vec<Vec<u32>> = longer.iter().map(|job| job.session.given_times(job.ids)).collect();
    let rows: Vec<Vec<usize>> = longer.iter().map(|job| (0..job.ids.len() - 1).collect()).collect();
    let mut forks: Vec<_> = longer.iter().map(|job| job.session.fork_sequence()).collect();
    let mut batch: Vec<(&mut dyn Sequence, Step<'_>)> = Vec::with_capacity(longer.len());
    for (idx, fork) in forks.iter_mut().enumerate() {
        let n = longer[idx].ids.len() - 1;
        let step = Step {
            input_ids: &longer[idx].ids[..n],
            media_time: &times[idx][..n],
            media: longer[idx].session.media(),
            logit_rows: &rows[idx],
        };
        batch.push((fork.as_mut(), step));
    }
    let logits = match longer.first() {
        None => Vec::new(),
        Some(job) => job.session.model().backend().advance_together(&mut batch)?,
    };
    let mut logits = logits.into_iter();
    let scores = |job: &Job<'_>| {
        let mut scores: Vec<f64> =
            job.ids.first().map(|id| score(job.next, *id)).into_iter().collect();
        if job.ids.len() > 1 {
            let logits = logits.next().unwrap_or_default();
            let rows = logits.chunks_exact(job.next.len().max(1)).map(log_softmax);
            scores.extend(rows.zip(&job.ids[1..]).map(|(row, id)| score(&row, *id)));
        }
        scores
    };
    Ok(jobs.iter().map(scores).collect())
}
