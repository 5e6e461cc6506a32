//! How often a model answers right: prompts of the demo's tasks about pictures that no training saw.
//!
//! Prompts and pictures are a pure function of task, split and seed (`flamingo-scenes`). An answer counts if all of
//! its tokens are generated, greedily, as written.

use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::{fmt, fs};

use anyhow::{Context as _, Result, bail, ensure};
use flamingo_runtime::image::{Mode, Picture, preprocess};
use flamingo_runtime::{GenerateOptions, Limits, Medium, Model};
use flamingo_scenes::Split;
use flamingo_scenes::draw::{self, Pixels, draw};
use flamingo_scenes::episode::{Episode, Style, Task};
use flamingo_scenes::random::stream;
use flamingo_scenes::words::{BEGIN, END_OF_CHUNK, IMAGE, Vocabulary};
use serde::Serialize;
use serde_json::{Value, json};

use super::interval::wilson;

/// The weight from which a token is part of the answer.
const ANSWER: f32 = 0.9;

/// What is asked.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalOptions {
    /// Tasks, each with its number of examples or pictures.
    pub tasks: Vec<Task>,
    /// Pictures of which split.
    pub split: Split,
    /// Prompts of each task.
    pub n: usize,
    /// Decides prompts and pictures.
    pub seed: u64,
    /// All visual tokens are 0: what can be known without eyes.
    pub blind: bool,
}

/// One task's score.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Score {
    /// The task's name.
    pub task: String,
    /// Examples before the question.
    pub shots: usize,
    /// Prompts.
    pub n: usize,
    /// Share of right answers.
    pub score: f64,
    /// Lower end of Wilson's interval of 95 %.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// Names of tasks, in the order of tables. `which_2` and `which_4` show so many pictures.
pub const TASKS: [&str; 10] = [
    "caption",
    "attribute",
    "count",
    "pair",
    "yes_no",
    "video",
    "which_2",
    "which_4",
    "few_shot",
    "bind",
];

/// Numbers of examples if none are given.
const SHOTS: [usize; 6] = [0, 2, 4, 8, 16, 32];

/// Tasks by name, each with all numbers of examples that it can have. No names, or `demo`, are all tasks.
///
/// # Errors
/// A name that is none; numbers of examples beyond 63.
pub fn tasks(names: &[String], shots: &[usize]) -> Result<Vec<Task>> {
    let shots = if shots.is_empty() { SHOTS.as_slice() } else { shots };
    ensure!(shots.iter().all(|n| *n < 64), "`--shots`: at most 63 examples, got {shots:?}");
    let all = names.is_empty() || names.iter().any(|name| name == "demo");
    let names: Vec<&str> = match all {
        true => TASKS.to_vec(),
        false => names.iter().map(String::as_str).collect(),
    };
    let mut tasks = Vec::new();
    for name in names {
        tasks.extend(match name {
            "caption" => vec![Task::Caption],
            "attribute" => vec![Task::Attribute],
            "count" => vec![Task::Count],
            "pair" => vec![Task::Pair],
            "yes_no" => vec![Task::YesNo],
            "video" => vec![Task::Video],
            "which_2" => vec![Task::Which(2)],
            "which_4" => vec![Task::Which(4)],
            "few_shot" => shots.iter().map(|n| Task::FewShot(*n)).collect(),
            // Both words must have been seen.
            "bind" => shots.iter().filter(|n| **n >= 2).map(|n| Task::Bind(*n)).collect(),
            other => bail!("no task `{other}`\n\nhint: `demo` for all, or of {}", TASKS.join(", ")),
        });
    }
    Ok(tasks)
}

/// Answers the prompts of all tasks; `on_answer` hears each, with the tokens that were generated.
///
/// # Errors
/// A model of other words than the demo's; a prompt that does not fit it; those of `on_answer`.
pub fn eval(
    model: &Model,
    options: &EvalOptions,
    on_answer: &mut dyn FnMut(&Question, &[u32]) -> Result<()>,
) -> Result<Vec<Score>> {
    check_words(model)?;
    let mut scores = Vec::new();
    for task in &options.tasks {
        let mut right = 0;
        for number in 0..options.n {
            let question = Question::new(*task, options, number);
            let answer = question.ask(model, options.blind)?;
            right += usize::from(answer == question.answer);
            on_answer(&question, &answer)?;
        }
        scores.push(score(*task, options.n, right));
    }
    Ok(scores)
}

