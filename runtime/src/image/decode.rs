//! Decoding: bytes of a JPEG, PNG, WebP or GIF file → [`Picture`] in the mode Pillow would open it in.
//!
//! Every size is checked against [`MAX_SIDE`] and [`MAX_BYTES`] before
//! pixels are allocated. The EXIF orientation is applied to still pictures. Pixels of lossless
//! formats equal Pillow's; JPEG and lossy WebP may differ by a few levels, since their decoders
//! round differently. A CMYK JPEG becomes RGB here, before any resize.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;
use std::time::Duration;

use ::image::codecs::gif::GifDecoder;
use ::image::codecs::jpeg::JpegDecoder;
use ::image::codecs::png::PngDecoder;
use ::image::codecs::webp::WebPDecoder;
use ::image::{
    AnimationDecoder, DynamicImage, Frames, ImageDecoder, ImageFormat, Limits, RgbaImage,
};

use super::picture::{Mode, Picture};
use super::{ImageError, MAX_BYTES, MAX_SIDE};

/// One picture of a video.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The whole canvas at this moment, [`Mode::Rgb`], or [`Mode::Rgba`] if it is seen through.
    pub picture: Picture,
    /// How long it is shown; zero where the file does not say.
    pub delay: Duration,
}

/// Reads and decodes the picture at `path`; the first frame of an animation.
///
/// # Errors
/// [`ImageError::File`] with the path and what is wrong.
pub fn open(path: &Path) -> Result<Picture, ImageError> {
    at(path, read(path).and_then(|bytes| decode(&bytes)))
}

/// Reads and decodes all frames of the animation at `path`; a still picture is one frame.
///
/// # Errors
/// [`ImageError::File`] with the path and what is wrong.
pub fn open_frames(path: &Path) -> Result<Vec<Frame>, ImageError> {
    at(path, read(path).and_then(|bytes| decode_frames(&bytes)))
}

/// Decodes a picture; the first frame of an animation.
///
/// # Errors
/// [`ImageError::NotAnImage`], [`ImageError::Broken`] or [`ImageError::TooLarge`].
pub fn decode(bytes: &[u8]) -> Result<Picture, ImageError> {
    let source = Source::new(bytes)?;
    let decoded = match source.format {
        Format::Jpeg => {
            check_jpeg_end(bytes)?;
            source.still(source.jpeg()?)?
        }
        Format::Png => source.still(source.png()?)?,
        Format::WebP => source.still(source.webp()?)?,
        Format::Gif => source.still(source.gif()?)?,
    };
    picture_of(decoded, source.stored_colours())
}

/// Decodes all frames of a GIF, WebP or APNG animation; a still picture is one frame.
///
/// # Errors
/// As [`decode`], and [`ImageError::TooManyFrames`] if they do not fit in [`MAX_BYTES`] together.
pub fn decode_frames(bytes: &[u8]) -> Result<Vec<Frame>, ImageError> {
    let mut total = 0_usize;
    let mut kept = Vec::new();
    for (idx, frame) in frames(bytes)?.enumerate() {
        let frame = frame?;
        total = total.saturating_add(frame.picture.pixels().len());
        if total > MAX_BYTES {
            return Err(ImageError::TooManyFrames { frame: idx });
        }
        kept.push(frame);
    }
    Ok(kept)
}

/// Decodes frames one at a time, so that a long animation can be sampled without holding it.
///
/// An animation's EXIF orientation is not applied.
///
/// # Errors
/// As [`decode`]; a frame that is broken is an item of the iterator.
pub fn frames(
    bytes: &[u8],
) -> Result<Box<dyn Iterator<Item = Result<Frame, ImageError>> + '_>, ImageError> {
    let source = Source::new(bytes)?;
    let animation = match source.format {
        Format::Gif => source.gif()?.into_frames(),
        Format::WebP => match source.webp()? {
            decoder if decoder.has_animation() => decoder.into_frames(),
            _ => return Ok(one_frame(bytes)),
        },
        Format::Png => match source.png()? {
            decoder if decoder.is_apng().map_err(|e| source.error(e))? => {
                decoder.apng().map_err(|e| source.error(e))?.into_frames()
            }
            _ => return Ok(one_frame(bytes)),
        },
        Format::Jpeg => return Ok(one_frame(bytes)),
    };
    Ok(Box::new(FrameIter { frames: Some(animation), source }))
}

fn one_frame(bytes: &[u8]) -> Box<dyn Iterator<Item = Result<Frame, ImageError>> + '_> {
    Box::new(std::iter::once_with(move || {
        Ok(Frame { picture: decode(bytes)?, delay: Duration::ZERO })
    }))
}

