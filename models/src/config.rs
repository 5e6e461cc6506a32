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
    /// flamingo-pytorch's `FlamingoPaLM`: one state dict, and a vision encoder.
    FlamingoPytorch,
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

    /// Places in a prompt that a medium has visual tokens for; 1 where they are the same at every place.
    pub fn n_places(&self) -> usize {
        self.resampler.as_ref().map_or(1, |resampler| resampler.max_places.max(1))
    }
}

/// A vision encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VisionConfig {
    /// Side of the square input in pixels.
    pub image_size: usize,
    /// Width of a token.
    pub width: usize,
    /// What is between pixels and tokens.
    #[serde(flatten)]
    pub encoder: VisionEncoder,
}

/// What is between pixels and tokens; the fields tell which it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum VisionEncoder {
    /// A vision transformer of CLIP or SigLIP.
    Clip(ClipConfig),
    /// An NFNet.
    Nfnet(NfnetConfig),
}

/// A vision transformer of CLIP or SigLIP. What SigLIP has otherwise is in a manifest only where it is so.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClipConfig {
    /// Side of a patch in pixels.
    pub patch_size: usize,
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
    /// The checkpoint's positions, if they are of another square than the patches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positions: Option<PositionsConfig>,
    /// Whether a class token stands before the patches (CLIP), or none does (SigLIP).
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub has_class_token: bool,
    /// Whether the patch embedding has a bias (SigLIP).
    #[serde(default, skip_serializing_if = "is_no")]
    pub patch_bias: bool,
    /// Whether a norm stands before the layers (CLIP).
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub pre_norm: bool,
    /// Whether tokens are handed on behind the last norm.
    #[serde(default, skip_serializing_if = "is_no")]
    pub final_norm: bool,
}

fn yes() -> bool {
    true
}

fn is_yes(flag: &bool) -> bool {
    *flag
}

fn is_no(flag: &bool) -> bool {
    !*flag
}

/// Positions of a square of patches, to be resampled to another square.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PositionsConfig {
    /// Patches along one side.
    pub grid: usize,
    /// Whether it is done as open_clip does it, with antialiasing, or as transformers.
    pub antialias: bool,
}

/// A normaliser-free ResNet of the F family (Brock et al. 2021), as timm's `dm_nfnet_f0` to `dm_nfnet_f6`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NfnetConfig {
    /// Channels after each convolution of the stem.
    pub stem: Vec<usize>,
    /// The stages; each but the first halves the sides of its input.
    pub stages: Vec<NfnetStage>,
}

/// Blocks of one width.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NfnetStage {
    /// Blocks.
    pub n_blocks: usize,
    /// Channels between blocks.
    pub width: usize,
    /// Channels within a block.
    pub inner_width: usize,
    /// Channels of a group of the 3 × 3 convolutions.
    pub group_width: usize,
    /// Channels between the two linears of squeeze-excite.
    pub squeezed_width: usize,
}

impl NfnetConfig {
    /// Pixels between windows of each convolution of the stem.
    pub const STEM_STRIDES: [usize; 4] = [2, 1, 1, 2];

    /// Pixels between windows of the first block of a stage.
    pub fn stride(stage: usize) -> usize {
        if stage == 0 { 1 } else { 2 }
    }

    /// `f0` to `f6`, where widths and depths are those of one.
    pub fn variant(&self) -> Option<String> {
        let depths: Vec<usize> = self.stages.iter().map(|stage| stage.n_blocks).collect();
        let widths: Vec<usize> = self.stages.iter().map(|stage| stage.width).collect();
        let number = depths.first()?.checked_sub(1).filter(|number| *number <= 6)?;
        let expected = [1, 2, 6, 3].map(|n_blocks| n_blocks * (number + 1));
        (depths == expected && widths == [256, 512, 1536, 1536]).then(|| format!("f{number}"))
    }
}

