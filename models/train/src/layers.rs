//! The layers that the models share, as functions of named weights. Tensors are `[batch, tokens, width]`.

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{Int, Tensor, module};

use crate::weights::Weights;

const EPSILON: f64 = 1e-5;

/// x Wᵀ + b, with `NAME.weight`, and `NAME.bias` where there is one.
pub fn linear(weights: &Weights, name: &str, x: Tensor<3>) -> Tensor<3> {
    let bias = format!("{name}.bias");
    let y = multiply(weights, &format!("{name}.weight"), x);
    match weights.contains(&bias) {
        true => y + weights.get(&bias).unsqueeze(),
        false => y,
    }
}

/// x Wᵀ with the weight of this name.
pub fn multiply(weights: &Weights, name: &str, x: Tensor<3>) -> Tensor<3> {
    multiply_by(x, weights.get(name))
}

/// x Wᵀ.
pub fn multiply_by(x: Tensor<3>, weight: Tensor<2>) -> Tensor<3> {
    let [batch, tokens, width] = x.dims();
    let outputs = weight.dims()[0];
    x.reshape([batch * tokens, width]).matmul(weight.transpose()).reshape([batch, tokens, outputs])
}

/// LayerNorm with `NAME.weight` and `NAME.bias`.
pub fn layer_norm(weights: &Weights, name: &str, x: Tensor<3>) -> Tensor<3> {
    let centred = x.clone() - x.mean_dim(2);
    let variance = centred.clone().square().mean_dim(2);
    let scale = weights.get(&format!("{name}.weight")).unsqueeze();
    let shift = weights.get(&format!("{name}.bias")).unsqueeze();
    centred * (variance + EPSILON).sqrt().recip() * scale + shift
}

/// RMSNorm with `NAME.weight`.
pub fn rms_norm(weights: &Weights, name: &str, x: Tensor<3>) -> Tensor<3> {
    let power = x.clone().square().mean_dim(2);
    x * (power + EPSILON).sqrt().recip() * weights.get(&format!("{name}.weight")).unsqueeze()
}

/// x σ(1.702 x), the activation of OpenAI's CLIP.
pub fn quick_gelu(x: Tensor<3>) -> Tensor<3> {
    x.clone() * sigmoid(x * 1.702)
}

/// `[batch, tokens, heads × dim]` to `[batch, heads, tokens, dim]`.
pub fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, tokens, width] = x.dims();
    x.reshape([batch, tokens, heads, width / heads]).swap_dims(1, 2)
}

/// Attention of `q` to `k` and `v`, all `[batch, heads, tokens, dim]`, with a mask that is added to the
/// scores, `[batch or 1, 1, queries, keys]`; heads merged: `[batch, queries, heads × dim]`.
pub fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<Tensor<4>>) -> Tensor<3> {
    let [batch, heads, queries, dim] = q.dims();
    let scores = (q * (dim as f64).powf(-0.5)).matmul(k.swap_dims(2, 3));
    let scores = match mask {
        Some(mask) => scores + mask,
        None => scores,
    };
    softmax(scores, 3).matmul(v).swap_dims(1, 2).reshape([batch, queries, heads * dim])
}

/// Rows of a table by their ids: `[batch, tokens]` to `[batch, tokens, width]`.
pub fn embed(table: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    module::embedding(table, ids)
}
