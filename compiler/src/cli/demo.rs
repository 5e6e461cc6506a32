//! `flamingoc demo`.

use std::fs;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use flamingo_runtime::{Answer, GenerateOptions, Model, PromptFile, Segment, VideoFiles};
use flamingo_scenes::Split;
use flamingo_scenes::words::ORDINALS;
use serde::Deserialize;
use serde_json::{Value, json};

use super::eval::table;
use super::output::{Output, bytes, count_bar};
use super::thumbnail::thumbnails;
use super::{Opening, Outcome};
use crate::compile::{CalibrateOn, CompileOptions, compile};
use crate::eval::{EvalOptions, Score, eval, tasks};
use crate::scheme::Precision;

/// Examples of the few-shot tasks that are measured.
const SHOTS: [usize; 3] = [0, 2, 4];
/// Seed of the pictures and prompts that are measured.
const SEED: u64 = 2026;

/// Compile the bundled model and let it answer questions about pictures
///
/// The model is a small Flamingo that flamingo-train made (3 million weights, 78
/// words): it knows coloured shapes and handwritten digits, and nothing of
/// photographs. All pictures are of the test split, which training never saw.
#[derive(Args)]
#[command(after_help = "Examples:
  flamingoc demo
  flamingoc demo --precision f32 --n 500
  flamingoc demo --backend ort --ort-lib libonnxruntime.so")]
pub(super) struct Demo {
    /// Folder of the demo model [default: models/demo of this checkout]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Keep the artifact here
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// How weights are stored
    #[arg(long, value_enum, default_value = "int8")]
    precision: Precision,
    /// Prompts of each task that are measured; 0 for none
    #[arg(long, value_name = "N", default_value = "50")]
    n: usize,
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
}

impl Demo {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        let folder = self.folder()?;
        let lines = read_lines(&folder)?;
        let scratch = tempfile::tempdir()?;
        let artifact = self.output.clone().unwrap_or_else(|| scratch.path().join("demo.flamingo"));
        let started = Instant::now();
        let options = CompileOptions {
            flavours: Vec::new(),
            source: folder.join("recipe.toml"),
            output: artifact.clone(),
            overwrite: true,
            max_context: None,
            max_images: 64,
            scheme: self.precision.into(),
            calibrate: CalibrateOn::Bundled,
            calibration_cache: None,
            observer: None,
            gate: None,
            dump: None,
        };
        let (manifest, _) = compile(&options, &mut |_| {})?;
        let size = manifest.files.iter().map(|file| file.bytes).sum();
        output.note(&format!(
            "compiled {} to {} in {:.2} s ({})\n",
            folder.display(),
            self.precision.name(),
            started.elapsed().as_secs_f64(),
            bytes(size)
        ));
        let model = Model::open(&artifact, &self.opening.options())?;
        let mut shown = Shown::default();
        for line in &lines {
            self.show(output, &model, &folder, line, &mut shown)?;
        }
        let scores = self.measure(&model)?;
        if self.json {
            let latency: Value = shown.latency().into_iter().map(|(k, _, v)| (k, v)).collect();
            output.json(&json!({
                "precision": self.precision.name(),
                "answers": shown.answers,
                "scores": scores,
                "latency": latency,
            }))?;
            return Ok(Outcome::Ok);
        }
        if self.n > 0 {
            output.line(&format!("Pictures of the test split, {} prompts a task:\n", self.n))?;
            table(output, &scores)?;
            output.line("")?;
        }
        let rows: Vec<Vec<String>> = shown
            .latency()
            .iter()
            .map(|(what, unit, value)| {
                vec![(*what).to_owned(), format!("{value:.2}"), (*unit).to_owned()]
            })
            .collect();
        output.table(&[&format!("median of {} prompts", lines.len()), "", ""], &rows)?;
        Ok(Outcome::Ok)
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

