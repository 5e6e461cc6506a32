//! The Perceiver Resampler (open_flamingo `helpers.py`): features of any number of frames to latents.

use burn::tensor::Tensor;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::fused::gelu;
use crate::layers::{attend, layer_norm, multiply, split_heads};
use crate::weights::{Start, Weights};

/// Shape of the resampler; its width is the vision encoder's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resampler {
    /// Layers.
    pub layers: usize,
    /// Visual tokens of a medium.
    pub latents: usize,
    /// Heads of an attention.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Frame embeddings; a clip of another number of frames takes values between them.
    pub max_frames: usize,
}

impl Resampler {
    /// Random weights.
    pub fn start(&self, width: usize, rng: &mut impl Rng) -> Weights {
        let (inner, mut w) = (self.heads * self.head_dim, Weights::default());
        w.add("perceiver.latents", &[self.latents, width], Start::Normal(0.5), rng);
        w.add("perceiver.frame_embs", &[self.max_frames, width], Start::Normal(0.1), rng);
        for layer in 0..self.layers {
            let name = |part: &str| format!("perceiver.layers.{layer}.{part}");
            w.add_layer_norm(&name("0.norm_media"), width);
            w.add_layer_norm(&name("0.norm_latents"), width);
            w.add_linear(name("0.to_q.weight"), inner, width, rng);
            w.add_linear(name("0.to_kv.weight"), 2 * inner, width, rng);
            w.add_linear(name("0.to_out.weight"), width, inner, rng);
            w.add_layer_norm(&name("1.0"), width);
            w.add_linear(name("1.1.weight"), 4 * width, width, rng);
            w.add_linear(name("1.3.weight"), width, 4 * width, rng);
        }
        w.add_layer_norm("perceiver.norm", width);
        w
    }

    /// Features `[n, frames × tokens, width]` to visual tokens `[n, latents, width]`.
    pub fn forward(&self, w: &Weights, features: Tensor<3>, frames: usize) -> Tensor<3> {
        let [n, tokens, width] = features.dims();
        let times = w.get("perceiver.frame_embs").narrow(0, 0, frames);
        let times = times.unsqueeze_dim::<3>(1).expand([frames, tokens / frames, width]);
        let features = features + times.reshape([1, tokens, width]);
        let mut x = w.get("perceiver.latents").unsqueeze::<3>().expand([n, self.latents, width]);
        let inner = self.heads * self.head_dim;
        for layer in 0..self.layers {
            let name = |part: &str| format!("perceiver.layers.{layer}.{part}");
            let media = layer_norm(w, &name("0.norm_media"), features.clone());
            let latents = layer_norm(w, &name("0.norm_latents"), x.clone());
            let q = multiply(w, &name("0.to_q.weight"), latents.clone());
            let all = Tensor::cat(vec![media, latents], 1);
            let kv = multiply(w, &name("0.to_kv.weight"), all);
            let part = |i| split_heads(kv.clone().narrow(2, i * inner, inner), self.heads);
            let y = attend(split_heads(q, self.heads), part(0), part(1), None);
            x = x + multiply(w, &name("0.to_out.weight"), y);
            let y = layer_norm(w, &name("1.0"), x.clone());
            let y = gelu(multiply(w, &name("1.1.weight"), y));
            x = x + multiply(w, &name("1.3.weight"), y);
        }
        layer_norm(w, "perceiver.norm", x)
    }
}
