//! Parity: an artifact against the reference evaluation of its source, on seeded random inputs.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use flamingo_ir::op::Flavour;
use flamingo_ir::{Graph, Tensor, evaluate_with};
use flamingo_models::config::ModelConfig;
use flamingo_models::{Graphs, Source, media_time};
use flamingo_runtime::Model;
use flamingo_runtime::argmax;
use flamingo_runtime::backend::{Media, frame_weights};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Largest error of f32 outputs as a part of the largest magnitude.
pub const F32_BOUND: f32 = 1e-4;

/// Smallest cosine between f32 outputs.
pub const MIN_COSINE: f64 = 0.999_999;

/// Errors of values below this magnitude are taken relative to it.
const ABSOLUTE_FLOOR: f32 = 1e-6;

/// How far one output is from its reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// `visual_tokens` or `logits`, with the case.
    pub what: String,
    /// Largest absolute error over the largest absolute reference value.
    pub relative_error: f32,
    /// Cosine of the angle between the two.
    pub cosine: f64,
    /// Where the worst element is, and both values there.
    pub worst: (usize, f32, f32),
    /// Rows whose largest value is at another place although it is no near-tie.
    pub different_tokens: usize,
    /// Whether all bounds hold.
    pub pass: bool,
}

/// Largest mean KL divergence of next tokens that an artifact of weights stored so may have from its
/// source, in nats; none for f32, whose numbers are compared themselves. Of layer groups stored
/// differently the coarsest counts. `precision`: [`Manifest::precision`].
///
/// [`Manifest::precision`]: flamingo_models::manifest::Manifest::precision
pub fn kl_bound(precision: &BTreeMap<String, String>) -> Option<f64> {
    let bound = |format: &str| match format {
        "f32" => None,
        "f16" => Some(1e-4),
        "bf16" => Some(1e-3),
        "int8" => Some(0.01),
        _ => Some(0.05),
    };
    let formats = precision.values().flat_map(|formats| formats.split('+'));
    formats.filter_map(bound).max_by(f64::total_cmp)
}

/// How far next-token distributions are from the reference's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// Tokens compared.
    pub n_tokens: usize,
    /// Mean of KL(reference ‖ found), in nats.
    pub mean_kl: f64,
    /// Largest KL divergence of one token.
    pub max_kl: f64,
    /// Share of tokens whose most likely successor is the same.
    pub top1_agreement: f64,
}

/// The divergence between rows of `width` logits. NaN gives NaN.
pub fn divergence(found: &[f32], reference: &[f32], width: usize) -> Result<Divergence> {
    ensure!(
        found.len() == reference.len() && width > 0 && found.len() >= width,
        "logits: expected {} values in rows of {width}, got {}",
        reference.len(),
        found.len()
    );
    let rows = || found.chunks(width).zip(reference.chunks(width));
    let kl: Vec<f64> = rows().map(|(found, reference)| kl_divergence(found, reference)).collect();
    let equal = rows().filter(|(found, reference)| argmax(found) == argmax(reference)).count();
    let n_tokens = kl.len();
    Ok(Divergence {
        n_tokens,
        mean_kl: kl.iter().sum::<f64>() / n_tokens as f64,
        max_kl: kl.iter().copied().fold(0.0, |max, kl| if kl <= max { max } else { kl }),
        top1_agreement: equal as f64 / n_tokens as f64,
    })
}

/// Σ p (log p − log q) with p from the reference and q from `found`, both softmaxes of logits.
pub(crate) fn kl_divergence(found: &[f32], reference: &[f32]) -> f64 {
    let log_sum = |logits: &[f32]| -> f64 {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
        f64::from(max) + sum.ln()
    };
    let (q_sum, p_sum) = (log_sum(found), log_sum(reference));
    let term = |(q, p): (&f32, &f32)| {
        let (log_q, log_p) = (f64::from(*q) - q_sum, f64::from(*p) - p_sum);
        log_p.exp() * (log_p - log_q)
    };
    found.iter().zip(reference).map(term).sum()
}