/// Ends after the first broken frame.
struct FrameIter<'a> {
    frames: Option<Frames<'a>>,
    source: Source<'a>,
}

impl Iterator for FrameIter<'_> {
    type Item = Result<Frame, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.frames.as_mut()?.next()? {
            Ok(frame) => {
                let delay = frame.delay().into();
                Some(canvas(frame.into_buffer()).map(|picture| Frame { picture, delay }))
            }
            Err(error) => {
                self.frames = None;
                Some(Err(self.source.error(error)))
            }
        }
    }
}

/// A format that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Jpeg,
    Png,
    WebP,
    Gif,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "JPEG",
            Self::Png => "PNG",
            Self::WebP => "WebP",
            Self::Gif => "GIF",
        }
    }
}

/// How a file stores its colours, where the decoded pixels no longer tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StoredColours {
    /// As decoded.
    Plain,
    /// Indices into a palette, or black and white.
    Indexed,
    /// Levels that equal their palette indices: Pillow opens such a GIF as grey.
    GreyPalette,
    /// Grey or RGB without an alpha channel; decoded alpha comes from one transparent colour.
    Keyed,
}

/// Bytes whose format is known.
struct Source<'a> {
    bytes: &'a [u8],
    format: Format,
}

impl<'a> Source<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, ImageError> {
        if bytes.len() > MAX_BYTES {
            return Err(ImageError::FileTooLarge);
        }
        let format = match ::image::guess_format(bytes) {
            Ok(ImageFormat::Jpeg) => Format::Jpeg,
            Ok(ImageFormat::Png) => Format::Png,
            Ok(ImageFormat::WebP) => Format::WebP,
            Ok(ImageFormat::Gif) => Format::Gif,
            other => {
                let found = describe(bytes, other.ok());
                return Err(ImageError::NotAnImage { found });
            }
        };
        Ok(Self { bytes, format })
    }

    fn jpeg(&self) -> Result<JpegDecoder<Cursor<&'a [u8]>>, ImageError> {
        self.checked(JpegDecoder::new(Cursor::new(self.bytes)))
    }

    fn png(&self) -> Result<PngDecoder<Cursor<&'a [u8]>>, ImageError> {
        self.checked(PngDecoder::with_limits(Cursor::new(self.bytes), limits()))
    }

    fn webp(&self) -> Result<WebPDecoder<Cursor<&'a [u8]>>, ImageError> {
        check_webp_chunks(self.bytes)?;
        self.checked(WebPDecoder::new(Cursor::new(self.bytes)))
    }

    fn gif(&self) -> Result<GifDecoder<Cursor<&'a [u8]>>, ImageError> {
        self.checked(GifDecoder::new(Cursor::new(self.bytes)))
    }

    /// A decoder whose header was read and whose declared size is within the limits.
    fn checked<D: ImageDecoder>(&self, decoder: ::image::ImageResult<D>) -> Result<D, ImageError> {
        let mut decoder = decoder.map_err(|e| self.error(e))?;
        let (width, height) = decoder.dimensions();
        let (width, height, bytes) = (width.into(), height.into(), decoder.total_bytes());
        if width > MAX_SIDE as u64 || height > MAX_SIDE as u64 || bytes > MAX_BYTES as u64 {
            return Err(ImageError::TooLarge { width, height, bytes });
        }
        if width == 0 || height == 0 {
            return Err(self.broken(format!("its size is {width} x {height} pixels")));
        }
        decoder.set_limits(limits()).map_err(|e| self.error(e))?;
        Ok(decoder)
    }

    fn still(&self, mut decoder: impl ImageDecoder) -> Result<DynamicImage, ImageError> {
        let orientation = decoder.orientation().map_err(|e| self.error(e))?;
        let mut decoded = DynamicImage::from_decoder(decoder).map_err(|e| self.error(e))?;
        decoded.apply_orientation(orientation);
        Ok(decoded)
    }

    fn stored_colours(&self) -> StoredColours {
        match self.format {
            Format::Jpeg | Format::WebP => StoredColours::Plain,
            Format::Png => png_colours(self.bytes),
            Format::Gif if has_grey_palette(self.bytes) => StoredColours::GreyPalette,
            Format::Gif => StoredColours::Indexed,
        }
    }

    fn error(&self, error: ::image::ImageError) -> ImageError {
        self.broken(error.to_string())
    }

    fn broken(&self, reason: String) -> ImageError {
        let format = self.format.name();
        ImageError::Broken { format, reason }
    }
}

fn limits() -> Limits {
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_BYTES as u64);
    limits
}

fn at<T>(path: &Path, result: Result<T, ImageError>) -> Result<T, ImageError> {
    result.map_err(|error| ImageError::File { path: path.to_owned(), error: Box::new(error) })
}

fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    let limit = MAX_BYTES as u64 + 1;
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What bytes that are no picture look like, for the error message.
fn describe(bytes: &[u8], format: Option<ImageFormat>) -> String {
    let start = &bytes[..bytes.len().min(24)];
    match (format, std::str::from_utf8(start)) {
        (Some(format), _) => format!("a {format:?} picture"),
        (None, _) if bytes.is_empty() => "an empty file".to_owned(),
        (None, Ok(text)) if !text.contains('\0') => format!("text starting with {text:?}"),
        (None, _) => format!("bytes starting with {start:02x?}"),
    }
}

/// Refuses a JPEG file that stops before its end marker: the decoder would fill the rest with grey.
fn check_jpeg_end(bytes: &[u8]) -> Result<(), ImageError> {
    const END_OF_IMAGE: u8 = 0xd9;
    let mut position = 2;
    while let Some(&[first, second]) = bytes.get(position..).and_then(|rest| rest.first_chunk()) {
        position += match (first, second) {
            (0xff, END_OF_IMAGE) => return Ok(()),
            // Stuffed bytes, restart markers and stand-alone markers carry no length.
            (0xff, 0x00 | 0x01 | 0xd0..=0xd8) => 2,
            // Fill byte, or entropy-coded data.
            (0xff, 0xff) | (0..0xff, _) => 1,
            (0xff, _) => match bytes.get(position + 2..).and_then(|rest| rest.first_chunk()) {
                Some(&length) => 2 + usize::from(u16::from_be_bytes(length)),
                None => break,
            },
        };
    }
    Err(ImageError::Broken {
        format: Format::Jpeg.name(),
        reason: "the file ends before the end-of-image marker".to_owned(),
    })
}

/// Refuses a WebP file with a chunk that is longer than the file: the decoder trusts the lengths.
fn check_webp_chunks(bytes: &[u8]) -> Result<(), ImageError> {
    const FILE_HEADER_LEN: usize = 12;
    let mut rest = bytes.get(FILE_HEADER_LEN..).unwrap_or_default();
    while let Some((header, body)) = rest.split_first_chunk::<8>() {
        let [_, _, _, _, length @ ..] = *header;
        let length = u32::from_le_bytes(length);
        // Chunks are padded to an even length; the last pad byte is often missing.
        let body_len = usize::try_from(length).unwrap_or(usize::MAX);
        if body_len > body.len() {
            return Err(ImageError::Broken {
                format: Format::WebP.name(),
                reason: format!("a chunk of {length} bytes, of which {} are there", body.len()),
            });
        }
        rest = body.get(body_len + body_len % 2..).unwrap_or_default();
    }
    Ok(())
}

/// Reads bit depth and colour type of the header chunk, which a PNG file starts with.
fn png_colours(bytes: &[u8]) -> StoredColours {
    match (bytes.get(12..16), bytes.get(24), bytes.get(25)) {
        (Some(b"IHDR"), _, Some(3)) | (Some(b"IHDR"), Some(1), Some(0)) => StoredColours::Indexed,
        (Some(b"IHDR"), _, Some(0 | 2)) => StoredColours::Keyed,
        _ => StoredColours::Plain,
    }
}

/// Whether every entry i of a GIF file's global palette is the grey level i.
fn has_grey_palette(bytes: &[u8]) -> bool {
    const HEADER_LEN: usize = 13;
    let Some(&flags) = bytes.get(10) else {
        return false;
    };
    let n_colours = 2_usize << (flags & 7);
    let palette = bytes.get(HEADER_LEN..HEADER_LEN + 3 * n_colours);
    let is_grey = |palette: &[u8]| {
        let mut entries = (0..=255_u8).zip(palette.as_chunks::<3>().0);
        entries.all(|(level, &entry)| entry == [level; 3])
    };
    flags & 0x80 != 0 && palette.is_some_and(is_grey)
}

fn picture_of(decoded: DynamicImage, stored: StoredColours) -> Result<Picture, ImageError> {
    let (width, height) = (decoded.width(), decoded.height());
    let (mode, pixels) = pixels_of(decoded)?;
    let picture = sized(width, height, mode, pixels)?;
    Ok(match (stored, mode) {
        (StoredColours::Indexed, _) => indexed(&picture)?,
        (StoredColours::GreyPalette, _) => grey_keyed(&picture)?,
        (StoredColours::Keyed, Mode::Rgba) => picture.to_rgb().into_owned(),
        (StoredColours::Keyed, Mode::GreyAlpha) => grey_keyed(&picture)?,
        (StoredColours::Keyed | StoredColours::Plain, _) => picture,
    })
}

