//! AdamW and Muon with a rate and a decay for each weight, after the gradients were cut to a norm.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{
    AdamWConfig, AdamWState, AdaptiveMomentumState, AdjustLrFn, MuonConfig, Optimizer as _,
};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Moments;
use crate::parallel;
use crate::weights::Weights;

/// Gradients by the names of their weights.
pub type Gradients = BTreeMap<String, Tensor<2>>;

/// How a step is made of gradients.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Adam with decoupled weight decay.
    #[default]
    AdamW,
    /// Momentum whose singular values are all made 1 by Newton-Schulz iterations, scaled to the size of AdamW's
    /// steps (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982). For matrices that multiply.
    Muon,
}

/// What one weight asks of the optimiser.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// How its gradients become steps.
    pub method: Method,
    /// Multiplies the learning rate.
    pub rate: f64,
    /// Weight decay: subtracted is rate × decay × weight.
    pub decay: f32,
}

/// What is remembered of a weight's gradients.
#[derive(Clone)]
enum State {
    AdamW(Box<AdamWState<2>>),
    Muon(Box<Tensor<2>>),
}

/// Muon's decay rate of its moment.
const MOMENTUM: f64 = 0.95;

/// The state of all trained weights.
pub struct Optimiser {
    states: BTreeMap<String, State>,
    betas: (f32, f32),
    threads: usize,
}

impl Optimiser {
    /// No steps taken yet. `betas` are AdamW's decay rates.
    pub fn new(betas: (f32, f32), threads: usize) -> Optimiser {
        Optimiser { states: BTreeMap::new(), betas, threads }
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
        let gradients: Vec<(String, Tensor<2>)> = gradients.into_iter().collect();
        let squares = parallel::map(gradients.len(), self.threads, |index| {
            f64::from(gradients[index].1.clone().square().sum().into_scalar::<f32>())
        });
        let norm = squares.into_iter().sum::<f64>().sqrt();
        let scale = if norm > clip { clip / norm } else { 1.0 };
        let rules: Vec<Rule> = gradients.iter().map(|(name, _)| rule(name)).collect();
        let stepped = parallel::map(gradients.len(), self.threads, |index| {
            let ((name, gradient), rule) = (&gradients[index], rules[index]);
            let (value, state) = (weights.get(name), self.states.get(name).cloned());
            self.one(rule, learning_rate * rule.rate, value, gradient.clone() * scale, state)
        });
        for ((name, _), (value, state)) in gradients.into_iter().zip(stepped) {
            weights.set(&name, value);
            self.states.insert(name, state);
        }
        norm
    }

    fn one(
        &self,
        rule: Rule,
        rate: f64,
        value: Tensor<2>,
        gradient: Tensor<2>,
        state: Option<State>,
    ) -> (Tensor<2>, State) {
        match (rule.method, state) {
            (Method::AdamW, state) => {
                let optimiser = AdamWConfig::new()
                    .with_beta_1(self.betas.0)
                    .with_beta_2(self.betas.1)
                    .with_epsilon(1e-8)
                    .with_weight_decay(rule.decay)
                    .build();
                let state = state.map(|state| match state {
                    State::AdamW(state) => *state,
                    State::Muon(_) => panic!("a weight keeps its method for a stage"),
                });
                let (value, state) = optimiser.step(rate, value, gradient, state);
                (value, State::AdamW(Box::new(state.expect("AdamW has a state after a step"))))
            }
            (Method::Muon, state) => {
                let moment = match state {
                    Some(State::Muon(moment)) => *moment * MOMENTUM + gradient.clone(),
                    _ => gradient.clone(),
                };
                let ahead = moment.clone() * MOMENTUM + gradient;
                let none = MomentumConfig::new().with_momentum(0.0).with_dampening(0.0);
                let optimiser = MuonConfig::new()
                    .with_momentum(none)
                    .with_weight_decay(Some(WeightDecayConfig::new(rule.decay)))
                    .with_adjust_lr_fn(AdjustLrFn::MatchRmsAdamW)
                    .build();
                (optimiser.step(rate, value, ahead, None).0, State::Muon(Box::new(moment)))
            }
        }
    }

