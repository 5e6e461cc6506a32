//! Calibration: prompts through an artifact in f32, and what the rows that meet each weight look like.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use flamingo_ir::op::Inputs;
use flamingo_runtime::backend::Media;
use flamingo_runtime::{Model, PromptFile, Segment};
use flamingo_scenes::Split;
use flamingo_scenes::draw::{self, draw};
use flamingo_scenes::facts::Facts;
use flamingo_scenes::random::stream;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;

use crate::eval::{self, EvalOptions, tasks};
use crate::parity::cases;

/// Seed of the bundled default.
const SEED: u64 = 6;

/// A prompt as the model reads it.
#[derive(Debug, Clone)]
pub struct Example {
    /// Tokens, the answer among them where there is one.
    pub input_ids: Vec<u32>,
    /// Pixel values `[n_frames, 3, size, size]` of each medium, and its frames.
    pub media: Vec<(Vec<f32>, usize)>,
}

impl Example {
    /// Visual tokens of all media, and logits `[L, vocabulary]`.
    ///
    /// # Errors
    /// A prompt that does not fit the model.
    pub fn run(&self, model: &Model) -> Result<(Vec<f32>, Vec<f32>)> {
        let mut media: Vec<Arc<Media>> = Vec::new();
        for (pixels, n_frames) in &self.media {
            media.extend(model.encode_pixels(pixels, 1, *n_frames)?);
        }
        let visual_tokens = media.iter().flat_map(|m| m.visual_tokens.iter().copied()).collect();
        Ok((visual_tokens, model.logits(&self.input_ids, &media)?))
    }
}

/// What calibration saw of the rows that meet each weight.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Calibration {
    by_weight: BTreeMap<String, Inputs>,
}

impl Calibration {
    /// What met a weight.
    pub fn inputs(&self, weight: &str) -> Option<&Inputs> {
        self.by_weight.get(weight)
    }

    /// The same under other names, given as pairs of new and old.
    pub fn renamed<'a>(&self, names: impl Iterator<Item = (String, &'a str)>) -> Calibration {
        let inputs = |(new, old): (String, &str)| Some((new, self.inputs(old)?.clone()));
        Calibration { by_weight: names.filter_map(inputs).collect() }
    }

    /// Writes it, with a `key` that says what it is of.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, path: &Path, key: &str) -> Result<()> {
        let mut metadata = HashMap::from([(KEY.to_owned(), key.to_owned())]);
        let mut views = Vec::new();
        for (name, inputs) in &self.by_weight {
            metadata.insert(format!("n_rows.{name}"), inputs.n_rows().to_string());
            let (largest, products) = inputs.parts();
            for (part, values) in [(LARGEST, largest), (PRODUCTS, products)] {
                let bytes = bytemuck::cast_slice(values);
                views.push((
                    format!("{name}{part}"),
                    TensorView::new(Dtype::F32, vec![values.len()], bytes)?,
                ));
            }
        }
        let unfinished = path.with_extension("unfinished");
        safetensors::serialize_to_file(views, Some(metadata), &unfinished)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(std::fs::rename(&unfinished, path)?))
            .with_context(|| format!("cannot write `{}`", path.display()))
    }

    /// Reads what [`Calibration::save`] wrote with the same key.
    ///
    /// # Errors
    /// A file that cannot be read, or is none of those, or of another model or other prompts.
    pub fn load(path: &Path, key: &str) -> Result<Calibration> {
        let bytes =
            std::fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
        let place = || format!("`{}` is no calibration", path.display());
        let (_, header) = SafeTensors::read_metadata(&bytes).with_context(place)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let entry = |name: &str| metadata.get(name).with_context(|| format!("no `{name}`"));
        let number = |name: &str| Ok::<usize, anyhow::Error>(entry(name)?.parse()?);
        ensure!(
            entry(KEY).with_context(place)? == key,
            "`{}` is of another model or of other prompts\n\n\
             hint: give another `--calibration-cache`, or remove the file",
            path.display()
        );
        let tensors = SafeTensors::deserialize(&bytes).with_context(place)?;
        let values = |name: &str| -> Result<Vec<f32>> {
            let view = tensors.tensor(name)?;
            ensure!(view.dtype() == Dtype::F32, "`{name}` is not f32");
            let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            Ok(view.data().chunks_exact(4).map(value).collect())
        };
        let mut by_weight = BTreeMap::new();
        for tensor in tensors.names() {
            let Some(name) = tensor.strip_suffix(LARGEST) else { continue };
            let n_rows = number(&format!("n_rows.{name}")).with_context(place)?;
            let products = values(&format!("{name}{PRODUCTS}")).with_context(place)?;
            let inputs = Inputs::from_parts(n_rows, values(tensor)?, products);
            by_weight.insert(name.to_owned(), inputs.with_context(place)?);
        }
        Ok(Calibration { by_weight })
    }
}

const KEY: &str = "calibration_of";
const LARGEST: &str = ".largest";
const PRODUCTS: &str = ".products";

