//! Otter: OpenFlamingo's arithmetic in one Hugging Face folder
//! (Otter `src/otter_ai/models/otter/modeling_otter.py`).

use std::path::Path;

use serde_json::Value;

use super::Source;
use super::hugging_face::{Config, language_config};
use super::open_flamingo::{
    buffer, gated_key, in_flamingo, layers_path, shape_gated, shape_resampler,
};
use crate::build::{GatedKey, KeyMap, ResamplerKey, VisionKey};
use crate::config::{ClipConfig, Family, ModelConfig, SpecialTokens, VisionConfig, VisionEncoder};
use crate::image_spec::ImageSpec;
use crate::source::{Binder, Parts, SourceError};
use crate::tokenizer::{ANSWER, token_ids};

/// Opens an Otter folder.
pub(super) fn open(folder: &Path, config: &Config) -> Result<Source, SourceError> {
    let parts = Parts::open(&[("checkpoint", folder.to_owned())])?;
    let text = config.section("text_config");
    let keys = Keys { layers: layers_path(text.text("model_type")?) };
    let embedding = [
        "transformer.wte.weight",
        "gpt_neox.embed_in.weight",
        "model.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    ];
    let rows = embedding.iter().find_map(|key| {
        parts.get(&format!("checkpoint/lang_encoder.{key}"))?.shape.first().copied()
    });
    let rows = rows.ok_or_else(|| config.error(format!("no embedding: none of {embedding:?}")))?;
    let language = language_config(&text, rows)?;
    let wrong = |reason| config.error(reason);
    let resampler = shape_resampler(&parts, &resampler_key, None).map_err(wrong)?;
    let gated = shape_gated(&parts, &|layer, key| keys.gated(0, layer, key), language.n_layers);
    let tokenizer = Some(folder.join("tokenizer.json")).filter(|path| path.is_file());
    let model = ModelConfig {
        family: Family::Otter,
        vision: vision_config(&config.section("vision_config"))?,
        resampler: Some(resampler),
        cross_attention: gated.map_err(wrong)?,
        tokens: special_tokens(folder, tokenizer.as_deref(), &text)?,
        language,
    };
    Ok(Source {
        image: ImageSpec::otter(model.vision.image_size),
        config: model,
        parts,
        tokenizer,
        notes: Vec::new(),
        keys: Box::new(keys),
        ignorable,
    })
}

fn vision_config(config: &Config) -> Result<VisionConfig, SourceError> {
    config.must_be("num_channels", Value::from(3))?;
    Ok(VisionConfig {
        image_size: config.size_or("image_size", 224)?,
        width: config.size_or("hidden_size", 1024)?,
        encoder: VisionEncoder::Clip(ClipConfig {
            patch_size: config.size_or("patch_size", 14)?,
            n_layers: config.layers_or("num_hidden_layers", 24)?,
            n_heads: config.size_or("num_attention_heads", 16)?,
            mlp_width: config.size_or("intermediate_size", 4096)?,
            activation: config.activation("hidden_act", "quick_gelu")?,
            epsilon: config.float_or("layer_norm_eps", 1e-5)?,
            keep_class_token: false,
            positions: None,
            has_class_token: true,
            patch_bias: false,
            pre_norm: true,
            final_norm: false,
        }),
    })
}

/// Ids from `tokenizer.json`, else from `added_tokens.json`.
fn special_tokens(
    folder: &Path,
    tokenizer: Option<&Path>,
    text: &Config,
) -> Result<SpecialTokens, SourceError> {
    let names = ["<image>", "<|endofchunk|>", "<PAD>", ANSWER];
    let mut ids = match tokenizer {
        Some(path) => token_ids(path, &names)?,
        None => vec![None; 4],
    };
    let added = folder.join("added_tokens.json");
    if added.is_file() {
        let added = Config::read(&added)?;
        for (id, name) in ids.iter_mut().zip(names) {
            *id = id.or(added.id(name));
        }
    }
    let missing =
        || text.error("no id of `<image>` in `tokenizer.json` or `added_tokens.json`".into());
    Ok(SpecialTokens {
        image: ids[0].ok_or_else(missing)?,
        end_of_chunk: ids[1],
        begin: text.id("bos_token_id"),
        end: text.id("eos_token_id"),
        pad: ids[2],
        around_image: None,
        answer: ids[3],
        stop: Vec::new(),
    })
}

struct Keys {
    layers: &'static str,
}

fn resampler_key(key: ResamplerKey) -> String {
    let key = match key {
        ResamplerKey::Latents => "latents".to_owned(),
        ResamplerKey::PlaceEmbeddings => "media_pos_emb".to_owned(),
        ResamplerKey::FrameEmbeddings => "frame_embs".to_owned(),
        ResamplerKey::MediaNorm(i, part) => format!("layers.{i}.norm_media.{part}"),
        ResamplerKey::LatentsNorm(i, part) => format!("layers.{i}.norm_latents.{part}"),
        ResamplerKey::Query(i) => format!("layers.{i}.to_q.weight"),
        ResamplerKey::KeyValue(i) => format!("layers.{i}.to_kv.weight"),
        ResamplerKey::Key(i) => format!("layers.{i}.to_k.weight"),
        ResamplerKey::Value(i) => format!("layers.{i}.to_v.weight"),
        ResamplerKey::QueryNorm(i, part) => format!("layers.{i}.q_norm.{part}"),
        ResamplerKey::KeyNorm(i, part) => format!("layers.{i}.k_norm.{part}"),
        ResamplerKey::Output(i) => format!("layers.{i}.to_out.weight"),
        ResamplerKey::MlpNorm(i, part) => format!("layers.{i}.feed_forward.0.{part}"),
        ResamplerKey::Up(i) => format!("layers.{i}.feed_forward.1.weight"),
        ResamplerKey::Down(i) => format!("layers.{i}.feed_forward.3.weight"),
        ResamplerKey::FinalNorm(part) => format!("norm.{part}"),
    };
    format!("checkpoint/perceiver.{key}")
}

/// CLIP and SigLIP in transformers' naming; `prefix` ends where `embeddings` or `encoder` begins.
pub(super) fn hugging_face_vision(prefix: &str, key: VisionKey) -> String {
    let layer = |i: usize, rest: String| format!("encoder.layers.{i}.{rest}");
    let key = match key {
        VisionKey::ClassToken => "embeddings.class_embedding".to_owned(),
        VisionKey::Positions => "embeddings.position_embedding.weight".to_owned(),
        VisionKey::Patch(part) => format!("embeddings.patch_embedding.{part}"),
        VisionKey::PreNorm(part) => format!("pre_layrnorm.{part}"),
        VisionKey::AttentionNorm(i, part) => layer(i, format!("layer_norm1.{part}")),
        VisionKey::Qkv(i, part) => layer(i, format!("self_attn.qkv.{part}")),
        VisionKey::Projection(i, side, part) => layer(i, format!("self_attn.{side}_proj.{part}")),
        VisionKey::Output(i, part) => layer(i, format!("self_attn.out_proj.{part}")),
        VisionKey::MlpNorm(i, part) => layer(i, format!("layer_norm2.{part}")),
        VisionKey::Up(i, part) => layer(i, format!("mlp.fc1.{part}")),
        VisionKey::Down(i, part) => layer(i, format!("mlp.fc2.{part}")),
        VisionKey::FinalNorm(part) => format!("post_layernorm.{part}"),
    };
    format!("{prefix}{key}")
}

impl KeyMap for Keys {
    fn vision(&self, key: VisionKey) -> String {
        hugging_face_vision("checkpoint/vision_encoder.vision_model.", key)
    }

    fn resampler(&self, key: ResamplerKey) -> String {
        resampler_key(key)
    }

    fn gated(&self, _index: usize, layer: usize, key: GatedKey) -> String {
        let key = gated_key(key, "feed_forward");
        format!("checkpoint/lang_encoder.{}.{layer}.gated_cross_attn_layer.{key}", self.layers)
    }

    fn language(&self, _binder: &Binder, key: &str) -> String {
        format!("checkpoint/lang_encoder.{}", in_flamingo(key, self.layers))
    }
}

fn ignorable(_parts: &Parts, name: &str) -> bool {
    let key = name.trim_start_matches("checkpoint/");
    buffer(key)
        || key.starts_with("vision_encoder.vision_model.post_layernorm.")
        || key.starts_with("lang_encoder.gated_cross_attn_layers.")
        || key.starts_with("lang_encoder.old_decoder_blocks.")
}