/// 8-bit pixels with their mode; 16-bit channels keep their high byte, as in Pillow.
fn pixels_of(decoded: DynamicImage) -> Result<(Mode, Vec<u8>), ImageError> {
    let high_bytes = |levels: Vec<u16>| levels.iter().map(|v| v.to_be_bytes()[0]).collect();
    Ok(match decoded {
        DynamicImage::ImageLuma8(buffer) => (Mode::Grey, buffer.into_raw()),
        DynamicImage::ImageLumaA8(buffer) => (Mode::GreyAlpha, buffer.into_raw()),
        DynamicImage::ImageRgb8(buffer) => (Mode::Rgb, buffer.into_raw()),
        DynamicImage::ImageRgba8(buffer) => (Mode::Rgba, buffer.into_raw()),
        DynamicImage::ImageLuma16(buffer) => (Mode::Grey, high_bytes(buffer.into_raw())),
        DynamicImage::ImageLumaA16(buffer) => (Mode::GreyAlpha, high_bytes(buffer.into_raw())),
        DynamicImage::ImageRgb16(buffer) => (Mode::Rgb, high_bytes(buffer.into_raw())),
        DynamicImage::ImageRgba16(buffer) => (Mode::Rgba, high_bytes(buffer.into_raw())),
        other => {
            let found = format!("pixels of type {:?}", other.color());
            return Err(ImageError::NotAnImage { found });
        }
    })
}

fn sized(width: u32, height: u32, mode: Mode, pixels: Vec<u8>) -> Result<Picture, ImageError> {
    let side = |side: u32| usize::try_from(side).unwrap_or(usize::MAX);
    Picture::new(side(width), side(height), mode, pixels)
}

/// The same pixels as palette colours with alpha.
fn indexed(picture: &Picture) -> Result<Picture, ImageError> {
    let each = |pixel: &[u8]| match *pixel {
        [grey] => [grey, grey, grey, 255],
        [grey, alpha] => [grey, grey, grey, alpha],
        [red, green, blue] => [red, green, blue, 255],
        [red, green, blue, alpha, ..] => [red, green, blue, alpha],
        [] => [0; 4],
    };
    let n_channels = picture.mode().channels();
    let pixels = picture.pixels().chunks_exact(n_channels).flat_map(each);
    Picture::new(picture.width(), picture.height(), Mode::Indexed, pixels.collect())
}

/// The same pixels as grey levels with a transparent level; colours stay as they are.
fn grey_keyed(picture: &Picture) -> Result<Picture, ImageError> {
    let each = |pixel: &[u8]| match *pixel {
        [grey, alpha] => Some([grey, alpha]),
        [red, green, blue, alpha] if red == green && green == blue => Some([red, alpha]),
        _ => None,
    };
    let n_channels = picture.mode().channels();
    let pixels: Option<Vec<_>> = picture.pixels().chunks_exact(n_channels).map(each).collect();
    match pixels {
        Some(pixels) => {
            let pixels = pixels.as_flattened().to_vec();
            Picture::new(picture.width(), picture.height(), Mode::GreyKeyed, pixels)
        }
        // A frame with a palette of its own.
        None => indexed(picture),
    }
}

/// A frame as it is shown: RGB unless something shines through.
fn canvas(frame: RgbaImage) -> Result<Picture, ImageError> {
    let (width, height) = frame.dimensions();
    let picture = sized(width, height, Mode::Rgba, frame.into_raw())?;
    let opaque = picture.pixels().iter().skip(3).step_by(4).all(|&alpha| alpha == 255);
    Ok(if opaque { picture.to_rgb().into_owned() } else { picture })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jpeg_end_is_found_behind_segments_and_stuffing() {
        let thumbnail_only = [0xff, 0xd8, 0xff, 0xe1, 0, 6, 0xff, 0xd9, 1, 2, 0xff, 0xda, 0, 2, 9];
        assert!(check_jpeg_end(&thumbnail_only).is_err());
        let mut whole = thumbnail_only.to_vec();
        whole.extend([0xff, 0x00, 0xff, 0xd3, 7, 0xff, 0xff, 0xd9, 5]);
        assert!(check_jpeg_end(&whole).is_ok());
        for len in 0..whole.len() - 1 {
            assert!(check_jpeg_end(&whole[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn describe_names_what_was_found() {
        assert_eq!(describe(b"", None), "an empty file");
        assert_eq!(describe(b"hello", None), "text starting with \"hello\"");
        assert!(describe(&[0xfe, 0, 1], None).contains("fe, 00, 01"));
        assert!(describe(b"BM", Some(ImageFormat::Bmp)).contains("Bmp"));
    }
}
