//! `flamingoc demo`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use flamingo_runtime::{GenerateOptions, Model, PromptFile, Segment, VideoFiles};
use serde::Deserialize;
use serde_json::json;

use super::output::{Output, bytes};
use super::{Opening, Outcome};
use crate::compile::{CalibrateOn, CompileOptions, compile};
use crate::scheme::Scheme;

/// Tasks of which the demo shows one prompt, with the number of examples before the question.
const SHOWN: [(&str, usize); 6] =
    [("caption", 0), ("attribute", 0), ("count", 0), ("which", 0), ("video", 0), ("few_shot", 3)];

/// Compile the bundled model and let it answer prompts about bundled pictures
///
/// The model is a small trained Flamingo (3.1 million weights, 72 words) in genuine
/// OpenFlamingo files; it knows coloured shapes and digits, and nothing of photographs.
#[derive(Args)]
#[command(after_help = "Examples:\n  flamingoc demo\n  flamingoc demo --all --backend ort")]
pub(super) struct Demo {
    /// Folder of the demo model [default: models/demo of this checkout]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Keep the artifact here
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Answer all bundled prompts and print the accuracy of each task
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    opening: Opening,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

/// One line of `prompts.jsonl`.
#[derive(Deserialize)]
struct Line {
    task: String,
    shots: usize,
    segments: Vec<Segment>,
    answer: String,
    reference_prediction: String,
    reference_margin: f32,
}

impl Demo {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        let folder = self.folder()?;
        let lines = read_lines(&folder)?;
        let scratch = tempfile::tempdir()?;
        let artifact = self.output.clone().unwrap_or_else(|| scratch.path().join("demo.flamingo"));
        let started = Instant::now();
        let options = CompileOptions {
            source: folder.join("recipe.toml"),
            output: artifact.clone(),
            overwrite: true,
            max_context: None,
            max_images: 64,
            scheme: Scheme::default(),
            calibrate: CalibrateOn::Nothing,
            dump: None,
        };
        let (manifest, _) = compile(&options, &mut |_| {})?;
        let compile_s = started.elapsed().as_secs_f64();
        let size = manifest.files.iter().map(|file| file.bytes).sum();
        output.note(&format!(
            "compiled {} in {compile_s:.2} s ({})",
            folder.display(),
            bytes(size)
        ));
        let model = Model::open(&artifact, &self.opening.options())?;
        match self.all {
            true => answer_all(output, &model, &folder, &lines, self.json),
            false => show(output, &model, &folder, &lines, self.json),
        }
    }

    fn folder(&self) -> Result<PathBuf> {
        if let Some(folder) = &self.model {
            return Ok(folder.clone());
        }
        let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
        let candidates = [PathBuf::from("models/demo"), checkout];
        let found = candidates.iter().find(|folder| folder.join("recipe.toml").is_file());
        match found {
            Some(folder) => Ok(fs::canonicalize(folder).unwrap_or_else(|_| folder.clone())),
            None => bail!(
                "no demo model: looked for `recipe.toml` in `models/demo` here and in the checkout this program was \
                 built from\n\nhint: run from a checkout, or pass `--model DIR`"
            ),
        }
    }
}

fn read_lines(folder: &Path) -> Result<Vec<Line>> {
    let path = folder.join("prompts.jsonl");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let parse = |(index, line): (usize, &str)| {
        serde_json::from_str(line)
            .with_context(|| format!("`{}` line {}", path.display(), index + 1))
    };
    text.lines().enumerate().map(parse).collect()
}

fn prompt(folder: &Path, line: &Line) -> PromptFile {
    let mut prompt = PromptFile { segments: line.segments.clone(), ..PromptFile::default() };
    prompt.resolve(folder);
    prompt
}

