//! How a checkpoint expects its pictures: size, resize rule, colour step and normalisation.
//!
//! Importers choose an [`ImageSpec`], the artifact manifest carries it, and the runtime's image
//! module executes it. No pixel is touched here.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Channel means of OpenAI CLIP, RGB, on the 0 to 1 scale (open_clip `constants.py`).
pub const CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];

/// Channel standard deviations of OpenAI CLIP, RGB, on the 0 to 1 scale (open_clip `constants.py`).
pub const CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// Channel means of ImageNet, RGB, on the 0 to 1 scale (timm `constants.py`).
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];

/// Channel standard deviations of ImageNet, RGB, on the 0 to 1 scale (timm `constants.py`).
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Largest side a spec may ask for, in pixels: a bound on what a manifest can make the runtime allocate.
pub const MAX_IMAGE_SIZE: usize = 4096;

/// How a picture becomes the `[3, size, size]` f32 input of a vision encoder.
///
/// A value is `(pixel * rescale - mean) / std`. The product is taken in f64 and rounded to f32;
/// with `rescale` = 1/255 that gives, for all 256 levels, the f32 quotient `pixel / 255`, so one
/// field serves torchvision's division and the Hugging Face multiplication alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// Side of the square input, in pixels.
    pub size: usize,
    /// How a picture of any shape is fitted to the square.
    pub resize: ResizeMode,
    /// Where a centre crop starts when the margin is an odd number of pixels.
    pub crop_rounding: CropRounding,
    /// When and how the picture becomes RGB.
    pub to_rgb: ToRgb,
    /// Factor from 8-bit levels to the scale of `mean` and `std`, normally 1/255.
    pub rescale: f64,
    /// Subtracted from the rescaled channel, RGB.
    pub mean: [f32; 3],
    /// Divides the centred channel, RGB.
    pub std: [f32; 3],
}

/// How a picture of any shape is fitted to a square of `size` pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResizeMode {
    /// Shortest side becomes `size`, the other `floor(size * long / short)`; then a centre crop.
    ShortestSideCenterCrop,
    /// Both sides become `size`; the aspect is not kept.
    Squash,
    /// Longest side becomes `size`, the rest is filled with `mean` on both sides.
    PadToMean,
}

/// Where a centre crop starts when the margin `side - size` is odd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CropRounding {
    /// `round(margin / 2)`, halves to the even number (torchvision `center_crop`).
    HalfToEven,
    /// `floor(margin / 2)` (Hugging Face `center_crop`).
    Down,
}

/// When and how a picture that is not RGB becomes RGB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToRgb {
    /// Resize in the file's own mode, then drop alpha (open_clip: `Resize`, `CenterCrop`, `_convert_to_rgb`).
    AfterResize,
    /// Drop alpha, then resize (Hugging Face `CLIPImageProcessor`).
    BeforeResize,
    /// Composite over white, then resize (Hugging Face `IdeficsImageProcessor`).
    OverWhite,
}

/// An [`ImageSpec`] that no picture can be prepared with.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ImageSpecError {
    /// The side is zero or beyond [`MAX_IMAGE_SIZE`].
    #[error("image spec: field `size`: expected 1 to {MAX_IMAGE_SIZE} pixels, got {size}")]
    Size {
        /// The side that was asked for.
        size: usize,
    },
    /// A number is not finite, or a divisor is zero.
    #[error("image spec: field `{field}`: expected {expected}, got {value}")]
    Number {
        /// Name of the field.
        field: &'static str,
        /// What the field may hold.
        expected: &'static str,
        /// What it holds.
        value: f64,
    },
}

impl ImageSpec {
    /// OpenFlamingo: open_clip's inference transform with CLIP statistics.
    pub fn open_flamingo(size: usize) -> Self {
        Self {
            size,
            resize: ResizeMode::ShortestSideCenterCrop,
            crop_rounding: CropRounding::HalfToEven,
            to_rgb: ToRgb::AfterResize,
            rescale: 1.0 / 255.0,
            mean: CLIP_MEAN,
            std: CLIP_STD,
        }
    }

    /// Otter: the defaults of `CLIPImageProcessor`. Same statistics as OpenFlamingo, but RGB
    /// comes before the resize and the crop's start is rounded down.
    pub fn otter(size: usize) -> Self {
        Self {
            crop_rounding: CropRounding::Down,
            to_rgb: ToRgb::BeforeResize,
            ..Self::open_flamingo(size)
        }
    }

