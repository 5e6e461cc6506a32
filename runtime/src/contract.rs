//! What the graphs of an artifact take and put out, and what a step must give: the checks that
//! all backends share, so that they refuse the same things in the same words.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use flamingo_ir::{DType, Dim, Fact, Graph, ValueId};

use crate::backend::{BackendError, Media, MediaKv, Step};

/// The two graphs of an artifact, found to fit each other.
#[derive(Clone, Debug)]
pub(crate) struct Contract {
    /// What pictures look like.
    pub(crate) pictures: PictureShape,
    /// What each output of the media graph is, in order.
    media_outputs: Vec<MediaOutput>,
    /// Gated blocks.
    n_blocks: usize,
    /// Places in a prompt that the media graph computes a medium for.
    n_places: usize,
}

/// What the media graph says of its pictures.
#[derive(Clone, Debug)]
pub(crate) struct PictureShape {
    /// Channels, height, width.
    pub(crate) frame_shape: Vec<usize>,
    /// Frames, where the graph fixes them.
    pub(crate) n_frames: Option<usize>,
    /// Rows of the table of temporal embeddings, if there is one.
    pub(crate) n_max_frames: Option<usize>,
}

/// What an output of the media graph is, per medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MediaOutput {
    VisualTokens { width: usize },
    K(usize),
    V(usize),
}

impl Contract {
    /// Reads the contract off the graphs.
    ///
    /// # Errors
    /// Lists the differences between a graph and what every artifact's graph is.
    pub(crate) fn new(media: &Graph, decoder: &Graph) -> Result<Contract, BackendError> {
        let pictures = picture_shape(media)?;
        let media_outputs = media_outputs(media)?;
        check_decoder(media, decoder)?;
        let block = |output: &MediaOutput| match output {
            MediaOutput::K(block) | MediaOutput::V(block) => Some(block + 1),
            MediaOutput::VisualTokens { .. } => None,
        };
        let n_blocks = media_outputs.iter().filter_map(block).max().unwrap_or(0);
        let n_places = n_places(media, decoder);
        Ok(Contract { pictures, media_outputs, n_blocks, n_places })
    }

    /// Place of `visual_tokens` among the media graph's outputs.
    pub(crate) fn tokens_place(&self) -> usize {
        let is_tokens = |output: &MediaOutput| matches!(output, MediaOutput::VisualTokens { .. });
        self.media_outputs.iter().position(is_tokens).unwrap_or(0)
    }

    /// One medium from the media graph's outputs, in the order of the graph.
    pub(crate) fn media_from_outputs(&self, outputs: Vec<Vec<f32>>) -> Media {
        let mut media = Media::default();
        let mut blocks = vec![(Vec::new(), Vec::new()); self.n_blocks];
        for (output, data) in self.media_outputs.iter().zip(outputs) {
            match output {
                MediaOutput::VisualTokens { width } => {
                    media.n_latents = data.len() / width.max(&1);
                    media.visual_tokens = data;
                }
                MediaOutput::K(block) => blocks[*block].0 = data,
                MediaOutput::V(block) => blocks[*block].1 = data,
            }
        }
        let block = |(k, v): (Vec<f32>, Vec<f32>)| match k.is_empty() && v.is_empty() {
            true => MediaKv::None,
            false => MediaKv::Rows { k, v },
        };
        media.blocks = blocks.into_iter().map(block).collect();
        if self.n_places > 1 { media.split(self.n_places) } else { media }
    }
}

impl PictureShape {
    /// Numbers of one frame; the product was checked when the graph was read.
    fn frame_elements(&self) -> usize {
        self.frame_shape.iter().product()
    }