/// Compares `found` with `reference` (rows of `width`). NaN fails.
pub fn compare(what: &str, found: &[f32], reference: &[f32], width: usize) -> Result<Comparison> {
    ensure!(
        found.len() == reference.len() && width > 0,
        "{what}: expected {} values, got {}",
        reference.len(),
        found.len()
    );
    let scale = reference.iter().fold(ABSOLUTE_FLOOR, |max, value| max.max(value.abs()));
    let mut worst = (0, 0.0f32);
    for (index, (a, b)) in found.iter().zip(reference).enumerate() {
        let error = (a - b).abs();
        let error = if error.is_nan() { f32::INFINITY } else { error };
        if error > worst.1 {
            worst = (index, error);
        }
    }
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let norms = (dot(found, found) * dot(reference, reference)).sqrt();
    let cosine = if norms > 0.0 { dot(found, reference) / norms } else { 1.0 };
    let relative_error = worst.1 / scale;
    let different_tokens = found
        .chunks(width)
        .zip(reference.chunks(width))
        .filter(|(found, reference)| differs(found, reference, F32_BOUND * scale))
        .count();
    let at = |values: &[f32]| values.get(worst.0).copied().unwrap_or(0.0);
    Ok(Comparison {
        what: what.to_owned(),
        relative_error,
        cosine,
        worst: (worst.0, at(found), at(reference)),
        different_tokens,
        pass: relative_error <= F32_BOUND && cosine >= MIN_COSINE && different_tokens == 0,
    })
}

/// Whether the best token differs by more than a near-tie.
fn differs(found: &[f32], reference: &[f32], tie: f32) -> bool {
    let (a, b) = (argmax(found) as usize, argmax(reference) as usize);
    a != b && (reference[b] - reference[a]).abs() > tie
}

/// A prompt of random pictures and tokens.
pub struct Case {
    /// Name in tables.
    pub name: &'static str,
    /// Tokens, image tokens among them.
    pub input_ids: Vec<u32>,
    /// f32 [n_media, 1, 3, size, size].
    pub pixel_values: Vec<f32>,
    /// Media.
    pub n_media: usize,
}

/// Seeded cases: text only, one picture, text before the first of several pictures.
pub fn cases(config: &ModelConfig, seed: u64) -> Vec<Case> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let forms: [(&str, &[usize]); 3] =
        [("text only", &[7]), ("one picture", &[0, 6]), ("three pictures", &[3, 4, 1, 5])];
    let mut cases = Vec::with_capacity(forms.len());
    for (name, runs) in forms {
        let mut input_ids = Vec::new();
        for (index, run) in runs.iter().enumerate() {
            if index > 0 {
                input_ids.push(config.tokens.image);
            }
            input_ids.extend((0..*run).map(|_| word(config, &mut random)));
        }
        let n_media = runs.len() - 1;
        let n_pixels = n_media * 3 * config.vision.image_size * config.vision.image_size;
        let pixel_values = (0..n_pixels).map(|_| random.random_range(-2.0..2.0)).collect();
        cases.push(Case { name, input_ids, pixel_values, n_media });
    }
    cases
}

/// A random token that is not special.
fn word(config: &ModelConfig, random: &mut ChaCha8Rng) -> u32 {
    let tokens = &config.tokens;
    let vocabulary = u32::try_from(config.language.vocabulary).unwrap_or(u32::MAX);
    let special =
        [Some(tokens.image), tokens.end, tokens.around_image, tokens.end_of_chunk, tokens.pad];
    loop {
        let id = random.random_range(0..vocabulary);
        if !special.contains(&Some(id)) {
            return id;
        }
    }
}

/// Visual tokens and logits of a case as the source's own graphs, unoptimised, give them.
pub fn reference(source: &Source, graphs: &Graphs, case: &Case) -> Result<(Vec<f32>, Vec<f32>)> {
    let config = &source.config;
    let size = config.vision.image_size;
    // A graph without media still needs one to have shapes; no token sees it.
    let n_media = case.n_media.max(1);
    let mut pixels = case.pixel_values.clone();
    pixels.resize(n_media * 3 * size * size, 0.0);
    let mut inputs = BTreeMap::new();
    inputs.insert("pixel_values".to_owned(), tensor(&[n_media, 1, 3, size, size], pixels)?);
    let max_frames = config.resampler.as_ref().map_or(0, |resampler| resampler.max_frames);
    let weights = frame_weights(1, max_frames);
    inputs.insert("frame_weights".to_owned(), tensor(&[1, max_frames], weights)?);
    let mut encoded = run(&graphs.media, &inputs, source)?;
    let visual_tokens =
        encoded.remove("visual_tokens").context("media graph without visual tokens")?;
    for (name, tensor) in encoded {
        inputs.insert(name, at_their_places(config.n_places(), tensor)?);
    }
    inputs.extend(text_inputs(config, &case.input_ids, n_media)?);
    let mut outputs = run(&graphs.decoder, &inputs, source)?;
    let logits = outputs.remove("logits").context("decoder graph without logits")?;
    let values = |tensor: Tensor| tensor.to_f32_vec().context("outputs are f32");
    let visual_tokens = if case.n_media > 0 { values(visual_tokens)? } else { Vec::new() };
    Ok((visual_tokens, values(logits)?))
}