/// The words of the demo are tokens with the ids that the generator gives them.
pub(crate) fn check_words(model: &Model) -> Result<()> {
    let (tokenizer, vocabulary) = (model.tokenizer()?, Vocabulary::default());
    for id in 0..vocabulary.size() as u32 {
        let word = vocabulary.word(id).unwrap_or_default();
        ensure!(
            tokenizer.token_to_id(word) == Some(id),
            "tasks `demo`: `{word}` is token {id} there, and {:?} in this model\n\nhint: they ask a model that \
             `flamingo-train` made",
            tokenizer.token_to_id(word)
        );
    }
    Ok(())
}

/// One prompt of a task.
#[derive(Debug, Clone)]
pub struct Question {
    /// Of which task.
    pub task: Task,
    /// Its number within the task.
    pub number: usize,
    /// Tokens before the answer.
    pub prompt: Vec<u32>,
    /// The right answer's tokens.
    pub answer: Vec<u32>,
    /// Frames of each medium, `[side, side, 3]` bytes.
    pub media: Vec<Vec<Pixels>>,
}

impl Question {
    pub(crate) fn new(task: Task, options: &EvalOptions, number: usize) -> Question {
        let mut rng = stream(options.seed, &format!("eval/{task:?}/{:?}/{number}", options.split));
        let style = Style { split: options.split, dense: false, described: false };
        let episode = Episode::random(task, style, &Vocabulary::default(), &mut rng);
        let (prompt, answer) = split_answer(&episode);
        let mut frames = |facts| draw(facts, options.split, &mut rng).frames;
        let media = episode.media.iter().map(|facts| frames(*facts)).collect();
        Question { task, number, prompt, answer, media }
    }

    /// What the model answers, as many tokens as the right answer has.
    fn ask(&self, model: &Model, blind: bool) -> Result<Vec<u32>> {
        let mut media: Vec<Medium> =
            self.media.iter().map(|frames| encode(model, frames)).collect::<Result<_>>()?;
        if blind {
            media.iter_mut().for_each(|m| *m = Medium::from(Arc::new(m.media.blind())));
        }
        let mut session = model.session()?;
        session.append_ids(&self.prompt, &media, &Limits::default())?;
        let generate = GenerateOptions {
            max_new_tokens: self.answer.len(),
            ignore_stops: true,
            ..GenerateOptions::default()
        };
        let (mut tokens, mut answer) = (session.tokens(&generate), Vec::new());
        while let Some(id) = tokens.next_id()? {
            answer.push(id);
        }
        Ok(answer)
    }

    /// Writes the pictures below `images/` of a folder; gives the prompt as a line of `prompts.jsonl`.
    ///
    /// # Errors
    /// A picture that cannot be written.
    pub fn save(&self, folder: &Path) -> Result<Value> {
        let images = folder.join("images");
        fs::create_dir_all(&images)
            .with_context(|| format!("cannot make `{}`", images.display()))?;
        let (name, shots) = label(self.task);
        let mut media = Vec::new();
        for (index, frames) in self.media.iter().enumerate() {
            let mut files = Vec::new();
            for (frame, pixels) in frames.iter().enumerate() {
                let part = if frames.len() > 1 { format!("-f{frame}") } else { String::new() };
                let file = format!("images/{name}-{shots}-{}-{index}{part}.png", self.number);
                let side = draw::SIDE as u32;
                image::save_buffer(folder.join(&file), pixels, side, side, image::ColorType::Rgb8)
                    .with_context(|| format!("cannot write `{file}`"))?;
                files.push(file);
            }
            media.push(match files.as_slice() {
                [file] => json!({ "image": file }),
                files => json!({ "video": files }),
            });
        }
        Ok(json!({
            "task": name,
            "shots": shots,
            "segments": self.segments(media),
            "answer": words(&self.answer),
        }))
    }

    /// The prompt as segments of a prompt file.
    fn segments(&self, media: Vec<Value>) -> Vec<Value> {
        let mut media = media.into_iter();
        let mut segments: Vec<Value> = Vec::new();
        for id in &self.prompt {
            match *id {
                BEGIN => {}
                IMAGE => segments.extend(media.next()),
                END_OF_CHUNK => segments.push(json!({ "end_of_chunk": true })),
                id => match segments.last_mut().and_then(|last| last.get_mut("text")) {
                    Some(text) => {
                        *text =
                            json!(format!("{} {}", text.as_str().unwrap_or_default(), words(&[id])))
                    }
                    None => segments.push(json!({ "text": words(&[id]) })),
                },
            }
        }
        segments
    }
}

