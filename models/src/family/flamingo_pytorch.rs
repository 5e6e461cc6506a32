//! flamingo-pytorch: the state dict of `FlamingoPaLM` (0.1.2 `flamingo_palm.py`, `flamingo_pytorch.py`). Shapes are read from
//! the tensors; the image encoder, which the package leaves to its user, is a file of its own.

use std::path::Path;

use flamingo_ir::op::Activation;

use super::open_flamingo::{
    buffer, count, gated_key, image_spec, note_of_positions, open_flamingo_resampler,
    shape_resampler, vision_config,
};
use super::vision_transformer::VisionNames;
use super::{Recipe, Source, nfnet};
use crate::build::{GatedKey, KeyMap, ResamplerKey, VisionKey};
use crate::config::{
    Architecture, CrossAttentionConfig, Family, LanguageConfig, ModelConfig, Normalisation,
    PositionConfig, SpecialTokens,
};
use crate::source::{Binder, Parts, SourceError};

/// Tokens of a context, which rotary positions do not bound and the files do not tell.
const MAX_CONTEXT: usize = 2048;

/// Most tokens of anything: sizes above are no model's.
const MAX_SIZE: usize = 1 << 24;

/// Embeddings of frames, which the package adds to the frames of videos and not to pictures.
const FRAMES: &str = "checkpoint/video_frame_pos_emb";

/// Opens the parts that a recipe names; `path` is what errors call it.
pub(super) fn open(recipe: &Recipe, path: &Path) -> Result<Source, SourceError> {
    let parts = Parts::open(&[
        ("checkpoint", recipe.checkpoint.clone()),
        ("vision_encoder", recipe.vision_encoder.clone()),
    ])?;
    let wrong = |reason| SourceError::Config { path: path.to_owned(), reason };
    if recipe.resampler.head_dim.is_some() || recipe.resampler.activation.is_some() {
        return Err(wrong("`resampler`: a `FlamingoPaLM` has none to choose from".into()));
    }
    let language = language_config(&parts).map_err(wrong)?;
    let vision = vision_config(&parts, recipe, path)?;
    if vision.width != language.width {
        return Err(wrong(format!(
            "`vision_encoder`: expected tokens of width {}, the language model's, got {}",
            language.width, vision.width
        )));
    }
    let resampler = shape_resampler(&parts, &resampler_key, Some(language.head_dim));
    let model = ModelConfig {
        family: Family::FlamingoPytorch,
        resampler: Some(resampler.map_err(wrong)?),
        cross_attention: cross_attention_config(&parts, &language).map_err(wrong)?,
        tokens: special_tokens(recipe).map_err(wrong)?,
        vision,
        language,
    };
    Ok(Source {
        image: image_spec(recipe, &model.vision),
        notes: notes(&model),
        config: model,
        tokenizer: recipe.tokenizer.clone(),
        keys: Box::new(Keys { vision: VisionNames::of(&parts) }),
        parts,
        ignorable,
    })
}

