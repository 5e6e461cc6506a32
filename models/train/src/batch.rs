//! Prompts as tensors: ids, targets with their weights, and the media that tokens see.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData, activation::log_softmax};
use flamingo_scenes::episode::Episode;
use flamingo_scenes::words::{IMAGE, PAD};

use crate::model::gated::Media;
use crate::model::resampler::Resampler;
use crate::weights::Weights;

/// A score that softmax turns into 0.
pub const UNSEEN: f32 = -1e9;

/// Prompts padded to one length.
pub struct Batch {
    rows: usize,
    tokens: usize,
    ids: Vec<u32>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Batch {
    /// Inputs are all tokens but the last, targets all but the first; padding weighs 0.
    pub fn new(episodes: &[Episode], weight: impl Fn(f32) -> f32) -> Batch {
        let tokens = episodes.iter().map(|e| e.tokens.len()).max().unwrap_or(1).max(2) - 1;
        let count = episodes.len() * tokens;
        let (mut ids, mut targets, mut weights) =
            (vec![PAD; count], vec![PAD; count], vec![0.0; count]);
        for (row, episode) in episodes.iter().enumerate() {
            for (i, pair) in episode.tokens.windows(2).enumerate() {
                let at = row * tokens + i;
                ids[at] = pair[0].id;
                targets[at] = pair[1].id;
                weights[at] = weight(pair[1].weight);
            }
        }
        Batch { rows: episodes.len(), tokens, ids, targets, weights }
    }

    /// Token ids, `[rows, tokens]`.
    pub fn ids(&self) -> Tensor<2, Int> {
        Tensor::from_inner(self.int(&self.ids))
    }

    /// Sum of the targets' weights.
    pub fn total_weight(&self) -> f64 {
        self.weights.iter().map(|w| f64::from(*w)).sum()
    }

    /// Weighted sum of −log p of the targets, given logits `[rows, tokens, vocabulary]`.
    pub fn loss(&self, logits: Tensor<3>) -> Tensor<1> {
        let targets: Tensor<2, Int> = Tensor::from_inner(self.int(&self.targets));
        let picked = log_softmax(logits, 2).gather(2, targets.unsqueeze_dim::<3>(2));
        let weights = floats(self.weights.clone(), [self.rows, self.tokens, 1]);
        (picked * Tensor::from_inner(weights)).sum().neg()
    }

    /// For each row, whether the best token is the target wherever a target weighs at least `least`.
    pub fn all_right(&self, logits: Tensor<3>, least: f32) -> Vec<bool> {
        let best: Vec<i32> = logits.argmax(2).into_data().iter::<i32>().collect();
        let right = |row: usize| {
            (row * self.tokens..(row + 1) * self.tokens)
                .all(|i| self.weights[i] < least || best[i] == self.targets[i] as i32)
        };
        (0..self.rows).map(right).collect()
    }

    fn int(&self, values: &[u32]) -> Tensor<2, Int> {
        let values = values.iter().map(|v| *v as i32).collect();
        Tensor::from_data(
            TensorData::new::<i32, _>(values, [self.rows, self.tokens]),
            &Device::flex(),
        )
    }

    /// Visual tokens and masks of these prompts. `features` are those of all media, prompt after prompt.
    pub fn media(
        &self,
        w: &Weights,
        resampler: &Resampler,
        episodes: &[Episode],
        features: &[Arc<[f32]>],
        options: &MediaOptions,
    ) -> Media {
        let slots = episodes.iter().map(|e| e.media.len()).max().unwrap_or(0).max(1);
        let visual = resample(w, resampler, episodes, features, options.width, slots);
        let visual = if options.blind { visual * 0.0 } else { visual };
        let (mask, sees) = self.masks(slots, resampler.latents, options.only_last_image);
        Media { tokens: visual, mask, sees }
    }

    fn masks(&self, slots: usize, latents: usize, only_last: bool) -> (Tensor<4>, Tensor<3>) {
        let keys = slots * latents;
        let mut mask = vec![0.0; self.rows * self.tokens * keys];
        let mut sees = vec![1.0; self.rows * self.tokens];
        for row in 0..self.rows {
            let mut seen = 0;
            for token in 0..self.tokens {
                let at = row * self.tokens + token;
                seen += usize::from(self.ids[at] == IMAGE);
                if seen == 0 {
                    sees[at] = 0.0;
                    continue;
                }
                for (key, value) in mask[at * keys..(at + 1) * keys].iter_mut().enumerate() {
                    let slot = key / latents + 1;
                    let visible = if only_last { slot == seen } else { slot <= seen };
                    *value = if visible { 0.0 } else { UNSEEN };
                }
            }
        }
        let mask = Tensor::<4>::from_data(
            TensorData::new(mask, [self.rows, 1, self.tokens, keys]),
            &Device::flex(),
        );
        let sees = floats(sees, [self.rows, self.tokens, 1]);
        (Tensor::from_inner(mask), Tensor::from_inner(sees))
    }
}

/// How media are shown.
#[derive(Debug, Clone, Copy)]
pub struct MediaOptions {
    /// Width of the features.
    pub width: usize,
    /// A token sees the last medium before it, not all of them.
    pub only_last_image: bool,
    /// Visual tokens are set to zero: what can be known without eyes.
    pub blind: bool,
}

/// `[rows, slots × latents, width]`: pictures and videos apart, then each to its row and slot.
fn resample(
    w: &Weights,
    resampler: &Resampler,
    episodes: &[Episode],
    features: &[Arc<[f32]>],
    width: usize,
    slots: usize,
) -> Tensor<3> {
    let frames: Vec<usize> =
        episodes.iter().flat_map(|e| e.media.iter().map(|facts| facts.n_frames())).collect();
    let mut parts = Vec::new();
    let mut order = vec![0; frames.len()];
    let mut next = 0;
    for n_frames in [1, 4] {
        let chosen: Vec<usize> = (0..frames.len()).filter(|i| frames[*i] == n_frames).collect();
        if chosen.is_empty() {
            continue;
        }
        let values: Vec<f32> = chosen.iter().flat_map(|i| features[*i].iter().copied()).collect();
        let shape = [chosen.len(), values.len() / chosen.len() / width, width];
        let tensor = Tensor::from_inner(floats(values, shape));
        parts.push(resampler.forward(w, tensor, n_frames));
        for index in chosen {
            order[index] = next;
            next += 1;
        }
    }
    let zeros = floats(vec![0.0; resampler.latents * width], [1, resampler.latents, width]);
    parts.push(Tensor::from_inner(zeros));
    let (mut places, mut medium) = (Vec::new(), 0);
    for episode in episodes {
        for slot in 0..slots {
            let place = if slot < episode.media.len() { order[medium + slot] } else { next };
            places.push(place as i32);
        }
        medium += episode.media.len();
    }
    let count = places.len();
    let places: Tensor<1, Int> =
        Tensor::from_data(TensorData::new(places, [count]), &Device::flex());
    let visual = Tensor::cat(parts, 0).select(0, Tensor::from_inner(places));
    visual.reshape([episodes.len(), slots * resampler.latents, width])
}

/// A tensor of given values.
pub fn floats(values: Vec<f32>, shape: [usize; 3]) -> Tensor<3> {
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}