/// Tokens as words; an end of chunk is none.
pub fn words(ids: &[u32]) -> String {
    let vocabulary = Vocabulary::default();
    let said = ids.iter().filter(|id| **id != END_OF_CHUNK);
    let words: Vec<&str> = said.filter_map(|id| vocabulary.word(*id)).collect();
    words.join(" ")
}

fn encode(model: &Model, frames: &[Pixels]) -> Result<Medium> {
    let values = pixel_values(model, frames)?;
    model.encode_medium(&values, frames.len()).context("cannot encode a picture")
}

/// Generated frames as a model's encoder takes them, `[n_frames, 3, size, size]`.
pub(crate) fn pixel_values(model: &Model, frames: &[Pixels]) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    for frame in frames {
        let picture = Picture::new(draw::SIDE, draw::SIDE, Mode::Rgb, frame.clone())?;
        values.extend(preprocess(&picture, &model.manifest().image)?);
    }
    Ok(values)
}

/// Ids before the answer, and the answer's.
fn split_answer(episode: &Episode) -> (Vec<u32>, Vec<u32>) {
    let tokens = &episode.tokens;
    let first = tokens.iter().position(|token| token.weight >= ANSWER).unwrap_or(tokens.len());
    let ids = |tokens: &[flamingo_scenes::episode::Token]| tokens.iter().map(|t| t.id).collect();
    let answer = tokens[first..].iter().take_while(|token| token.weight >= ANSWER).count();
    (ids(&tokens[..first]), ids(&tokens[first..first + answer]))
}

fn score(task: Task, n: usize, right: usize) -> Score {
    let (task, shots) = label(task);
    let (low, high) = wilson(right, n);
    Score { task, shots, n, score: right as f64 / n as f64, low, high }
}

/// A task's name, and its examples.
fn label(task: Task) -> (String, usize) {
    match task {
        Task::Which(pictures) => (format!("which_{pictures}"), 0),
        _ => (task.name().to_owned(), task.size().unwrap_or(0)),
    }
}

/// A split by its name on the command line.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SplitName(pub Split);

impl FromStr for SplitName {
    type Err = String;

    fn from_str(name: &str) -> Result<SplitName, String> {
        match name {
            "train" => Ok(SplitName(Split::Train)),
            "test" => Ok(SplitName(Split::Test)),
            "unseen" => Ok(SplitName(Split::Unseen)),
            _ => Err("expected train, test or unseen".into()),
        }
    }
}

impl fmt::Display for SplitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Split::Train => "train",
            Split::Test => "test",
            Split::Unseen => "unseen",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_give_tasks_with_their_examples() {
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let found = tasks(&names(&["few_shot", "bind"]), &[0, 2]).unwrap();
        assert_eq!(found, [Task::FewShot(0), Task::FewShot(2), Task::Bind(2)]);
        assert_eq!(tasks(&names(&["demo"]), &[]).unwrap(), tasks(&[], &[]).unwrap());
        assert_eq!(tasks(&[], &[4]).unwrap().len(), TASKS.len());
        let error = tasks(&names(&["caption", "sing"]), &[]).unwrap_err().to_string();
        assert!(error.contains("`sing`") && error.contains("few_shot"), "{error}");
        assert!(tasks(&[], &[64]).is_err());
    }

    #[test]
    fn the_answer_is_what_follows_the_prompt() {
        let style = Style { split: Split::Test, dense: false, described: false };
        for task in [Task::Caption, Task::Attribute, Task::FewShot(3), Task::Bind(4)] {
            let mut rng = stream(1, "answer");
            let episode = Episode::random(task, style, &Vocabulary::default(), &mut rng);
            let (prompt, answer) = split_answer(&episode);
            assert!(!answer.is_empty() && !prompt.is_empty(), "{task:?}");
            let all: Vec<u32> = episode.tokens.iter().map(|t| t.id).collect();
            assert!(all.starts_with(&[prompt, answer].concat()), "{task:?}");
        }
    }
}
