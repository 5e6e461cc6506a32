//! OpenFlamingo: key names of `checkpoint.pt` and open_clip, shapes read from the tensors
//! (open_flamingo 2.0.1 `src/{flamingo,flamingo_lm,helpers}.py`, open_clip 2.20.0).

use std::path::Path;

use flamingo_ir::op::Activation;

use super::hugging_face::{Config, language_config};
use super::recipe::VisionKind;
use super::vision_transformer::VisionNames;
use super::{Recipe, Source, nfnet, vision_transformer};
use crate::build::{GatedKey, KeyMap, ResamplerKey, VisionKey};
use crate::config::{
    Architecture, CrossAttentionConfig, Family, LanguageConfig, ModelConfig, ResamplerConfig,
    SpecialTokens, VisionConfig, VisionEncoder,
};
use crate::image_spec::{IMAGENET_MEAN, IMAGENET_STD, ImageSpec};
use crate::source::{Binder, Parts, SourceError};
use crate::tokenizer::flamingo_token_ids;

/// Width of a head of the gated blocks, fixed in open_flamingo's `GatedCrossAttentionBlock`.
const GATED_HEAD_DIM: usize = 64;

/// Opens the parts that a recipe names; `path` is what errors call it.
pub(super) fn open(recipe: &Recipe, path: &Path) -> Result<Source, SourceError> {
    let parts = Parts::open(&[
        ("checkpoint", recipe.checkpoint.clone()),
        ("language_model", recipe.language_model.clone()),
        ("vision_encoder", recipe.vision_encoder.clone()),
    ])?;
    let config = Config::read(&recipe.language_model.join("config.json"))?;
    let keys = Keys::new(&parts, config.text("model_type")?);
    let vocabulary = vocabulary(&parts, &keys, &config)?;
    let tokenizer = match &recipe.tokenizer {
        Some(path) => Some(path.clone()),
        None => Some(recipe.language_model.join("tokenizer.json")).filter(|path| path.is_file()),
    };
    let language = language_config(&config, vocabulary)?;
    let wrong = |reason| SourceError::Config { path: path.to_owned(), reason };
    let model = ModelConfig {
        family: Family::OpenFlamingo,
        vision: vision_config(&parts, recipe, path)?,
        resampler: Some(resampler_config(&parts, recipe).map_err(wrong)?),
        cross_attention: cross_attention_config(&parts, &keys, &language).map_err(wrong)?,
        tokens: special_tokens(recipe, &config, tokenizer.as_deref(), path)?,
        language,
    };
    Ok(Source {
        image: image_spec(recipe, &model.vision),
        notes: notes(&parts, &keys, &model),
        config: model,
        parts,
        tokenizer,
        keys: Box::new(keys),
        ignorable,
    })
}

/// The encoder's picture preparation, with the recipe's resize rule.
pub(super) fn image_spec(recipe: &Recipe, vision: &VisionConfig) -> ImageSpec {
    let spec = match &vision.encoder {
        VisionEncoder::Clip(clip) if !clip.has_class_token => ImageSpec::siglip(vision.image_size),
        VisionEncoder::Clip(_) => ImageSpec::open_flamingo(vision.image_size),
        VisionEncoder::Nfnet(_) => ImageSpec::paper(vision.image_size, IMAGENET_MEAN, IMAGENET_STD),
    };
    ImageSpec { resize: recipe.vision.resize.unwrap_or(spec.resize), ..spec }
}

/// What a user should know.
fn notes(parts: &Parts, keys: &Keys, model: &ModelConfig) -> Vec<String> {
    [note_of_head(parts, keys, model), note_of_positions(&model.vision)]
        .into_iter()
        .flatten()
        .collect()
}

/// That pictures have another side than in training.
pub(super) fn note_of_positions(vision: &VisionConfig) -> Option<String> {
    let VisionEncoder::Clip(clip) = &vision.encoder else { return None };
    let old = clip.positions.as_ref()?;
    Some(format!(
        "the vision encoder's positions are resampled from pictures of {} pixels to {}",
        old.grid * clip.patch_size,
        vision.image_size
    ))
}

