//! Trains a Flamingo the way the paper does: a contrastive vision encoder, a language model, then, with both
//! frozen, a Perceiver Resampler and tanh-gated cross-attention. The result is a checkpoint in OpenFlamingo's
//! files, which `flamingoc compile` takes.
//!
//! Weights are named as in those files and kept by name (`weights`); a model is a few functions of them
//! (`model`). A stage gives losses and gradients of a step (`stage`), which are a pure function of recipe, step
//! and weights, so that a run stops and goes on anywhere (`run`).

#![forbid(unsafe_code)]

pub mod batch;
pub mod checkpoint;
pub mod export;
pub mod fused;
pub mod layers;
pub mod model;
pub mod optimiser;
pub mod parallel;
pub mod pictures;
pub mod plot;
pub mod recipe;
pub mod run;
pub mod scenes;
pub mod shards;
pub mod stage;
pub mod weights;
