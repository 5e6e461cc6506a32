//! Pictures: from files of users to the `[3, size, size]` f32 input of the vision encoder.
//!
//! The stages are [`mod@decode`] (file → [`Picture`] in the file's own mode), the colour step,
//! [`mod@resize`] (Pillow's arithmetic, to the bit) and normalisation. The order and the numbers come
//! from the checkpoint's [`ImageSpec`].
//!
//! Two steps differ from the reference on purpose:
//!
//! * **Orientation.** The EXIF orientation is applied. Pillow's `Image.open` alone does not, so a
//!   reference script may see a phone photograph lying on its side; nobody wants an answer
//!   about that.
//! * **16-bit grey.** Reduced by `>> 8`. Pillow's conversion of its `I;16` mode clips at 255
//!   instead, which turns nearly every such picture white.
//!
//! ```
//! use flamingo_models::image_spec::ImageSpec;
//! use flamingo_runtime::image::{Mode, Picture, preprocess};
//!
//! let picture = Picture::new(2, 1, Mode::Rgb, vec![0, 0, 0, 255, 255, 255])?;
//! let input = preprocess(&picture, &ImageSpec::idefics(32))?;
//! assert_eq!(input.len(), 3 * 32 * 32);
//! # Ok::<(), flamingo_runtime::image::ImageError>(())
//! ```

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use flamingo_models::image_spec::{CropRounding, ImageSpec, ImageSpecError, ResizeMode, ToRgb};
use thiserror::Error;

pub mod decode;
pub mod picture;
pub mod resize;

pub use decode::{Frame, decode, decode_frames, frames, open, open_frames};
pub use picture::{Mode, Picture};

use resize::Window;

/// Largest side of a picture that is read, in pixels.
pub const MAX_SIDE: usize = 16_384;

/// Most bytes of decoded pixels held for one file (all frames of a video together), and most
/// bytes of a file that are read.
pub const MAX_BYTES: usize = 512 << 20;

/// Why a picture could not be read or prepared.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file named could not be used.
    #[error("image `{}`: {error}", path.display())]
    File {
        /// The file as it was named by the caller.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        error: Box<ImageError>,
    },
    /// The file could not be read.
    #[error("cannot read: {0}")]
    Read(#[from] io::Error),
    /// The bytes are not a picture in a known format.
    #[error(
        "expected a JPEG, PNG, WebP or GIF picture, found {found}\n\n\
         hint: the content decides, not the file name; convert the file to PNG or JPEG"
    )]
    NotAnImage {
        /// What the bytes look like.
        found: String,
    },
    /// The bytes start as a picture of this format but do not continue as one.
    #[error(
        "expected a complete {format} picture, found a broken one: {reason}\n\n\
         hint: copy or download the file again, or re-encode it"
    )]
    Broken {
        /// Name of the format.
        format: &'static str,
        /// What the decoder says.
        reason: String,
    },
    /// The picture is larger than what is read.
    #[error(
        "expected at most {MAX_SIDE} pixels a side and {MAX_BYTES} decoded bytes, \
         found {width} x {height} pixels in {bytes} bytes\n\n\
         hint: scale the picture down; the model sees a few hundred pixels a side"
    )]
    TooLarge {
        /// Declared width in pixels.
        width: u64,
        /// Declared height in pixels.
        height: u64,
        /// Bytes that the pixels take.
        bytes: u64,
    },
    /// The file itself is larger than what is read.
    #[error("expected a file of at most {MAX_BYTES} bytes, found more")]
    FileTooLarge,
    /// All frames together are larger than what is held at once.
    #[error(
        "expected at most {MAX_BYTES} bytes of decoded frames, found more at frame {frame}\n\n\
         hint: use a shorter or smaller animation"
    )]
    TooManyFrames {
        /// Index of the first frame that does not fit.
        frame: usize,
    },
    /// Size and pixel count of a [`Picture`] disagree.
    #[error("picture of {width} x {height} pixels: expected {expected} bytes, got {found}")]
    PixelCount {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// What the size and mode ask for, in words or digits.
        expected: String,
        /// Bytes that were given.
        found: usize,
    },
    /// The checkpoint's description cannot be followed.
    #[error(transparent)]
    Spec(#[from] ImageSpecError),
}

/// Reads the picture at `path` and prepares it: [`open`], then [`preprocess`].
///
/// # Errors
/// [`ImageError::File`] with the path, or [`ImageError::Spec`].
pub fn load(path: &Path, spec: &ImageSpec) -> Result<Vec<f32>, ImageError> {
    preprocess(&open(path)?, spec)
}

/// Prepares one picture: `[3, size, size]`, f32, channel-major, `(pixel * rescale - mean) / std`.
///
/// # Errors
/// [`ImageError::Spec`] if `spec` cannot be followed.
pub fn preprocess(picture: &Picture, spec: &ImageSpec) -> Result<Vec<f32>, ImageError> {
    spec.check()?;
    let placement = Placement::new(picture, spec);
    let coloured = match spec.to_rgb {
        ToRgb::AfterResize => Cow::Borrowed(picture),
        ToRgb::BeforeResize => picture.to_rgb(),
        ToRgb::OverWhite => picture.over_white(),
    };
    let resized = resize::resize_window(&coloured, placement.resized, placement.window);
    Ok(normalise(&resized.to_rgb(), placement.offset, spec))
}

