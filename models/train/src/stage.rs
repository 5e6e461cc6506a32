//! What a stage of training is, and the gradients of one step in pieces.

pub mod contrastive;
pub mod flamingo;
pub mod language;

use anyhow::Result;
use burn::tensor::Tensor;

use crate::optimiser::{Gradients, Rule, accumulate};
use crate::parallel;
use crate::recipe::Schedule;
use crate::weights::Weights;

/// One of the three stages.
pub trait Stage {
    /// Its name in metrics and files.
    fn name(&self) -> &'static str;
    /// Steps and rates.
    fn schedule(&self) -> &Schedule;
    /// How the optimiser treats a weight that is trained, in a step.
    fn rule(&self, step: usize, name: &str) -> Rule;
    /// Losses by name, and the gradients of their weighted sum; a pure function of step and weights.
    ///
    /// # Errors
    /// A task of the recipe that does not exist; a sample of a shard that cannot be used.
    fn step(&mut self, step: usize, weights: &Weights) -> Result<(Losses, Gradients)>;
}

/// Losses by name.
pub type Losses = Vec<(String, f64)>;

/// The loss and gradients of a batch in `count` pieces, each its own graph over weights of which `trained`
/// ones get gradients. The loss is the sum of what `loss` gives for the pieces.
pub fn in_pieces(
    count: usize,
    threads: usize,
    weights: &Weights,
    trained: &(dyn Fn(&str) -> bool + Sync),
    loss: impl Fn(usize, &Weights) -> Tensor<1> + Sync,
) -> (f64, Gradients) {
    let piece = |index| {
        let leaves = weights.tracked(trained);
        let loss = loss(index, &leaves);
        let value = f64::from(loss.clone().into_scalar::<f32>());
        let mut all = loss.backward();
        let own = leaves.iter().filter(|(name, _)| trained(name));
        let gradients: Gradients = own
            .filter_map(|(name, w)| Some((name.to_owned(), w.value.grad_remove(&mut all)?)))
            .collect();
        (value, gradients)
    };
    let mut total = (0.0, Gradients::new());
    for (value, gradients) in parallel::map(count, threads, piece) {
        total.0 += value;
        accumulate(&mut total.1, gradients, 1.0);
    }
    total
}

/// Norms, biases, embeddings of places: what is not decayed.
pub fn is_small(name: &str) -> bool {
    let ends = ["bias", "embedding", "norm.weight", "layernorm.weight", "positions", "logit_scale"];
    name.contains("ln_")
        || name.ends_with("ff.0.weight")
        || name.ends_with(".1.0.weight")
        || name.contains("norm")
        || ends.iter().any(|end| name.ends_with(end))
}
