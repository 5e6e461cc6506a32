//! What is asked of a model: a data set with examples and questions, the form of the prompt, the metric.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use flamingo_models::Family;
use serde::{Deserialize, Serialize};

use super::data::{DataFile, Dataset, Row};
use super::metric::Metric;
use super::ok_vqa::stemmed;
use super::template::{Form, Template};

/// What is done to generated text before it is judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Postprocess {
    /// Nothing but white space around goes.
    #[default]
    None,
    /// OpenFlamingo's of captions: cut before `Output`, without quotation marks.
    Caption,
    /// OpenFlamingo's of short answers: cut before `Question`, `Answer`, `Short` and `, `.
    Vqa,
    /// OpenFlamingo's of OK-VQA: that of short answers, and each word's stem.
    OkVqa,
}

impl Postprocess {
    /// A text as it is judged.
    pub(super) fn of(self, text: &str) -> String {
        let before = |text: &str, marks: &[&str]| {
            let end = marks.iter().filter_map(|mark| text.find(mark)).min();
            text[..end.unwrap_or(text.len())].to_owned()
        };
        let short = || before(&before(text, &["Question", "Answer", "Short"]), &[", "]);
        let text = match self {
            Postprocess::None => text.to_owned(),
            Postprocess::Caption => before(text, &["Output"]).replace('"', ""),
            Postprocess::Vqa => short(),
            Postprocess::OkVqa => stemmed(&short()),
        };
        text.trim().to_owned()
    }
}

/// A task file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TaskFile {
    /// Its name [default: the file's].
    name: Option<String>,
    metric: Metric,
    /// Examples to show.
    support: DataFile,
    /// Questions to ask.
    queries: DataFile,
    prompt: Prompt,
    /// Candidates of every question.
    #[serde(default)]
    candidates: Vec<String>,
    /// The candidate whose share `roc_auc` ranks by.
    positive: Option<String>,
    /// Rank by the mean log-likelihood of a token, not the sum [default: true].
    per_token: Option<bool>,
    max_new_tokens: Option<usize>,
    beams: Option<usize>,
    #[serde(default)]
    postprocess: Postprocess,
    /// Examples without pictures where 0 are asked for [default: 2 if text is generated, else 0].
    text_examples: Option<usize>,
    /// Most rows of `support` that examples are chosen from [default: 2048].
    support_size: Option<usize>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Prompt {
    /// A template by name.
    form: Option<Form>,
    /// The paper's words instead of the family's.
    #[serde(default)]
    paper: bool,
    /// Own texts; each replaces that of `form`.
    preamble: Option<String>,
    query: Option<String>,
    turn: Option<String>,
    answer: Option<String>,
    joiner: Option<String>,
}

/// A task, ready to be asked.
#[derive(Clone, Debug)]
pub struct Task {
    /// Its name.
    pub name: String,
    /// How answers are judged; it decides whether candidates are compared or text is generated.
    pub metric: Metric,
    /// Texts of prompts.
    pub template: Template,
    /// Examples to show.
    pub support: Dataset,
    /// Questions to ask.
    pub queries: Dataset,
    /// Candidates of questions that have none of their own.
    pub candidates: Vec<String>,
    /// The candidate whose share [`Metric::RocAuc`] ranks by.
    pub positive: Option<String>,
    /// Whether candidates are ranked by the mean log-likelihood of a token.
    pub per_token: bool,
    /// Most tokens of generated text.
    pub max_new_tokens: usize,
    /// Beams of generated text.
    pub beams: usize,
    /// What is done to generated text.
    pub postprocess: Postprocess,
    /// Examples without pictures where 0 are asked for.
    pub text_examples: usize,
    /// Most rows that examples are chosen from.
    pub support_size: usize,
    /// What decides its answers beside the rows, for the journal.
    pub identity: String,
}

/// Rows that examples are chosen from, as in the paper.
pub const SUPPORT_SIZE: usize = 2048;
/// Beams, as in the paper.
pub const BEAMS: usize = 3;
/// Examples without pictures for zero-shot prompts, as in the paper.
pub const TEXT_EXAMPLES: usize = 2;

