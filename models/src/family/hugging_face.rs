//! Hugging Face configs: checked reading of `config.json`, and the language models' shapes.

use std::path::{Path, PathBuf};

use flamingo_ir::op::Activation;
use serde_json::{Map, Value};

use crate::config::{Architecture, LanguageConfig, Normalisation, PositionConfig};
use crate::source::SourceError;

/// Sizes above this are no model's.
const MAX_SIZE: u64 = 1 << 24;

/// Numbers of layers above this are no model's: every layer becomes nodes before its tensors are
/// looked for.
const MAX_LAYERS: usize = 1024;

/// A JSON object with the file it came from.
pub(super) struct Config {
    path: PathBuf,
    /// Keys that lead to this object, each followed by a dot.
    prefix: String,
    object: Map<String, Value>,
}

impl Config {
    pub(super) fn read(path: &Path) -> Result<Config, SourceError> {
        let io = |source| SourceError::Io { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(io)?;
        let wrong = |reason: String| SourceError::Config { path: path.to_owned(), reason };
        match serde_json::from_str(&text) {
            Ok(Value::Object(object)) => {
                Ok(Config { path: path.to_owned(), prefix: String::new(), object })
            }
            Ok(_) => Err(wrong("expected a JSON object".into())),
            Err(error) => Err(wrong(error.to_string())),
        }
    }

    pub(super) fn error(&self, reason: String) -> SourceError {
        SourceError::Config { path: self.path.clone(), reason }
    }

    /// The object under `key`; empty if there is none.
    pub(super) fn section(&self, key: &str) -> Config {
        let object = match self.object.get(key) {
            Some(Value::Object(object)) => object.clone(),
            _ => Map::new(),
        };
        Config { path: self.path.clone(), prefix: format!("{}{key}.", self.prefix), object }
    }

    fn wrong(&self, key: &str, expected: &str) -> SourceError {
        let found = self.object.get(key).map_or("nothing".to_owned(), Value::to_string);
        self.error(format!("`{}{key}`: expected {expected}, got {found}", self.prefix))
    }

    /// Whether `key` has a value.
    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, key: &str) -> Result<&str, SourceError> {
        self.get(key).and_then(Value::as_str).ok_or_else(|| self.wrong(key, "a word"))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, SourceError> {
        let size =
            self.get(key).and_then(Value::as_u64).filter(|size| (1..MAX_SIZE).contains(size));
        let size = size.and_then(|size| usize::try_from(size).ok());
        size.ok_or_else(|| self.wrong(key, "a size from 1 to 2^24"))
    }

    pub(super) fn size_or(&self, key: &str, default: usize) -> Result<usize, SourceError> {
        self.get(key).map_or(Ok(default), |_| self.size(key))
    }

    /// A number of layers.
    pub(super) fn layers(&self, key: &str) -> Result<usize, SourceError> {
        let n_layers = self.size(key).ok().filter(|n_layers| *n_layers <= MAX_LAYERS);
        n_layers.ok_or_else(|| self.wrong(key, &format!("1 to {MAX_LAYERS} layers")))
    }

    pub(super) fn layers_or(&self, key: &str, default: usize) -> Result<usize, SourceError> {
        self.get(key).map_or(Ok(default), |_| self.layers(key))
    }

    pub(super) fn id(&self, key: &str) -> Option<u32> {
        self.get(key).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok())
    }

    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool, SourceError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// A positive finite number.
    pub(super) fn float_or(&self, key: &str, default: f32) -> Result<f32, SourceError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let number = value.as_f64().map(|number| number as f32);
        let number = number.filter(|number| number.is_finite() && *number >= 0.0);
        number.ok_or_else(|| self.wrong(key, "a number from 0"))
    }

    /// Errors unless `key` is absent, null or `value`.
    pub(super) fn must_be(&self, key: &str, value: Value) -> Result<(), SourceError> {
        match self.get(key) {
            None => Ok(()),
            Some(found) if *found == value => Ok(()),
            Some(_) => Err(self.wrong(key, &format!("{value} (other values are not supported)"))),
        }
    }

    /// An activation by its transformers name.
    pub(super) fn activation(&self, key: &str, default: &str) -> Result<Activation, SourceError> {
        let name = self.get(key).map_or(Some(default), Value::as_str);
        match name {
            Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
            Some("quick_gelu") => Ok(Activation::QuickGelu),
            Some("relu") => Ok(Activation::Relu),
            Some("silu" | "swish") => Ok(Activation::Silu),
            _ => Err(self.wrong(key, "gelu, gelu_pytorch_tanh, quick_gelu, relu or silu")),
        }
    }

    fn per_head(&self, width: usize, n_heads: usize) -> Result<usize, SourceError> {
        match width.is_multiple_of(n_heads) {
            true => Ok(width / n_heads),
            false => Err(self.error(format!("{n_heads} heads do not divide the width {width}"))),
        }
    }
}

