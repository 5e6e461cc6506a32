//! IDEFICS-1 folders: one Hugging Face config and one set of tensors for the whole model.

use serde_json::{Value, json};

use super::language::{LLAMA_WRITER, gated_mlp, llama_layer};
use super::random::Storage;
use super::tensor::{Fill, TensorList};
use super::tokens::Tokens;

/// Shape of an IDEFICS-1.
#[derive(Clone, Debug)]
pub(super) struct Idefics {
    pub(super) width: usize,
    pub(super) n_layers: usize,
    pub(super) n_heads: usize,
    pub(super) mlp_width: usize,
    pub(super) vocabulary: usize,
    pub(super) max_context: usize,
    /// A gated block before every `interval`-th decoder layer: 0, `interval`, ….
    pub(super) interval: usize,
    pub(super) vision: Vision,
    pub(super) resampler: Resampler,
    pub(super) tokens: Tokens,
    pub(super) storage: Storage,
}

/// Shape of the CLIP tower inside.
#[derive(Clone, Debug)]
pub(super) struct Vision {
    pub(super) width: usize,
    pub(super) n_layers: usize,
    pub(super) n_heads: usize,
    pub(super) mlp_width: usize,
    pub(super) image_size: usize,
    pub(super) patch_size: usize,
}

/// Shape of the resampler; its feed-forward is four times as wide as the vision encoder.
#[derive(Clone, Debug)]
pub(super) struct Resampler {
    pub(super) depth: usize,
    pub(super) n_latents: usize,
    pub(super) n_heads: usize,
    pub(super) head_dim: usize,
}

impl Idefics {
    /// Every tensor of the folder.
    pub(super) fn tensors(&self) -> TensorList {
        let mut list = TensorList::default();
        let n_added = self.tokens.added.len();
        list.embedding("model.embed_tokens", self.vocabulary, self.width);
        list.embedding("model.embed_tokens.additional_embedding", n_added, self.width);
        self.vision.tensors(&mut list, "model.vision_model");
        self.resampler(&mut list);
        for layer_idx in 0..self.n_layers {
            let layer = format!("model.layers.{layer_idx}");
            llama_layer(&mut list, &layer, self.width, self.mlp_width);
        }
        for block_idx in 0..self.n_layers.div_ceil(self.interval) {
            self.gated_block(&mut list, &format!("model.gated_cross_attn_layers.{block_idx}"));
        }
        list.final_norm_scale("model.norm", self.width, false);
        list.linear("lm_head", self.vocabulary, self.width);
        list.linear("lm_head.additional_fc", n_added, self.width);
        list.before_outliers("model.gated_cross_attn_layers.0");
        list.before_outliers("model.layers.0");
        list.outlier_writer(&format!("model.layers.0.{LLAMA_WRITER}"), true);
        list
    }

    fn gated_block(&self, list: &mut TensorList, block: &str) {
        let (width, head_dim) = (self.width, self.width / self.n_heads);
        list.add(format!("{block}.alpha_cross_attn"), &[1], Fill::Gate);
        list.add(format!("{block}.alpha_dense"), &[1], Fill::Gate);
        list.linear(&format!("{block}.cross_attn.q_proj"), width, width);
        list.linear(&format!("{block}.cross_attn.k_proj"), width, self.vision.width);
        list.linear(&format!("{block}.cross_attn.v_proj"), width, self.vision.width);
        list.linear(&format!("{block}.cross_attn.o_proj"), width, width);
        list.norm_scale(&format!("{block}.cross_attn.q_layer_norm"), head_dim);
        list.norm_scale(&format!("{block}.cross_attn.k_layer_norm"), head_dim);
        gated_mlp(list, block, width, self.mlp_width);
        list.residual_norm_scale(&format!("{block}.input_layernorm"), width);
        list.residual_norm_scale(&format!("{block}.post_attention_layernorm"), width);
    }