/// The prompt for people: pictures by name.
fn describe(line: &Line) -> String {
    let name = |path: &PathBuf| {
        path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let word = |segment: &Segment| match segment {
        Segment::Image { image } => format!("[{}]", name(image)),
        Segment::Video { video: VideoFiles::File(file), .. } => format!("[{}]", name(file)),
        Segment::Video { video: VideoFiles::Frames(files), .. } => {
            format!("[{} … {} frames]", files.first().map(name).unwrap_or_default(), files.len())
        }
        Segment::Text { text } => text.clone(),
        Segment::EndOfChunk { .. } => "|".to_owned(),
    };
    line.segments.iter().map(word).collect::<Vec<String>>().join(" ")
}

fn show(
    output: &mut Output,
    model: &Model,
    folder: &Path,
    lines: &[Line],
    as_json: bool,
) -> Result<Outcome> {
    let options = GenerateOptions { max_new_tokens: 8, ..GenerateOptions::default() };
    let mut answers = Vec::new();
    let (mut cold, mut warm, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for (task, shots) in SHOWN {
        let Some(line) = lines.iter().find(|line| line.task == task && line.shots == shots) else {
            bail!("the bundled prompts have none of task `{task}` with {shots} shots");
        };
        let prompt = prompt(folder, line);
        if !as_json {
            output.line(&describe(line))?;
            output.text("  → ")?;
        }
        let mut shown = Ok(());
        let answer = model.generate(&prompt, &options, &mut |piece| {
            if !as_json && shown.is_ok() {
                shown = output.text(piece);
            }
        })?;
        shown?;
        if !as_json {
            output.line(&format!("   (right answer: {})", line.answer))?;
        }
        cold.push(answer.timings.first_token_ms);
        rates.extend(answer.timings.decode_tokens_per_s);
        warm.push(model.generate(&prompt, &options, &mut |_| {})?.timings.first_token_ms);
        answers.push(json!({
            "task": task, "shots": shots, "prompt": describe(line), "text": answer.text, "answer": line.answer,
        }));
    }
    let latency = [
        ("first token, pictures not seen before", "ms", median(&mut cold)),
        ("first token, pictures seen before", "ms", median(&mut warm)),
        ("decode", "tokens/s", median(&mut rates)),
    ];
    if as_json {
        let latency: BTreeMap<&str, f64> =
            latency.iter().map(|(what, _, value)| (*what, *value)).collect();
        output.json(&json!({"answers": answers, "latency": latency}))?;
        return Ok(Outcome::Ok);
    }
    let rows: Vec<Vec<String>> = latency
        .iter()
        .map(|(what, unit, value)| {
            vec![(*what).to_owned(), format!("{value:.2}"), (*unit).to_owned()]
        })
        .collect();
    output.line("")?;
    output.table(&[&format!("median of {} prompts", SHOWN.len()), "", ""], &rows)?;
    Ok(Outcome::Ok)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Answers of one task.
#[derive(Default)]
struct Score {
    n: usize,
    right: usize,
    as_reference: usize,
    near_ties: usize,
}

/// Answers every prompt; the check fails if one differs from PyTorch's answer and is no near-tie.
fn answer_all(
    output: &mut Output,
    model: &Model,
    folder: &Path,
    lines: &[Line],
    as_json: bool,
) -> Result<Outcome> {
    let mut scores: BTreeMap<String, Score> = BTreeMap::new();
    let mut differ = Vec::new();
    for line in lines {
        let n_words = if line.task == "caption" { 8 } else { 1 };
        let options = GenerateOptions { max_new_tokens: n_words, ..GenerateOptions::default() };
        let answer = model.generate(&prompt(folder, line), &options, &mut |_| {})?;
        let name = if line.shots > 0 {
            format!("{} {} shots", line.task, line.shots)
        } else {
            line.task.clone()
        };
        let score = scores.entry(name).or_default();
        score.n += 1;
        score.right += usize::from(answer.text == line.answer);
        match answer.text == line.reference_prediction {
            true => score.as_reference += 1,
            false if line.reference_margin < 0.01 => score.near_ties += 1,
            false => differ.push(format!(
                "{}: expected \"{}\", got \"{}\"",
                describe(line),
                line.reference_prediction,
                answer.text
            )),
        }
    }
    if as_json {
        let tasks: Vec<serde_json::Value> = scores
            .iter()
            .map(|(task, s)| {
                json!({"task": task, "n": s.n, "right": s.right, "as_reference": s.as_reference, "near_ties": s.near_ties})
            })
            .collect();
        output.json(&json!({"tasks": tasks, "differ": differ}))?;
    } else {
        let row = |(task, s): (&String, &Score)| {
            let accuracy = s.right as f64 / s.n as f64;
            vec![
                task.clone(),
                s.n.to_string(),
                format!("{accuracy:.3}"),
                s.as_reference.to_string(),
                s.near_ties.to_string(),
            ]
        };
        let rows: Vec<Vec<String>> = scores.iter().map(row).collect();
        output
            .table(&["task", "prompts", "right", "as PyTorch", "near-ties that differ"], &rows)?;
        for line in &differ {
            output.line(line)?;
        }
    }
    match differ.is_empty() {
        true => Ok(Outcome::Ok),
        false => Ok(Outcome::CheckFailed),
    }
}