    /// Numbers of one medium, after checking that `n_elements` are those of `n_media`.
    ///
    /// # Errors
    /// If they are not, or the graph takes another number of frames.
    pub(crate) fn check(
        &self,
        n_elements: usize,
        n_media: usize,
        n_frames: usize,
    ) -> Result<usize, BackendError> {
        let wrong = |expected: String, found: String| BackendError::Input {
            place: "pixel_values".into(),
            expected,
            found,
            hint: "prepare pictures with the image spec of this artifact",
        };
        if n_frames == 0 || self.n_frames.is_some_and(|expected| expected != n_frames) {
            let expected =
                self.n_frames.map_or("1 frame or more".into(), |n| format!("{n} frames"));
            return Err(wrong(expected, format!("{n_frames} frames")));
        }
        let medium_elements = self.frame_elements().checked_mul(n_frames);
        let expected = medium_elements.and_then(|medium| medium.checked_mul(n_media));
        match (medium_elements, expected) {
            (Some(medium), Some(expected)) if expected == n_elements && medium > 0 => Ok(medium),
            _ => {
                let frame = self.frame_elements();
                let expected = format!("{n_media} media x {n_frames} frames x {frame} numbers");
                Err(wrong(expected, format!("{n_elements} numbers")))
            }
        }
    }
}

/// Checks room, and lengths that must agree, of a step after `len` tokens.
///
/// # Errors
/// The first thing that does not fit.
pub(crate) fn check_step(
    step: &Step<'_>,
    len: usize,
    max_context: usize,
) -> Result<(), BackendError> {
    let wrong = |place: &str, expected: String, found: String, hint| {
        Err(BackendError::Input { place: place.into(), expected, found, hint })
    };
    let text_len = step.input_ids.len();
    if text_len == 0 {
        let hint = "a prompt starts with a begin-of-text token";
        return wrong("input_ids", "1 token or more".into(), "none".into(), hint);
    }
    if step.media_time.len() != text_len {
        let found = step.media_time.len().to_string();
        let hint = "give one entry of `media_time` for each token";
        return wrong("media_time", format!("{text_len} entries"), found, hint);
    }
    let n_media = u32::try_from(step.media.len()).unwrap_or(u32::MAX);
    if let Some(time) = step.media_time.iter().find(|time| **time > n_media) {
        let hint = "give as many media as the text has image tokens";
        return wrong("media_time", format!("0 to {n_media}"), time.to_string(), hint);
    }
    let n_places = step.media.iter().map(|media| media.later.len()).filter(|later| *later > 0);
    if let Some(n_places) = n_places.min().map(|later| later + 1).filter(|n| step.media.len() > *n)
    {
        let found = format!("{} media", step.media.len());
        let hint = "the checkpoint has no embeddings for more places in a prompt";
        return wrong("media", format!("at most {n_places} media"), found, hint);
    }
    if let Some(row) = step.logit_rows.iter().find(|row| **row >= text_len) {
        let hint = "logit rows count from the first new token";
        return wrong("logit_rows", format!("rows below {text_len}"), row.to_string(), hint);
    }
    match max_context.saturating_sub(len) < text_len {
        true => Err(full(step, len, max_context)),
        false => Ok(()),
    }
}

/// More tokens than there is room for.
pub(crate) fn full(step: &Step<'_>, len: usize, max_context: usize) -> BackendError {
    BackendError::Input {
        place: "input_ids".into(),
        expected: format!("at most {} more tokens", max_context.saturating_sub(len)),
        found: step.input_ids.len().to_string(),
        hint: "shorten the prompt or pass a larger `--max-context`",
    }
}

/// An input of a graph that is not of the size or range it must be.
pub(crate) fn wrong_input(
    graph: &str,
    name: &str,
    expected: String,
    found: String,
) -> BackendError {
    BackendError::Input {
        place: format!("graph \"{graph}\": input `{name}`"),
        expected,
        found,
        hint: "check the sizes against `inspect`, and that prompt and artifact belong together",
    }
}

/// Checks that each index plus `offset` is a row of a table of `limit` rows.
///
/// # Errors
/// The first index that is not.
pub(crate) fn check_range(
    graph: &str,
    name: &str,
    indices: &[i64],
    offset: i64,
    limit: usize,
) -> Result<(), BackendError> {
    let row = |index: i64| usize::try_from(index.checked_add(offset)?).ok();
    let is_outside = |index: &&i64| row(**index).is_none_or(|row| row >= limit);
    match indices.iter().find(is_outside) {
        None => Ok(()),
        Some(index) => {
            let (first, limit) = (offset.saturating_neg(), i128::try_from(limit).unwrap_or(0));
            let expected = format!("{first} to {}", limit - 1 - i128::from(offset));
            Err(wrong_input(graph, name, expected, index.to_string()))
        }
    }
}