    /// The moments of each weight: two of AdamW, one of Muon.
    pub fn moments(&self) -> impl Iterator<Item = (&str, Vec<Tensor<2>>)> {
        self.states.iter().map(|(name, state)| {
            let moments = match state {
                State::AdamW(state) => {
                    vec![state.momentum.moment_1.clone(), state.momentum.moment_2.clone()]
                }
                State::Muon(moment) => vec![*moment.clone()],
            };
            (name.as_str(), moments)
        })
    }

    /// Goes on from saved moments after so many steps.
    ///
    /// # Errors
    /// A first moment that is missing.
    pub fn restore(&mut self, moments: Moments, steps: usize) -> Result<()> {
        for (name, moments) in moments {
            let [first, second] = moments.map(|moment| {
                let (shape, values) = moment?;
                let mut one = Weights::default();
                one.insert("moment", &shape, values);
                Some(one.get("moment"))
            });
            let state = match (first, second) {
                (Some(first), Some(second)) => State::AdamW(Box::new(AdamWState::new(
                    AdaptiveMomentumState::new(steps, first, second),
                ))),
                (Some(moment), None) => State::Muon(Box::new(moment)),
                (None, _) => bail!("a moment of `{name}` is missing in the checkpoint"),
            };
            self.states.insert(name, state);
        }
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    fn matrix(values: &[f32], shape: [usize; 2]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::flex())
    }

    fn values(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().try_into_vec().unwrap()
    }

    /// What a first step of rate 0.1 takes from a weight of zeros.
    fn first_step(method: Method, gradient: &[f32], shape: [usize; 2]) -> Vec<f32> {
        let mut weights = Weights::default();
        weights.insert("w", &shape, vec![0.0; gradient.len()]);
        let gradients = [("w".to_owned(), matrix(gradient, shape))].into();
        let rule = |_: &str| Rule { method, rate: 1.0, decay: 0.0 };
        Optimiser::new((0.9, 0.98), 2).step(&mut weights, gradients, 0.1, f64::MAX, &rule);
        values(weights.get("w"))
    }

    /// Newton-Schulz with Muon's coefficients brings singular values to between 0.68 and 1.13.
    #[test]
    fn a_step_of_muon_has_singular_values_near_one_whatever_the_gradient_has() {
        let size = 0.1 * 0.2 * 3f32.sqrt();
        let step = first_step(Method::Muon, &[30.0, 0.0, 0.0, 0.0, 0.0, -2.0], [2, 3]);
        let expected = [-size, 0.0, 0.0, 0.0, 0.0, size];
        for (found, expected) in step.iter().zip(expected) {
            assert!((found - expected).abs() < 0.35 * size, "{step:?}");
        }
        assert!((step[0].abs() / step[5].abs() - 1.0).abs() < 0.5, "{step:?}");
    }

    #[test]
    fn a_first_step_of_adamw_is_the_rate_along_each_sign() {
        let step = first_step(Method::AdamW, &[30.0, 0.0, -2.0], [1, 3]);
        for (found, expected) in step.iter().zip([-0.1, 0.0, 0.1]) {
            assert!((found - expected).abs() < 1e-5, "{step:?}");
        }
    }

    #[test]
    fn decay_takes_rate_times_decay_of_a_weight_and_rules_are_asked_by_name() {
        let mut weights = Weights::default();
        for name in ["kept", "decayed"] {
            weights.insert(name, &[2, 2], vec![1.0; 4]);
        }
        let zero = || matrix(&[0.0; 4], [2, 2]);
        let gradients = [("kept".to_owned(), zero()), ("decayed".to_owned(), zero())].into();
        let rule = |name: &str| Rule {
            method: Method::Muon,
            rate: 1.0,
            decay: if name == "decayed" { 0.5 } else { 0.0 },
        };
        Optimiser::new((0.9, 0.98), 1).step(&mut weights, gradients, 0.1, 1.0, &rule);
        let all = |name: &str, value: f32| {
            values(weights.get(name)).iter().all(|found| (found - value).abs() < 1e-6)
        };
        assert!(all("kept", 1.0) && all("decayed", 0.95));
    }
}