/// Runs prompts through a model whose weights are f32; tells each before it begins.
///
/// # Errors
/// An engine that shows no rows, or a prompt that does not fit the model.
pub fn calibrate(
    model: &Model,
    examples: &[Example],
    on_example: &mut dyn FnMut(usize),
) -> Result<Calibration> {
    let seen: Arc<Mutex<BTreeMap<String, Inputs>>> = Arc::default();
    let watched = Arc::clone(&seen);
    let watcher = Arc::new(move |weight: &str, rows: &[f32], k: usize| {
        let mut seen = watched.lock().unwrap_or_else(PoisonError::into_inner);
        if !seen.contains_key(weight) {
            seen.insert(weight.to_owned(), Inputs::new(k));
        }
        if let Some(inputs) = seen.get_mut(weight).filter(|inputs| inputs.k() == k) {
            inputs.add(rows);
        }
    });
    ensure!(model.backend().set_watcher(Some(watcher)), "calibration needs the native engine");
    let run = |(index, example): (usize, &Example)| {
        on_example(index);
        example.run(model).map(drop)
    };
    let result: Result<()> = examples.iter().enumerate().try_for_each(run);
    model.backend().set_watcher(None);
    result?;
    let by_weight = std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(Calibration { by_weight })
}

/// A line of a file of prompts; other keys are for other readers.
#[derive(Deserialize)]
struct Line {
    segments: Vec<Segment>,
    /// What the prompt should be answered with; it is read after it.
    #[serde(default)]
    answer: Option<String>,
}

/// Prompts of a file: JSON with `segments` as in a prompt file, and if known an `answer`, in each line; paths are
/// relative to the file.
///
/// # Errors
/// A line that is no prompt, or a picture that cannot be read, with its line.
pub fn from_file(model: &Model, path: &Path) -> Result<Vec<Example>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read `{}`", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut examples = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = || format!("`{}` line {}", path.display(), index + 1);
        let Line { mut segments, answer } = serde_json::from_str(line).with_context(place)?;
        segments.extend(answer.map(|answer| Segment::Text { text: format!(" {answer}") }));
        let mut prompt = PromptFile { segments, ..PromptFile::default() };
        prompt.resolve(folder);
        let input_ids = model.encode_prompt(&prompt).with_context(place)?;
        examples
            .push(Example { input_ids, media: model.pixel_values(&prompt).with_context(place)? });
    }
    ensure!(
        !examples.is_empty(),
        "`{}` has no prompts\n\nhint: one prompt in JSON a line, as in a prompt file",
        path.display()
    );
    Ok(examples)
}

/// The bundled default: generated scenes with questions and answers about them; of a model without a tokenizer random
/// tokens and pictures. `first` skips so many, so that what is judged was not calibrated on.
///
/// # Errors
/// A model that its own limits leave no prompt.
pub fn bundled(model: &Model, first: usize, n: usize) -> Result<Vec<Example>> {
    if eval::check_words(model).is_ok() {
        return of_tasks(model, first, n);
    }
    match model.tokenizer() {
        Ok(_) => (first..first + n).map(|number| of_scene(model, number)).collect(),
        Err(_) => random(model, first, n),
    }
}

/// Prompts of the demo's tasks, in turn, with their right answers.
fn of_tasks(model: &Model, first: usize, n: usize) -> Result<Vec<Example>> {
    let all = tasks(&[], &[2, 4])?;
    let options =
        EvalOptions { tasks: all.clone(), split: Split::Train, n: 0, seed: SEED, blind: false };
    let of = |number: usize| {
        let task = all[number % all.len()];
        let question = eval::Question::new(task, &options, number / all.len());
        let input_ids = [question.prompt.as_slice(), &question.answer].concat();
        let media = question.media.iter().map(|frames| pixels(model, frames));
        Ok(Example { input_ids, media: media.collect::<Result<_>>()? })
    };
    (first..first + n).map(of).collect()
}

fn pixels(model: &Model, frames: &[draw::Pixels]) -> Result<(Vec<f32>, usize)> {
    Ok((eval::pixel_values(model, frames)?, frames.len()))
}

/// Two pictures with a sentence each, in the model's own words.
fn of_scene(model: &Model, number: usize) -> Result<Example> {
    let mut rng = stream(SEED, &format!("calibration/{number}"));
    let (mut segments, mut media) = (Vec::new(), Vec::new());
    for opening in ["Output:", "Question: what is in the picture? Answer:"] {
        let facts = Facts::picture(Split::Train, &mut rng);
        let text = format!("{opening} {}.", facts.caption().join(" "));
        segments.push(Segment::Image { image: PathBuf::new() });
        segments.push(Segment::Text { text });
        segments.push(Segment::EndOfChunk { end_of_chunk: true });
        media.push(pixels(model, &draw(facts, Split::Train, &mut rng).frames)?);
    }
    let prompt = PromptFile { segments, ..PromptFile::default() };
    Ok(Example { input_ids: model.encode_prompt(&prompt)?, media })
}

fn random(model: &Model, first: usize, n: usize) -> Result<Vec<Example>> {
    let config = &model.manifest().config;
    let mut examples = Vec::new();
    for seed in 0u64.. {
        if examples.len() >= first + n {
            break;
        }
        for case in cases(config, SEED + seed) {
            let each = case.pixel_values.len() / case.n_media.max(1);
            let media = case.pixel_values.chunks(each.max(1)).map(|p| (p.to_vec(), 1)).collect();
            examples.push(Example { input_ids: case.input_ids, media });
        }
    }
    match examples.split_off(first.min(examples.len())) {
        rest if rest.is_empty() => bail!("no prompts to calibrate on"),
        mut rest => {
            rest.truncate(n);
            Ok(rest)
        }
    }
}
