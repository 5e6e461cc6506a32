//! What a Flamingo is made of: shapes and rules that the files' configs and tensors tell.
//!
//! The structs are written into the artifact's manifest, so the runtime knows the model
//! without its checkpoint.

use flamingo_ir::op::{Activation, Position};
use serde::{Deserialize, Serialize};

/// Checkpoint family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// OpenFlamingo: `checkpoint.pt`, language model folder, open_clip visual weights.
    OpenFlamingo,
    /// IDEFICS-1: one Hugging Face folder.
    Idefics,
    /// Otter: one Hugging Face folder with OpenFlamingo's arithmetic.
    Otter,
}

/// A whole model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Checkpoint family; decides the mask rule, the prompt form and the key map.
    pub family: Family,
    /// Vision encoder.
    pub vision: VisionConfig,
    /// Perceiver Resampler; without one the vision encoder's tokens are the visual tokens.
    pub resampler: Option<ResamplerConfig>,
    /// Gated cross-attention.
    pub cross_attention: CrossAttentionConfig,
    /// Language model.
    pub language: LanguageConfig,
    /// Special tokens.
    pub tokens: SpecialTokens,
}

impl ModelConfig {
    /// Visual tokens of one medium (without a resampler: of one picture).
    pub fn n_latents(&self) -> usize {
        match &self.resampler {
            Some(resampler) => resampler.n_latents,
            None => self.vision.n_tokens(),
        }
    }
}

/// A CLIP vision transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VisionConfig {
    /// Side of the square input in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Width of a token.
    pub width: usize,
    /// Transformer layers.
    pub n_layers: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Width of the hidden layer of the feed-forward blocks.
    pub mlp_width: usize,
    /// Activation of the feed-forward blocks.
    #[serde(with = "activation_name")]
    pub activation: Activation,
    /// ε of the layer norms.
    pub epsilon: f32,
    /// Whether the class token is among the tokens handed on (IDEFICS), or dropped.
    pub keep_class_token: bool,
}

impl VisionConfig {
    /// Patches along one side.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Tokens handed on for one picture.
    pub fn n_tokens(&self) -> usize {
        self.grid() * self.grid() + usize::from(self.keep_class_token)
    }
}

/// A Perceiver Resampler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResamplerConfig {
    /// Layers.
    pub n_layers: usize,
    /// Learnt queries, and visual tokens of a medium.
    pub n_latents: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the hidden layer of the feed-forward blocks.
    pub mlp_width: usize,
    /// Activation of the feed-forward blocks.
    #[serde(with = "activation_name")]
    pub activation: Activation,
    /// Rows of the temporal embedding table; 0 without one.
    pub max_frames: usize,
    /// Whether queries and keys are layer-normalised per head (IDEFICS).
    pub qk_norm: bool,
}

/// The gated cross-attention blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CrossAttentionConfig {
    /// Decoder layers before which a block stands, ascending.
    pub layers: Vec<usize>,
    /// Heads.
    pub n_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether queries and keys are RMS-normalised per head (IDEFICS).
    pub qk_norm: bool,
}

/// Key layout and arithmetic of a language model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// MPT-1B (`mosaic_gpt`).
    MosaicGpt,
    /// MPT-7B and Hugging Face MPT (`mpt`).
    Mpt,
    /// GPT-NeoX, RedPajama-INCITE, Pythia (`gpt_neox`).
    GptNeox,
    /// LLaMA (`llama`), also inside IDEFICS.
    Llama,
    /// OPT (`opt`).
    Opt,
}

/// Normalisation of a language model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalisation {
    /// Layer norm.
    Layer {
        /// Added to the variance.
        epsilon: f32,
    },
    /// RMS norm.
    Rms {
        /// Added to the mean square.
        epsilon: f32,
    },
}

/// How the language model knows positions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionConfig {
    /// A learnt embedding per position; row = position + offset (OPT).
    Learnt {
        /// Added to the position.
        offset: usize,
    },
    /// Linear biases.
    Alibi {
        /// Largest exponent of the slopes.
        bias_max: f32,
    },
    /// Rotary embedding.
    Rotary {
        /// Rotated dimensions of a head.
        n_dims: usize,
        /// Base of the frequencies.
        theta: f32,
    },
}

impl PositionConfig {
    /// The part that self-attention sees.
    pub fn in_attention(self) -> Position {
        match self {
            PositionConfig::Learnt { .. } => Position::None,
            PositionConfig::Alibi { bias_max } => Position::Alibi { bias_max },
            PositionConfig::Rotary { n_dims, theta } => Position::Rotary { n_dims, theta },
        }
    }
}

/// A decoder-only language model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LanguageConfig {
    /// Key layout and arithmetic.
    pub architecture: Architecture,
    /// Width of a token.
    pub width: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the hidden layer of the feed-forward blocks.
    pub mlp_width: usize,
    /// Activation of the feed-forward blocks.
    #[serde(with = "activation_name")]
    pub activation: Activation,
    /// Whether the feed-forward is gated (SwiGLU).
    pub gated_mlp: bool,
    /// Normalisation.
    pub normalisation: Normalisation,
    /// Positions.
    pub position: PositionConfig,
    /// Factor of the attention scores.
    pub attention_scale: f32,
    /// Whether queries and keys are layer-normalised over the full width (MPT-1B).
    pub qk_norm: bool,
    /// Whether attention and feed-forward read the same input (GPT-NeoX).
    pub parallel_residual: bool,
    /// Whether the output head is the embedding.
    pub tied_head: bool,
    /// Rows of the embedding, and width of the logits.
    pub vocabulary: usize,
    /// Tokens the model was made for.
    pub max_context: usize,
}

/// Ids of special tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecialTokens {
    /// Stands where a picture or video stands.
    pub image: u32,
    /// Ends an example (OpenFlamingo, Otter); IDEFICS has none.
    pub end_of_chunk: Option<u32>,
    /// Begins a text.
    pub begin: Option<u32>,
    /// Ends a text; in IDEFICS also forgets the last picture.
    pub end: Option<u32>,
    /// Fills up batches.
    pub pad: Option<u32>,
    /// Stands before and after `image` in IDEFICS.
    pub around_image: Option<u32>,
    /// Where generation stops, besides `end` and `end_of_chunk`.
    #[serde(default)]
    pub stop: Vec<u32>,
}

mod activation_name {
    use flamingo_ir::op::Activation;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(a: &Activation, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(a.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Activation, D::Error> {
        let name = String::deserialize(d)?;
        let unknown = || D::Error::custom(format!("unknown activation `{name}`"));
        Activation::from_name(&name).ok_or_else(unknown)
    }
}