/// That a released file lacks rows of the head.
fn note_of_head(parts: &Parts, keys: &Keys, model: &ModelConfig) -> Option<String> {
    let head = match model.language.architecture {
        Architecture::GptNeox => "embed_out.weight",
        _ => "lm_head.weight",
    };
    let binder = Binder::new(parts);
    let rows =
        parts.get(&keys.language(&binder, head)).and_then(|info| info.shape.first().copied());
    match rows {
        Some(rows) if !model.language.tied_head && rows < model.language.vocabulary => {
            Some(format!(
                "the output head has {rows} rows in the files and the vocabulary {}: the logits of the other \
             tokens are 0 (the reference draws them at random)",
                model.language.vocabulary
            ))
        }
        _ => None,
    }
}

/// Rows of the embedding: the checkpoint's, which has the new tokens, else the language model's.
fn vocabulary(parts: &Parts, keys: &Keys, config: &Config) -> Result<usize, SourceError> {
    let names = [
        "transformer.wte.weight",
        "gpt_neox.embed_in.weight",
        "model.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    ];
    let binder = Binder::new(parts);
    let rows =
        names.iter().find_map(|name| parts.get(&keys.language(&binder, name))?.shape.first());
    let missing = || config.error(format!("no embedding in the files: none of {names:?}"));
    rows.copied().ok_or_else(missing)
}

/// The vision encoder's shape from its tensors, and what they cannot tell from recipe or folder; `path` is what errors call
/// the recipe.
pub(super) fn vision_config(
    parts: &Parts,
    recipe: &Recipe,
    path: &Path,
) -> Result<VisionConfig, SourceError> {
    let kind = if nfnet::is_nfnet(parts) { VisionKind::Nfnet } else { VisionKind::Clip };
    let wrong = |reason| SourceError::Config { path: path.to_owned(), reason };
    match recipe.vision.kind.unwrap_or(kind) {
        VisionKind::Clip => vision_transformer::config(parts, recipe, path),
        VisionKind::Nfnet => nfnet::config(parts, &recipe.vision).map_err(wrong),
    }
}

pub(super) fn activation_named(key: &str, name: &str) -> Result<Activation, String> {
    let unknown = || {
        format!("`{key}`: expected gelu, gelu_tanh, quick_gelu, relu or squared_relu, got `{name}`")
    };
    Activation::from_name(name).ok_or_else(unknown)
}

/// How many of 0, 1, … satisfy `exists`, up to the first that does not.
pub(super) fn count(exists: impl Fn(usize) -> bool) -> usize {
    (0..4096).take_while(|index| exists(*index)).count()
}

fn resampler_config(parts: &Parts, recipe: &Recipe) -> Result<ResamplerConfig, String> {
    shape_resampler(parts, &|key| open_flamingo_resampler(key), recipe.resampler.head_dim).and_then(
        |config| {
            let name = recipe.resampler.activation.as_deref().unwrap_or("gelu");
            Ok(ResamplerConfig {
                activation: activation_named("resampler.activation", name)?,
                ..config
            })
        },
    )
}

/// The resampler's shape from its tensors, in OpenFlamingo's arithmetic.
pub(super) fn shape_resampler(
    parts: &Parts,
    name: &dyn Fn(ResamplerKey) -> String,
    head_dim: Option<usize>,
) -> Result<ResamplerConfig, String> {
    let rows = |key| {
        let name = name(key);
        let rows = parts.get(&name).and_then(|info| info.shape.first().copied());
        rows.filter(|rows| *rows > 0).ok_or(format!("no tensor `{name}`, or an empty one"))
    };
    let head_dim = head_dim.unwrap_or(64);
    let inner = rows(ResamplerKey::Query(0))?;
    if head_dim == 0 || !inner.is_multiple_of(head_dim) {
        return Err(format!(
            "`resampler.head_dim`: {head_dim} does not divide the inner width {inner}"
        ));
    }
    Ok(ResamplerConfig {
        n_layers: count(|layer| parts.get(&name(ResamplerKey::Query(layer))).is_some()),
        n_latents: rows(ResamplerKey::Latents)?,
        n_heads: inner / head_dim,
        head_dim,
        mlp_width: rows(ResamplerKey::Up(0))?,
        activation: Activation::Gelu,
        max_frames: rows(ResamplerKey::FrameEmbeddings).unwrap_or(0),
        max_places: rows(ResamplerKey::PlaceEmbeddings).unwrap_or(0),
        qk_norm: false,
    })
}

fn cross_attention_config(
    parts: &Parts,
    keys: &Keys,
    language: &LanguageConfig,
) -> Result<CrossAttentionConfig, String> {
    shape_gated(parts, &|layer, key| keys.gated(0, layer, key), language.n_layers)
}

/// Which layers have a gated block, and its shape.
pub(super) fn shape_gated(
    parts: &Parts,
    name: &dyn Fn(usize, GatedKey) -> String,
    n_layers: usize,
) -> Result<CrossAttentionConfig, String> {
    let has = |layer: &usize| parts.get(&name(*layer, GatedKey::Query)).is_some();
    let layers: Vec<usize> = (0..n_layers).filter(has).collect();
    let Some(first) = layers.first() else {
        return Err(format!(
            "no gated cross-attention block: no tensor like `{}` for any of {n_layers} layers\n\nhint: is this \
             the checkpoint of another language model?",
            name(0, GatedKey::Query)
        ));
    };
    let query = parts.get(&name(*first, GatedKey::Query));
    let inner = query.and_then(|info| info.shape.first().copied()).unwrap_or(0);
    if inner == 0 || !inner.is_multiple_of(GATED_HEAD_DIM) {
        return Err(format!(
            "gated blocks of inner width {inner}, not a multiple of {GATED_HEAD_DIM}"
        ));
    }
    Ok(CrossAttentionConfig {
        layers,
        n_heads: inner / GATED_HEAD_DIM,
        head_dim: GATED_HEAD_DIM,
        qk_norm: false,
    })
}

fn special_tokens(
    recipe: &Recipe,
    config: &Config,
    tokenizer: Option<&Path>,
    path: &Path,
) -> Result<SpecialTokens, SourceError> {
    let known = match tokenizer {
        Some(path) if recipe.tokens.image.is_none() => flamingo_token_ids(path)?,
        _ => [None; 3],
    };
    let image = recipe.tokens.image.or(known[0]).ok_or_else(|| SourceError::Config {
        path: path.to_owned(),
        reason: "`tokens.image`: no id given, and no tokenizer that has `<image>`".into(),
    })?;
    Ok(SpecialTokens {
        image,
        end_of_chunk: recipe.tokens.end_of_chunk.or(known[1]),
        begin: config.id("bos_token_id"),
        end: config.id("eos_token_id"),
        pad: recipe.tokens.pad.or(known[2]),
        around_image: None,
        answer: None,
        stop: Vec::new(),
    })
}

/// Key names of OpenFlamingo.
struct Keys {
    /// Path of the decoder layers inside the language model.
    layers: &'static str,
    vision: VisionNames,
}

impl Keys {
    fn new(parts: &Parts, model_type: &str) -> Keys {
        Keys { layers: layers_path(model_type), vision: VisionNames::of(parts) }
    }
}

/// Path of the decoder layers (open_flamingo `factory.py`).
pub(super) fn layers_path(model_type: &str) -> &'static str {
    match model_type {
        "gpt_neox" => "gpt_neox.layers",
        "llama" => "model.layers",
        "opt" => "model.decoder.layers",
        _ => "transformer.blocks",
    }
}

