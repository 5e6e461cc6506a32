//! Runs tasks over numbers of examples: questions that the journal lacks are asked, then all answers are judged.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Result, ensure};
use flamingo_runtime::Model;
use serde::{Deserialize, Serialize};

use super::ask::{AskOptions, Asker, Sharing};
use super::interval::interval;
use super::journal::{Answer, Journal};
use super::metric::{Figure, Judged, figures, score};
use super::select::Select;
use super::task::Task;

/// A task's score after so many examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The task.
    pub task: String,
    /// Examples before the question.
    pub shots: usize,
    /// Questions that were answered.
    pub n: usize,
    /// The score, a share; of CIDEr and BLEU 1 is what is printed as 100.
    pub score: f64,
    /// Lower end of the interval of 95 %.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// The metric's name.
    pub metric: String,
    /// Questions that could not be asked.
    pub bad: usize,
    /// What each answer is worth, if asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub items: Vec<Item>,
}

/// An answer with what it is worth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// The row's name.
    pub id: String,
    /// The text or candidate.
    pub given: String,
    /// Its part of the score.
    pub figure: Figure,
}

/// How long answers took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// The task.
    pub task: String,
    /// Examples before the question.
    pub shots: usize,
    /// Milliseconds a question on average, without reading examples that all share.
    pub ms: f64,
}

/// How far a run is.
pub struct Progress<'a> {
    /// The task.
    pub task: &'a str,
    /// Examples before the question.
    pub shots: usize,
    /// The score of the answers so far with its interval; it takes a while.
    pub so_far: &'a dyn Fn() -> (f64, f64, f64),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All questions have answers.
    Whole,
    /// As many new answers as were allowed.
    Stopped,
}

/// Asks what the journal lacks, at most `at_most` questions.
///
/// # Errors
/// A journal that cannot be written; those of `on_answer`.
pub fn run(
    asker: &mut Asker<'_>,
    shots: &[usize],
    journal: &mut Journal,
    at_most: usize,
    on_answer: &mut dyn FnMut(&Progress<'_>) -> Result<()>,
) -> Result<Ended> {
    let (task, n_queries) = (asker.task(), asker.queries().len());
    let mut left = at_most;
    for shots in shots {
        let lacking = (0..n_queries).filter(|n| journal.get(&task.name, *shots, *n).is_none());
        let lacking: Vec<usize> = lacking.collect();
        let now = &lacking[..lacking.len().min(left)];
        let queries = asker.queries().to_vec();
        asker.ask(*shots, now, &mut |answer| {
            journal.push(&answer)?;
            let so_far = || {
                let known =
                    (0..n_queries).filter_map(|n| Some((n, journal.get(&task.name, *shots, n)?)));
                let known: Vec<(usize, &Answer)> = known.collect();
                let judged: Vec<Judged<'_>> = known
                    .iter()
                    .filter(|(_, answer)| answer.bad.is_none())
                    .map(|(n, answer)| judged(task, queries[*n], answer))
                    .collect();
                let figures = figures(task.metric, &judged);
                let (low, high) = interval(&figures);
                (score(figures.iter()), low, high)
            };
            on_answer(&Progress { task: &task.name, shots: *shots, so_far: &so_far })
        })?;
        left -= now.len();
        if now.len() < lacking.len() {
            return Ok(Ended::Stopped);
        }
    }
    Ok(Ended::Whole)
}

/// Judges the answers that a journal has of a task after `shots` examples.
///
/// # Errors
/// If not one question could be asked.
pub fn outcome(asker: &Asker<'_>, shots: usize, journal: &Journal) -> Result<(Outcome, Timing)> {
    let task = asker.task();
    let rows = asker.queries().iter().enumerate();
    let known = rows.filter_map(|(n, row)| Some((*row, journal.get(&task.name, shots, n)?)));
    let known: Vec<_> = known.collect();
    let good: Vec<_> = known.iter().filter(|(_, answer)| answer.bad.is_none()).collect();
    let first_reason = known.iter().find_map(|(_, answer)| answer.bad.clone()).unwrap_or_default();
    ensure!(
        !good.is_empty(),
        "task `{}`, {shots} shots: no question could be asked: {first_reason}\n\nhint: fewer `--shots`, or a larger \
         `--max-context` and `--max-images` when compiling",
        task.name
    );
    let all: Vec<Judged<'_>> = good.iter().map(|(row, answer)| judged(task, row, answer)).collect();
    let figures = figures(task.metric, &all);
    let (low, high) = interval(&figures);
    let (score, ms) =
        (score(figures.iter()), good.iter().map(|(_, answer)| answer.ms).sum::<f64>());
    let item = |((row, answer), figure): (&&(&super::data::Row, &Answer), Figure)| Item {
        id: row.id.clone(),
        given: answer.given.clone(),
        figure,
    };
    let outcome = Outcome {
        task: task.name.clone(),
        shots,
        n: good.len(),
        score,
        low,
        high,
        metric: task.metric.name().to_owned(),
        bad: known.len() - good.len(),
        items: good.iter().zip(figures).map(item).collect(),
    };
    let timing = Timing { task: task.name.clone(), shots, ms: ms / good.len() as f64 };
    Ok((outcome, timing))
}

/// Reasons why questions could not be asked, with their numbers.
pub fn bad_queries(
    asker: &Asker<'_>,
    shots: &[usize],
    journal: &Journal,
) -> BTreeMap<String, usize> {
    let mut reasons = BTreeMap::new();
    for shots in shots {
        for number in 0..asker.queries().len() {
            let answer = journal.get(&asker.task().name, *shots, number);
            if let Some(reason) = answer.and_then(|answer| answer.bad.clone()) {
                *reasons.entry(reason).or_insert(0) += 1;
            }
        }
    }
    reasons
}

fn judged<'a>(task: &'a Task, row: &'a super::data::Row, answer: &'a Answer) -> Judged<'a> {
    let candidates = task.candidates(row);
    let largest = answer.likelihoods.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = answer.likelihoods.iter().map(|log| (log - largest).exp()).collect();
    let place = candidates.iter().position(|one| Some(one) == task.positive.as_ref());
    let positive = place.and_then(|place| weights.get(place)).copied().unwrap_or(0.0);
    let total: f64 = weights.iter().sum();
    Judged {
        given: &answer.given,
        references: &row.answers,
        positive_share: if total > 0.0 { positive / total } else { 0.0 },
        is_positive: task.positive.as_ref().is_some_and(|positive| row.answers.contains(positive)),
    }
}

