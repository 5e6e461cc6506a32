//! The layers that the models share, as functions of named weights. Tensors are `[batch, tokens, width]`.

use burn::tensor::{Int, Tensor, module};

use crate::fused::{self, masked_softmax};
use crate::weights::Weights;

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
    let (scale, shift) = (format!("{name}.weight"), format!("{name}.bias"));
    fused::layer_norm(x, weights.get(&scale), weights.get(&shift))
}

/// RMSNorm with `NAME.weight`.
pub fn rms_norm(weights: &Weights, name: &str, x: Tensor<3>) -> Tensor<3> {
    fused::rms_norm(x, weights.get(&format!("{name}.weight")))
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
    let keys = k.dims()[2];
    let mask = mask.unwrap_or_else(|| Tensor::zeros([1, 1, queries, keys], &q.device()));
    let scores = masked_softmax(q.matmul(k.swap_dims(2, 3)), mask, (dim as f32).powf(-0.5));
    scores.matmul(v).swap_dims(1, 2).reshape([batch, queries, heads * dim])
}

/// Rows of a table by their ids: `[batch, tokens]` to `[batch, tokens, width]`.
pub fn embed(table: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    module::embedding(table, ids)
}