/// Of keys or values `[n_media, n_places · n_latents, width]` those of each medium at its place in the prompt,
/// `[n_media, n_latents, width]`.
pub fn at_their_places(n_places: usize, of_all: Tensor) -> Result<Tensor> {
    let &[n_media, n_latents, width] = of_all.shape() else { return Ok(of_all) };
    if n_places <= 1 {
        return Ok(of_all);
    }
    let values = of_all.to_f32_vec().context("keys and values are f32")?;
    let n = n_latents / n_places * width;
    let at =
        |medium: usize| values.get((medium * n_places + medium) * n..).and_then(|v| v.get(..n));
    let own: Option<Vec<&[f32]>> = (0..n_media).map(at).collect();
    let own = own.context("more media than places in a prompt")?.concat();
    tensor(&[n_media, n_latents / n_places, width], own)
}

/// What the decoder takes for a whole prompt, but for keys and values of its media.
pub(crate) fn text_inputs(
    config: &ModelConfig,
    input_ids: &[u32],
    n_media: usize,
) -> Result<Vec<(String, Tensor)>> {
    let n = i64::try_from(input_ids.len())?;
    let time = media_time(config.family, &config.tokens, input_ids);
    let index: Vec<i64> = (1..=i64::try_from(n_media)?).collect();
    let mut inputs = Vec::new();
    let mut put = |name: &str, values: Vec<i64>| -> Result<()> {
        let tensor = Tensor::i64(&[values.len()], values).context("a list")?;
        inputs.push((name.to_owned(), tensor));
        Ok(())
    };
    put("input_ids", input_ids.iter().map(|id| i64::from(*id)).collect())?;
    for name in ["positions", "key_positions", "logit_rows"] {
        put(name, (0..n).collect())?;
    }
    put("media_time", time.into_iter().map(i64::from).collect())?;
    put("media_index", index)?;
    let language = &config.language;
    for layer in 0..language.n_layers {
        for side in ["k", "v"] {
            let empty = tensor(&[language.n_kv_heads, 0, language.head_dim], Vec::new())?;
            inputs.push((format!("past_{side}.{layer}"), empty));
        }
    }
    Ok(inputs)
}

fn tensor(shape: &[usize], values: Vec<f32>) -> Result<Tensor> {
    Tensor::f32(shape, values).context("values fill their shape")
}

/// Runs a graph on named tensors.
fn run(
    graph: &Graph,
    inputs: &BTreeMap<String, Tensor>,
    source: &Source,
) -> Result<BTreeMap<String, Tensor>> {
    let pick = |(name, _): &(String, _)| {
        inputs.get(name).cloned().with_context(|| format!("no input `{name}`"))
    };
    let ordered = graph.inputs().iter().map(pick).collect::<Result<Vec<Tensor>>>()?;
    let outputs = evaluate_with(graph, &ordered, &source.parts)?;
    Ok(graph.outputs().iter().map(|(name, _)| name.clone()).zip(outputs).collect())
}

/// What an artifact is compared with its source by.
#[derive(Clone, Debug)]
pub struct Parity {
    /// Numbers of each case; bounds hold for f32 alone.
    pub comparisons: Vec<Comparison>,
    /// Next tokens of all cases.
    pub divergence: Divergence,
    /// Largest mean KL divergence allowed; none for f32.
    pub kl_bound: Option<f64>,
}

impl Parity {
    /// Whether the bounds hold that are for this precision.
    pub fn pass(&self) -> bool {
        match self.kl_bound {
            Some(bound) => self.divergence.mean_kl <= bound,
            None => self.comparisons.iter().all(|comparison| comparison.pass),
        }
    }
}