/// Shape of the language model that `config` describes. `vocabulary` counts the rows of the
/// embedding in use.
pub(super) fn language_config(
    config: &Config,
    vocabulary: usize,
) -> Result<LanguageConfig, SourceError> {
    match config.text("model_type")? {
        "mosaic_gpt" => mosaic_gpt(config, vocabulary),
        "mpt" => mpt(config, vocabulary),
        "gpt_neox" => gpt_neox(config, vocabulary),
        "llama" => llama(config, vocabulary),
        "opt" => opt(config, vocabulary),
        _ => Err(config.wrong("model_type", "mosaic_gpt, mpt, gpt_neox, llama or opt")),
    }
}

fn mosaic_gpt(config: &Config, vocabulary: usize) -> Result<LanguageConfig, SourceError> {
    let width = config.size("d_model")?;
    let n_heads = config.size("n_heads")?;
    let head_dim = config.per_head(width, n_heads)?;
    config.must_be("alibi", Value::Bool(true))?;
    config.must_be("prefix_lm", Value::Bool(false))?;
    config.must_be("logit_scale", Value::Null)?;
    config.must_be("attn_clip_qkv", Value::Null)?;
    let bias_max = config.float_or("alibi_bias_max", 8.0)?;
    Ok(LanguageConfig {
        architecture: Architecture::MosaicGpt,
        width,
        n_layers: config.layers("n_layers")?,
        n_heads,
        n_kv_heads: n_heads,
        head_dim,
        mlp_width: width * config.size_or("mlp_ratio", 4)?,
        activation: Activation::Gelu,
        gated_mlp: false,
        normalisation: Normalisation::Layer { epsilon: 1e-5 },
        position: PositionConfig::Alibi { bias_max },
        attention_scale: config.float_or("softmax_scale", 1.0 / (head_dim as f32).sqrt())?,
        qk_norm: config.flag_or("attn_qk_ln", false)?,
        parallel_residual: false,
        tied_head: true,
        vocabulary,
        max_context: config.size_or("max_seq_len", 2048)?,
    })
}

fn mpt(config: &Config, vocabulary: usize) -> Result<LanguageConfig, SourceError> {
    let attention = config.section("attn_config");
    attention.must_be("alibi", Value::Bool(true))?;
    attention.must_be("qk_ln", Value::Bool(false))?;
    attention.must_be("clip_qkv", Value::Null)?;
    attention.must_be("prefix_lm", Value::Bool(false))?;
    config.must_be("logit_scale", Value::Null)?;
    let width = config.size("d_model")?;
    let n_heads = config.size("n_heads")?;
    let head_dim = config.per_head(width, n_heads)?;
    let bias_max = attention.float_or("alibi_bias_max", 8.0)?;
    let epsilon = config.float_or("layer_norm_epsilon", 1e-5)?;
    Ok(LanguageConfig {
        architecture: Architecture::Mpt,
        width,
        n_layers: config.layers("n_layers")?,
        n_heads,
        n_kv_heads: n_heads,
        head_dim,
        mlp_width: width * config.size_or("expansion_ratio", 4)?,
        activation: Activation::Gelu,
        gated_mlp: false,
        normalisation: Normalisation::Layer { epsilon },
        position: PositionConfig::Alibi { bias_max },
        attention_scale: attention.float_or("softmax_scale", 1.0 / (head_dim as f32).sqrt())?,
        qk_norm: false,
        parallel_residual: false,
        tied_head: true,
        vocabulary,
        max_context: config.size_or("max_seq_len", 2048)?,
    })
}

fn gpt_neox(config: &Config, vocabulary: usize) -> Result<LanguageConfig, SourceError> {
    config.must_be("rope_scaling", Value::Null)?;
    let width = config.size("hidden_size")?;
    let n_heads = config.size("num_attention_heads")?;
    let head_dim = config.per_head(width, n_heads)?;
    let (fraction, theta) = rotary(config, "rotary_pct", 0.25, "rotary_emb_base")?;
    let epsilon = config.float_or("layer_norm_eps", 1e-5)?;
    Ok(LanguageConfig {
        architecture: Architecture::GptNeox,
        width,
        n_layers: config.layers("num_hidden_layers")?,
        n_heads,
        n_kv_heads: n_heads,
        head_dim,
        mlp_width: config.size("intermediate_size")?,
        activation: config.activation("hidden_act", "gelu")?,
        gated_mlp: false,
        normalisation: Normalisation::Layer { epsilon },
        position: PositionConfig::Rotary { n_dims: rotated(head_dim, fraction), theta },
        attention_scale: 1.0 / (head_dim as f32).sqrt(),
        qk_norm: false,
        parallel_residual: config.flag_or("use_parallel_residual", true)?,
        tied_head: config.flag_or("tie_word_embeddings", false)?,
        vocabulary,
        max_context: config.size_or("max_position_embeddings", 2048)?,
    })
}

