//! OpenFlamingo: key names of `checkpoint.pt` and open_clip, shapes read from the tensors
//! (open_flamingo 2.0.1 `src/{flamingo,flamingo_lm,helpers}.py`, open_clip 2.20.0).

use std::path::Path;

use flamingo_ir::op::Activation;
use serde_json::Value;

use super::hugging_face::{Config, language_config};
use super::otter::hugging_face_vision;
use super::recipe::VisionKind;
use super::{Recipe, Source, nfnet};
use crate::build::{GatedKey, KeyMap, ResamplerKey, VisionKey};
use crate::config::{
    Architecture, ClipConfig, CrossAttentionConfig, Family, LanguageConfig, ModelConfig,
    PositionsConfig, ResamplerConfig, SpecialTokens, VisionConfig, VisionEncoder,
};
use crate::image_spec::{IMAGENET_MEAN, IMAGENET_STD, ImageSpec, MAX_IMAGE_SIZE};
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
        vision: vision_config(&parts, &keys, recipe, told_vision(&recipe.vision_encoder)?)
            .map_err(wrong)?,
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
fn image_spec(recipe: &Recipe, vision: &VisionConfig) -> ImageSpec {
    let spec = match vision.encoder {
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
fn note_of_positions(vision: &VisionConfig) -> Option<String> {
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

/// What a vision encoder's `config.json` tells.
struct ToldVision {
    n_heads: Option<usize>,
    activation: Option<Activation>,
    epsilon: f32,
}

/// From the folder's `config.json`, where the section `vision_config` of a whole CLIP is entered.
fn told_vision(path: &Path) -> Result<ToldVision, SourceError> {
    let file = path.join("config.json");
    if !file.is_file() {
        return Ok(ToldVision { n_heads: None, activation: None, epsilon: 1e-5 });
    }
    let whole = Config::read(&file)?;
    let vision = match whole.has("vision_config") {
        true => whole.section("vision_config"),
        false => whole,
    };
    vision.must_be("num_channels", Value::from(3))?;
    Ok(ToldVision {
        n_heads: Some(vision.size_or("num_attention_heads", 12)?),
        activation: Some(vision.activation("hidden_act", "quick_gelu")?),
        epsilon: vision.float_or("layer_norm_eps", 1e-5)?,
    })
}

/// The vision encoder's shape from its tensors, and what they cannot tell from recipe or folder.
fn vision_config(
    parts: &Parts,
    keys: &Keys,
    recipe: &Recipe,
    told: ToldVision,
) -> Result<VisionConfig, String> {
    let kind = if nfnet::is_nfnet(parts) { VisionKind::Nfnet } else { VisionKind::Clip };
    match recipe.vision.kind.unwrap_or(kind) {
        VisionKind::Clip => clip_config(parts, keys, recipe, told),
        VisionKind::Nfnet => nfnet::config(parts, &recipe.vision),
    }
}

fn clip_config(
    parts: &Parts,
    keys: &Keys,
    recipe: &Recipe,
    told: ToldVision,
) -> Result<VisionConfig, String> {
    if recipe.vision.variant.is_some() {
        return Err("`vision.variant`: only an NFNet has one; the files are read as CLIP".into());
    }
    let recipe = &recipe.vision;
    let shape = |key| {
        let name = keys.vision(key);
        parts.get(&name).map(|info| info.shape.as_slice()).ok_or(format!(
            "no tensor `{name}`\n\nhint: `vision_encoder` takes open_clip's `visual` weights, OpenAI's CLIP file, or \
             a Hugging Face folder of CLIP"
        ))
    };
    let &[width, 3, patch_size, other] = shape(VisionKey::Patch)? else {
        return Err("the patch weight has not the shape [width, 3, p, p]".into());
    };
    let &[n_tokens, _] = shape(VisionKey::Positions)? else {
        return Err("the positional embedding has not the shape [tokens, width]".into());
    };
    let grid = n_tokens.saturating_sub(1).isqrt();
    if patch_size == 0 || patch_size != other || grid * grid + 1 != n_tokens {
        return Err(format!("{n_tokens} positions are not a class token and a square of patches"));
    }
    let n_layers = count(|layer| parts.get(&keys.vision(VisionKey::Up(layer, "weight"))).is_some());
    let mlp_width = match shape(VisionKey::Up(0, "weight"))? {
        [mlp_width, _] => *mlp_width,
        other => return Err(format!("the first feed-forward weight has the shape {other:?}")),
    };
    expect("vision.patch_size", recipe.patch_size, patch_size)?;
    let (image_size, positions) = image_size(recipe.image_size, (grid, patch_size), &keys.vision)?;
    let (head_width, usual_activation) = usual_clip(width);
    let n_heads = recipe.heads.or(told.n_heads).unwrap_or(width / head_width);
    if n_heads == 0 || !width.is_multiple_of(n_heads) {
        return Err(format!(
            "`vision.heads`: expected a divisor of the width {width}, got {n_heads}"
        ));
    }
    let activation = match &recipe.activation {
        Some(name) => activation_named("vision.activation", name)?,
        None => told.activation.unwrap_or(usual_activation),
    };
    Ok(VisionConfig {
        image_size,
        width,
        encoder: VisionEncoder::Clip(ClipConfig {
            patch_size,
            n_layers,
            n_heads,
            mlp_width,
            activation,
            epsilon: told.epsilon,
            keep_class_token: false,
            positions,
        }),
    })
}

/// Width of a head and activation of the CLIPs of a width where no `config.json` tells: OpenAI's B and L, open_clip's H, g
/// and G.
fn usual_clip(width: usize) -> (usize, Activation) {
    match width {
        1280 => (80, Activation::Gelu),
        1408 => (88, Activation::Gelu),
        1664 => (104, Activation::Gelu),
        _ => (64, Activation::QuickGelu),
    }
}

/// Side of pictures, and the positions of the files where the recipe asks for another side than theirs.
fn image_size(
    recipe: Option<usize>,
    (grid, patch_size): (usize, usize),
    names: &VisionNames,
) -> Result<(usize, Option<PositionsConfig>), String> {
    let of_files = grid.saturating_mul(patch_size);
    let image_size = recipe.unwrap_or(of_files);
    if image_size == 0 || !image_size.is_multiple_of(patch_size) || image_size > MAX_IMAGE_SIZE {
        return Err(format!(
            "`vision.image_size`: expected a multiple of the patch size {patch_size} up to {MAX_IMAGE_SIZE}, got \
             {image_size}"
        ));
    }
    let antialias = matches!(names, VisionNames::OpenClip(_));
    let resampled = (image_size != of_files).then_some(PositionsConfig { grid, antialias });
    Ok((image_size, resampled))
}

fn expect(key: &str, recipe: Option<usize>, files: usize) -> Result<(), String> {
    match recipe {
        Some(value) if value != files => {
            Err(format!("`{key}`: the files say {files}, the recipe says {value}"))
        }
        _ => Ok(()),
    }
}

fn activation_named(key: &str, name: &str) -> Result<Activation, String> {
    let unknown =
        || format!("`{key}`: expected gelu, quick_gelu, relu or squared_relu, got `{name}`");
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

/// Whose names the vision encoder's tensors have.
enum VisionNames {
    /// open_clip's and OpenAI's, behind this prefix: `visual.` where the file holds both CLIP towers.
    OpenClip(&'static str),
    /// transformers' `CLIPModel` or `CLIPVisionModel`.
    HuggingFace,
}

impl Keys {
    fn new(parts: &Parts, model_type: &str) -> Keys {
        let has = |key: &str| parts.get(&format!("vision_encoder/{key}")).is_some();
        let vision = match () {
            () if has("visual.conv1.weight") => VisionNames::OpenClip("visual."),
            () if has("vision_model.embeddings.patch_embedding.weight") => VisionNames::HuggingFace,
            () => VisionNames::OpenClip(""),
        };
        Keys { layers: layers_path(model_type), vision }
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
        let prefix = match self.vision {
            VisionNames::OpenClip(prefix) => prefix,
            VisionNames::HuggingFace => {
                return hugging_face_vision("vision_encoder/vision_model.", key);
            }
        };
        let block = |i: usize, rest: String| format!("transformer.resblocks.{i}.{rest}");
        let key = match key {
            VisionKey::ClassToken => "class_embedding".to_owned(),
            VisionKey::Positions => "positional_embedding".to_owned(),
            VisionKey::Patch => "conv1.weight".to_owned(),
            VisionKey::PreNorm(part) => format!("ln_pre.{part}"),
            VisionKey::AttentionNorm(i, part) => block(i, format!("ln_1.{part}")),
            VisionKey::Qkv(i, part) => block(i, format!("attn.in_proj_{part}")),
            VisionKey::Projection(i, side, part) => block(i, format!("attn.{side}_proj.{part}")),
            VisionKey::Output(i, part) => block(i, format!("attn.out_proj.{part}")),
            VisionKey::MlpNorm(i, part) => block(i, format!("ln_2.{part}")),
            VisionKey::Up(i, part) => block(i, format!("mlp.c_fc.{part}")),
            VisionKey::Down(i, part) => block(i, format!("mlp.c_proj.{part}")),
        };
        format!("vision_encoder/{prefix}{key}")
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
        "vision_encoder" => ignorable_vision(parts, key),
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

/// The projection and final norm that the patch tokens do not pass, and CLIP's text tower; an NFNet's classifier.
fn ignorable_vision(parts: &Parts, key: &str) -> bool {
    if nfnet::is_nfnet(parts) {
        return key.starts_with("head.");
    }
    let unused = ["text_model.", "text_projection.", "visual_projection.", "logit_scale"];
    let in_hugging_face = parts.get("vision_encoder/vision_model.pre_layrnorm.weight").is_some();
    if in_hugging_face {
        return buffer(key)
            || key.starts_with("vision_model.post_layernorm.")
            || unused.iter().any(|unused| key.starts_with(unused));
    }
    let both_towers = parts.get("vision_encoder/visual.conv1.weight").is_some();
    let visual = match (both_towers, key.strip_prefix("visual.")) {
        (true, None) => return true,
        (true, Some(key)) => key,
        (false, _) => key,
    };
    visual == "proj" || visual.starts_with("ln_post.")
}
