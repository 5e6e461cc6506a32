//! Fused operations against the same formulas in burn's own operations: values and gradients.

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{Device, Tensor, TensorData, Tolerance};
use flamingo_train::fused;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// A leaf of normal-sized numbers.
fn leaf<const D: usize>(shape: [usize; D], size: f32, seed: u64) -> Tensor<D> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-size..size)).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff()).require_grad()
}

/// Numbers that nothing is asked of.
fn constant<const D: usize>(shape: [usize; D], values: Vec<f32>) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff())
}

/// Values of both functions, and gradients of a weighted sum by each leaf, agree.
fn compare<const D: usize, const O: usize>(
    leaves: &[Tensor<D>],
    ours: impl Fn(&[Tensor<D>]) -> Tensor<O>,
    theirs: impl Fn(&[Tensor<D>]) -> Tensor<O>,
) {
    let (ours, theirs) = (ours(leaves), theirs(leaves));
    let tolerance = Tolerance::<f32>::rel_abs(2e-5, 2e-6);
    ours.to_data().assert_approx_eq(&theirs.to_data(), tolerance);
    let weights = leaf(ours.dims(), 1.0, 99);
    let (ours, theirs) =
        ((ours * weights.clone()).sum().backward(), (theirs * weights).sum().backward());
    for (index, leaf) in leaves.iter().enumerate() {
        let [ours, theirs] =
            [&ours, &theirs].map(|all| leaf.grad(all).unwrap_or_else(|| panic!("leaf {index}")));
        ours.to_data().assert_approx_eq(&theirs.to_data(), Tolerance::<f32>::rel_abs(5e-5, 1e-5));
    }
}

#[test]
fn norms_are_burns_own() {
    for (rows, width) in [(1, 1), (3, 7), (5, 8), (4, 96), (2, 130)] {
        let leaves =
            [leaf([rows, width], 3.0, 1), leaf([1, width], 2.0, 2), leaf([1, width], 1.0, 3)];
        compare(
            &leaves,
            |l| fused::layer_norm(l[0].clone(), l[1].clone(), l[2].clone()),
            |l| {
                let centred = l[0].clone() - l[0].clone().mean_dim(1);
                let variance = centred.clone().square().mean_dim(1);
                centred * (variance + 1e-5).sqrt().recip() * l[1].clone() + l[2].clone()
            },
        );
        compare(
            &leaves[..2],
            |l| fused::rms_norm(l[0].clone(), l[1].clone()),
            |l| {
                let power = l[0].clone().square().mean_dim(1);
                l[0].clone() * (power + 1e-5).sqrt().recip() * l[1].clone()
            },
        );
    }
}

#[test]
fn activations_are_burns_own() {
    for size in [0.5, 6.0, 60.0] {
        let leaves = [leaf([3, 37], size, 4), leaf([3, 37], 2.0, 5)];
        compare(
            &leaves[..1],
            |l| fused::quick_gelu(l[0].clone()),
            |l| l[0].clone() * sigmoid(l[0].clone() * 1.702),
        );
        compare(
            &leaves[..1],
            |l| fused::gelu(l[0].clone()),
            |l| burn::tensor::activation::gelu(l[0].clone()),
        );
        compare(
            &leaves,
            |l| fused::swiglu(l[0].clone(), l[1].clone()),
            |l| burn::tensor::activation::silu(l[0].clone()) * l[1].clone(),
        );
    }
}

#[test]
fn masked_softmax_is_burns_own_and_unseen_keys_get_exactly_nothing() {
    let (batch, heads, queries, keys) = (2, 3, 5, 11);
    for (masks, rows) in [(1, queries), (batch, queries), (batch, 1)] {
        let hidden =
            |i: usize| if i % keys > i / keys % rows { -1e9 } else { 0.1 * (i % 3) as f32 };
        let mask = (0..masks * rows * keys).map(hidden).collect();
        let mask = constant([masks, 1, rows, keys], mask);
        let leaves = [leaf([batch, heads, queries, keys], 8.0, 6)];
        let ours = |l: &[Tensor<4>]| fused::masked_softmax(l[0].clone(), mask.clone(), 0.3);
        compare(&leaves, ours, |l| softmax(l[0].clone() * 0.3 + mask.clone(), 3));
        let first: Vec<f32> = ours(&leaves).into_data().try_into_vec().unwrap();
        assert_eq!(first[..keys].iter().filter(|p| **p == 0.0).count(), keys - 1);
    }
}

#[test]
fn rotation_is_burns_own() {
    let (tokens, heads, dim) = (5, 2, 6);
    let table = (0..tokens * dim).map(|i| (i as f32).sin()).collect();
    let table = constant([tokens, dim], table);
    compare(
        &[leaf([2, tokens, heads * dim], 1.0, 8)],
        |l| fused::rotate(l[0].clone(), table.clone()),
        |l| {
            let x = l[0].clone().reshape([2, tokens, heads, dim]);
            let part = |x: &Tensor<4>, i| x.clone().narrow(3, i * dim / 2, dim / 2);
            let angle = |i| {
                let half = table.clone().narrow(1, i * dim / 2, dim / 2);
                half.reshape([1, tokens, 1, dim / 2])
            };
            let (a, b, cos, sin) = (part(&x, 0), part(&x, 1), angle(0), angle(1));
            let first = a.clone() * cos.clone() - b.clone() * sin.clone();
            let second = b * cos + a * sin;
            Tensor::cat(vec![first, second], 3).reshape([2, tokens, heads * dim])
        },
    );
}

#[test]
fn a_view_is_taken_in_the_order_of_its_axes() {
    compare(
        &[leaf([6, 4], 2.0, 9)],
        |l| fused::quick_gelu(l[0].clone().transpose()),
        |l| l[0].clone().transpose() * sigmoid(l[0].clone().transpose() * 1.702),
    );
}