/// LLaMA, also as the language model inside IDEFICS.
pub(super) fn llama(config: &Config, vocabulary: usize) -> Result<LanguageConfig, SourceError> {
    config.must_be("rope_scaling", Value::Null)?;
    let width = config.size("hidden_size")?;
    let n_heads = config.size("num_attention_heads")?;
    let head_dim = match config.get("head_dim") {
        Some(_) => config.size("head_dim")?,
        None => config.per_head(width, n_heads)?,
    };
    let n_kv_heads = config.size_or("num_key_value_heads", n_heads)?;
    if !n_heads.is_multiple_of(n_kv_heads) {
        return Err(config.wrong("num_key_value_heads", &format!("a divisor of {n_heads}")));
    }
    let (_, theta) = rotary(config, "", 1.0, "rope_theta")?;
    let epsilon = config.float_or("rms_norm_eps", 1e-6)?;
    Ok(LanguageConfig {
        architecture: Architecture::Llama,
        width,
        n_layers: config.layers("num_hidden_layers")?,
        n_heads,
        n_kv_heads,
        head_dim,
        mlp_width: config.size("intermediate_size")?,
        activation: config.activation("hidden_act", "silu")?,
        gated_mlp: true,
        normalisation: Normalisation::Rms { epsilon },
        position: PositionConfig::Rotary { n_dims: head_dim, theta },
        attention_scale: 1.0 / (head_dim as f32).sqrt(),
        qk_norm: false,
        parallel_residual: false,
        tied_head: config.flag_or("tie_word_embeddings", false)?,
        vocabulary,
        max_context: config.size_or("max_position_embeddings", 2048)?,
    })
}

fn opt(config: &Config, vocabulary: usize) -> Result<LanguageConfig, SourceError> {
    config.must_be("do_layer_norm_before", Value::Bool(true))?;
    config.must_be("_remove_final_layer_norm", Value::Bool(false))?;
    config.must_be("layer_norm_elementwise_affine", Value::Bool(true))?;
    let width = config.size("hidden_size")?;
    config.must_be("word_embed_proj_dim", Value::from(width))?;
    let n_heads = config.size("num_attention_heads")?;
    let head_dim = config.per_head(width, n_heads)?;
    Ok(LanguageConfig {
        architecture: Architecture::Opt,
        width,
        n_layers: config.layers("num_hidden_layers")?,
        n_heads,
        n_kv_heads: n_heads,
        head_dim,
        mlp_width: config.size("ffn_dim")?,
        activation: config.activation("activation_function", "relu")?,
        gated_mlp: false,
        normalisation: Normalisation::Layer { epsilon: 1e-5 },
        position: PositionConfig::Learnt { offset: 2 },
        attention_scale: 1.0 / (head_dim as f32).sqrt(),
        qk_norm: false,
        parallel_residual: false,
        tied_head: config.flag_or("tie_word_embeddings", true)?,
        vocabulary,
        max_context: config.size_or("max_position_embeddings", 2048)?,
    })
}

/// Rotated fraction and base of the frequencies, in the older or the newer spelling
/// (`rope_parameters` of transformers 5).
fn rotary(
    config: &Config,
    fraction_key: &str,
    fraction_default: f32,
    theta_key: &str,
) -> Result<(f32, f32), SourceError> {
    let newer = config.section("rope_parameters");
    newer.must_be("rope_type", Value::from("default"))?;
    let fraction = newer.float_or("partial_rotary_factor", fraction_default)?;
    let fraction = config.float_or(fraction_key, fraction)?;
    let theta = newer.float_or("rope_theta", 1e4)?;
    Ok((fraction.min(1.0), config.float_or(theta_key, theta)?))
}

/// Rotated dimensions of a head: `fraction` of them, as transformers truncates.
fn rotated(head_dim: usize, fraction: f32) -> usize {
    (0..=head_dim).rev().find(|n| *n as f32 <= head_dim as f32 * fraction).unwrap_or(0)
}