/// Where the pixels of a picture land in the square.
#[derive(Debug, PartialEq)]
struct Placement {
    /// Width and height of the whole picture after the resize.
    resized: (usize, usize),
    /// The part of the resized picture that is kept.
    window: Window,
    /// Column and row of the square at which the window starts.
    offset: (usize, usize),
}

impl Placement {
    fn new(picture: &Picture, spec: &ImageSpec) -> Self {
        let (width, height) = (picture.width(), picture.height());
        match spec.resize {
            ResizeMode::ShortestSideCenterCrop => Self::crop(width, height, spec),
            ResizeMode::Squash => Self::whole((spec.size, spec.size), spec.size),
            ResizeMode::PadToMean => Self::whole(fit_longest(width, height, spec.size), spec.size),
        }
    }

    fn crop(width: usize, height: usize, spec: &ImageSpec) -> Self {
        let resized = fit_shortest(width, height, spec.size);
        let start = |side: usize| crop_start(side - spec.size, spec.crop_rounding);
        let window = Window {
            left: start(resized.0),
            top: start(resized.1),
            width: spec.size,
            height: spec.size,
        };
        Self { resized, window, offset: (0, 0) }
    }

    fn whole(resized: (usize, usize), size: usize) -> Self {
        Self {
            resized,
            window: Window::whole(resized),
            offset: ((size - resized.0) / 2, (size - resized.1) / 2),
        }
    }
}

/// Shortest side to `size`, the other to `floor(size * long / short)` (torchvision's rule).
fn fit_shortest(width: usize, height: usize, size: usize) -> (usize, usize) {
    if width <= height { (size, size * height / width) } else { (size * width / height, size) }
}

/// Longest side to `size`, the other to `floor(size * short / long)`, at least 1.
fn fit_longest(width: usize, height: usize, size: usize) -> (usize, usize) {
    if width >= height {
        (size, (size * height / width).max(1))
    } else {
        ((size * width / height).max(1), size)
    }
}

fn crop_start(margin: usize, rounding: CropRounding) -> usize {
    let half = margin / 2;
    match rounding {
        CropRounding::HalfToEven => half + (margin % 2) * (half % 2),
        CropRounding::Down => half,
    }
}

/// `[3, size, size]` from RGB bytes; what `rgb` does not cover holds 0, the normalised mean.
fn normalise(rgb: &Picture, offset: (usize, usize), spec: &ImageSpec) -> Vec<f32> {
    let plane_len = spec.size * spec.size;
    let row_len = 3 * rgb.width();
    let mut output = vec![0.0; 3 * plane_len];
    for (channel, plane) in output.chunks_exact_mut(plane_len).enumerate() {
        let levels = level_table(spec, channel);
        let rows = rgb.pixels().chunks_exact(row_len);
        let targets = plane.chunks_exact_mut(spec.size).skip(offset.1);
        for (row, target) in rows.zip(targets) {
            let values = row.iter().skip(channel).step_by(3);
            for (&level, value) in values.zip(&mut target[offset.0..]) {
                *value = levels[usize::from(level)];
            }
        }
    }
    output
}

/// The normalised value of each of the 256 levels, in torch's order of operations, in f32.
fn level_table(spec: &ImageSpec, channel: usize) -> [f32; 256] {
    let (mean, std) = (spec.mean[channel], spec.std[channel]);
    let mut table = [0.0; 256];
    for (level, value) in (0..=255_u8).zip(&mut table) {
        let scaled = (f64::from(level) * spec.rescale) as f32;
        *value = (scaled - mean) / std;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crop_start_rounds_as_the_two_libraries_do() {
        let table = [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 1), (5, 2, 2), (7, 4, 3)];
        for (margin, half_to_even, down) in table {
            assert_eq!(crop_start(margin, CropRounding::HalfToEven), half_to_even);
            assert_eq!(crop_start(margin, CropRounding::Down), down);
        }
    }

    #[test]
    fn extreme_aspect_computes_only_the_window() {
        let picture = Picture::new(1, MAX_SIDE, Mode::Grey, vec![7; MAX_SIDE]).unwrap();
        let spec = ImageSpec::open_flamingo(224);
        let placement = Placement::new(&picture, &spec);
        assert_eq!(placement.resized, (224, 224 * MAX_SIDE));
        assert_eq!(placement.window.height, 224);
        assert_eq!(preprocess(&picture, &spec).unwrap().len(), 3 * 224 * 224);
    }

    #[test]
    fn padding_is_zero_and_centred() {
        let spec = ImageSpec::paper(8, [0.5; 3], [0.5; 3]);
        let picture = Picture::new(8, 3, Mode::Rgb, vec![255; 72]).unwrap();
        let values = preprocess(&picture, &spec).unwrap();
        for (idx, &value) in values.iter().enumerate() {
            let row = idx / 8 % 8;
            let expected = if (2..5).contains(&row) { 1.0 } else { 0.0 };
            assert_eq!(value, expected, "value {idx}");
        }
    }

    #[test]
    fn bad_spec_is_refused_before_any_work() {
        let picture = Picture::new(1, 1, Mode::Grey, vec![7]).unwrap();
        let error = preprocess(&picture, &ImageSpec::idefics(0)).unwrap_err();
        assert!(matches!(error, ImageError::Spec(_)), "{error}");
    }
}
