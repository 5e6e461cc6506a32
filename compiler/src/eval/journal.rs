//! Answers as they come, a line each: what a run that was interrupted goes on from.
//!
//! The first line says what the answers are of. A line that breaks off, where a run was killed, is asked again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::lines;

/// What was answered to a question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The task.
    pub task: String,
    /// Examples that were asked for.
    pub shots: usize,
    /// The question's number.
    pub query: usize,
    /// Numbers of the examples, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub examples: Vec<usize>,
    /// The text, or the most likely candidate.
    pub given: String,
    /// What each candidate is ranked by, over all orders of the examples.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub likelihoods: Vec<f64>,
    /// Milliseconds it took, on average of those that were asked together.
    pub ms: f64,
    /// Why the question could not be asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bad: Option<String>,
}

/// Answers of a run, in memory and, if it has a file, there too.
#[derive(Debug, Default)]
pub struct Journal {
    file: Option<(PathBuf, File)>,
    answers: BTreeMap<(String, usize, usize), Answer>,
}

impl Journal {
    /// A journal without a file.
    pub fn in_memory() -> Journal {
        Journal::default()
    }

    /// Opens the journal of a run with this identity, or begins it.
    ///
    /// # Errors
    /// A file that cannot be read or written, or is of another run.
    pub fn open(path: &Path, identity: &str) -> Result<Journal> {
        let place = || format!("journal `{}`", path.display());
        let header = serde_json::json!({ "flamingoc_eval": identity }).to_string();
        let Some((file, lines)) = lines::open(path, &header).with_context(place)? else {
            bail!(
                "journal `{}`: it is of other tasks, options or another artifact\n\nhint: name another \
                 file, or remove this one",
                path.display()
            )
        };
        let answers = lines.iter().filter_map(|line| serde_json::from_str::<Answer>(line).ok());
        let answers = answers.map(|answer| (key(&answer), answer)).collect();
        Ok(Journal { file: Some((path.to_owned(), file)), answers })
    }

    /// The answer to a question, if there is one.
    pub fn get(&self, task: &str, shots: usize, query: usize) -> Option<&Answer> {
        self.answers.get(&(task.to_owned(), shots, query))
    }

    /// Answers so far.
    pub fn len(&self) -> usize {
        self.answers.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Adds an answer. What is kept is what a later run would read.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn push(&mut self, answer: &Answer) -> Result<()> {
        let line = serde_json::to_string(answer)?;
        if let Some((path, file)) = &mut self.file {
            writeln!(file, "{line}").with_context(|| format!("journal `{}`", path.display()))?;
        }
        let answer: Answer = serde_json::from_str(&line)?;
        self.answers.insert(key(&answer), answer);
        Ok(())
    }
}

fn key(answer: &Answer) -> (String, usize, usize) {
    (answer.task.clone(), answer.shots, answer.query)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn answer(query: usize) -> Answer {
        Answer {
            task: "t".to_owned(),
            shots: 4,
            query,
            examples: vec![3, 1],
            given: "a \"b\"\n".to_owned(),
            likelihoods: vec![-0.1, f64::from(7u8) / -3.0],
            ms: 1.5,
            bad: None,
        }
    }

    #[test]
    fn a_journal_goes_on_where_it_was_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("j.jsonl");
        let mut journal = Journal::open(&path, "run").unwrap();
        (0..3).for_each(|query| journal.push(&answer(query)).unwrap());
        let bytes = fs::read(&path).unwrap();
        for lost in 0..bytes.len() {
            fs::write(&path, &bytes[..bytes.len() - lost]).unwrap();
            let mut again = Journal::open(&path, "run").unwrap();
            let kept = (0..3).filter(|query| again.get("t", 4, *query).is_some()).count();
            assert_eq!(kept, again.len());
            (kept..3).for_each(|query| again.push(&answer(query)).unwrap());
            assert_eq!(fs::read(&path).unwrap(), bytes, "{lost} bytes lost");
            assert_eq!(again.answers, journal.answers);
        }
    }

    #[test]
    fn a_journal_of_another_run_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("j.jsonl");
        Journal::open(&path, "run").unwrap();
        let error = Journal::open(&path, "other").unwrap_err().to_string();
        assert!(error.contains("j.jsonl") && error.contains("hint: "), "{error}");
    }
}
