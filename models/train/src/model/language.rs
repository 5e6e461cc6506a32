//! The language model: LLaMA as Hugging Face writes it (RMSNorm, rotary positions, SwiGLU, tied head).

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::gated::{Gated, Media};
use crate::fused::{rotate, swiglu};
use crate::layers::{attend, embed, multiply, multiply_by, rms_norm, split_heads};
use crate::weights::{Start, Weights};

/// The table of token embeddings, which is the output head too.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
const ROTARY_BASE: f32 = 10_000.0;

/// Shape of the language model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Language {
    /// Width of a token.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Heads of an attention.
    pub heads: usize,
    /// Width inside the feed-forward part.
    pub mlp_width: usize,
    /// Tokens of the longest prompt.
    pub max_tokens: usize,
}

impl Language {
    /// Random weights.
    pub fn start(&self, vocabulary: usize, rng: &mut impl Rng) -> Weights {
        let (width, mut w) = (self.width, Weights::default());
        w.add(EMBEDDING, &[vocabulary, width], Start::Normal(0.05), rng);
        for layer in 0..self.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            for part in ["input_layernorm", "post_attention_layernorm"] {
                w.insert(name(part), &[width], vec![1.0; width]);
            }
            for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
                w.add_linear(name(&format!("self_attn.{part}")), width, width, rng);
            }
            for part in ["gate_proj", "up_proj"] {
                w.add_linear(name(&format!("mlp.{part}")), self.mlp_width, width, rng);
            }
            w.add_linear(name("mlp.down_proj"), width, self.mlp_width, rng);
        }
        w.insert("model.norm.weight", &[width], vec![1.0; width]);
        w
    }

    /// Logits `[batch, tokens, vocabulary]` of token ids `[batch, tokens]`. With gated blocks, each of their
    /// layers sees the media first.
    pub fn forward(
        &self,
        w: &Weights,
        ids: Tensor<2, Int>,
        gated: Option<(&Gated, &Media)>,
    ) -> Tensor<3> {
        let tokens = ids.dims()[1];
        let angles = rotary_angles(tokens, self.width / self.heads);
        let mask = causal_mask(tokens);
        let mut x = embed(w.get(EMBEDDING), ids);
        for layer in 0..self.layers {
            if let Some((gated, media)) = gated.filter(|(gated, _)| gated.is_before(layer)) {
                x = gated.forward(w, layer, x, media);
            }
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let y = rms_norm(w, &name("input_layernorm"), x.clone());
            let part =
                |part: &str| multiply(w, &name(&format!("self_attn.{part}.weight")), y.clone());
            let turned = |name| split_heads(rotate(part(name), angles.clone()), self.heads);
            let v = split_heads(part("v_proj"), self.heads);
            let y = attend(turned("q_proj"), turned("k_proj"), v, Some(mask.clone()));
            x = x + multiply(w, &name("self_attn.o_proj.weight"), y);
            let y = rms_norm(w, &name("post_attention_layernorm"), x.clone());
            let gate = multiply(w, &name("mlp.gate_proj.weight"), y.clone());
            let y = swiglu(gate, multiply(w, &name("mlp.up_proj.weight"), y));
            x = x + multiply(w, &name("mlp.down_proj.weight"), y);
        }
        multiply_by(rms_norm(w, "model.norm", x), w.get(EMBEDDING))
    }
}

/// 0 where a token may look, −10⁹ at later tokens: `[1, 1, tokens, tokens]`.
fn causal_mask(tokens: usize) -> Tensor<4> {
    let later = Tensor::<2, Bool>::tril_mask([tokens, tokens], 0, &Device::flex());
    let zeros = Tensor::<2>::zeros([tokens, tokens], &Device::flex());
    Tensor::from_inner(zeros.mask_fill(later, -1e9)).unsqueeze()
}

/// Rotary positions in Hugging Face's arrangement, where the two halves of a head turn together: cosines, then
/// sines of each token's angles, `[tokens, dim]`.
fn rotary_angles(tokens: usize, dim: usize) -> Tensor<2> {
    let half = dim / 2;
    let value = |i: usize| {
        let (token, pair) = (i / dim, i % dim % half);
        let angle = token as f32 * ROTARY_BASE.powf(-(pair as f32) / half as f32);
        if i % dim < half { angle.cos() } else { angle.sin() }
    };
    let values: Vec<f32> = (0..tokens * dim).map(value).collect();
    let data = TensorData::new(values, [tokens, dim]);
    Tensor::from_inner(Tensor::from_data(data, &Device::flex()))
}
