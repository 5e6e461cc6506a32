//! [`Picture`]: 8-bit pixels in the mode of the file they came from, and its colour conversions.
//!
//! The mode is kept because the OpenFlamingo reference resizes before it converts to RGB, and a
//! resize depends on the mode. Conversions follow Pillow's integer formulas.

use std::borrow::Cow;

use super::{ImageError, MAX_SIDE};

/// What the bytes of a [`Picture`] mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One channel (Pillow `L`).
    Grey,
    /// Grey and alpha (Pillow `LA`).
    GreyAlpha,
    /// Grey and alpha, where alpha comes from one transparent level named in the file (Pillow `L`
    /// with `info["transparency"]`): resized as grey, seen as transparent only over a background.
    GreyKeyed,
    /// Red, green, blue (Pillow `RGB`).
    Rgb,
    /// Red, green, blue, alpha (Pillow `RGBA`).
    Rgba,
    /// Palette colours, looked up, with alpha (Pillow `P`, and `1` for black and white files).
    /// Resized by nearest pixel, as Pillow does whatever filter is asked for.
    Indexed,
}

impl Mode {
    /// Bytes a pixel.
    pub fn channels(self) -> usize {
        match self {
            Self::Grey => 1,
            Self::GreyAlpha | Self::GreyKeyed => 2,
            Self::Rgb => 3,
            Self::Rgba | Self::Indexed => 4,
        }
    }
}

/// A decoded picture, `[height, width, channels]`, 8 bits a channel, at least 1 x 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    mode: Mode,
    pixels: Vec<u8>,
}

impl Picture {
    /// Wraps pixels, rows from the top, channels interleaved.
    ///
    /// # Errors
    /// [`ImageError::PixelCount`] if a side is 0 or beyond [`MAX_SIDE`], or `pixels` does not hold
    /// `width * height * channels` bytes.
    pub fn new(
        width: usize,
        height: usize,
        mode: Mode,
        pixels: Vec<u8>,
    ) -> Result<Self, ImageError> {
        let sides = 1..=MAX_SIDE;
        let expected = if sides.contains(&width) && sides.contains(&height) {
            width * height * mode.channels()
        } else {
            return Err(ImageError::PixelCount {
                width,
                height,
                expected: format!("sides of 1 to {MAX_SIDE} pixels and their"),
                found: pixels.len(),
            });
        };
        if pixels.len() != expected {
            return Err(ImageError::PixelCount {
                width,
                height,
                expected: expected.to_string(),
                found: pixels.len(),
            });
        }
        Ok(Self { width, height, mode, pixels })
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// What the bytes mean.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The bytes, `[height, width, channels]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// RGB by dropping alpha without blending (Pillow `convert("RGB")`).
    pub fn to_rgb(&self) -> Cow<'_, Self> {
        match self.mode {
            Mode::Rgb => Cow::Borrowed(self),
            Mode::Grey => self.map(Mode::Rgb, |p: [u8; 1]| [p[0]; 3]),
            Mode::GreyAlpha | Mode::GreyKeyed => self.map(Mode::Rgb, |p: [u8; 2]| [p[0]; 3]),
            Mode::Rgba | Mode::Indexed => self.map(Mode::Rgb, |p: [u8; 4]| [p[0], p[1], p[2]]),
        }
    }

