//! Which pictures are kept, and in what form: decoded, large enough, of a sane shape, of more than one
//! colour, new to the eye, safe if someone judges that.

use std::collections::{HashMap, HashSet};

use image::RgbImage;
use image_hasher::{HashAlg, Hasher, HasherConfig};

use crate::picture::{Fit, decode, png, square};
use crate::report::PictureReject;

/// Judges whether a picture is unsafe to train on. None is built in; the report says so.
pub trait UnsafeScorer {
    /// Name in the report.
    fn name(&self) -> &str;

    /// Whether the picture, upright RGB of any size, is refused.
    fn is_unsafe(&mut self, picture: &RgbImage) -> bool;
}

/// Least side in pixels.
const MIN_SIDE: u32 = 64;
/// Most that one side may be of the other.
const MAX_ASPECT: u32 = 3;
/// Most that the values of a channel may differ in a picture of one colour; above the noise of JPEG.
const MAX_FLAT_RANGE: u8 = 8;
/// Most bits of 64 in which hashes of the same picture differ.
const MAX_DISTANCE: u32 = 3;

/// The pictures seen so far, and how kept ones are written.
pub struct PictureFilter {
    size: u32,
    fit: Fit,
    scorer: Option<Box<dyn UnsafeScorer>>,
    hasher: Hasher<[u8; 8]>,
    seen: HashSet<blake3::Hash>,
    look: NearHashes,
}

impl PictureFilter {
    /// Nothing seen; kept pictures become squares of `size` pixels.
    pub fn new(size: u32, fit: Fit, scorer: Option<Box<dyn UnsafeScorer>>) -> Self {
        let config = HasherConfig::with_bytes_type::<[u8; 8]>().hash_alg(HashAlg::Median);
        Self {
            size,
            fit,
            scorer,
            hasher: config.hash_size(8, 8).preproc_dct().to_hasher(),
            seen: HashSet::new(),
            look: NearHashes::default(),
        }
    }

    /// Encoded bytes → PNG of the square.
    ///
    /// # Errors
    /// The picture is refused.
    pub fn check(&mut self, bytes: &[u8]) -> Result<Vec<u8>, PictureReject> {
        let picture = decode(bytes).ok_or(PictureReject::Broken)?;
        let (width, height) = picture.dimensions();
        let (short, long) = (width.min(height), width.max(height));
        if short < MIN_SIDE {
            return Err(PictureReject::Tiny);
        }
        if long > MAX_ASPECT * short {
            return Err(PictureReject::Aspect);
        }
        if is_flat(&picture) {
            return Err(PictureReject::SingleColour);
        }
        if !self.seen.insert(blake3::hash(bytes)) {
            return Err(PictureReject::Duplicate);
        }
        if !self.look.insert(self.look_of(&picture)) {
            return Err(PictureReject::NearDuplicate);
        }
        if self.scorer.as_mut().is_some_and(|scorer| scorer.is_unsafe(&picture)) {
            return Err(PictureReject::Unsafe);
        }
        Ok(png(&square(&picture, self.size, self.fit)))
    }

    /// 64 signs of low frequencies (a pHash).
    fn look_of(&self, picture: &RgbImage) -> u64 {
        let hash = self.hasher.hash_image(picture);
        u64::from_le_bytes(hash.into_inner())
    }
}

fn is_flat(picture: &RgbImage) -> bool {
    let mut range = [(u8::MAX, u8::MIN); 3];
    for pixel in picture.pixels() {
        for ((low, high), value) in range.iter_mut().zip(pixel.0) {
            (*low, *high) = ((*low).min(value), (*high).max(value));
        }
    }
    range.iter().all(|(low, high)| high.saturating_sub(*low) <= MAX_FLAT_RANGE)
}

/// Hashes by each quarter of their bits: two that differ in at most three bits share a quarter.
#[derive(Default)]
struct NearHashes {
    by_quarter: [HashMap<u16, Vec<u64>>; 4],
}

impl NearHashes {
    /// Whether no hash near this one was there; then it is there.
    fn insert(&mut self, hash: u64) -> bool {
        let quarters = quarters(hash);
        let mut known =
            self.by_quarter.iter().zip(quarters).filter_map(|(map, quarter)| map.get(&quarter));
        if known
            .any(|hashes| hashes.iter().any(|other| (other ^ hash).count_ones() <= MAX_DISTANCE))
        {
            return false;
        }
        for (map, quarter) in self.by_quarter.iter_mut().zip(quarters) {
            map.entry(quarter).or_default().push(hash);
        }
        true
    }
}

