//! The stages of an artifact as cases to time, and what each reads and computes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flamingo_models::manifest::Manifest;
use flamingo_runtime::backend::{Media, Sequence, Step};
use flamingo_runtime::image;
use flamingo_runtime::profile::Record;
use flamingo_runtime::visual_cache::{Fingerprint, MediaKey};
use flamingo_runtime::{Limits, Medium, Model, RunError};
use serde::Serialize;

use super::BenchOptions;
use super::inputs::{Prompt, jpeg, pixel_values, prompt};
use super::measure::Run;

/// A stage of an artifact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Opening and planning.
    Load,
    /// A picture file decoded, resized and normalised.
    Preprocess,
    /// One picture, resampler and keys and values of the gated layers included.
    Encode,
    /// The resampler's part of an encode.
    Resample,
    /// Keys and values of the gated layers out of one picture's visual tokens.
    MediaKv,
    /// A prompt over encoded pictures.
    Prefill,
    /// One token over encoded pictures.
    Decode,
    /// The same with keys and values of every picture made again: what runtimes without a cache of them do.
    DecodeReprojected,
    /// Pictures and prompt, to the first logits.
    FirstToken,
    /// The same after a prompt that had all but the last picture, and the text before it.
    FirstTokenWarm,
    /// The same after a prompt that had all of it.
    FirstTokenHot,
    /// A question after few-shot examples from files, to the first token, nothing known before.
    FewShot,
    /// The same where the examples lie in a bank that was used before.
    FewShotBank,
}

impl Stage {
    /// Its name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Load => "load",
            Stage::Preprocess => "preprocess",
            Stage::Encode => "encode",
            Stage::Resample => "resample",
            Stage::MediaKv => "media_kv",
            Stage::Prefill => "prefill",
            Stage::Decode => "decode",
            Stage::DecodeReprojected => "decode_reprojected",
            Stage::FirstToken => "first_token",
            Stage::FirstTokenWarm => "first_token_warm",
            Stage::FirstTokenHot => "first_token_hot",
            Stage::FewShot => "few_shot",
            Stage::FewShotBank => "few_shot_bank",
        }
    }
}

/// A stage at one size.
pub(super) struct Case<'a> {
    /// Number of the subject.
    pub(super) subject: usize,
    pub(super) stage: Stage,
    pub(super) images: usize,
    /// Tokens of the prompt, or before the token that is decoded; 0 without text.
    pub(super) context: usize,
    /// Sequences that take a step together.
    pub(super) batch: usize,
    pub(super) run: Run<'a>,
}

impl<'a> Case<'a> {
    /// Of the first subject, and one sequence.
    pub(super) fn new(stage: Stage, images: usize, context: usize, run: Run<'a>) -> Case<'a> {
        Case { subject: 0, stage, images, context, batch: 1, run }
    }
}

/// Inputs of all cases.
pub(super) struct Inputs {
    /// A picture as a JPEG file.
    picture: Vec<u8>,
    /// One picture, `[3, size, size]`.
    pixel_values: Vec<f32>,
    /// By number of pictures: what is prefilled.
    prompts: BTreeMap<usize, Prompt>,
    /// By number of pictures and of tokens: what lies before a decoded token.
    contexts: BTreeMap<(usize, usize), Prompt>,
}

impl Inputs {
    pub(super) fn new(manifest: &Manifest, options: &BenchOptions) -> Result<Inputs, RunError> {
        let prompt = |len: usize, images: usize| prompt(manifest, len, images, options.seed);
        let sizes = options.images.iter();
        let sizes = sizes.flat_map(|n| options.contexts.iter().map(move |len| (*n, *len)));
        Ok(Inputs {
            picture: jpeg(options.picture, options.seed)?,
            pixel_values: pixel_values(manifest, options.seed),
            prompts: options
                .images
                .iter()
                .map(|n| (*n, prompt(options.prompt_tokens, *n)))
                .collect(),
            contexts: sizes.map(|(n, len)| ((n, len), prompt(len, n))).collect(),
        })
    }
}

/// Encoded pictures: copies of one, each with memory of its own as different pictures have.
pub(super) fn encoded(
    model: &Model,
    inputs: &Inputs,
    n: usize,
) -> Result<Vec<Arc<Media>>, RunError> {
    let one = model.encode_pixels(&inputs.pixel_values, 1, 1)?;
    let copy = |medium: &Arc<Media>| Arc::new(Media::clone(medium));
    Ok(one.iter().cycle().take(if one.is_empty() { 0 } else { n }).map(copy).collect())
}

/// All cases but `load`, over `media`, which are as many as the largest number of pictures.
pub(super) fn cases<'m>(
    model: &'m Model,
    inputs: &'m Inputs,
    media: &[Arc<Media>],
    options: &BenchOptions,
) -> Result<Vec<Case<'m>>, RunError> {
    let keeps_tokens = model.backend().token_format().is_some();
    let mut cases = vec![preprocess(model, inputs), encode(model, inputs)];
    if model.backend().set_profiling(false) {
        cases.push(resample(model, inputs));
    }
    if let (true, Some(medium)) = (keeps_tokens, media.first()) {
        cases.push(media_kv(model, medium));
    }
    for (&images, prompt) in &inputs.prompts {
        let media = &media[..images];
        cases.push(prefill(model, prompt, media.to_vec())?);
        for ((_, _), context) in inputs.contexts.range((images, 0)..=(images, usize::MAX)) {
            for batch in &options.batches {
                cases.push(decode(model, context, media.to_vec(), *batch)?);
            }
            if options.reproject {
                let step = decode(model, context, media.to_vec(), 1)?;
                cases.push(reprojected(model, step, media));
            }
        }
        cases.push(first_token(model, inputs, prompt, images));
        if keeps_tokens && images > 0 {
            cases.push(first_token_warm(model, inputs, prompt, media));
        }
        if keeps_tokens {
            cases.push(first_token_hot(model, prompt, media));
        }
    }
    Ok(cases)
}