/// Checks that the keys or values `found` of the `index`-th medium are `n_latents` rows.
///
/// # Errors
/// If they are not.
pub(crate) fn check_medium(
    (graph, name): (&str, &str),
    index: usize,
    found: usize,
    [n_latents, width]: [usize; 2],
) -> Result<(), BackendError> {
    if Some(found) == n_latents.checked_mul(width) {
        return Ok(());
    }
    let expected = format!("{n_latents} x {width} elements for medium {}", index + 1);
    Err(wrong_input(graph, name, expected, found.to_string()))
}

/// Sizes as i64; `None` if one does not fit.
pub(crate) fn indices(sizes: impl Iterator<Item = usize>) -> Option<Vec<i64>> {
    sizes.map(|size| i64::try_from(size).ok()).collect()
}

/// A graph that is not one of an artifact.
pub(crate) fn broken(graph: &Graph, problems: Vec<String>) -> BackendError {
    BackendError::Graph { graph: graph.name.clone(), problems }
}

fn fact_of<'g>(graph: &'g Graph, values: &[(String, ValueId)], name: &str) -> Option<&'g Fact> {
    let found = values.iter().find(|(other, _)| other == name);
    found.map(|(_, id)| graph.fact(*id))
}

/// Reads the sizes of pictures off the inputs of the media graph.
fn picture_shape(media: &Graph) -> Result<PictureShape, BackendError> {
    let fact = |name: &str| fact_of(media, media.inputs(), name);
    let found = fact("pixel_values");
    let wrong = || {
        let found = found.map_or("none".into(), Fact::to_string);
        let expected = "f32[n_media, n_frames, channels, height, width]";
        broken(media, vec![format!("input `pixel_values`: expected {expected}, found {found}")])
    };
    let pixels = found.filter(|fact| fact.rank() == 5 && fact.dtype == DType::F32);
    let shape = &pixels.ok_or_else(wrong)?.shape;
    let frame: Option<Vec<usize>> = shape[2..].iter().map(Dim::known).collect();
    let frame_shape = frame.ok_or_else(wrong)?;
    let product = frame_shape.iter().copied().try_fold(1usize, usize::checked_mul);
    product.ok_or_else(wrong)?;
    let one_medium = shape[0].as_symbol() == Some("n_media") || shape[0].known() == Some(1);
    let frames = shape[1].as_symbol() == Some("n_frames") || shape[1].known().is_some();
    if !one_medium || !frames {
        return Err(wrong());
    }
    let table = fact("frame_weights").and_then(|fact| fact.shape.last()?.known());
    let n_frames = shape[1].known();
    Ok(PictureShape { frame_shape, n_frames, n_max_frames: table })
}

/// Reads off what the outputs of the media graph are, in order.
fn media_outputs(media: &Graph) -> Result<Vec<MediaOutput>, BackendError> {
    let mut problems = Vec::new();
    let mut outputs = Vec::new();
    let n_outputs = media.outputs().len();
    for (name, id) in media.outputs() {
        let block =
            |prefix: &str| name.strip_prefix(prefix)?.parse().ok().filter(|b| *b < n_outputs);
        let width = media.fact(*id).shape.get(2).and_then(Dim::known);
        match (block("media_k."), block("media_v."), width) {
            (Some(block), _, Some(_)) => outputs.push(MediaOutput::K(block)),
            (_, Some(block), Some(_)) => outputs.push(MediaOutput::V(block)),
            (_, _, Some(width)) if name == "visual_tokens" => {
                outputs.push(MediaOutput::VisualTokens { width });
            }
            _ => {
                let (fact, names) = (media.fact(*id), "visual_tokens, media_k.N or media_v.N");
                problems.push(format!("output `{name}`: expected {names}, found {fact}"));
            }
        }
    }
    let has_tokens = outputs.iter().any(|o| matches!(o, MediaOutput::VisualTokens { .. }));
    if !has_tokens {
        problems.push("output `visual_tokens`: expected one, found none".into());
    }
    if problems.is_empty() { Ok(outputs) } else { Err(broken(media, problems)) }
}