impl Task {
    /// Reads a task file; paths in it are relative to it.
    ///
    /// # Errors
    /// A file that is none, data that cannot be read, keys that do not go together.
    pub fn read(path: &Path, family: Family) -> Result<Task> {
        let place = || format!("`{}`", path.display());
        let text = fs::read_to_string(path).with_context(place)?;
        let file: TaskFile = toml::from_str(&text).with_context(place)?;
        let template = file.prompt.template(family).with_context(place)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let support = Dataset::read(folder, &file.support)?;
        let queries = Dataset::read(folder, &file.queries)?;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let is_closed = file.metric.is_closed();
        let mut task = Task {
            name: file.name.unwrap_or(stem),
            metric: file.metric,
            template,
            support,
            queries,
            candidates: file.candidates,
            positive: file.positive,
            per_token: file.per_token.unwrap_or(true),
            max_new_tokens: file.max_new_tokens.unwrap_or(match file.metric {
                Metric::Cider | Metric::Bleu => 20,
                Metric::Exact | Metric::Vqa | Metric::Accuracy | Metric::RocAuc => 5,
            }),
            beams: file.beams.unwrap_or(BEAMS),
            postprocess: file.postprocess,
            text_examples: file.text_examples.unwrap_or(if is_closed { 0 } else { TEXT_EXAMPLES }),
            support_size: file.support_size.unwrap_or(SUPPORT_SIZE),
            identity: String::new(),
        };
        task.finish().with_context(place)?;
        Ok(task)
    }

    /// Leaves out rows that the prompt or the metric cannot use, and checks what goes together.
    ///
    /// # Errors
    /// Keys that do not go together, or no row that is left.
    pub(super) fn finish(&mut self) -> Result<()> {
        self.template.check()?;
        ensure!(self.beams > 0, "`beams`: expected at least 1, found 0");
        let (metric, template) = (self.metric, &self.template);
        let (candidates, positive) = (&self.candidates, &self.positive);
        if metric == Metric::RocAuc {
            let known = positive.as_ref().is_some_and(|p| candidates.contains(p));
            ensure!(known, "`positive`: expected one of {candidates:?}, found {positive:?}");
        }
        let usable = |row: &Row| {
            template.example(row, true).map(drop)?;
            let own = row.candidates.as_ref().unwrap_or(candidates);
            let known = own.iter().any(|one| row.answers.contains(one));
            match metric.is_closed() && !known {
                true => Err("a right answer that is no candidate".to_owned()),
                false => Ok(()),
            }
        };
        for (what, dataset) in [("support", &mut self.support), ("queries", &mut self.queries)] {
            let rows = std::mem::take(&mut dataset.rows);
            for row in rows {
                match usable(&row) {
                    Ok(()) => dataset.rows.push(row),
                    Err(reason) => dataset.reject(reason),
                }
            }
            ensure!(
                !dataset.rows.is_empty(),
                "{what}: no row is left: {:?}\n\nhint: closed-ended metrics need `candidates` with the right answers",
                dataset.bad
            );
        }
        self.identity = self.describe();
        Ok(())
    }

    /// Candidates of a row.
    pub fn candidates<'a>(&'a self, row: &'a Row) -> &'a [String] {
        row.candidates.as_deref().unwrap_or(&self.candidates)
    }

    /// Generated text as it is judged.
    pub fn postprocessed(&self, text: &str) -> String {
        self.postprocess.of(text)
    }

    /// A hash of all that decides its answers: texts, rows and settings.
    fn describe(&self) -> String {
        let Task { name, metric, template, candidates, positive, per_token, .. } = self;
        let settings = (self.max_new_tokens, self.beams, self.postprocess, self.text_examples);
        let mut hasher = blake3::Hasher::new();
        let mut add = |text: String| {
            hasher.update(text.as_bytes()).update(&[0]);
        };
        add(format!("{name:?} {metric:?} {template:?} {candidates:?} {positive:?} {per_token}"));
        add(format!("{settings:?} {}", self.support_size));
        for Row { id, media, fields, answers, candidates } in
            self.support.rows.iter().chain(&self.queries.rows)
        {
            add(format!("{id:?} {fields:?} {answers:?} {candidates:?}"));
            media.iter().for_each(|source| add(source.identity()));
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Numbers of bad rows by reason, of examples and of questions.
    pub fn bad(&self) -> [&BTreeMap<String, usize>; 2] {
        [&self.support.bad, &self.queries.bad]
    }
}

impl Prompt {
    fn template(&self, family: Family) -> Result<Template> {
        let named = self.form.map(|form| form.template(family, self.paper));
        if named.is_none() && self.paper {
            bail!("[prompt]: `paper` without `form`\n\nhint: name a form, such as `form = \"vqa\"`")
        }
        let named = named.unwrap_or_default();
        let own = |own: &Option<String>, of_form: String| own.clone().unwrap_or(of_form);
        Ok(Template {
            preamble: own(&self.preamble, named.preamble),
            query: own(&self.query, named.query),
            turn: own(&self.turn, named.turn),
            answer: own(&self.answer, named.answer),
            joiner: own(&self.joiner, named.joiner),
        })
    }
}
