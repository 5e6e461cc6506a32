//! Vision encoders, from pixels to tokens; and the vision transformers of CLIP (open_clip 2.20 `VisionTransformer.forward`,
//! transformers `CLIPVisionTransformer`) and SigLIP (transformers `SiglipVisionTransformer`, timm `VisionTransformer`).

use flamingo_ir::op::{Activate, Add, Attention, ClassEmbedding, LayerNorm, Patches, Slice};
use flamingo_ir::{Graph, GraphError, ValueId};

use super::nfnet::build_nfnet;
use super::positions::resample;
use super::{KeyMap, VisionKey, linear, reshaped, rows};
use crate::config::{ClipConfig, VisionConfig, VisionEncoder};
use crate::source::Binder;

/// Pictures [n, 3, S, S] → tokens [n, tokens, width], as the encoder hands them on.
pub(super) fn build_vision(
    graph: &mut Graph,
    binder: &mut Binder,
    keys: &dyn KeyMap,
    config: &VisionConfig,
    pictures: ValueId,
) -> Result<ValueId, GraphError> {
    match &config.encoder {
        VisionEncoder::Clip(clip) => build_clip(graph, binder, keys, (config, clip), pictures),
        VisionEncoder::Nfnet(nfnet) => build_nfnet(graph, binder, keys, (config, nfnet), pictures),
    }
}

/// The last layer's output, behind the final norm where the configuration says so.
fn build_clip(
    graph: &mut Graph,
    binder: &mut Binder,
    keys: &dyn KeyMap,
    (config, clip): (&VisionConfig, &ClipConfig),
    pictures: ValueId,
) -> Result<ValueId, GraphError> {
    let (width, grid) = (config.width, config.grid() * config.grid());
    let mut vision = Vision { graph, binder, keys, width, n_patches: grid, config: clip };
    let mut x = vision.embed(pictures)?;
    for layer in 0..clip.n_layers {
        x = vision.attention(layer, x)?;
        x = vision.feed_forward(layer, x)?;
    }
    if clip.final_norm {
        x = vision.norm("vision.final_norm", x, VisionKey::FinalNorm)?;
    }
    match clip.keep_class_token || !clip.has_class_token {
        true => Ok(x),
        false => graph.add("vision.patch_tokens", Slice { axis: 1, start: 1, end: grid + 1 }, &[x]),
    }
}

struct Vision<'g, 'b, 'p> {
    graph: &'g mut Graph,
    binder: &'b mut Binder<'p>,
    keys: &'b dyn KeyMap,
    width: usize,
    n_patches: usize,
    config: &'b ClipConfig,
}

