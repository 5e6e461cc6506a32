//! Synthetic inputs in a model's shape: random pixel values, and random tokens with image tokens
//! spread evenly among them.

use std::collections::BTreeSet;

use flamingo_models::manifest::Manifest;
use flamingo_models::{SpecialTokens, media_time};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Token ids with the medium that each sees.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Prompt {
    pub(super) input_ids: Vec<u32>,
    pub(super) media_time: Vec<u32>,
}

/// Tokens that stand for one picture.
pub(super) fn image_tokens(tokens: &SpecialTokens) -> Vec<u32> {
    match tokens.around_image {
        Some(around) => vec![around, tokens.image, around],
        None => vec![tokens.image],
    }
}

/// `len` random tokens of which some stand for `n_images` pictures; the caller checked that they
/// fit.
pub(super) fn prompt(manifest: &Manifest, len: usize, n_images: usize, seed: u64) -> Prompt {
    let config = &manifest.config;
    let mut input_ids = random_ids(&config.tokens, config.language.vocabulary, len, seed);
    let image = image_tokens(&config.tokens);
    for index in 0..n_images {
        let start = (index * len / n_images).min(len.saturating_sub(image.len()));
        for (id, special) in input_ids[start..].iter_mut().zip(&image) {
            *id = *special;
        }
    }
    let media_time = media_time(config.family, &config.tokens, &input_ids);
    Prompt { input_ids, media_time }
}

/// Random ids that are no special tokens.
fn random_ids(tokens: &SpecialTokens, vocabulary: usize, len: usize, seed: u64) -> Vec<u32> {
    let optional = [tokens.end_of_chunk, tokens.begin, tokens.end, tokens.pad, tokens.around_image];
    let mut special: BTreeSet<u32> = optional.into_iter().flatten().collect();
    special.extend(tokens.stop.iter().chain([&tokens.image]));
    let n_ids = u32::try_from(vocabulary).unwrap_or(u32::MAX);
    let plain: Vec<u32> = (0..n_ids).filter(|id| !special.contains(id)).collect();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    // A vocabulary of special tokens only: any of them will do.
    let pick = |random: &mut ChaCha8Rng| match plain.is_empty() {
        true => 0,
        false => plain[random.random_range(0..plain.len())],
    };
    (0..len).map(|_| pick(&mut random)).collect()
}

/// Pixel values of one picture, `[3, size, size]`, as spread as normalised ones.
pub(super) fn pixel_values(manifest: &Manifest, seed: u64) -> Vec<f32> {
    let size = manifest.config.vision.image_size;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..3 * size * size).map(|_| random.random_range(-2.0..2.0)).collect()
}
