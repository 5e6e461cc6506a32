//! Pictures as files of the world → RGB → squares of one size → PNG. Limits are checked before memory is taken.

use std::io::Cursor;

use clap::ValueEnum;
use image::imageops::{self, FilterType};
use image::{DynamicImage, ImageDecoder, ImageEncoder, ImageReader, Limits, RgbImage};

/// Most bytes of an encoded picture or animation.
pub(crate) const MAX_PICTURE_BYTES: u64 = 32 << 20;

const MAX_SIDE: u32 = 16_384;
const MAX_DECODED_BYTES: u64 = 256 << 20;

/// How a picture becomes a square.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Fit {
    /// The middle square of it, as CLIP's preprocessing.
    #[default]
    Crop,
    /// All of it, on black.
    Pad,
    /// All of it, stretched.
    Stretch,
}

/// What decoders may take.
pub(crate) fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    limits
}

/// The picture upright, transparent parts on white. `None` if it is broken or over a limit.
pub fn decode(bytes: &[u8]) -> Option<RgbImage> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().ok()?;
    reader.limits(limits());
    let mut decoder = reader.into_decoder().ok()?;
    let orientation = decoder.orientation().ok()?;
    let mut picture = DynamicImage::from_decoder(decoder).ok()?;
    picture.apply_orientation(orientation);
    Some(on_white(picture))
}

/// RGB, with transparent parts on white.
pub(crate) fn on_white(picture: DynamicImage) -> RgbImage {
    if !picture.color().has_alpha() {
        return picture.into_rgb8();
    }
    let picture = picture.into_rgba8();
    let mut rgb = RgbImage::new(picture.width(), picture.height());
    for (to, from) in rgb.pixels_mut().zip(picture.pixels()) {
        let [r, g, b, alpha] = from.0;
        to.0 = [r, g, b].map(|colour| over_white(colour, alpha));
    }
    rgb
}

/// `colour · alpha + 255 · (1 - alpha)`, rounded.
fn over_white(colour: u8, alpha: u8) -> u8 {
    let (colour, alpha) = (u32::from(colour), u32::from(alpha));
    let mixed = (colour * alpha + 255 * (255 - alpha) + 127) / 255;
    u8::try_from(mixed).expect("a mean of two bytes is a byte")
}

/// The picture as a square of `size` pixels, by a triangle filter that averages when it shrinks.
pub fn square(picture: &RgbImage, size: u32, fit: Fit) -> RgbImage {
    let (width, height) = picture.dimensions();
    match fit {
        Fit::Stretch => imageops::resize(picture, size, size, FilterType::Triangle),
        Fit::Crop => {
            let side = width.min(height);
            let (x, y) = ((width - side) / 2, (height - side) / 2);
            let middle = imageops::crop_imm(picture, x, y, side, side).to_image();
            imageops::resize(&middle, size, size, FilterType::Triangle)
        }
        Fit::Pad => {
            let side = width.max(height);
            let scaled = |len: u32| {
                let rounded =
                    (u64::from(len) * u64::from(size) + u64::from(side) / 2) / u64::from(side);
                u32::try_from(rounded).unwrap_or(size).clamp(1, size)
            };
            let (width, height) = (scaled(width), scaled(height));
            let whole = imageops::resize(picture, width, height, FilterType::Triangle);
            let mut square = RgbImage::new(size, size);
            let (x, y) = ((size - width) / 2, (size - height) / 2);
            imageops::replace(&mut square, &whole, x.into(), y.into());
            square
        }
    }
}

/// PNG bytes, the same for the same pixels.
pub fn png(picture: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    let encoder = image::codecs::png::PngEncoder::new(&mut bytes);
    let (width, height) = picture.dimensions();
    encoder
        .write_image(picture.as_raw(), width, height, image::ExtendedColorType::Rgb8)
        .expect("an RGB picture with sides over 0 goes into memory as PNG");
    bytes
}

/// PNG of a square of `side` pixels, `[side, side, 3]` u8 RGB. `None` if there are not so many numbers.
pub fn png_from_pixels(pixels: Vec<u8>, side: u32) -> Option<Vec<u8>> {
    let picture = RgbImage::from_raw(side, side, pixels).filter(|_| side > 0)?;
    Some(png(&picture))
}

/// Pixels of a picture made a square of `side` pixels if it is none yet, `[side, side, 3]` u8 RGB. `None` if it is
/// broken or over a limit.
pub fn pixels(bytes: &[u8], side: u32, fit: Fit) -> Option<Vec<u8>> {
    let picture = decode(bytes)?;
    Some(match picture.dimensions() == (side, side) {
        true => picture.into_raw(),
        false => square(&picture, side, fit).into_raw(),
    })
}

#[cfg(test)]
mod tests {
    use image::{DynamicImage, Rgb, RgbImage, Rgba, RgbaImage};
    use proptest::prelude::*;

    use super::{Fit, decode, on_white, pixels, png, png_from_pixels, square};

    /// Left third red, middle green, right blue.
    fn thirds(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, _| {
            let colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255]];
            Rgb(colours[usize::try_from(x * 3 / width).unwrap()])
        })
    }

    #[test]
    fn fits_keep_what_they_say() {
        let wide = thirds(90, 30);
        let colours = |fit| {
            let picture = square(&wide, 30, fit);
            assert_eq!(picture.dimensions(), (30, 30));
            [(1, 15), (15, 15), (28, 15), (15, 1)].map(|(x, y)| picture.get_pixel(x, y).0)
        };
        let [red, green, blue, black] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]];
        assert_eq!(colours(Fit::Crop), [green, green, green, green]);
        assert_eq!(colours(Fit::Stretch), [red, green, blue, green]);
        assert_eq!(colours(Fit::Pad), [red, green, blue, black]);
    }

    #[test]
    fn transparent_parts_are_white() {
        let picture = RgbaImage::from_fn(3, 1, |x, _| Rgba([0, 0, 200, [0, 128, 255][x as usize]]));
        let rgb = on_white(DynamicImage::ImageRgba8(picture));
        assert_eq!(rgb.as_raw()[..], [255, 255, 255, 127, 127, 227, 0, 0, 200]);
    }

    #[test]
    fn png_keeps_pixels() {
        let picture = thirds(7, 5);
        assert_eq!(decode(&png(&picture)), Some(picture));
    }

    #[test]
    fn pixels_are_kept_if_they_fit_and_squared_if_not() {
        let picture = thirds(30, 30);
        let bytes = png_from_pixels(picture.as_raw().clone(), 30).unwrap();
        assert_eq!(bytes, png(&picture));
        assert_eq!(pixels(&bytes, 30, Fit::Crop), Some(picture.into_raw()));
        let wide = pixels(&png(&thirds(90, 30)), 10, Fit::Crop).unwrap();
        assert_eq!(wide, [0, 255, 0].repeat(100));
        assert_eq!(png_from_pixels(vec![0; 26], 3), None);
        assert_eq!(pixels(b"no picture", 3, Fit::Crop), None);
    }

    #[test]
    fn a_picture_that_claims_to_be_huge_is_refused() {
        let mut bytes = png(&thirds(3, 3));
        bytes[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
        assert_eq!(decode(&bytes), None);
    }

    proptest! {
        #[test]
        fn a_damaged_picture_never_panics(place in 0..60_usize, byte: u8, len in 0..200_usize) {
            let mut bytes = png(&thirds(9, 9));
            let n = bytes.len();
            bytes[place % n] = byte;
            bytes.truncate(len.max(1));
            decode(&bytes);
        }
    }
}