    /// IDEFICS-1: composite over white, resize to the square without keeping the aspect.
    pub fn idefics(size: usize) -> Self {
        Self {
            resize: ResizeMode::Squash,
            crop_rounding: CropRounding::Down,
            to_rgb: ToRgb::OverWhite,
            ..Self::open_flamingo(size)
        }
    }

    /// SigLIP: transformers' `SiglipImageProcessor`, open_clip's transform of SigLIP models. Values from −1 to 1.
    pub fn siglip(size: usize) -> Self {
        Self { resize: ResizeMode::Squash, mean: [0.5; 3], std: [0.5; 3], ..Self::otter(size) }
    }

    /// The Flamingo paper: aspect kept, padded with the mean, mean 0 and variance 1.
    ///
    /// The paper does not print its statistics; those of the encoder's training data go here.
    pub fn paper(size: usize, mean: [f32; 3], std: [f32; 3]) -> Self {
        Self {
            size,
            resize: ResizeMode::PadToMean,
            crop_rounding: CropRounding::Down,
            to_rgb: ToRgb::BeforeResize,
            rescale: 1.0 / 255.0,
            mean,
            std,
        }
    }

    /// Checks a spec that came from outside.
    ///
    /// # Errors
    /// [`ImageSpecError`] if `size` is 0 or beyond [`MAX_IMAGE_SIZE`], a number is not finite,
    /// or a divisor is 0.
    pub fn check(&self) -> Result<(), ImageSpecError> {
        if !(1..=MAX_IMAGE_SIZE).contains(&self.size) {
            return Err(ImageSpecError::Size { size: self.size });
        }
        check_number("rescale", "a finite number", self.rescale, f64::is_finite)?;
        for mean in self.mean {
            check_number("mean", "a finite number", f64::from(mean), f64::is_finite)?;
        }
        for std in self.std {
            check_number("std", "a normal number other than 0", f64::from(std), |_| {
                std.is_normal()
            })?;
        }
        Ok(())
    }
}

fn check_number(
    field: &'static str,
    expected: &'static str,
    value: f64,
    valid: impl Fn(f64) -> bool,
) -> Result<(), ImageSpecError> {
    if valid(value) {
        return Ok(());
    }
    Err(ImageSpecError::Number { field, expected, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_round_trip_keeps_every_bit() {
        for spec in [
            ImageSpec::open_flamingo(224),
            ImageSpec::otter(224),
            ImageSpec::idefics(224),
            ImageSpec::siglip(384),
            ImageSpec::paper(320, [0.5; 3], [0.25; 3]),
        ] {
            let text = serde_json::to_string(&spec).unwrap();
            let back: ImageSpec = serde_json::from_str(&text).unwrap();
            assert_eq!(back, spec, "{text}");
            assert_eq!(spec.check(), Ok(()));
        }
    }

    #[test]
    fn unknown_field_is_refused() {
        let mut value = serde_json::to_value(ImageSpec::idefics(224)).unwrap();
        value["gamma"] = 2.2.into();
        let error = serde_json::from_value::<ImageSpec>(value).unwrap_err();
        assert!(error.to_string().contains("gamma"), "{error}");
    }

    #[test]
    fn bad_numbers_are_refused() {
        let good = ImageSpec::open_flamingo(224);
        for size in [0, MAX_IMAGE_SIZE + 1, usize::MAX] {
            let spec = ImageSpec { size, ..good.clone() };
            assert_eq!(spec.check(), Err(ImageSpecError::Size { size }));
        }
        for (spec, field) in [
            (ImageSpec { std: [1.0, 0.0, 1.0], ..good.clone() }, "std"),
            (ImageSpec { mean: [f32::NAN; 3], ..good.clone() }, "mean"),
            (ImageSpec { rescale: f64::INFINITY, ..good.clone() }, "rescale"),
        ] {
            let message = spec.check().unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
    }

    #[test]
    fn rescale_equals_division_by_255_for_all_levels() {
        let spec = ImageSpec::open_flamingo(224);
        for level in 0..=255_u8 {
            let product = (f64::from(level) * spec.rescale) as f32;
            assert_eq!(product, f32::from(level) / 255.0, "level {level}");
        }
    }
}