/// Times `work`.
pub(super) fn timed<T>(work: impl FnOnce() -> Result<T, RunError>) -> Result<Duration, RunError> {
    let start = Instant::now();
    let result = work()?;
    let duration = start.elapsed();
    drop(result);
    Ok(duration)
}

fn encode<'m>(model: &'m Model, inputs: &'m Inputs) -> Case<'m> {
    let run = move || timed(|| model.encode_pixels(&inputs.pixel_values, 1, 1));
    Case::new(Stage::Encode, 1, 0, Box::new(run))
}

fn preprocess<'m>(model: &'m Model, inputs: &'m Inputs) -> Case<'m> {
    let spec = &model.manifest().image;
    let work = move || Ok(image::preprocess(&image::decode(&inputs.picture)?, spec)?);
    Case::new(Stage::Preprocess, 1, 0, Box::new(move || timed(work)))
}

fn media_kv<'m>(model: &'m Model, medium: &Arc<Media>) -> Case<'m> {
    let tokens = medium.visual_tokens.clone();
    let run = move || {
        let tokens = tokens.clone();
        timed(|| Ok(model.backend().media_from_tokens(tokens, 1)?))
    };
    Case::new(Stage::MediaKv, 1, 0, Box::new(run))
}

/// The times of the resampler's instructions: its graph is that of the encoder.
fn resample<'m>(model: &'m Model, inputs: &'m Inputs) -> Case<'m> {
    let run = move || {
        let encode = &mut || timed(|| model.encode_pixels(&inputs.pixel_values, 1, 1));
        let records = recorded(model, encode)?.unwrap_or_default();
        Ok(records.iter().filter(|record| is_resampler(record)).map(|r| r.duration).sum())
    };
    Case::new(Stage::Resample, 1, 0, Box::new(run))
}

pub(super) fn is_resampler(record: &Record) -> bool {
    record.node.split('.').next() == Some("resampler")
}

fn whole<'a>(prompt: &'a Prompt, media: &'a [Arc<Media>], last: &'a [usize]) -> Step<'a> {
    let Prompt { input_ids, media_time } = prompt;
    Step { input_ids, media_time, media, logit_rows: last }
}

fn prefill<'m>(
    model: &'m Model,
    prompt: &'m Prompt,
    media: Vec<Arc<Media>>,
) -> Result<Case<'m>, RunError> {
    let (images, context) = (media.len(), prompt.input_ids.len());
    let mut sequence = model.backend().new_sequence(context)?;
    let run = move || {
        sequence.truncate(0);
        timed(|| Ok(sequence.advance(&whole(prompt, &media, &[context - 1]))?))
    };
    Ok(Case::new(Stage::Prefill, images, context, Box::new(run)))
}

/// The context is prefilled once; each sample steps from its end and is forgotten: cut off where keys and values lie in
/// blocks, a step of a fork where they are whole tensors, which would be copied to be cut. Sequences of a batch have the
/// same context, each in memory of its own.
fn decode<'m>(
    model: &'m Model,
    prompt: &'m Prompt,
    media: Vec<Arc<Media>>,
    batch: usize,
) -> Result<Case<'m>, RunError> {
    let (images, context) = (media.len(), prompt.input_ids.len());
    let mut wholes = Vec::with_capacity(batch);
    for _ in 0..batch {
        let mut sequence = model.backend().new_sequence(context + 1)?;
        sequence.advance(&whole(prompt, &media, &[context - 1]))?;
        wholes.push(sequence);
    }
    let mut sequences: Vec<_> = wholes.iter().map(|whole| whole.fork()).collect();
    let cuts = sequences.iter().all(|sequence| sequence.truncates_in_place());
    let seen = prompt.media_time.last().copied().unwrap_or(0);
    let run = move || {
        match cuts {
            true => sequences.iter_mut().for_each(|sequence| sequence.truncate(context)),
            false => sequences = wholes.iter().map(|whole| whole.fork()).collect(),
        }
        let step = Step {
            input_ids: &prompt.input_ids[context - 1..],
            media_time: &[seen],
            media: &media,
            logit_rows: &[0],
        };
        step_of_all(model, &mut sequences, step)
    };
    Ok(Case { batch, ..Case::new(Stage::Decode, images, context, Box::new(run)) })
}