    /// RGB by compositing over white (Pillow `alpha_composite`).
    pub fn over_white(&self) -> Cow<'_, Self> {
        match self.mode {
            Mode::Rgb | Mode::Grey => self.to_rgb(),
            Mode::GreyAlpha | Mode::GreyKeyed => {
                self.map(Mode::Rgb, |p: [u8; 2]| [blend_with_white(p[0], p[1]); 3])
            }
            Mode::Rgba | Mode::Indexed => self.map(Mode::Rgb, |p: [u8; 4]| {
                [p[0], p[1], p[2]].map(|level| blend_with_white(level, p[3]))
            }),
        }
    }

    /// The form that Pillow resizes: alpha multiplied into the colours, a transparent level ignored.
    pub(super) fn premultiplied(&self) -> Cow<'_, Self> {
        match self.mode {
            Mode::Grey | Mode::Rgb | Mode::Indexed => Cow::Borrowed(self),
            Mode::GreyKeyed => self.map(Mode::Grey, |p: [u8; 2]| [p[0]]),
            Mode::GreyAlpha => {
                self.map(Mode::GreyAlpha, |p: [u8; 2]| [multiply_255(p[0], p[1]), p[1]])
            }
            Mode::Rgba => self.map(Mode::Rgba, |p: [u8; 4]| {
                let [red, green, blue] = [p[0], p[1], p[2]].map(|level| multiply_255(level, p[3]));
                [red, green, blue, p[3]]
            }),
        }
    }

    /// Undoes the multiplication of [`Self::premultiplied`].
    pub(super) fn unpremultiplied(&self) -> Cow<'_, Self> {
        match self.mode {
            Mode::Grey | Mode::GreyKeyed | Mode::Rgb | Mode::Indexed => Cow::Borrowed(self),
            Mode::GreyAlpha => {
                self.map(Mode::GreyAlpha, |p: [u8; 2]| [divide_255(p[0], p[1]), p[1]])
            }
            Mode::Rgba => self.map(Mode::Rgba, |p: [u8; 4]| {
                let [red, green, blue] = [p[0], p[1], p[2]].map(|level| divide_255(level, p[3]));
                [red, green, blue, p[3]]
            }),
        }
    }

    fn map<const FROM: usize, const TO: usize>(
        &self,
        mode: Mode,
        convert: impl Fn([u8; FROM]) -> [u8; TO],
    ) -> Cow<'static, Self> {
        let (pixels, rest) = self.pixels.as_chunks::<FROM>();
        debug_assert!(rest.is_empty() && mode.channels() == TO);
        let mut mapped = vec![0; pixels.len() * TO];
        for (target, &pixel) in mapped.as_chunks_mut::<TO>().0.iter_mut().zip(pixels) {
            *target = convert(pixel);
        }
        Cow::Owned(Self { width: self.width, height: self.height, mode, pixels: mapped })
    }
}

/// `round(a * b / 255)` by Pillow's shift (`MULDIV255`); never beyond 255.
fn multiply_255(a: u8, b: u8) -> u8 {
    let product = u32::from(a) * u32::from(b) + 128;
    low_byte(((product >> 8) + product) >> 8)
}

/// `level * 255 / alpha`, clipped; as it is where alpha says nothing (0) or everything (255).
fn divide_255(level: u8, alpha: u8) -> u8 {
    match alpha {
        0 | 255 => level,
        _ => low_byte((255 * u32::from(level) / u32::from(alpha)).min(255)),
    }
}

/// One channel of `Image.alpha_composite` over opaque white, with its 7 extra bits.
fn blend_with_white(level: u8, alpha: u8) -> u8 {
    if alpha == 0 {
        return 255;
    }
    let (level, alpha) = (u32::from(level), u32::from(alpha));
    let sum = (level * alpha + 255 * (255 - alpha) + 128) << 7;
    low_byte((((sum >> 8) + sum) >> 8) >> 7)
}

fn low_byte(value: u32) -> u8 {
    debug_assert!(value <= 255);
    value as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_byte_count_is_refused() {
        for (width, height, len) in [(2, 2, 11), (0, 2, 0), (MAX_SIDE + 1, 1, 3 * (MAX_SIDE + 1))] {
            let error = Picture::new(width, height, Mode::Rgb, vec![0; len]).unwrap_err();
            assert!(matches!(error, ImageError::PixelCount { .. }), "{error}");
        }
    }

    #[test]
    fn multiplication_rounds_to_nearest() {
        for a in 0..=255_u8 {
            for b in 0..=255_u8 {
                let exact = (f64::from(a) * f64::from(b) / 255.0).round();
                assert_eq!(f64::from(multiply_255(a, b)), exact, "{a} * {b}");
            }
        }
    }

    #[test]
    fn blend_stays_within_a_level_of_exact() {
        for level in 0..=255_u8 {
            for alpha in 0..=255_u8 {
                let alpha_part = f64::from(alpha) / 255.0;
                let exact = f64::from(level) * alpha_part + 255.0 * (1.0 - alpha_part);
                let found = f64::from(blend_with_white(level, alpha));
                assert!((found - exact).abs() <= 1.0, "{level} at {alpha}: {found} {exact}");
            }
        }
    }
}
