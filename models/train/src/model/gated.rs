//! Tanh-gated cross-attention blocks (open_flamingo `helpers.py`): each text token sees the last medium
//! before it, nothing before the first; the gates begin at 0.

use burn::tensor::Tensor;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::fused::gelu;
use crate::layers::{attend, layer_norm, multiply, split_heads};
use crate::weights::Weights;

/// Width of a head, fixed in OpenFlamingo.
pub const HEAD_DIM: usize = 64;

/// Shape of the gated blocks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gated {
    /// Heads of an attention, of 64 numbers each.
    pub heads: usize,
    /// A block stands before layer i if i + 1 is a multiple of this.
    pub every: usize,
    /// False leaves the gates out, for comparison: what is added is added whole.
    #[serde(default = "yes")]
    pub tanh_gate: bool,
}

fn yes() -> bool {
    true
}

/// The media of a batch, as the blocks take them.
#[derive(Debug)]
pub struct Media {
    /// Visual tokens, `[batch, media × latents, vision width]`; rows without a medium there are zeros.
    pub tokens: Tensor<3>,
    /// 0 where a token may look, −10⁹ elsewhere, `[batch, 1, tokens, media × latents]`.
    pub mask: Tensor<4>,
    /// 1 where there is anything to see, else 0, `[batch, tokens, 1]`.
    pub sees: Tensor<3>,
}

impl Gated {
    /// Whether a block stands before this layer of the language model.
    pub fn is_before(&self, layer: usize) -> bool {
        (layer + 1).is_multiple_of(self.every)
    }

    /// How many blocks stand before the block of a layer.
    pub fn index(&self, layer: usize) -> usize {
        (layer + 1) / self.every - 1
    }

    /// Random weights, gates at 0.
    pub fn start(&self, layers: usize, width: usize, vision: usize, rng: &mut impl Rng) -> Weights {
        let (inner, mut w) = (self.heads * HEAD_DIM, Weights::default());
        for layer in (0..layers).filter(|layer| self.is_before(*layer)) {
            let name = |part: &str| block(layer, part);
            w.add_layer_norm(&name("attn.norm"), width);
            w.add_linear(name("attn.to_q.weight"), inner, width, rng);
            w.add_linear(name("attn.to_kv.weight"), 2 * inner, vision, rng);
            w.add_linear(name("attn.to_out.weight"), width, inner, rng);
            w.insert(name("attn_gate"), &[1], vec![0.0]);
            w.add_layer_norm(&name("ff.0"), width);
            w.add_linear(name("ff.1.weight"), 4 * width, width, rng);
            w.add_linear(name("ff.3.weight"), width, 4 * width, rng);
            w.insert(name("ff_gate"), &[1], vec![0.0]);
        }
        w
    }

    /// One block: `x + tanh(a) attention(x, media)`, then `+ tanh(b) feed-forward`.
    pub fn forward(&self, w: &Weights, layer: usize, x: Tensor<3>, media: &Media) -> Tensor<3> {
        let (inner, name) = (self.heads * HEAD_DIM, |part: &str| block(layer, part));
        let y = layer_norm(w, &name("attn.norm"), x.clone());
        let q = split_heads(multiply(w, &name("attn.to_q.weight"), y), self.heads);
        let kv = multiply(w, &name("attn.to_kv.weight"), media.tokens.clone());
        let part = |i| split_heads(kv.clone().narrow(2, i * inner, inner), self.heads);
        let y = attend(q, part(0), part(1), Some(media.mask.clone())) * media.sees.clone();
        let y = multiply(w, &name("attn.to_out.weight"), y);
        let x = x + self.gate(w, &name("attn_gate"), y);
        let y = layer_norm(w, &name("ff.0"), x.clone());
        let y = gelu(multiply(w, &name("ff.1.weight"), y));
        x + self.gate(w, &name("ff_gate"), multiply(w, &name("ff.3.weight"), y))
    }

    fn gate(&self, w: &Weights, name: &str, y: Tensor<3>) -> Tensor<3> {
        match self.tanh_gate {
            true => y * w.get(name).tanh().unsqueeze(),
            false => y,
        }
    }
}

fn block(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.gated_cross_attn_layer.{part}")
}