impl VisionConfig {
    /// Patches, or pixels of the last stage, along one side.
    pub fn grid(&self) -> usize {
        match &self.encoder {
            VisionEncoder::Clip(clip) => self.image_size / clip.patch_size,
            VisionEncoder::Nfnet(nfnet) => {
                let stages = (0..nfnet.stages.len()).map(NfnetConfig::stride);
                let strides = NfnetConfig::STEM_STRIDES.into_iter().chain(stages);
                strides.fold(self.image_size, usize::div_ceil)
            }
        }
    }

    /// Tokens handed on for one picture.
    pub fn n_tokens(&self) -> usize {
        let keeps_class_token =
            matches!(&self.encoder, VisionEncoder::Clip(clip) if clip.keep_class_token);
        self.grid() * self.grid() + usize::from(keeps_class_token)
    }

    /// Layers or blocks.
    pub fn n_layers(&self) -> usize {
        match &self.encoder {
            VisionEncoder::Clip(clip) => clip.n_layers,
            VisionEncoder::Nfnet(nfnet) => nfnet.stages.iter().map(|stage| stage.n_blocks).sum(),
        }
    }
}

fn is_zero(size: &usize) -> bool {
    *size == 0
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
    /// Rows of the table of embeddings of a medium's place in the prompt (flamingo-pytorch); 0 without one. With one, a medium
    /// has visual tokens for each place, and a prompt takes no more media.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub max_places: usize,
    /// Whether queries and keys are layer-normalised per head (IDEFICS).
    pub qk_norm: bool,
}

/// The gated cross-attention blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CrossAttentionConfig {
    /// Decoder layers before which a block stands, ascending; the number of layers for a block after the last.
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
    /// PaLM as flamingo-pytorch has it.
    Palm,
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
    /// Stands before an answer in Otter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<u32>,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn nfnet(depths: [usize; 4], image_size: usize) -> VisionConfig {
        let widths = [256, 512, 1536, 1536];
        let stage = |(n_blocks, width): (usize, usize)| NfnetStage {
            n_blocks,
            width,
            inner_width: width / 2,
            group_width: 128,
            squeezed_width: width / 2,
        };
        let stages = depths.into_iter().zip(widths).map(stage).collect();
        let encoder = VisionEncoder::Nfnet(NfnetConfig { stem: vec![16, 32, 64, 128], stages });
        VisionConfig { image_size, width: 3072, encoder }
    }

    #[test]
    fn nfnets_halve_and_round_up_five_times() {
        for (image_size, grid) in [(320, 10), (319, 10), (321, 11), (36, 2), (1, 1)] {
            assert_eq!(nfnet([7, 14, 42, 21], image_size).grid(), grid, "{image_size}");
        }
    }

    #[test]
    fn depths_and_widths_tell_the_variant() {
        let variant = |depths| match nfnet(depths, 320).encoder {
            VisionEncoder::Nfnet(nfnet) => nfnet.variant(),
            VisionEncoder::Clip(_) => None,
        };
        assert_eq!(variant([7, 14, 42, 21]).as_deref(), Some("f6"));
        assert_eq!(variant([1, 2, 6, 3]).as_deref(), Some("f0"));
        assert_eq!(variant([1, 2, 6, 4]), None);
        assert_eq!(variant([0, 2, 6, 3]), None);
        assert_eq!(variant([8, 16, 48, 24]), None);
    }

    /// The manifest's form of CLIP is that of versions that knew no other encoder.
    #[test]
    fn fields_tell_the_kind_of_encoder() {
        let clip = r#"{"image_size":28,"patch_size":14,"width":16,"n_layers":2,"n_heads":4,"mlp_width":64,
            "activation":"quick_gelu","epsilon":1e-5,"keep_class_token":false}"#;
        let clip: VisionConfig = serde_json::from_str(clip).unwrap();
        let VisionEncoder::Clip(config) = &clip.encoder else { panic!("{clip:?}") };
        assert!(config.has_class_token && config.pre_norm);
        assert!(!config.patch_bias && !config.final_norm);
        assert!(!serde_json::to_string(&clip).unwrap().contains("norm"));
        for config in [clip, nfnet([1, 2, 6, 3], 192)] {
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<VisionConfig>(&json).unwrap(), config, "{json}");
        }
    }
}