fn step_of_all(
    model: &Model,
    sequences: &mut [Box<dyn Sequence>],
    step: Step<'_>,
) -> Result<Duration, RunError> {
    if let [sequence] = sequences {
        return timed(|| Ok(sequence.advance(&step)?));
    }
    let mut together: Vec<(&mut dyn Sequence, Step<'_>)> = Vec::with_capacity(sequences.len());
    for sequence in sequences {
        together.push((sequence.as_mut(), step));
    }
    timed(|| Ok(model.backend().advance_together(&mut together)?))
}

/// A step with the keys and values of all pictures made from their visual tokens before it.
fn reprojected<'m>(model: &'m Model, decode: Case<'m>, media: &[Arc<Media>]) -> Case<'m> {
    let Case { images, context, run: mut step, .. } = decode;
    let media = media.to_vec();
    let run = move || {
        let start = Instant::now();
        for medium in &media {
            drop(model.backend().media_from_tokens(medium.visual_tokens.clone(), 1)?);
        }
        Ok(start.elapsed() + step()?)
    };
    Case::new(Stage::DecodeReprojected, images, context, Box::new(run))
}

/// Nothing is known before: every picture is encoded, and the caches are new.
fn first_token<'m>(
    model: &'m Model,
    inputs: &'m Inputs,
    prompt: &'m Prompt,
    images: usize,
) -> Case<'m> {
    let context = prompt.input_ids.len();
    let answer = move || {
        let mut media = Vec::with_capacity(images);
        for _ in 0..images {
            media.extend(model.encode_pixels(&inputs.pixel_values, 1, 1)?);
        }
        let mut sequence = model.backend().new_sequence(context)?;
        Ok(sequence.advance(&whole(prompt, &media, &[context - 1]))?)
    };
    let run = move || timed(answer);
    Case::new(Stage::FirstToken, images, context, Box::new(run))
}

/// The last picture is new; the others, and the text before it, are in the caches.
fn first_token_warm<'m>(
    model: &'m Model,
    inputs: &'m Inputs,
    prompt: &'m Prompt,
    media: &[Arc<Media>],
) -> Case<'m> {
    let (images, context) = (media.len(), prompt.input_ids.len());
    let known = known(&media[..images - 1]);
    let answer = move || {
        let new = model.encode_pixels(&inputs.pixel_values, 1, 1)?;
        let media: Vec<Medium> =
            known.iter().cloned().chain(new.into_iter().map(Medium::from)).collect();
        let mut session = model.session()?;
        session.append_ids(&prompt.input_ids, &media, &Limits::default())
    };
    let run = move || timed(&answer);
    Case::new(Stage::FirstTokenWarm, images, context, Box::new(run))
}

/// Pictures and text are in the caches.
fn first_token_hot<'m>(model: &'m Model, prompt: &'m Prompt, media: &[Arc<Media>]) -> Case<'m> {
    let (images, context) = (media.len(), prompt.input_ids.len());
    let media = known(media);
    let answer = move || {
        let mut session = model.session()?;
        session.append_ids(&prompt.input_ids, &media, &Limits::default())
    };
    let run = move || timed(&answer);
    Case::new(Stage::FirstTokenHot, images, context, Box::new(run))
}

/// Media that a prefix cache can tell apart.
fn known(media: &[Arc<Media>]) -> Vec<Medium> {
    let known = |(place, media): (usize, &Arc<Media>)| Medium {
        media: Arc::clone(media),
        key: Some(MediaKey::new(&Fingerprint::of(&["bench"]), &[place as f32], 1)),
    };
    media.iter().enumerate().map(known).collect()
}

/// What the instructions of one run were; none for an engine that does not tell.
pub(super) fn recorded(
    model: &Model,
    run: &mut dyn FnMut() -> Result<Duration, RunError>,
) -> Result<Option<Vec<Record>>, RunError> {
    let backend = model.backend();
    if !backend.set_profiling(true) {
        return Ok(None);
    }
    backend.take_profile();
    let ran = run();
    backend.set_profiling(false);
    let records = backend.take_profile();
    ran.map(|_| Some(records))
}