pub(super) fn open_flamingo_resampler(key: ResamplerKey) -> String {
    let key = match key {
        ResamplerKey::Latents => "latents".to_owned(),
        ResamplerKey::PlaceEmbeddings => "media_pos_emb".to_owned(),
        ResamplerKey::FrameEmbeddings => "frame_embs".to_owned(),
        ResamplerKey::MediaNorm(i, part) => format!("layers.{i}.0.norm_media.{part}"),
        ResamplerKey::LatentsNorm(i, part) => format!("layers.{i}.0.norm_latents.{part}"),
        ResamplerKey::Query(i) => format!("layers.{i}.0.to_q.weight"),
        ResamplerKey::KeyValue(i) => format!("layers.{i}.0.to_kv.weight"),
        ResamplerKey::Key(i) => format!("layers.{i}.0.to_k.weight"),
        ResamplerKey::Value(i) => format!("layers.{i}.0.to_v.weight"),
        ResamplerKey::QueryNorm(i, part) => format!("layers.{i}.0.q_norm.{part}"),
        ResamplerKey::KeyNorm(i, part) => format!("layers.{i}.0.k_norm.{part}"),
        ResamplerKey::Output(i) => format!("layers.{i}.0.to_out.weight"),
        ResamplerKey::MlpNorm(i, part) => format!("layers.{i}.1.0.{part}"),
        ResamplerKey::Up(i) => format!("layers.{i}.1.1.weight"),
        ResamplerKey::Down(i) => format!("layers.{i}.1.3.weight"),
        ResamplerKey::FinalNorm(part) => format!("norm.{part}"),
    };
    format!("checkpoint/perceiver.{key}")
}

