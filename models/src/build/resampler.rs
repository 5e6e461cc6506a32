//! The Perceiver Resampler (paper fig. 5; open_flamingo `helpers.py` `PerceiverResampler`;
//! transformers `models/idefics/perceiver.py`).

use flamingo_ir::op::{Activate, Add, Attention, Concat, ExpandBatch, LayerNorm};
use flamingo_ir::{Graph, GraphError, ValueId};

use super::{KeyMap, ResamplerKey, linear, rows};
use crate::config::ResamplerConfig;
use crate::source::Binder;

/// ε of every norm of the resampler, in both families.
const EPSILON: f32 = 1e-5;

/// Media tokens [n_media, t, width] → visual tokens [n_media, n_latents, width].
/// `like` has as many entries as there are media.
pub(super) fn build_resampler(
    graph: &mut Graph,
    binder: &mut Binder,
    keys: &dyn KeyMap,
    config: &ResamplerConfig,
    width: usize,
    media: ValueId,
    like: ValueId,
) -> Result<ValueId, GraphError> {
    let mut resampler = Resampler { graph, binder, keys, config, width, like };
    let mut latents = resampler.weight(ResamplerKey::Latents, &[config.n_latents, width]);
    for layer in 0..config.n_layers {
        latents = resampler.attention(layer, media, latents)?;
        latents = resampler.feed_forward(layer, latents)?;
    }
    resampler.norm("resampler.norm", ResamplerKey::FinalNorm, latents)
}

struct Resampler<'g, 'b, 'p> {
    graph: &'g mut Graph,
    binder: &'b mut Binder<'p>,
    keys: &'b dyn KeyMap,
    config: &'b ResamplerConfig,
    width: usize,
    like: ValueId,
}

impl Resampler<'_, '_, '_> {
    fn weight(&mut self, key: ResamplerKey, shape: &[usize]) -> ValueId {
        self.binder.weight(self.graph, &self.keys.resampler(key), shape)
    }

    fn norm(
        &mut self,
        name: &str,
        key: impl Fn(&'static str) -> ResamplerKey,
        x: ValueId,
    ) -> Result<ValueId, GraphError> {
        let affine = ["weight", "bias"].map(|part| self.weight(key(part), &[self.width]));
        let op = LayerNorm { epsilon: EPSILON, n_heads: 1, scale: true, bias: true };
        self.graph.add(name, op, &[x, affine[0], affine[1]])
    }

    /// Layer norm of each head's part of x, where the model has it.
    fn head_norm(
        &mut self,
        name: &str,
        key: impl Fn(&'static str) -> ResamplerKey,
        x: ValueId,
    ) -> Result<ValueId, GraphError> {
        let ResamplerConfig { n_heads, head_dim, qk_norm, .. } = *self.config;
        if !qk_norm {
            return Ok(x);
        }
        let affine = ["weight", "bias"].map(|part| self.weight(key(part), &[head_dim]));
        let op = LayerNorm { epsilon: EPSILON, n_heads, scale: true, bias: true };
        self.graph.add(name, op, &[x, affine[0], affine[1]])
    }

    /// The key and the value weight, cut out of a fused tensor where the file has one.
    fn key_value(&mut self, layer: usize) -> Result<[ValueId; 2], GraphError> {
        let inner = self.config.n_heads * self.config.head_dim;
        if !self.binder.has(&self.keys.resampler(ResamplerKey::KeyValue(layer))) {
            return Ok([
                self.weight(ResamplerKey::Key(layer), &[inner, self.width]),
                self.weight(ResamplerKey::Value(layer), &[inner, self.width]),
            ]);
        }
        let fused = self.weight(ResamplerKey::KeyValue(layer), &[2 * inner, self.width]);
        Ok([rows(self.graph, fused, 0, inner)?, rows(self.graph, fused, inner, 2 * inner)?])
    }

    /// Latents of the first layer are the same for every medium: whatever depends on them alone
    /// is written without a media axis, so that it folds into a constant.
    fn per_media(&mut self, name: &str, x: ValueId) -> Result<ValueId, GraphError> {
        match self.graph.fact(x).rank() {
            2 => self.graph.add(name, ExpandBatch, &[x, self.like]),
            _ => Ok(x),
        }
    }

    fn attention(
        &mut self,
        layer: usize,
        media: ValueId,
        latents: ValueId,
    ) -> Result<ValueId, GraphError> {
        let ResamplerConfig { n_heads, head_dim, .. } = *self.config;
        let name = |part: &str| format!("resampler.{layer}.attention.{part}");
        let media = self.norm(&name("media_norm"), |p| ResamplerKey::MediaNorm(layer, p), media)?;
        let normed =
            self.norm(&name("latents_norm"), |p| ResamplerKey::LatentsNorm(layer, p), latents)?;
        let weight = self.weight(ResamplerKey::Query(layer), &[n_heads * head_dim, self.width]);
        let [key, value] = self.key_value(layer)?;
        let q = linear(self.graph, &name("query"), normed, weight, None)?;
        let q = self.head_norm(&name("query_norm"), |p| ResamplerKey::QueryNorm(layer, p), q)?;
        let q = self.per_media(&name("queries"), q)?;
        let mut keys = Vec::with_capacity(2);
        let mut values = Vec::with_capacity(2);
        for (x, of) in [(media, "media"), (normed, "latents")] {
            let k = linear(self.graph, &name(&format!("{of}_key")), x, key, None)?;
            let norm_name = name(&format!("{of}_key_norm"));
            let k = self.head_norm(&norm_name, |p| ResamplerKey::KeyNorm(layer, p), k)?;
            let v = linear(self.graph, &name(&format!("{of}_value")), x, value, None)?;
            keys.push(self.per_media(&name(&format!("{of}_keys")), k)?);
            values.push(self.per_media(&name(&format!("{of}_values")), v)?);
        }
        let k = self.graph.add(&name("keys"), Concat { axis: 1 }, &keys)?;
        let v = self.graph.add(&name("values"), Concat { axis: 1 }, &values)?;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mixed = self.graph.add(&name("attention"), Attention { n_heads, scale }, &[q, k, v])?;
        let weight = self.weight(ResamplerKey::Output(layer), &[self.width, n_heads * head_dim]);
        let out = linear(self.graph, &name("output"), mixed, weight, None)?;
        let latents = self.per_media(&name("latents"), latents)?;
        self.graph.add(&name("residual"), Add, &[latents, out])
    }

    fn feed_forward(&mut self, layer: usize, latents: ValueId) -> Result<ValueId, GraphError> {
        let ResamplerConfig { mlp_width, activation, .. } = *self.config;
        let name = |part: &str| format!("resampler.{layer}.mlp.{part}");
        let y = self.norm(&name("norm"), |p| ResamplerKey::MlpNorm(layer, p), latents)?;
        let up = self.weight(ResamplerKey::Up(layer), &[mlp_width, self.width]);
        let hidden = linear(self.graph, &name("up"), y, up, None)?;
        let hidden = self.graph.add(&name("activation"), Activate { activation }, &[hidden])?;
        let down = self.weight(ResamplerKey::Down(layer), &[self.width, mlp_width]);
        let out = linear(self.graph, &name("down"), hidden, down, None)?;
        self.graph.add(&name("residual"), Add, &[latents, out])
    }
}