    fn resampler(&self, list: &mut TensorList) {
        let (width, resampler) = (self.vision.width, &self.resampler);
        let inner = resampler.n_heads * resampler.head_dim;
        let root = "model.perceiver_resampler";
        list.add(format!("{root}.latents"), &[resampler.n_latents, width], Fill::Latents);
        for layer_idx in 0..resampler.depth {
            let attention = format!("{root}.blocks.{layer_idx}.0");
            list.layer_norm(&format!("{attention}.context_layer_norm"), width);
            list.layer_norm(&format!("{attention}.latents_layer_norm"), width);
            list.layer_norm(&format!("{attention}.q_layer_norm"), resampler.head_dim);
            list.layer_norm(&format!("{attention}.k_layer_norm"), resampler.head_dim);
            for projection in ["q_proj", "k_proj", "v_proj"] {
                list.linear(&format!("{attention}.{projection}"), inner, width);
            }
            list.linear(&format!("{attention}.output_proj"), width, inner);
            let feed_forward = format!("{root}.blocks.{layer_idx}.1");
            list.layer_norm(&format!("{feed_forward}.ln"), width);
            list.linear(&format!("{feed_forward}.fc"), 4 * width, width);
            list.linear(&format!("{feed_forward}.c_proj"), width, 4 * width);
        }
        list.layer_norm(&format!("{root}.layer_norm"), width);
    }

    /// The folder's `config.json`.
    pub(super) fn config(&self) -> Value {
        let (vision, resampler) = (&self.vision, &self.resampler);
        json!({
            "architectures": ["IdeficsForVisionText2Text"], "model_type": "idefics",
            "vocab_size": self.vocabulary, "additional_vocab_size": self.tokens.added.len(),
            "hidden_size": self.width, "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.n_layers, "num_attention_heads": self.n_heads,
            "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "max_position_embeddings": self.max_context, "max_sequence_length": self.max_context,
            "cross_layer_interval": self.interval, "qk_layer_norms": true,
            "alpha_initializer": "zeros", "alpha_type": "float", "alphas_initializer_range": 0.0,
            "dropout": 0.0, "freeze_lm_head": true, "freeze_text_layers": true,
            "freeze_vision_layers": true, "tie_word_embeddings": false, "use_cache": true,
            "use_resampler": true, "torch_dtype": self.storage.torch_name(),
            "pad_token_id": 0, "bos_token_id": self.tokens.begin(),
            "eos_token_id": self.tokens.end(),
            "perceiver_config": {
                "use_resampler": true, "qk_layer_norms_perceiver": true,
                "resampler_depth": resampler.depth, "resampler_n_latents": resampler.n_latents,
                "resampler_n_heads": resampler.n_heads, "resampler_head_dim": resampler.head_dim
            },
            "vision_config": {
                "model_type": "idefics_vision", "embed_dim": vision.width,
                "image_size": vision.image_size, "patch_size": vision.patch_size,
                "intermediate_size": vision.mlp_width, "num_hidden_layers": vision.n_layers,
                "num_attention_heads": vision.n_heads, "num_channels": 3, "hidden_act": "gelu",
                "layer_norm_eps": 1e-5, "attention_dropout": 0.0
            }
        })
    }
}

impl Vision {
    /// Its tensors, all below `root`.
    pub(super) fn tensors(&self, list: &mut TensorList, root: &str) {
        let (width, patch) = (self.width, self.patch_size);
        let n_tokens = (self.image_size / patch).pow(2) + 1;
        list.add(format!("{root}.embeddings.class_embedding"), &[width], Fill::Embedding);
        let patch_shape = [width, 3, patch, patch];
        list.add(format!("{root}.embeddings.patch_embedding.weight"), &patch_shape, Fill::Linear);
        list.embedding(&format!("{root}.embeddings.position_embedding"), n_tokens, width);
        list.layer_norm(&format!("{root}.pre_layrnorm"), width);
        for layer_idx in 0..self.n_layers {
            let layer = format!("{root}.encoder.layers.{layer_idx}");
            for projection in ["k_proj", "v_proj", "q_proj", "out_proj"] {
                list.linear_with_bias(&format!("{layer}.self_attn.{projection}"), width, width);
            }
            list.layer_norm(&format!("{layer}.layer_norm1"), width);
            list.linear_with_bias(&format!("{layer}.mlp.fc1"), self.mlp_width, width);
            list.linear_with_bias(&format!("{layer}.mlp.fc2"), width, self.mlp_width);
            list.layer_norm(&format!("{layer}.layer_norm2"), width);
        }
        list.layer_norm(&format!("{root}.post_layernorm"), width);
    }
}