fn quarters(hash: u64) -> [u16; 4] {
    let bytes = hash.to_le_bytes();
    [0, 2, 4, 6].map(|at| u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

#[cfg(test)]
mod tests {
    use image::imageops::{self, FilterType};
    use image::{Rgb, RgbImage};
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};

    use super::{MAX_DISTANCE, NearHashes, PictureFilter, UnsafeScorer};
    use crate::picture::{Fit, decode, png};
    use crate::report::PictureReject;

    /// Soft spots of random colours.
    fn scene(seed: u64, width: u32, height: u32) -> RgbImage {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let coarse = RgbImage::from_fn(6, 6, |_, _| Rgb(rng.random()));
        imageops::resize(&coarse, width, height, FilterType::CatmullRom)
    }

    fn check(picture: &RgbImage) -> Result<(u32, u32), PictureReject> {
        let png = PictureFilter::new(32, Fit::Crop, None).check(&png(picture))?;
        Ok(decode(&png).unwrap().dimensions())
    }

    #[test]
    fn sizes_shapes_and_flat_colours() {
        assert_eq!(check(&scene(0, 64, 64)), Ok((32, 32)));
        assert_eq!(check(&scene(0, 63, 200)), Err(PictureReject::Tiny));
        assert_eq!(check(&scene(0, 192, 64)), Ok((32, 32)));
        assert_eq!(check(&scene(0, 64, 193)), Err(PictureReject::Aspect));
        let nearly = |last: u8| {
            RgbImage::from_fn(64, 64, |x, y| Rgb([9, 9, if x * y == 63 * 63 { last } else { 9 }]))
        };
        assert_eq!(check(&nearly(17)), Err(PictureReject::SingleColour));
        assert_eq!(check(&nearly(18)), Ok((32, 32)));
    }

    #[test]
    fn a_picture_is_kept_once_in_any_size_or_light() {
        let mut filter = PictureFilter::new(32, Fit::Crop, None);
        let picture = scene(1, 120, 90);
        assert!(filter.check(&png(&picture)).is_ok());
        assert_eq!(filter.check(&png(&picture)), Err(PictureReject::Duplicate));
        let smaller = imageops::resize(&picture, 80, 66, FilterType::Lanczos3);
        assert_eq!(filter.check(&png(&smaller)), Err(PictureReject::NearDuplicate));
        let lighter = imageops::brighten(&picture, 12);
        assert_eq!(filter.check(&png(&lighter)), Err(PictureReject::NearDuplicate));
    }

    #[test]
    fn other_pictures_do_not_look_alike() {
        let mut filter = PictureFilter::new(32, Fit::Crop, None);
        let kept =
            (0..200).filter(|&seed| filter.check(&png(&scene(seed, 96, 96))).is_ok()).count();
        assert_eq!(kept, 200);
    }

    #[test]
    fn a_scorer_has_its_say() {
        struct RefuseWide;
        impl UnsafeScorer for RefuseWide {
            fn name(&self) -> &str {
                "wide"
            }
            fn is_unsafe(&mut self, picture: &RgbImage) -> bool {
                picture.width() > picture.height()
            }
        }
        let mut filter = PictureFilter::new(32, Fit::Crop, Some(Box::new(RefuseWide)));
        assert!(filter.check(&png(&scene(2, 70, 80))).is_ok());
        assert_eq!(filter.check(&png(&scene(3, 80, 70))), Err(PictureReject::Unsafe));
    }

    proptest! {
        #[test]
        fn near_hashes_are_those_within_the_distance(hashes: Vec<u64>, flips in prop::collection::vec((0..40_usize, 0..64_u32, 0..64_u32, 0..64_u32, 0..64_u32), 0..40)) {
            let flipped = flips.iter().filter_map(|&(index, a, b, c, d)| Some(hashes.get(index)? ^ 1 << a ^ 1 << b ^ 1 << c ^ 1 << d));
            let all: Vec<u64> = hashes.iter().copied().chain(flipped).collect();
            let (mut fast, mut slow) = (NearHashes::default(), Vec::new());
            for hash in all {
                let is_new = slow.iter().all(|other: &u64| (other ^ hash).count_ones() > MAX_DISTANCE);
                if is_new {
                    slow.push(hash);
                }
                prop_assert_eq!(fast.insert(hash), is_new);
            }
        }
    }
}