    /// One bundled prompt, its pictures if this is a terminal, and the answer as it comes.
    fn show(
        &self,
        output: &mut Output,
        model: &Model,
        folder: &Path,
        line: &Line,
        shown: &mut Shown,
    ) -> Result<()> {
        let mut prompt = PromptFile { segments: line.segments.clone(), ..PromptFile::default() };
        prompt.resolve(folder);
        if !self.json {
            if std::io::stdout().is_terminal() {
                output.text(&thumbnails(&pictures(&prompt)?))?;
            }
            output.line(&describe(line))?;
            output.text("  → ")?;
        }
        let options = GenerateOptions {
            max_new_tokens: line.answer.split(' ').count(),
            ..GenerateOptions::default()
        };
        let mut written = Ok(());
        let answer = model.generate(&prompt, &options, &mut |piece| {
            if !self.json && written.is_ok() {
                written = output.text(piece);
            }
        })?;
        written?;
        let picture = picture_meant(line, &answer.text);
        if !self.json {
            let meant = picture.as_ref().map(|name| format!(", that is [{name}]"));
            let verdict = match answer.text == line.answer {
                true => "right".to_owned(),
                false => format!("wrong: {}", line.answer),
            };
            output.line(&format!("{}   ({verdict})\n", meant.unwrap_or_default()))?;
        }
        let again = model.generate(&prompt, &options, &mut |_| {})?;
        shown.add(line, &answer, &again, picture);
        Ok(())
    }

    fn measure(&self, model: &Model) -> Result<Vec<Score>> {
        if self.n == 0 {
            return Ok(Vec::new());
        }
        let options = EvalOptions {
            tasks: tasks(&[], &SHOTS)?,
            split: Split::Test,
            n: self.n,
            seed: SEED,
            blind: false,
        };
        let bar = count_bar();
        bar.set_length((options.n * options.tasks.len()) as u64);
        let scores = eval(model, &options, &mut |question, _| {
            bar.set_message(question.task.name());
            bar.inc(1);
            Ok(())
        });
        bar.finish_and_clear();
        scores
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

/// Files of the pictures, a video's frame by frame.
fn files(segments: &[Segment]) -> Vec<&PathBuf> {
    let mut files = Vec::new();
    for segment in segments {
        match segment {
            Segment::Image { image } => files.push(image),
            Segment::Video { video: VideoFiles::File(file), .. } => files.push(file),
            Segment::Video { video: VideoFiles::Frames(frames), .. } => files.extend(frames),
            Segment::Text { .. } | Segment::EndOfChunk { .. } => {}
        }
    }
    files
}

fn pictures(prompt: &PromptFile) -> Result<Vec<image::RgbImage>> {
    let open = |file: &PathBuf| {
        let picture = image::open(file);
        let picture = picture.with_context(|| format!("cannot read `{}`", file.display()))?;
        Ok(picture.into_rgb8())
    };
    files(&prompt.segments).into_iter().map(open).collect()
}

fn name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The prompt for people: pictures by name.
fn describe(line: &Line) -> String {
    let word = |segment: &Segment| match segment {
        Segment::Image { image } => format!("[{}]", name(image)),
        Segment::Video { video: VideoFiles::File(file), .. } => format!("[{}]", name(file)),
        Segment::Video { video: VideoFiles::Frames(files), .. } => {
            let first = files.first().map(|file| name(file)).unwrap_or_default();
            format!("[{first} … {} frames]", files.len())
        }
        Segment::Text { text } => text.clone(),
        Segment::EndOfChunk { .. } => "|".to_owned(),
    };
    line.segments.iter().map(word).collect::<Vec<String>>().join(" ")
}

/// The picture that an answer such as `second` means.
fn picture_meant(line: &Line, answer: &str) -> Option<String> {
    let index = ORDINALS.iter().position(|ordinal| *ordinal == answer)?;
    files(&line.segments).get(index).map(|file| name(file))
}

/// What was answered, and how fast.
#[derive(Default)]
struct Shown {
    answers: Vec<Value>,
    cold: Vec<f64>,
    warm: Vec<f64>,
    rates: Vec<f64>,
}

impl Shown {
    fn add(&mut self, line: &Line, answer: &Answer, again: &Answer, picture: Option<String>) {
        self.cold.push(answer.timings.first_token_ms);
        self.warm.push(again.timings.first_token_ms);
        self.rates.extend(answer.timings.decode_tokens_per_s);
        self.answers.push(json!({
            "task": line.task,
            "shots": line.shots,
            "prompt": describe(line),
            "text": answer.text,
            "answer": line.answer,
            "picture": picture,
        }));
    }

    fn latency(&mut self) -> [(&'static str, &'static str, f64); 3] {
        [
            ("first token, pictures not seen before", "ms", median(&mut self.cold)),
            ("first token, pictures seen before", "ms", median(&mut self.warm)),
            ("decode", "tokens/s", median(&mut self.rates)),
        ]
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
