//! The stages of an artifact as cases to time, and what each reads and computes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flamingo_models::manifest::Manifest;
use flamingo_runtime::backend::{Media, Step};
use flamingo_runtime::profile::Record;
use flamingo_runtime::visual_cache::{Fingerprint, MediaKey};
use flamingo_runtime::{Limits, Medium, Model, RunError};
use serde::Serialize;

use super::BenchOptions;
use super::inputs::{Prompt, pixel_values, prompt};
use super::measure::Run;

/// A stage of an artifact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Opening and planning.
    Load,
    /// One picture, resampler and keys and values of the gated layers included.
    Encode,
    /// The resampler's part of an encode.
    Resample,
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
            Stage::Encode => "encode",
            Stage::Resample => "resample",
            Stage::Prefill => "prefill",
            Stage::Decode => "decode",
            Stage::DecodeReprojected => "decode_reprojected",
            Stage::FirstToken => "first_token",
            Stage::FirstTokenWarm => "first_token_warm",
            Stage::FewShot => "few_shot",
            Stage::FewShotBank => "few_shot_bank",
        }
    }
}

/// A stage at one number of pictures.
pub(super) struct Case<'a> {
    pub(super) stage: Stage,
    pub(super) images: usize,
    /// Tokens of the prompt, or before the token that is decoded; 0 without text.
    pub(super) context: usize,
    pub(super) run: Run<'a>,
}

/// Inputs of all cases.
pub(super) struct Inputs {
    /// One picture, `[3, size, size]`.
    pixel_values: Vec<f32>,
    /// By number of pictures: what is prefilled.
    prompts: BTreeMap<usize, Prompt>,
    /// By number of pictures: what lies before a decoded token.
    contexts: BTreeMap<usize, Prompt>,
}

impl Inputs {
    pub(super) fn new(manifest: &Manifest, options: &BenchOptions) -> Inputs {
        let all = |len: usize| {
            let of = |n: &usize| (*n, prompt(manifest, len, *n, options.seed));
            options.images.iter().map(of).collect()
        };
        Inputs {
            pixel_values: pixel_values(manifest, options.seed),
            prompts: all(options.prompt_tokens),
            contexts: all(options.context),
        }
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
    reprojects: bool,
) -> Result<Vec<Case<'m>>, RunError> {
    let mut cases = vec![encode(model, inputs)];
    if model.backend().set_profiling(false) {
        cases.push(resample(model, inputs));
    }
    for (&images, prompt) in &inputs.prompts {
        let media = &media[..images];
        cases.push(prefill(model, prompt, media.to_vec())?);
        if let Some(context) = inputs.contexts.get(&images) {
            cases.push(decode(model, context, media.to_vec())?);
            if reprojects {
                cases.push(reprojected(model, decode(model, context, media.to_vec())?, media));
            }
        }
        cases.push(first_token(model, inputs, prompt, images));
        if model.backend().token_format().is_some() && images > 0 {
            cases.push(first_token_warm(model, inputs, prompt, media));
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
    Case { stage: Stage::Encode, images: 1, context: 0, run: Box::new(run) }
}

/// The times of the resampler's instructions: its graph is that of the encoder.
fn resample<'m>(model: &'m Model, inputs: &'m Inputs) -> Case<'m> {
    let run = move || {
        let encode = &mut || timed(|| model.encode_pixels(&inputs.pixel_values, 1, 1));
        let records = recorded(model, encode)?.unwrap_or_default();
        Ok(records.iter().filter(|record| is_resampler(record)).map(|r| r.duration).sum())
    };
    Case { stage: Stage::Resample, images: 1, context: 0, run: Box::new(run) }
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
    Ok(Case { stage: Stage::Prefill, images, context, run: Box::new(run) })
}

/// The context is prefilled once; each sample steps from its end and is forgotten: cut off where keys and values lie in
/// blocks, a step of a fork where they are whole tensors, which would be copied to be cut.
fn decode<'m>(
    model: &'m Model,
    prompt: &'m Prompt,
    media: Vec<Arc<Media>>,
) -> Result<Case<'m>, RunError> {
    let (images, context) = (media.len(), prompt.input_ids.len());
    let mut whole_context = model.backend().new_sequence(context + 1)?;
    whole_context.advance(&whole(prompt, &media, &[context - 1]))?;
    let mut sequence = whole_context.fork();
    let cuts = sequence.truncates_in_place();
    let seen = prompt.media_time.last().copied().unwrap_or(0);
    let run = move || {
        match cuts {
            true => sequence.truncate(context),
            false => sequence = whole_context.fork(),
        }
        let step = Step {
            input_ids: &prompt.input_ids[context - 1..],
            media_time: &[seen],
            media: &media,
            logit_rows: &[0],
        };
        timed(|| Ok(sequence.advance(&step)?))
    };
    Ok(Case { stage: Stage::Decode, images, context, run: Box::new(run) })
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
    Case { stage: Stage::DecodeReprojected, images, context, run: Box::new(run) }
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
    Case { stage: Stage::FirstToken, images, context, run: Box::new(run) }
}

/// The last picture is new; the others, and the text before it, are in the caches.
fn first_token_warm<'m>(
    model: &'m Model,
    inputs: &'m Inputs,
    prompt: &'m Prompt,
    media: &[Arc<Media>],
) -> Case<'m> {
    let (images, context) = (media.len(), prompt.input_ids.len());
    let known = |(place, media): (usize, &Arc<Media>)| Medium {
        media: Arc::clone(media),
        key: Some(MediaKey::new(&Fingerprint::of(&["bench"]), &[place as f32], 1)),
    };
    let known: Vec<Medium> = media[..images - 1].iter().enumerate().map(known).collect();
    let answer = move || {
        let new = model.encode_pixels(&inputs.pixel_values, 1, 1)?;
        let media: Vec<Medium> =
            known.iter().cloned().chain(new.into_iter().map(Medium::from)).collect();
        let mut session = model.session()?;
        session.append_ids(&prompt.input_ids, &media, &Limits::default())
    };
    let run = move || timed(&answer);
    Case { stage: Stage::FirstTokenWarm, images, context, run: Box::new(run) }
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
