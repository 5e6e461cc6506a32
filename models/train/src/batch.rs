//! Prompts as tensors: ids, targets with their weights, and the media that tokens see.

use std::collections::BTreeSet;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData, activation::log_softmax};
use flamingo_data::phi::media_indices;
use flamingo_scenes::episode::{Episode, Token};
use flamingo_scenes::words::{IMAGE, PAD};

use crate::model::gated::Media;
use crate::model::resampler::Resampler;
use crate::weights::Weights;

/// A score that softmax turns into 0.
pub const UNSEEN: f32 = -1e9;

/// A prompt as the models take it: a generated episode, or a sample of a shard.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Ids and what each weighs in the loss, `[L]`.
    pub tokens: Vec<Token>,
    /// φ: the medium that each token looks at, `[L]`, from 1; 0 is none.
    pub phi: Vec<u32>,
    /// T of each medium, in order.
    pub n_frames: Vec<usize>,
}

impl From<&Episode> for Prompt {
    /// Tokens look at the last medium before them.
    fn from(episode: &Episode) -> Prompt {
        let ids: Vec<u32> = episode.tokens.iter().map(|token| token.id).collect();
        Prompt {
            tokens: episode.tokens.clone(),
            phi: media_indices(&ids, IMAGE, false),
            n_frames: episode.media.iter().map(|facts| facts.n_frames()).collect(),
        }
    }
}

/// Prompts padded to one length.
pub struct Batch {
    rows: usize,
    tokens: usize,
    ids: Vec<u32>,
    /// φ of the ids, `[rows × tokens]`; padding looks where the token before it does.
    phi: Vec<u32>,
    targets: Vec<u32>,
    weights: Vec<f32>,
    /// T of the media of each row.
    n_frames: Vec<Vec<usize>>,
}

impl Batch {
    /// Episodes as prompts.
    pub fn new(episodes: &[Episode], weight: impl Fn(f32) -> f32) -> Batch {
        let prompts: Vec<Prompt> = episodes.iter().map(Prompt::from).collect();
        Batch::of(&prompts, weight)
    }