impl Vision<'_, '_, '_> {
    fn weight(&mut self, key: VisionKey, shape: &[usize]) -> ValueId {
        self.binder.weight(self.graph, &self.keys.vision(key), shape)
    }

    fn norm(
        &mut self,
        name: &str,
        x: ValueId,
        key: impl Fn(&'static str) -> VisionKey,
    ) -> Result<ValueId, GraphError> {
        let epsilon = self.config.epsilon;
        let affine = ["weight", "bias"].map(|part| self.weight(key(part), &[self.width]));
        let op = LayerNorm { epsilon, n_heads: 1, scale: true, bias: true };
        self.graph.add(name, op, &[x, affine[0], affine[1]])
    }

    /// Of the class token, where there is one, and of each patch.
    fn positions(&mut self) -> Result<ValueId, GraphError> {
        let (width, config) = (self.width, self.config);
        let n_class = usize::from(config.has_class_token);
        let stored = config.positions.as_ref().map_or(self.n_patches, |old| old.grid * old.grid);
        let shape = [n_class + stored, width];
        let key = self.keys.vision(VisionKey::Positions);
        // timm's have an axis of pictures.
        let positions = match self.binder.shape(&key) {
            Some([1, _, _]) => {
                let positions = self.weight(VisionKey::Positions, &[1, shape[0], width]);
                reshaped(self.graph, positions, &shape)?
            }
            _ => self.weight(VisionKey::Positions, &shape),
        };
        match &config.positions {
            None => Ok(positions),
            Some(old) => {
                resample(self.graph, positions, (old, n_class), (self.n_patches.isqrt(), width))
            }
        }
    }

    fn embed(&mut self, pictures: ValueId) -> Result<ValueId, GraphError> {
        let (patch_size, width) = (self.config.patch_size, self.width);
        let patches = self.graph.add("vision.patches", Patches { patch_size }, &[pictures])?;
        let weight = self.weight(VisionKey::Patch("weight"), &[width, 3, patch_size, patch_size]);
        let weight = reshaped(self.graph, weight, &[width, 3 * patch_size * patch_size])?;
        let bias = self.config.patch_bias.then(|| self.weight(VisionKey::Patch("bias"), &[width]));
        let x = linear(self.graph, "vision.patch_embedding", patches, weight, bias)?;
        let positions = self.positions()?;
        let x = if self.config.has_class_token {
            let class = self.weight(VisionKey::ClassToken, &[width]);
            self.graph.add("vision.class_embedding", ClassEmbedding, &[x, class, positions])?
        } else {
            self.graph.add("vision.embedding", Add, &[x, positions])?
        };
        match self.config.pre_norm {
            true => self.norm("vision.pre_norm", x, VisionKey::PreNorm),
            false => Ok(x),
        }
    }

    /// Weight and bias of q, k and v, cut out of a fused tensor where the file has one.
    fn projections(&mut self, layer: usize) -> Result<[[ValueId; 2]; 3], GraphError> {
        let width = self.width;
        let fused = self.binder.has(&self.keys.vision(VisionKey::Qkv(layer, "weight")));
        if !fused {
            return Ok(["q", "k", "v"].map(|name| {
                [
                    self.weight(VisionKey::Projection(layer, name, "weight"), &[width, width]),
                    self.weight(VisionKey::Projection(layer, name, "bias"), &[width]),
                ]
            }));
        }
        let weight = self.weight(VisionKey::Qkv(layer, "weight"), &[3 * width, width]);
        let bias = self.weight(VisionKey::Qkv(layer, "bias"), &[3 * width]);
        let mut cut = |part: usize| -> Result<[ValueId; 2], GraphError> {
            let (start, end) = (part * width, (part + 1) * width);
            Ok([rows(self.graph, weight, start, end)?, rows(self.graph, bias, start, end)?])
        };
        Ok([cut(0)?, cut(1)?, cut(2)?])
    }

    fn attention(&mut self, layer: usize, x: ValueId) -> Result<ValueId, GraphError> {
        let (width, n_heads) = (self.width, self.config.n_heads);
        let name = |part: &str| format!("vision.{layer}.attention.{part}");
        let y = self.norm(&name("norm"), x, |part| VisionKey::AttentionNorm(layer, part))?;
        let [q, k, v] = self.projections(layer)?;
        let q = linear(self.graph, &name("query"), y, q[0], Some(q[1]))?;
        let k = linear(self.graph, &name("key"), y, k[0], Some(k[1]))?;
        let v = linear(self.graph, &name("value"), y, v[0], Some(v[1]))?;
        let scale = 1.0 / ((width / n_heads) as f32).sqrt();
        let mixed = self.graph.add(&name("attention"), Attention { n_heads, scale }, &[q, k, v])?;
        let weight = self.weight(VisionKey::Output(layer, "weight"), &[width, width]);
        let bias = self.weight(VisionKey::Output(layer, "bias"), &[width]);
        let out = linear(self.graph, &name("output"), mixed, weight, Some(bias))?;
        self.graph.add(&name("residual"), Add, &[x, out])
    }

    fn feed_forward(&mut self, layer: usize, x: ValueId) -> Result<ValueId, GraphError> {
        let (mlp_width, activation) = (self.config.mlp_width, self.config.activation);
        let width = self.width;
        let name = |part: &str| format!("vision.{layer}.mlp.{part}");
        let y = self.norm(&name("norm"), x, |part| VisionKey::MlpNorm(layer, part))?;
        let up = self.weight(VisionKey::Up(layer, "weight"), &[mlp_width, width]);
        let up_bias = self.weight(VisionKey::Up(layer, "bias"), &[mlp_width]);
        let hidden = linear(self.graph, &name("up"), y, up, Some(up_bias))?;
        let hidden = self.graph.add(&name("activation"), Activate { activation }, &[hidden])?;
        let down = self.weight(VisionKey::Down(layer, "weight"), &[width, mlp_width]);
        let down_bias = self.weight(VisionKey::Down(layer, "bias"), &[width]);
        let out = linear(self.graph, &name("down"), hidden, down, Some(down_bias))?;
        self.graph.add(&name("residual"), Add, &[x, out])
    }
}
