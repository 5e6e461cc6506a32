//! The text side of the contrastive stage: a small BERT-like encoder, thrown away afterwards.

use burn::tensor::{Int, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::vision::add_linear_with_bias;
use crate::fused::gelu;
use crate::layers::{attend, embed, layer_norm, linear, split_heads};
use crate::weights::{Start, Weights};

/// Shape of the text encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextEncoder {
    /// Width of a token.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Heads of an attention.
    pub heads: usize,
    /// Tokens of the longest text.
    pub max_tokens: usize,
}

impl TextEncoder {
    /// Random weights for a vocabulary and a joint space.
    pub fn start(&self, vocabulary: usize, joint_width: usize, rng: &mut impl Rng) -> Weights {
        let (width, mut w) = (self.width, Weights::default());
        w.add("text.tokens", &[vocabulary, width], Start::Normal(0.1), rng);
        w.add("text.positions", &[self.max_tokens, width], Start::Normal(0.1), rng);
        for layer in 0..self.layers {
            let name = |part: &str| format!("text.{layer}.{part}");
            w.add_layer_norm(&name("norm_1"), width);
            w.add_layer_norm(&name("norm_2"), width);
            for part in ["q", "k", "v", "out"] {
                add_linear_with_bias(&mut w, &name(part), width, width, rng);
            }
            add_linear_with_bias(&mut w, &name("up"), 4 * width, width, rng);
            add_linear_with_bias(&mut w, &name("down"), width, 4 * width, rng);
        }
        w.add_layer_norm("text.norm", width);
        w.add_linear("text.proj", joint_width, width, rng);
        w
    }

    /// Texts `[n, tokens]`, padded, with the padding's mask (0 or −∞, `[n, 1, 1, tokens]`) and the weights of
    /// the mean over tokens (`[n, 1, tokens]`), to pooled features `[n, joint_width]`.
    pub fn forward(
        &self,
        w: &Weights,
        ids: Tensor<2, Int>,
        mask: Tensor<4>,
        pooling: Tensor<3>,
    ) -> Tensor<2> {
        let tokens = ids.dims()[1];
        let positions = w.get("text.positions").narrow(0, 0, tokens);
        let mut x = embed(w.get("text.tokens"), ids) + positions.unsqueeze();
        for layer in 0..self.layers {
            let name = |part: &str| format!("text.{layer}.{part}");
            let y = layer_norm(w, &name("norm_1"), x.clone());
            let [q, k, v] = ["q", "k", "v"]
                .map(|part| split_heads(linear(w, &name(part), y.clone()), self.heads));
            x = x + linear(w, &name("out"), attend(q, k, v, Some(mask.clone())));
            let y = linear(w, &name("up"), layer_norm(w, &name("norm_2"), x.clone()));
            x = x + linear(w, &name("down"), gelu(y));
        }
        let mean = pooling.matmul(layer_norm(w, "text.norm", x)).squeeze_dim::<2>(1);
        mean.matmul(w.get("text.proj").transpose())
    }
}