/// Names inside a gated block; `mlp` is `ff` in OpenFlamingo and `feed_forward` in Otter.
pub(super) fn gated_key(key: GatedKey, mlp: &str) -> String {
    match key {
        GatedKey::AttentionGate => "attn_gate".to_owned(),
        GatedKey::MlpGate => "ff_gate".to_owned(),
        GatedKey::AttentionNorm(part) => format!("attn.norm.{part}"),
        GatedKey::Query => "attn.to_q.weight".to_owned(),
        GatedKey::KeyValue => "attn.to_kv.weight".to_owned(),
        GatedKey::Key => "attn.to_k.weight".to_owned(),
        GatedKey::Value => "attn.to_v.weight".to_owned(),
        GatedKey::QueryNorm => "attn.q_norm.weight".to_owned(),
        GatedKey::KeyNorm => "attn.k_norm.weight".to_owned(),
        GatedKey::Output => "attn.to_out.weight".to_owned(),
        GatedKey::MlpNorm(part) => format!("{mlp}.0.{part}"),
        GatedKey::Up => format!("{mlp}.1.weight"),
        GatedKey::Gate => format!("{mlp}.2.weight"),
        GatedKey::Down => format!("{mlp}.3.weight"),
    }
}

impl KeyMap for Keys {
    fn vision(&self, key: VisionKey) -> String {
        self.vision.key(key)
    }

    fn resampler(&self, key: ResamplerKey) -> String {
        open_flamingo_resampler(key)
    }

    fn gated(&self, _index: usize, layer: usize, key: GatedKey) -> String {
        let key = gated_key(key, "ff");
        format!("checkpoint/lang_encoder.{}.{layer}.gated_cross_attn_layer.{key}", self.layers)
    }

    fn language(&self, binder: &Binder, key: &str) -> String {
        let names = [
            format!("checkpoint/lang_encoder.{}", in_flamingo(key, self.layers)),
            format!("language_model/{key}"),
        ];
        binder.first(&[&names[0], &names[1]]).to_owned()
    }
}

/// A language model's key as the Flamingo wrapper spells it: layers gain `.decoder_layer`.
pub(super) fn in_flamingo(key: &str, layers: &str) -> String {
    let rest = key.strip_prefix(layers).and_then(|rest| rest.strip_prefix('.'));
    match rest.and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) => format!("{layers}.{layer}.decoder_layer.{rest}"),
        None => key.to_owned(),
    }
}

/// Tensors that no forward pass of the reference reads, or that another part overrides.
fn ignorable(parts: &Parts, name: &str) -> bool {
    let Some((part, key)) = name.split_once('/') else { return false };
    match part {
        "vision_encoder" if nfnet::is_nfnet(parts) => key.starts_with("head."),
        "vision_encoder" => VisionNames::of(parts).is_unused(key),
        "language_model" => buffer(key) || overridden(parts, key),
        _ => {
            buffer(key)
                || key.starts_with("lang_encoder.gated_cross_attn_layers.")
                || key.starts_with("lang_encoder.old_decoder_blocks.")
                || key.starts_with("vision_encoder.")
        }
    }
}

/// Whether the checkpoint holds this tensor of the language model too.
fn overridden(parts: &Parts, key: &str) -> bool {
    let layers = ["gpt_neox.layers", "model.layers", "model.decoder.layers", "transformer.blocks"];
    let spellings = layers.iter().map(|layers| in_flamingo(key, layers));
    spellings.into_iter().any(|key| parts.get(&format!("checkpoint/lang_encoder.{key}")).is_some())
}

/// Buffers that transformers saves or once saved.
pub(super) fn buffer(key: &str) -> bool {
    let ends = ["rotary_emb.inv_freq", "attention.bias", "attention.masked_bias", "position_ids"];
    ends.iter().any(|end| key.ends_with(end)) || key.ends_with("attn_bias")
}
