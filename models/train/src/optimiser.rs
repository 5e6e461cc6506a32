//! AdamW with a rate and a decay for each weight, after the gradients were cut to a norm.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use burn::optim::{AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, Optimizer as _};
use burn::tensor::Tensor;

use crate::checkpoint::Moments;
use crate::weights::Weights;

/// Gradients by the names of their weights.
pub type Gradients = BTreeMap<String, Tensor<2>>;

/// What one weight asks of the optimiser.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Multiplies the learning rate.
    pub rate: f64,
    /// Weight decay: subtracted is rate × decay × weight.
    pub decay: f32,
}

/// AdamW's state of all trained weights.
pub struct Optimiser {
    states: BTreeMap<String, AdamWState<2>>,
    betas: (f32, f32),
}

impl Optimiser {
    /// No steps taken yet.
    pub fn new(betas: (f32, f32)) -> Optimiser {
        Optimiser { states: BTreeMap::new(), betas }
    }

    /// One step: weights move along their gradients, whose norm over all weights is at most `clip`.
    /// Returns the norm before.
    pub fn step(
        &mut self,
        weights: &mut Weights,
        gradients: Gradients,
        learning_rate: f64,
        clip: f64,
        rule: &dyn Fn(&str) -> Rule,
    ) -> f64 {
        let norm = norm(&gradients);
        let scale = if norm > clip { clip / norm } else { 1.0 };
        for (name, gradient) in gradients {
            let rule = rule(&name);
            let state = self.states.remove(&name);
            let (value, state) = self.adamw(rule.decay).step(
                learning_rate * rule.rate,
                weights.get(&name),
                gradient * scale,
                state,
            );
            weights.set(&name, value);
            self.states.extend(state.map(|state| (name, state)));
        }
        norm
    }

    /// Both moments of each weight.
    pub fn moments(&self) -> impl Iterator<Item = (&str, [Tensor<2>; 2])> {
        self.states.iter().map(|(name, state)| {
            let state = &state.momentum;
            (name.as_str(), [state.moment_1.clone(), state.moment_2.clone()])
        })
    }

    /// Goes on from saved moments after so many steps.
    ///
    /// # Errors
    /// A moment that is missing.
    pub fn restore(&mut self, moments: Moments, steps: usize) -> Result<()> {
        for (name, moments) in moments {
            let [Some(first), Some(second)] = moments else {
                bail!("a moment of `{name}` is missing in the checkpoint");
            };
            let mut both = Weights::default();
            both.insert("first", &first.0, first.1);
            both.insert("second", &second.0, second.1);
            let (first, second) = (both.get("first"), both.get("second"));
            let state = AdaptiveMomentumState::new(steps, first, second);
            self.states.insert(name, AdamWState::new(state));
        }
        Ok(())
    }

    fn adamw(&self, decay: f32) -> AdamW {
        AdamWConfig::new()
            .with_beta_1(self.betas.0)
            .with_beta_2(self.betas.1)
            .with_epsilon(1e-8)
            .with_weight_decay(decay)
            .build()
    }
}

/// Euclidean norm over all gradients.
fn norm(gradients: &Gradients) -> f64 {
    let squares =
        gradients.values().map(|g| f64::from(g.clone().square().sum().into_scalar::<f32>()));
    squares.sum::<f64>().sqrt()
}

/// Adds gradients, weighted.
pub fn accumulate(sum: &mut Gradients, gradients: Gradients, weight: f64) {
    for (name, gradient) in gradients {
        let gradient = gradient * weight;
        let total = match sum.remove(&name) {
            Some(old) => old + gradient,
            None => gradient,
        };
        sum.insert(name, total);
    }
}