/// Whether the media graph's `output` is what the decoder's `input` takes: the media graph may be
/// for one medium at a time, and its latents may be counted by frames.
fn serves(output: &Fact, input: &Fact) -> bool {
    let latents = |fact: &Fact| fact.shape[1].clone();
    output.rank() == 3
        && input.rank() == 3
        && output.dtype == input.dtype
        && output.shape[2] == input.shape[2]
        && (latents(output) == latents(input)
            || latents(input).as_symbol() == Some("n_latents")
            || places(output, input).is_some())
}

/// How many times the latents that the decoder takes of a medium the media graph puts out: once for each place in a prompt.
fn places(output: &Fact, input: &Fact) -> Option<usize> {
    let known = |fact: &Fact| fact.shape.get(1).and_then(Dim::known).filter(|n| *n > 0);
    let (given, taken) = known(output).zip(known(input))?;
    given.is_multiple_of(taken).then_some(given / taken)
}

/// Places in a prompt that the media graph computes a medium for; 1 where they are all the same.
fn n_places(media: &Graph, decoder: &Graph) -> usize {
    let of = |(name, id): &(String, ValueId)| {
        let output =
            fact_of(media, media.outputs(), name).filter(|_| name.starts_with("media_"))?;
        places(output, decoder.fact(*id))
    };
    decoder.inputs().iter().find_map(of).unwrap_or(1)
}

/// Checks the decoder's inputs and outputs, and that its media inputs are what the media graph
/// puts out.
fn check_decoder(media: &Graph, decoder: &Graph) -> Result<(), BackendError> {
    let text = |symbol: &str| Some(Fact::i64([Dim::symbol(symbol)]));
    let mut expected: BTreeMap<&str, Option<Fact>> = BTreeMap::from([
        ("input_ids", text("text_len")),
        ("positions", text("text_len")),
        ("media_time", text("text_len")),
        ("media_index", text("n_media")),
        ("logit_rows", text("n_logits")),
    ]);
    let has_places = |(name, id): &(String, ValueId)| {
        let shape = &decoder.fact(*id).shape;
        name.starts_with("past_") && shape.iter().any(|dim| dim.as_symbol() == Some("cache_len"))
    };
    let keys = match decoder.inputs().iter().any(has_places) {
        true => Dim::symbol("cache_len"),
        false => Dim::symbol("past_len") + Dim::symbol("text_len"),
    };
    expected.insert("key_positions", Some(Fact::i64([keys])));
    let mut problems = Vec::new();
    for (name, id) in decoder.inputs() {
        let found = decoder.fact(*id);
        if name.starts_with("past_k.") || name.starts_with("past_v.") {
            continue;
        }
        let fact = match name.starts_with("media_k.") || name.starts_with("media_v.") {
            true => fact_of(media, media.outputs(), name).cloned(),
            false => expected.get(name.as_str()).cloned().flatten(),
        };
        let fits = fact.as_ref().is_some_and(|fact| fact == found || serves(fact, found));
        if !fits {
            let expected = fact.map_or("no such input".into(), |fact| fact.to_string());
            problems.push(format!("input `{name}`: expected {expected}, found {found}"));
        }
    }
    let logits: Vec<_> =
        decoder.outputs().iter().filter(|(n, _)| !n.starts_with("present_")).collect();
    if !matches!(logits[..], [(name, id)] if name == "logits" && decoder.fact(*id).rank() == 2) {
        problems.push("outputs: expected logits of rank 2 and caches only, found others".into());
    }
    if problems.is_empty() { Ok(()) } else { Err(broken(decoder, problems)) }
}