    /// Inputs are all tokens but the last, targets all but the first; padding weighs 0.
    pub fn of(prompts: &[Prompt], weight: impl Fn(f32) -> f32) -> Batch {
        let tokens = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(1).max(2) - 1;
        let count = prompts.len() * tokens;
        let (mut ids, mut targets, mut weights) =
            (vec![PAD; count], vec![PAD; count], vec![0.0; count]);
        let mut phi = vec![0; count];
        for (row, prompt) in prompts.iter().enumerate() {
            for (i, pair) in prompt.tokens.windows(2).enumerate() {
                let at = row * tokens + i;
                ids[at] = pair[0].id;
                targets[at] = pair[1].id;
                weights[at] = weight(pair[1].weight);
                phi[at..(row + 1) * tokens].fill(prompt.phi[i]);
            }
        }
        let n_frames = prompts.iter().map(|prompt| prompt.n_frames.clone()).collect();
        Batch { rows: prompts.len(), tokens, ids, phi, targets, weights, n_frames }
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

    /// Visual tokens and masks of these prompts. `features` are those of all media, prompt after prompt,
    /// `[frames × patches, width]` each.
    pub fn media(
        &self,
        w: &Weights,
        resampler: &Resampler,
        features: &[Arc<[f32]>],
        options: &MediaOptions,
    ) -> Media {
        let slots = self.n_frames.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let visual = resample(w, resampler, &self.n_frames, features, options.width, slots);
        let visual = if options.blind { visual * 0.0 } else { visual };
        let (mask, sees) = self.masks(slots, resampler.latents, options.only_last_image);
        Media { tokens: visual, mask, sees }
    }

    fn masks(&self, slots: usize, latents: usize, only_last: bool) -> (Tensor<4>, Tensor<3>) {
        let keys = slots * latents;
        let mut mask = vec![0.0; self.rows * self.tokens * keys];
        let mut sees = vec![1.0; self.rows * self.tokens];
        for row in 0..self.rows {
            for token in 0..self.tokens {
                let at = row * self.tokens + token;
                let seen = self.phi[at] as usize;
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
    /// A token sees the medium that φ names, not all media up to it.
    pub only_last_image: bool,
    /// Visual tokens are set to zero: what can be known without eyes.
    pub blind: bool,
}

/// `[rows, slots × latents, width]`: media of one number of frames together, then each to its row and slot. `rows`
/// has the numbers of frames.
fn resample(
    w: &Weights,
    resampler: &Resampler,
    rows: &[Vec<usize>],
    features: &[Arc<[f32]>],
    width: usize,
    slots: usize,
) -> Tensor<3> {
    let frames: Vec<usize> = rows.concat();
    let lengths: BTreeSet<usize> = frames.iter().copied().collect();
    let mut parts = Vec::new();
    let mut order = vec![0; frames.len()];
    let mut next = 0;
    for n_frames in lengths {
        let chosen: Vec<usize> = (0..frames.len()).filter(|i| frames[*i] == n_frames).collect();
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
    for row in rows {
        for slot in 0..slots {
            let place = if slot < row.len() { order[medium + slot] } else { next };
            places.push(place as i32);
        }
        medium += row.len();
    }
    let count = places.len();
    let places: Tensor<1, Int> =
        Tensor::from_data(TensorData::new(places, [count]), &Device::flex());
    let visual = Tensor::cat(parts, 0).select(0, Tensor::from_inner(places));
    visual.reshape([rows.len(), slots * resampler.latents, width])
}

/// A tensor of given values.
pub fn floats(values: Vec<f32>, shape: [usize; 3]) -> Tensor<3> {
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The media that a token of a row may look at by the definition, each looked for on its own.
    fn visible(ids: &[u32], token: usize, next: bool, slots: usize, only_last: bool) -> Vec<bool> {
        let images: Vec<usize> = (0..ids.len()).filter(|i| ids[*i] == IMAGE).collect();
        let medium = match next {
            false => images.iter().rposition(|image| *image <= token),
            true => images.iter().position(|image| *image >= token),
        };
        let is_seen = |slot: usize| medium.is_some_and(|m| slot == m || (!only_last && slot < m));
        (0..slots).map(is_seen).collect()
    }

    #[test]
    fn masks_follow_the_definition_both_ways_of_the_coin() {
        let texts: [&[u32]; 4] = [
            &[1, IMAGE, 7, 8, IMAGE, 9, 3, IMAGE, 5, 3],
            &[1, 6, IMAGE, 7, 3],
            &[1, 5, 6, 3],
            &[1, IMAGE, IMAGE, 4, 4, 3],
        ];
        let coins = [true, false, true, true];
        let prompt = |(text, next): (&&[u32], bool)| Prompt {
            tokens: text.iter().map(|id| Token { id: *id, weight: 1.0 }).collect(),
            phi: media_indices(text, IMAGE, next),
            n_frames: vec![1; text.iter().filter(|id| **id == IMAGE).count()],
        };
        let prompts: Vec<Prompt> = texts.iter().zip(coins).map(prompt).collect();
        let (batch, slots, latents) = (Batch::of(&prompts, |weight| weight), 3, 2);
        for only_last in [true, false] {
            let (mask, sees) = batch.masks(slots, latents, only_last);
            assert_eq!(mask.dims(), [4, 1, 9, slots * latents]);
            let mask: Vec<f32> = mask.into_data().try_into_vec().unwrap();
            let sees: Vec<f32> = sees.into_data().try_into_vec().unwrap();
            for (row, (text, next)) in texts.iter().zip(coins).enumerate() {
                for token in 0..text.len() - 1 {
                    let expected = visible(text, token, next, slots, only_last);
                    let at = row * 9 + token;
                    let found = &mask[at * slots * latents..(at + 1) * slots * latents];
                    let case = format!("row {row}, token {token}, only the last: {only_last}");
                    let any = expected.contains(&true);
                    assert_eq!(sees[at], f32::from(u8::from(any)), "{case}");
                    for (key, value) in found.iter().enumerate().filter(|_| any) {
                        assert_eq!(*value == 0.0, expected[key / latents], "{case}: {found:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn padding_weighs_nothing_and_looks_where_the_token_before_it_does() {
        let prompt = |length: usize| Prompt {
            tokens: (0..length).map(|_| Token { id: 5, weight: 0.5 }).collect(),
            phi: (0..length as u32).collect(),
            n_frames: vec![1; length],
        };
        let batch = Batch::of(&[prompt(3), prompt(6)], |weight| weight);
        assert_eq!(batch.phi, [0, 1, 1, 1, 1, 0, 1, 2, 3, 4]);
        assert_eq!(batch.weights, [0.5, 0.5, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5]);
    }
}