/// What sharing saves: the same questions, asked in each way.
#[derive(Clone, Debug, Serialize)]
pub struct SharingReport {
    /// The task.
    pub task: String,
    /// Examples, the same before all questions.
    pub shots: usize,
    /// Questions.
    pub n: usize,
    /// Seconds, with examples read once and questions in common passes.
    pub shared_s: f64,
    /// Seconds, with every question a prompt of its own and pictures kept.
    pub pictures_shared_s: f64,
    /// Seconds, with every question a prompt of its own and every picture encoded anew.
    pub nothing_shared_s: f64,
    /// Largest difference of a likelihood between the three.
    pub largest_difference: f64,
}

/// Asks the same questions with everything shared, with pictures shared, and with nothing shared. `alone` is the same
/// model without a cache of prompts.
///
/// # Errors
/// A task that generates text; questions that cannot be asked.
pub fn measure_sharing(
    model: &Model,
    alone: &Model,
    task: &Task,
    options: &AskOptions,
    shots: usize,
) -> Result<SharingReport> {
    ensure!(
        task.metric.is_closed(),
        "task `{}`: it generates text\n\nhint: sharing is measured where candidates are compared",
        task.name
    );
    let ways = [(Sharing::All, model), (Sharing::Pictures, alone), (Sharing::Nothing, alone)];
    let (mut seconds, mut likelihoods, mut n) = (Vec::new(), Vec::<Vec<f64>>::new(), 0);
    for (sharing, model) in ways {
        let options = AskOptions { sharing, select: Select::Fixed, ..options.clone() };
        let mut asker = Asker::new(model, task, &options)?;
        n = asker.queries().len();
        let (numbers, mut all) = ((0..n).collect::<Vec<usize>>(), Vec::new());
        let started = Instant::now();
        asker.ask(shots, &numbers, &mut |answer| {
            ensure!(answer.bad.is_none(), "{}", answer.bad.unwrap_or_default());
            all.extend(answer.likelihoods);
            Ok(())
        })?;
        seconds.push(started.elapsed().as_secs_f64());
        likelihoods.push(all);
    }
    let difference = |other: &Vec<f64>| {
        likelihoods[0].iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    Ok(SharingReport {
        task: task.name.clone(),
        shots,
        n,
        shared_s: seconds[0],
        pictures_shared_s: seconds[1],
        nothing_shared_s: seconds[2],
        largest_difference: likelihoods[1..].iter().map(difference).fold(0.0, f64::max),
    })
}