/// Shape of the language model, all of it from tensors.
fn language_config(parts: &Parts) -> Result<LanguageConfig, String> {
    let matrix = |key: &str| {
        let name = format!("checkpoint/{key}.weight");
        let found = parts.get(&name).map(|info| info.shape.as_slice());
        match found {
            Some(&[n, k]) if (1..MAX_SIZE).contains(&n) && (1..MAX_SIZE).contains(&k) => Ok([n, k]),
            found => Err(format!(
                "`{name}`: expected a matrix, got {found:?}\n\nhint: `checkpoint` takes the state dict of flamingo-pytorch's \
                 `FlamingoPaLM`"
            )),
        }
    };
    if parts.get(FRAMES).is_some() {
        return Err(format!(
            "`{FRAMES}`: the package adds it to frames of videos and not to pictures, which is not supported\n\nhint: a \
             checkpoint made without `max_video_frames` can be compiled"
        ));
    }
    let [vocabulary, width] = matrix("token_emb")?;
    let [n_fused, _] = matrix("layers.0.0.fn.fused_attn_ff_proj")?;
    let [_, inner] = matrix("layers.0.0.fn.attn_out")?;
    let [_, mlp_width] = matrix("layers.0.0.fn.ff_out.1")?;
    // Rows of q; then of k and v, one head each; then of the two halves of the feed-forward.
    let head_dim = n_fused.saturating_sub(inner + 2 * mlp_width) / 2;
    if head_dim == 0 || !inner.is_multiple_of(head_dim) {
        return Err(format!(
            "`checkpoint/layers.0.0.fn.fused_attn_ff_proj.weight`: {n_fused} rows are not queries of width {inner}, one key, \
             one value and twice {mlp_width}"
        ));
    }
    Ok(LanguageConfig {
        architecture: Architecture::Palm,
        width,
        n_layers: count(|layer| has(parts, &format!("layers.{layer}.0.fn.attn_out.weight"))),
        n_heads: inner / head_dim,
        n_kv_heads: 1,
        head_dim,
        mlp_width,
        activation: Activation::Silu,
        gated_mlp: true,
        normalisation: Normalisation::Layer { epsilon: 1e-5 },
        position: PositionConfig::Rotary { n_dims: head_dim, theta: 1e4 },
        attention_scale: 1.0 / (head_dim as f32).sqrt(),
        qk_norm: false,
        parallel_residual: true,
        tied_head: true,
        vocabulary,
        max_context: MAX_CONTEXT,
    })
}

fn has(parts: &Parts, key: &str) -> bool {
    parts.get(&format!("checkpoint/{key}")).is_some()
}

/// A block stands after its layer here, so before the next.
fn cross_attention_config(
    parts: &Parts,
    language: &LanguageConfig,
) -> Result<CrossAttentionConfig, String> {
    let stands = |layer: &usize| has(parts, &format!("layers.{}.1.attn.to_q.weight", layer - 1));
    let layers: Vec<usize> = (1..=language.n_layers).filter(stands).collect();
    match layers.is_empty() {
        true => {
            Err("no gated cross-attention block: no tensor like `layers.0.1.attn.to_q.weight`"
                .into())
        }
        false => Ok(CrossAttentionConfig {
            layers,
            n_heads: language.n_heads,
            head_dim: language.head_dim,
            qk_norm: false,
        }),
    }
}

/// The package has one special token, an id below the vocabulary.
fn special_tokens(recipe: &Recipe) -> Result<SpecialTokens, String> {
    let image = recipe.tokens.image.ok_or(
        "`tokens.image`: expected the id that the model was made with as `media_token_id`\n\nhint: the package's default is 3",
    )?;
    Ok(SpecialTokens {
        image,
        end_of_chunk: recipe.tokens.end_of_chunk,
        pad: recipe.tokens.pad,
        ..SpecialTokens::default()
    })
}

/// What a user should know.
fn notes(model: &ModelConfig) -> Vec<String> {
    let places = format!(
        "a prompt takes at most {} pictures, for whose places the checkpoint has embeddings; each picture is encoded for all of \
         them",
        model.n_places()
    );
    [Some(places), note_of_positions(&model.vision)].into_iter().flatten().collect()
}

struct Keys {
    vision: VisionNames,
}

fn resampler_key(key: ResamplerKey) -> String {
    open_flamingo_resampler(key).replacen("/perceiver.", "/perceiver_resampler.", 1)
}

impl KeyMap for Keys {
    fn vision(&self, key: VisionKey) -> String {
        self.vision.key(key)
    }

    fn resampler(&self, key: ResamplerKey) -> String {
        resampler_key(key)
    }

    fn gated(&self, _index: usize, layer: usize, key: GatedKey) -> String {
        format!("checkpoint/layers.{}.1.{}", layer.saturating_sub(1), gated_key(key, "ff"))
    }

    fn language(&self, _binder: &Binder, key: &str) -> String {
        format!("checkpoint/{key}")
    }
}

/// Buffers, and the image encoder that training held: the recipe names its own.
fn ignorable(parts: &Parts, name: &str) -> bool {
    match name.split_once('/') {
        Some(("vision_encoder", key)) if nfnet::is_nfnet(parts) => key.starts_with("head."),
        Some(("vision_encoder", key)) => VisionNames::of(parts).is_unused(key),
        Some((_, key)) => buffer(key) || key.starts_with("img_encoder."),
        None => false,
    }
}
