//! IDEFICS-1: one Hugging Face folder (transformers `models/idefics`).

use std::path::Path;

use flamingo_ir::op::Activation;
use serde_json::Value;

use super::Source;
use super::hugging_face::{Config, llama};
use super::open_flamingo::buffer;
use super::otter::hugging_face_vision;
use crate::build::{GatedKey, KeyMap, ResamplerKey, VisionKey};
use crate::config::{
    ClipConfig, CrossAttentionConfig, Family, ModelConfig, ResamplerConfig, SpecialTokens,
    VisionConfig, VisionEncoder,
};
use crate::image_spec::ImageSpec;
use crate::source::{Binder, Parts, SourceError};

/// Opens an IDEFICS folder.
pub(super) fn open(folder: &Path, config: &Config) -> Result<Source, SourceError> {
    let parts = Parts::open(&[("checkpoint", folder.to_owned())])?;
    let base = config.size("vocab_size")?;
    let vocabulary = base + config.size_or("additional_vocab_size", 0)?;
    let mut language = llama(config, vocabulary)?;
    language.n_kv_heads = language.n_heads;
    let interval = config.size_or("cross_layer_interval", 1)?;
    let vision = vision_config(&config.section("vision_config"))?;
    let resampler = match config.flag_or("use_resampler", false)? {
        true => Some(resampler_config(&config.section("perceiver_config"), &vision)?),
        false => None,
    };
    let model = ModelConfig {
        family: Family::Idefics,
        cross_attention: CrossAttentionConfig {
            layers: (0..language.n_layers).step_by(interval).collect(),
            n_heads: language.n_heads,
            head_dim: language.head_dim,
            qk_norm: config.flag_or("qk_layer_norms", false)?,
        },
        tokens: special_tokens(config, base)?,
        vision,
        resampler,
        language,
    };
    Ok(Source {
        image: ImageSpec::idefics(model.vision.image_size),
        config: model,
        parts,
        tokenizer: Some(folder.join("tokenizer.json")).filter(|path| path.is_file()),
        notes: Vec::new(),
        keys: Box::new(Keys),
        ignorable,
    })
}

fn vision_config(config: &Config) -> Result<VisionConfig, SourceError> {
    config.must_be("num_channels", Value::from(3))?;
    Ok(VisionConfig {
        image_size: config.size_or("image_size", 224)?,
        width: config.size_or("embed_dim", 768)?,
        encoder: VisionEncoder::Clip(ClipConfig {
            patch_size: config.size_or("patch_size", 14)?,
            n_layers: config.layers_or("num_hidden_layers", 32)?,
            n_heads: config.size_or("num_attention_heads", 16)?,
            mlp_width: config.size_or("intermediate_size", 5120)?,
            activation: config.activation("hidden_act", "gelu")?,
            epsilon: config.float_or("layer_norm_eps", 1e-5)?,
            keep_class_token: true,
            positions: None,
            has_class_token: true,
            patch_bias: false,
            pre_norm: true,
            final_norm: false,
        }),
    })
}

fn resampler_config(
    config: &Config,
    vision: &VisionConfig,
) -> Result<ResamplerConfig, SourceError> {
    Ok(ResamplerConfig {
        n_layers: config.layers_or("resampler_depth", 6)?,
        n_latents: config.size_or("resampler_n_latents", 64)?,
        n_heads: config.size_or("resampler_n_heads", 16)?,
        head_dim: config.size_or("resampler_head_dim", 96)?,
        mlp_width: 4 * vision.width,
        activation: Activation::Relu,
        max_frames: 0,
        max_places: 0,
        qk_norm: config.flag_or("qk_layer_norms_perceiver", false)?,
    })
}

