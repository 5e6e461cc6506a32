//! The vision encoder: CLIP's ViT as open_clip writes it (`visual.` weights, QuickGELU, norms first).

use burn::tensor::Tensor;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::fused::quick_gelu;
use crate::layers::{attend, layer_norm, linear, multiply, split_heads};
use crate::weights::{Start, Weights};

/// Shape of the vision encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vision {
    /// Side of a picture in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Width of a token.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Heads of an attention.
    pub heads: usize,
    /// Width of the space where pictures and texts are compared.
    pub joint_width: usize,
}

/// OpenAI CLIP's mean and standard deviation of red, green and blue.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const DEVIATION: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

impl Vision {
    /// Patches of a picture.
    pub fn n_patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }

    /// Numbers of a patch: 3 colours × side × side.
    pub fn patch_width(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }

    /// Random weights.
    pub fn start(&self, rng: &mut impl Rng) -> Weights {
        let (width, mut w) = (self.width, Weights::default());
        let (patch, deviation) = (self.patch_size, (width as f32).powf(-0.5));
        let shape = [width, 3, patch, patch];
        let start = Start::Normal((self.patch_width() as f32).powf(-0.5));
        w.add("conv1.weight", &shape, start, rng);
        w.add("class_embedding", &[width], Start::Normal(deviation), rng);
        let positions = [self.n_patches() + 1, width];
        w.add("positional_embedding", &positions, Start::Normal(deviation), rng);
        w.add_layer_norm("ln_pre", width);
        for layer in 0..self.layers {
            let name = |part: &str| format!("transformer.resblocks.{layer}.{part}");
            w.add_layer_norm(&name("ln_1"), width);
            w.add_linear(name("attn.in_proj_weight"), 3 * width, width, rng);
            w.insert(name("attn.in_proj_bias"), &[3 * width], vec![0.0; 3 * width]);
            add_linear_with_bias(&mut w, &name("attn.out_proj"), width, width, rng);
            w.add_layer_norm(&name("ln_2"), width);
            add_linear_with_bias(&mut w, &name("mlp.c_fc"), 4 * width, width, rng);
            add_linear_with_bias(&mut w, &name("mlp.c_proj"), width, 4 * width, rng);
        }
        w.add_layer_norm("ln_post", width);
        w.add("proj", &[width, self.joint_width], Start::Normal(deviation), rng);
        w
    }

    /// Pixels of pictures, `[side, side, 3]` bytes each, to normalised patches in the order of the
    /// convolution's weight: `[n_pictures × n_patches × 3 p p]`.
    pub fn patches<'a>(&self, pictures: impl IntoIterator<Item = &'a [u8]>) -> Vec<f32> {
        let (side, patch) = (self.image_size, self.patch_size);
        let grid = side / patch;
        let mut out = Vec::new();
        for picture in pictures {
            assert_eq!(picture.len(), side * side * 3, "a picture of another size");
            for cell in 0..grid * grid {
                let (top, left) = (cell / grid * patch, cell % grid * patch);
                for colour in 0..3 {
                    for pixel in 0..patch * patch {
                        let (y, x) = (top + pixel / patch, left + pixel % patch);
                        let value = f32::from(picture[(y * side + x) * 3 + colour]) / 255.0;
                        out.push((value - MEAN[colour]) / DEVIATION[colour]);
                    }
                }
            }
        }
        out
    }

    /// Patches `[n, n_patches, 3 p p]` to features `[n, n_patches, width]`: without the class token and
    /// without the last norm, as OpenFlamingo takes them.
    pub fn forward(&self, w: &Weights, patches: Tensor<3>) -> Tensor<3> {
        let n = patches.dims()[0];
        let class = w.get("class_embedding").unsqueeze::<3>().expand([n, 1, self.width]);
        let x = Tensor::cat(vec![class, multiply(w, "conv1.weight", patches)], 1);
        let mut x = layer_norm(w, "ln_pre", x + w.get("positional_embedding").unsqueeze());
        for layer in 0..self.layers {
            let name = |part: &str| format!("transformer.resblocks.{layer}.{part}");
            x = x.clone() + self.attention(w, &name, layer_norm(w, &name("ln_1"), x));
            let y = linear(w, &name("mlp.c_fc"), layer_norm(w, &name("ln_2"), x.clone()));
            x = x + linear(w, &name("mlp.c_proj"), quick_gelu(y));
        }
        x.narrow(1, 1, self.n_patches())
    }

    fn attention(&self, w: &Weights, name: &dyn Fn(&str) -> String, x: Tensor<3>) -> Tensor<3> {
        let qkv = multiply(w, &name("attn.in_proj_weight"), x);
        let qkv = qkv + w.get(&name("attn.in_proj_bias")).unsqueeze();
        let part = |i| split_heads(qkv.clone().narrow(2, i * self.width, self.width), self.heads);
        linear(w, &name("attn.out_proj"), attend(part(0), part(1), part(2), None))
    }

    /// Features to pooled features in the joint space, `[n, joint_width]`: the weighted mean of tokens, the
    /// last norm, the projection. `pooling` is `[n, 1, n_patches]` with rows that sum to 1.
    pub fn pooled(&self, w: &Weights, features: Tensor<3>, pooling: Tensor<3>) -> Tensor<2> {
        let mean = layer_norm(w, "ln_post", pooling.matmul(features));
        mean.squeeze_dim::<2>(1).matmul(w.get("proj"))
    }
}

/// A linear layer with a bias of zeros; the weight is normal with deviation 1 / √inputs.
pub(crate) fn add_linear_with_bias(
    w: &mut Weights,
    name: &str,
    outputs: usize,
    inputs: usize,
    rng: &mut impl Rng,
) {
    w.add_linear(format!("{name}.weight"), outputs, inputs, rng);
    w.insert(format!("{name}.bias"), &[outputs], vec![0.0; outputs]);
}
