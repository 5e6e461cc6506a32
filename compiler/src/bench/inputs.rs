//! Synthetic inputs in a model's shape: random pixel values, and random tokens with image tokens
//! spread evenly among them.

use std::collections::BTreeSet;
use std::io::{self, Cursor};

use flamingo_models::manifest::Manifest;
use flamingo_models::{SpecialTokens, media_time};
use flamingo_runtime::RunError;
use flamingo_runtime::image::ImageError;
use image::{ImageFormat, Rgb, RgbImage};
use rand::{Rng, RngCore, SeedableRng};
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
pub(super) fn random_ids(
    tokens: &SpecialTokens,
    vocabulary: usize,
    len: usize,
    seed: u64,
) -> Vec<u32> {
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

/// A picture of noise over a slope of grey, as a JPEG file.
pub(super) fn jpeg((width, height): (u32, u32), seed: u64) -> Result<Vec<u8>, RunError> {
    let picture = camera_picture((width, height), seed);
    let mut file = Cursor::new(Vec::new());
    let written = picture.write_to(&mut file, ImageFormat::Jpeg);
    written.map_err(|error| ImageError::Read(io::Error::other(error)))?;
    Ok(file.into_inner())
}

/// A picture that no other seed gives: noise over a slope of grey.
pub(super) fn camera_picture((width, height): (u32, u32), seed: u64) -> RgbImage {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let slope = u64::from(width) + u64::from(height);
    RgbImage::from_fn(width, height, |x, y| {
        let grey = 224 * (u64::from(x) + u64::from(y)) / slope.max(1);
        let noise = random.next_u32();
        let channel = |shift: u32| (grey as u8).saturating_add(((noise >> shift) & 31) as u8);
        Rgb([channel(0), channel(8), channel(16)])
    })
}
