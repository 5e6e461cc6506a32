//! Log-likelihoods of continuations that share a beginning: how closed-ended tasks are answered (Flamingo paper, §3.1 and
//! appendix on evaluation).

use crate::answer::Limits;
use crate::backend::{Sequence, Step};
use crate::bank::Shots;
use crate::beam::log_softmax;
use crate::model::{Model, RunError};
use crate::prompt::{PromptError, PromptFile};
use crate::session::Session;

/// Continuations that are scored in one pass: their logits take memory.
const SCORED_TOGETHER: usize = 32;

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