/// The added tokens follow the base vocabulary: around-image, image, end of utterance.
fn special_tokens(config: &Config, base: usize) -> Result<SpecialTokens, SourceError> {
    let base = u32::try_from(base).map_err(|_| config.error("`vocab_size` is too large".into()))?;
    Ok(SpecialTokens {
        image: base + 1,
        end_of_chunk: None,
        begin: config.id("bos_token_id"),
        end: config.id("eos_token_id"),
        pad: config.id("pad_token_id"),
        around_image: Some(base),
        answer: None,
        stop: if config.size_or("additional_vocab_size", 0)? > 2 {
            vec![base + 2]
        } else {
            Vec::new()
        },
    })
}

struct Keys;

impl KeyMap for Keys {
    fn vision(&self, key: VisionKey) -> String {
        hugging_face_vision("checkpoint/model.vision_model.", key)
    }

    fn resampler(&self, key: ResamplerKey) -> String {
        let key = match key {
            ResamplerKey::Latents => "latents".to_owned(),
            ResamplerKey::PlaceEmbeddings => "media_pos_emb".to_owned(),
            ResamplerKey::FrameEmbeddings => "frame_embs".to_owned(),
            ResamplerKey::MediaNorm(i, part) => format!("blocks.{i}.0.context_layer_norm.{part}"),
            ResamplerKey::LatentsNorm(i, part) => format!("blocks.{i}.0.latents_layer_norm.{part}"),
            ResamplerKey::Query(i) => format!("blocks.{i}.0.q_proj.weight"),
            ResamplerKey::KeyValue(i) => format!("blocks.{i}.0.kv_proj.weight"),
            ResamplerKey::Key(i) => format!("blocks.{i}.0.k_proj.weight"),
            ResamplerKey::Value(i) => format!("blocks.{i}.0.v_proj.weight"),
            ResamplerKey::QueryNorm(i, part) => format!("blocks.{i}.0.q_layer_norm.{part}"),
            ResamplerKey::KeyNorm(i, part) => format!("blocks.{i}.0.k_layer_norm.{part}"),
            ResamplerKey::Output(i) => format!("blocks.{i}.0.output_proj.weight"),
            ResamplerKey::MlpNorm(i, part) => format!("blocks.{i}.1.ln.{part}"),
            ResamplerKey::Up(i) => format!("blocks.{i}.1.fc.weight"),
            ResamplerKey::Down(i) => format!("blocks.{i}.1.c_proj.weight"),
            ResamplerKey::FinalNorm(part) => format!("layer_norm.{part}"),
        };
        format!("checkpoint/model.perceiver_resampler.{key}")
    }

    fn gated(&self, index: usize, _layer: usize, key: GatedKey) -> String {
        let key = match key {
            GatedKey::AttentionGate => "alpha_cross_attn".to_owned(),
            GatedKey::MlpGate => "alpha_dense".to_owned(),
            GatedKey::AttentionNorm(part) => format!("input_layernorm.{part}"),
            GatedKey::Query => "cross_attn.q_proj.weight".to_owned(),
            GatedKey::KeyValue => "cross_attn.kv_proj.weight".to_owned(),
            GatedKey::Key => "cross_attn.k_proj.weight".to_owned(),
            GatedKey::Value => "cross_attn.v_proj.weight".to_owned(),
            GatedKey::QueryNorm => "cross_attn.q_layer_norm.weight".to_owned(),
            GatedKey::KeyNorm => "cross_attn.k_layer_norm.weight".to_owned(),
            GatedKey::Output => "cross_attn.o_proj.weight".to_owned(),
            GatedKey::MlpNorm(part) => format!("post_attention_layernorm.{part}"),
            GatedKey::Up => "mlp.up_proj.weight".to_owned(),
            GatedKey::Gate => "mlp.gate_proj.weight".to_owned(),
            GatedKey::Down => "mlp.down_proj.weight".to_owned(),
        };
        format!("checkpoint/model.gated_cross_attn_layers.{index}.{key}")
    }

    fn language(&self, _binder: &Binder, key: &str) -> String {
        format!("checkpoint/{key}")
    }
}

fn ignorable(_parts: &Parts, name: &str) -> bool {
    buffer(name) || name.starts_with("checkpoint/model.vision_model.post_layernorm.")
}
