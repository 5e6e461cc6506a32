//! Language models in Hugging Face folders: config and tensors under their genuine names.

use serde_json::{Value, json};

use super::random::Storage;
use super::tensor::{Fill, TensorList};
use super::tokens::Tokens;

/// Which language model's code reads the folder (its `model_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    /// `mosaic_gpt` (MPT-1B): q/k layer norms over the full width.
    MosaicGpt,
    /// `mpt` (MPT-7B).
    Mpt,
    /// `gpt_neox` (RedPajama-INCITE): rotary over the whole head, sequential residual.
    GptNeox,
    /// `llama`.
    Llama,
    /// `opt`.
    Opt,
}

/// Shape of a language model before Flamingo's resizing of the embedding.
#[derive(Clone, Debug)]
pub(super) struct Language {
    pub(super) architecture: Architecture,
    pub(super) width: usize,
    pub(super) n_layers: usize,
    pub(super) n_heads: usize,
    pub(super) mlp_width: usize,
    /// Rows of the embedding.
    pub(super) vocabulary: usize,
    pub(super) max_context: usize,
    /// How the released weights are stored.
    pub(super) storage: Storage,
}

impl Language {
    /// Prefix of a decoder layer's keys, without its number.
    pub(super) fn layers_prefix(&self) -> &'static str {
        match self.architecture {
            Architecture::MosaicGpt | Architecture::Mpt => "transformer.blocks",
            Architecture::GptNeox => "gpt_neox.layers",
            Architecture::Llama => "model.layers",
            Architecture::Opt => "model.decoder.layers",
        }
    }

    /// Every tensor of the folder.
    pub(super) fn tensors(&self) -> TensorList {
        let mut list = TensorList::default();
        let embedding = match self.architecture {
            Architecture::MosaicGpt | Architecture::Mpt => "transformer.wte",
            Architecture::GptNeox => "gpt_neox.embed_in",
            Architecture::Llama => "model.embed_tokens",
            Architecture::Opt => "model.decoder.embed_tokens",
        };
        list.embedding(embedding, self.vocabulary, self.width);
        for layer_idx in 0..self.n_layers {
            let layer = format!("{}.{layer_idx}", self.layers_prefix());
            match self.architecture {
                Architecture::MosaicGpt => self.mosaic_gpt_layer(&mut list, &layer),
                Architecture::Mpt => self.mpt_layer(&mut list, &layer),
                Architecture::GptNeox => self.gpt_neox_layer(&mut list, &layer),
                Architecture::Llama => {
                    llama_layer(&mut list, &layer, self.width, self.mlp_width);
                }
                Architecture::Opt => self.opt_layer(&mut list, &layer),
            }
        }
        self.end(&mut list);
        let (writer, is_gated) = match self.architecture {
            Architecture::MosaicGpt => ("mlp.mlp_down", false),
            Architecture::Mpt => ("ffn.down_proj", false),
            Architecture::GptNeox => ("mlp.dense_4h_to_h", false),
            Architecture::Llama => (LLAMA_WRITER, true),
            Architecture::Opt => ("fc2", false),
        };
        let first = format!("{}.0", self.layers_prefix());
        list.before_outliers(&first);
        list.outlier_writer(&format!("{first}.{writer}"), is_gated);
        list
    }

    /// Final norm, and the head or position table where there is one.
    fn end(&self, list: &mut TensorList) {
        match self.architecture {
            Architecture::MosaicGpt => list.final_norm_scale("transformer.ln_f", self.width, true),
            Architecture::Mpt => list.final_norm_scale("transformer.norm_f", self.width, true),
            Architecture::GptNeox => {
                list.final_layer_norm("gpt_neox.final_layer_norm", self.width, false);
                list.linear("embed_out", self.vocabulary, self.width);
            }
            Architecture::Llama => {
                list.final_norm_scale("model.norm", self.width, false);
                list.linear("lm_head", self.vocabulary, self.width);
            }
            Architecture::Opt => {
                list.final_layer_norm("model.decoder.final_layer_norm", self.width, true);
                self.opt_positions(list, "model.decoder.embed_positions");
            }
        }
    }

    fn mosaic_gpt_layer(&self, list: &mut TensorList, layer: &str) {
        list.residual_norm_scale(&format!("{layer}.ln_1"), self.width);
        list.linear(&format!("{layer}.attn.Wqkv"), 3 * self.width, self.width);
        list.norm_scale(&format!("{layer}.attn.q_ln"), self.width);
        list.norm_scale(&format!("{layer}.attn.k_ln"), self.width);
        list.linear(&format!("{layer}.attn.out_proj"), self.width, self.width);
        list.residual_norm_scale(&format!("{layer}.ln_2"), self.width);
        list.linear(&format!("{layer}.mlp.mlp_up"), self.mlp_width, self.width);
        list.linear(&format!("{layer}.mlp.mlp_down"), self.width, self.mlp_width);
    }

    fn mpt_layer(&self, list: &mut TensorList, layer: &str) {
        list.residual_norm_scale(&format!("{layer}.norm_1"), self.width);
        list.linear(&format!("{layer}.attn.Wqkv"), 3 * self.width, self.width);
        list.linear(&format!("{layer}.attn.out_proj"), self.width, self.width);
        list.residual_norm_scale(&format!("{layer}.norm_2"), self.width);
        list.linear(&format!("{layer}.ffn.up_proj"), self.mlp_width, self.width);
        list.linear(&format!("{layer}.ffn.down_proj"), self.width, self.mlp_width);
    }

    fn gpt_neox_layer(&self, list: &mut TensorList, layer: &str) {
        let (width, mlp_width) = (self.width, self.mlp_width);
        list.residual_layer_norm(&format!("{layer}.input_layernorm"), width);
        list.linear_with_bias(&format!("{layer}.attention.query_key_value"), 3 * width, width);
        list.linear_with_bias(&format!("{layer}.attention.dense"), width, width);
        list.residual_layer_norm(&format!("{layer}.post_attention_layernorm"), width);
        list.linear_with_bias(&format!("{layer}.mlp.dense_h_to_4h"), mlp_width, width);
        list.linear_with_bias(&format!("{layer}.mlp.dense_4h_to_h"), width, mlp_width);
    }

    fn opt_layer(&self, list: &mut TensorList, layer: &str) {
        for projection in ["k_proj", "v_proj", "q_proj", "out_proj"] {
            let name = format!("{layer}.self_attn.{projection}");
            list.linear_with_bias(&name, self.width, self.width);
        }
        list.residual_layer_norm(&format!("{layer}.self_attn_layer_norm"), self.width);
        list.linear_with_bias(&format!("{layer}.fc1"), self.mlp_width, self.width);
        list.linear_with_bias(&format!("{layer}.fc2"), self.width, self.mlp_width);
        list.residual_layer_norm(&format!("{layer}.final_layer_norm"), self.width);
    }

    /// OPT's table has two rows more than positions.
    fn opt_positions(&self, list: &mut TensorList, name: &str) {
        list.embedding(name, self.max_context + 2, self.width);
    }

    /// What an OpenFlamingo checkpoint holds of the language model after resizing to `n_rows`:
    /// whatever has "embed" in its name, and OPT's tied head.
    pub(super) fn checkpoint_embeddings(&self, list: &mut TensorList, n_rows: usize) {
        let width = self.width;
        match self.architecture {
            Architecture::MosaicGpt | Architecture::Mpt => {
                list.embedding("lang_encoder.transformer.wte", n_rows, width);
            }
            Architecture::GptNeox => {
                list.embedding("lang_encoder.gpt_neox.embed_in", n_rows, width);
                list.add("lang_encoder.embed_out.weight", &[n_rows, width], Fill::Linear);
            }
            Architecture::Llama => list.embedding("lang_encoder.model.embed_tokens", n_rows, width),
            Architecture::Opt => {
                let embedding = "lang_encoder.model.decoder.embed_tokens";
                list.embedding(embedding, n_rows, width);
                self.opt_positions(list, "lang_encoder.model.decoder.embed_positions");
                list.add_tied("lang_encoder.lm_head.weight", &format!("{embedding}.weight"));
            }
        }
    }

    /// The folder's `config.json`.
    pub(super) fn config(&self, tokens: &Tokens) -> Value {
        let mut config = match self.architecture {
            Architecture::MosaicGpt => self.mosaic_gpt_config(),
            Architecture::Mpt => self.mpt_config(),
            Architecture::GptNeox => self.gpt_neox_config(),
            Architecture::Llama => self.llama_config(),
            Architecture::Opt => self.opt_config(),
        };
        config["vocab_size"] = self.vocabulary.into();
        config["bos_token_id"] = tokens.begin().into();
        config["eos_token_id"] = tokens.end().into();
        config["torch_dtype"] = self.storage.torch_name().into();
        config["use_cache"] = true.into();
        config
    }

    fn mosaic_gpt_config(&self) -> Value {
        json!({
            "architectures": ["MosaicGPT"], "model_type": "mosaic_gpt",
            "d_model": self.width, "n_layers": self.n_layers, "n_heads": self.n_heads,
            "mlp_ratio": self.mlp_width / self.width, "max_seq_len": self.max_context,
            "alibi": true, "alibi_bias_max": 8, "attn_impl": "torch", "attn_qk_ln": true,
            "attn_clip_qkv": null, "attn_pdrop": 0.0, "attn_uses_sequence_id": false,
            "emb_pdrop": 0.0, "resid_pdrop": 0.0, "embedding_fraction": 1.0, "logit_scale": null,
            "low_precision_layernorm": true, "no_bias": true, "prefix_lm": false,
            "softmax_scale": null, "init_device": "cpu", "verbose": 0
        })
    }

    fn mpt_config(&self) -> Value {
        json!({
            "architectures": ["MptForCausalLM"], "model_type": "mpt",
            "d_model": self.width, "n_layers": self.n_layers, "n_heads": self.n_heads,
            "expansion_ratio": self.mlp_width / self.width, "max_seq_len": self.max_context,
            "attn_config": {
                "alibi": true, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
                "attn_type": "multihead_attention", "attn_uses_sequence_id": false,
                "clip_qkv": null, "prefix_lm": false, "qk_ln": false, "softmax_scale": null
            },
            "emb_pdrop": 0.0, "resid_pdrop": 0.0, "embedding_fraction": 1.0, "logit_scale": null,
            "layer_norm_epsilon": 1e-5, "learned_pos_emb": true, "no_bias": true,
            "norm_type": "low_precision_layernorm", "init_device": "cpu", "verbose": 0
        })
    }

    fn gpt_neox_config(&self) -> Value {
        json!({
            "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox",
            "hidden_size": self.width, "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads, "intermediate_size": self.mlp_width,
            "max_position_embeddings": self.max_context, "hidden_act": "gelu",
            "layer_norm_eps": 1e-5, "rotary_pct": 1.0, "rotary_emb_base": 10000,
            "use_parallel_residual": false, "tie_word_embeddings": false
        })
    }

    fn llama_config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": self.width, "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads, "num_key_value_heads": self.n_heads,
            "intermediate_size": self.mlp_width, "max_position_embeddings": self.max_context,
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "tie_word_embeddings": false
        })
    }

    fn opt_config(&self) -> Value {
        json!({
            "architectures": ["OPTForCausalLM"], "model_type": "opt",
            "hidden_size": self.width, "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads, "ffn_dim": self.mlp_width,
            "max_position_embeddings": self.max_context, "word_embed_proj_dim": self.width,
            "activation_function": "relu", "do_layer_norm_before": true, "enable_bias": true,
            "layer_norm_elementwise_affine": true, "_remove_final_layer_norm": false,
            "dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "pad_token_id": 1
        })
    }
}

/// The last matrix of a LLaMA decoder layer.
pub(super) const LLAMA_WRITER: &str = "mlp.down_proj";

/// A LLaMA decoder layer: also that of IDEFICS.
pub(super) fn llama_layer(list: &mut TensorList, layer: &str, width: usize, mlp_width: usize) {
    for projection in ["q_proj", "k_proj", "v_proj", "o_proj"] {
        list.linear(&format!("{layer}.self_attn.{projection}"), width, width);
    }
    gated_mlp(list, layer, width, mlp_width);
    list.residual_norm_scale(&format!("{layer}.input_layernorm"), width);
    list.residual_norm_scale(&format!("{layer}.post_attention_layernorm"), width);
}

/// LLaMA's SwiGLU matrices under `{layer}.mlp`.
pub(super) fn gated_mlp(list: &mut TensorList, layer: &str, width: usize, mlp_width: usize) {
    list.linear(&format!("{layer}.mlp.gate_proj"), mlp_width, width);
    list.linear(&format!("{layer}.mlp.up_proj"), mlp_width, width);
    list.linear(&format!("{layer}.mlp.down_proj"), width, mlp_width);
}