/// Compares an artifact with its source on seeded cases. `flavour`: that of the graphs which the model runs, if it runs
/// files.
pub fn check(
    model: &Model,
    source: &Source,
    seed: u64,
    flavour: Option<Flavour>,
) -> Result<Parity> {
    let config = &model.manifest().config;
    ensure!(
        *config == source.config,
        "the artifact was compiled from another model than the source\n\nhint: compile it again"
    );
    let graphs = source.graphs()?;
    let mut precision = model.manifest().precision.clone();
    let half = flavour.and_then(Flavour::half);
    precision.extend(half.map(|half| ("arithmetic".to_owned(), half.to_string())));
    let kl_bound = kl_bound(&precision);
    let mut comparisons = Vec::new();
    let (mut all_found, mut all_expected) = (Vec::new(), Vec::new());
    for case in cases(config, seed) {
        let (visual_tokens, logits) = reference(source, &graphs, &case)?;
        let media: Vec<Arc<Media>> = match case.n_media {
            0 => Vec::new(),
            n => model.encode_pixels(&case.pixel_values, n, 1)?,
        };
        if case.n_media > 0 {
            let found: Vec<f32> =
                media.iter().flat_map(|m| m.visual_tokens.iter().copied()).collect();
            let what = format!("visual tokens, {}", case.name);
            let mut comparison = compare(&what, &found, &visual_tokens, config.vision.width)?;
            comparison.different_tokens = 0;
            comparison.pass =
                comparison.relative_error <= F32_BOUND && comparison.cosine >= MIN_COSINE;
            comparisons.push(comparison);
        }
        let found = model.logits(&case.input_ids, &media)?;
        let what = format!("logits, {}", case.name);
        comparisons.push(compare(&what, &found, &logits, config.language.vocabulary)?);
        all_found.extend(found);
        all_expected.extend(logits);
    }
    if kl_bound.is_some() {
        // Numbers of rounded weights are told, and judged by what they do to the next token.
        comparisons.iter_mut().for_each(|c| c.pass = c.relative_error.is_finite());
    }
    let divergence = divergence(&all_found, &all_expected, config.language.vocabulary)?;
    Ok(Parity { comparisons, divergence, kl_bound })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergences_are_those_of_closed_forms() {
        let same = divergence(&[1.0, 2.0, 0.5, 0.5], &[3.0, 4.0, 7.0, 7.0], 2).unwrap();
        assert!(same.mean_kl.abs() < 1e-12 && same.top1_agreement == 1.0, "{same:?}");
        // p = (3/4, 1/4), q = (1/2, 1/2).
        let logits = [3.0f32.ln(), 0.0];
        let found = divergence(&[0.0, 0.0], &logits, 2).unwrap();
        let expected = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((found.mean_kl - expected).abs() < 1e-7, "{found:?}");
        let swapped = divergence(&[0.0, 1.0], &[1.0, 0.0], 2).unwrap();
        assert_eq!(swapped.top1_agreement, 0.0);
        assert!(divergence(&[f32::NAN, 0.0], &[1.0, 0.0], 2).unwrap().mean_kl.is_nan());
        assert!(divergence(&[], &[], 2).is_err());
    }

    #[test]
    fn the_coarsest_group_sets_the_bound() {
        let bound = |formats: &[&str]| {
            let entry = |(i, format): (usize, &&str)| (i.to_string(), (*format).to_owned());
            kl_bound(&formats.iter().enumerate().map(entry).collect())
        };
        assert_eq!(bound(&["f32", "f32"]), None);
        assert_eq!(bound(&["f32+int8", "f16"]), Some(0.01));
        assert_eq!(bound(&["int8", "int4/32"]), Some(0.05));
    }

    #[test]
    fn comparisons_can_fail() {
        let reference = [1.0, 2.0, 3.0, -4.0];
        assert!(compare("same", &reference, &reference, 2).unwrap().pass);
        let off = [1.0, 2.0, 3.0, -4.001];
        let comparison = compare("off", &off, &reference, 2).unwrap();
        assert!(!comparison.pass);
        assert_eq!(comparison.worst.0, 3);
        let nan = [f32::NAN, 2.0, 3.0, -4.0];
        assert!(!compare("nan", &nan, &reference, 2).unwrap().pass);
        let swapped = [2.0, 1.0, 3.0, -4.0];
        assert_eq!(compare("swapped", &swapped, &reference, 2).unwrap().different_tokens, 1);
        assert!(compare("short", &[1.0], &reference, 2).is_err());
        assert!(compare("zeros", &[0.0; 2], &[0.0; 2], 1).unwrap().pass);
    }
}
