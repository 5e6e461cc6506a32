//! Media of pairs → PNG squares: a picture, or the frames of a video at one a second.

use std::io::Cursor;
use std::path::Path;
use std::time::Duration;

use image::codecs::gif::GifDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::{AnimationDecoder, DynamicImage, Frames, ImageDecoder, ImageFormat, RgbImage};
use rand::Rng;

use super::Options;
use super::list::Media;
use crate::Error;
use crate::folder::Folder;
use crate::picture::{Fit, MAX_PICTURE_BYTES, decode, limits, on_white, png, square};
use crate::report::PictureReject;

/// Most seconds of a video that are looked at.
const MAX_SECONDS: usize = 120;
/// Most frames of an animation that are decoded.
const MAX_FRAMES: usize = 10_000;
/// How long a frame stands that says it does not: what browsers take for 10 ms and less.
const SHORTEST: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(100));

/// Reads media of one folder.
pub(super) struct MediaReader {
    folder: Folder,
    size: u32,
    fit: Fit,
    n_frames: usize,
}

impl MediaReader {
    /// For media of the list `input`.
    pub(super) fn open(input: &Path, options: &Options) -> Result<Self, Error> {
        let beside = match input.is_dir() {
            true => input,
            false => input.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")),
        };
        let folder = Folder::open(options.media.as_deref().unwrap_or(beside))?;
        let n_frames = options.frames.clamp(1, MAX_SECONDS);
        Ok(Self { folder, size: options.image_size, fit: options.fit, n_frames })
    }

    /// PNG squares: one for a picture, `n_frames` for a video.
    pub(super) fn read(
        &self,
        media: &Media,
        rng: &mut impl Rng,
    ) -> Result<Vec<Vec<u8>>, PictureReject> {
        match media {
            Media::Picture(path) => Ok(vec![png(&self.picture(path)?)]),
            Media::Video(path) => {
                let seconds = self.seconds(&self.bytes(path)?).ok_or(PictureReject::Broken)?;
                self.clip(seconds.len(), rng, |second| Ok(seconds[second].clone()))
            }
            Media::Either(path) => match self.seconds(&self.bytes(path)?) {
                Some(seconds) => {
                    self.clip(seconds.len(), rng, |second| Ok(seconds[second].clone()))
                }
                None => Ok(vec![png(&self.picture(path)?)]),
            },
            Media::Frames { paths, per_second } => {
                let n_seconds = paths.len().div_ceil(*per_second);
                self.clip(n_seconds, rng, |second| self.picture(&paths[second * per_second]))
            }
        }
    }

    /// `n_frames` seconds from a random one on; the last one again where there are too few.
    fn clip(
        &self,
        n_seconds: usize,
        rng: &mut impl Rng,
        at: impl Fn(usize) -> Result<RgbImage, PictureReject>,
    ) -> Result<Vec<Vec<u8>>, PictureReject> {
        let last = n_seconds.checked_sub(1).ok_or(PictureReject::Broken)?;
        let start = rng.random_range(0..=n_seconds.saturating_sub(self.n_frames));
        let frames = (start..start + self.n_frames).map(|second| Ok(png(&at(second.min(last))?)));
        frames.collect()
    }

    fn bytes(&self, path: &Path) -> Result<Vec<u8>, PictureReject> {
        self.folder.read(path, MAX_PICTURE_BYTES).ok_or(PictureReject::Missing)
    }

    fn picture(&self, path: &Path) -> Result<RgbImage, PictureReject> {
        let picture = decode(&self.bytes(path)?).ok_or(PictureReject::Broken)?;
        Ok(square(&picture, self.size, self.fit))
    }

    /// Squares of what an animation shows at 0 s, 1 s, …; `None` if it is none or is broken.
    fn seconds(&self, bytes: &[u8]) -> Option<Vec<RgbImage>> {
        let (mut seconds, mut until, mut n_frames) = (Vec::new(), Duration::ZERO, 0);
        for frame in animation(bytes)?.take(MAX_FRAMES) {
            let frame = frame.ok()?;
            let delay = Duration::from(frame.delay());
            until += if delay <= SHORTEST.0 { SHORTEST.1 } else { delay };
            n_frames += 1;
            let n_shown =
                usize::try_from(until.as_nanos().div_ceil(1_000_000_000)).ok()?.min(MAX_SECONDS);
            if n_shown > seconds.len() {
                let shown = on_white(DynamicImage::ImageRgba8(frame.into_buffer()));
                seconds.resize(n_shown, square(&shown, self.size, self.fit));
            }
            if seconds.len() == MAX_SECONDS {
                break;
            }
        }
        (n_frames > 1).then_some(seconds)
    }
}

/// Frames of a GIF, an animated WebP or an APNG.
fn animation(bytes: &[u8]) -> Option<Frames<'_>> {
    let bytes = Cursor::new(bytes);
    match image::guess_format(bytes.get_ref()).ok()? {
        ImageFormat::Gif => {
            let mut decoder = GifDecoder::new(bytes).ok()?;
            decoder.set_limits(limits()).ok()?;
            Some(decoder.into_frames())
        }
        ImageFormat::WebP => {
            let mut decoder = WebPDecoder::new(bytes).ok()?;
            decoder.set_limits(limits()).ok()?;
            decoder.has_animation().then(|| decoder.into_frames())
        }
        ImageFormat::Png => {
            let decoder = PngDecoder::with_limits(bytes, limits()).ok()?;
            // The decoder has no answer to animations with 16 bits a channel.
            let is_16_bit =
                decoder.color_type().bytes_per_pixel() > decoder.color_type().channel_count();
            let is_moving = decoder.is_apng().ok()? && !is_16_bit;
            is_moving.then(|| Some(decoder.apng().ok()?.into_frames()))?
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use image::codecs::gif::GifEncoder;
    use image::{Delay, Frame, Rgba, RgbaImage};
    use proptest::prelude::*;
    use rand::SeedableRng;

    use super::super::Options;
    use super::super::list::Media;
    use super::MediaReader;
    use crate::picture::{decode, png};
    use crate::report::PictureReject;

    /// A GIF whose frame `i` is the grey `20 · i`, standing for that many ms.
    fn gif(delays: &[u32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = GifEncoder::new(&mut bytes);
        for (grey, delay) in (0_u8..).step_by(20).zip(delays) {
            let picture = RgbaImage::from_pixel(9, 6, Rgba([grey, grey, grey, 255]));
            let frame = Frame::from_parts(picture, 0, 0, Delay::from_numer_denom_ms(*delay, 1));
            encoder.encode_frame(frame).unwrap();
        }
        drop(encoder);
        bytes
    }

    fn read(
        files: &[(&str, &[u8])],
        media: &Media,
        n_frames: usize,
        seed: u64,
    ) -> Result<Vec<u8>, PictureReject> {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        let options = Options { image_size: 4, frames: n_frames, ..Options::default() };
        let reader = MediaReader::open(folder.path(), &options).unwrap();
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let frames = reader.read(media, &mut rng)?;
        Ok(frames.iter().map(|png| decode(png).unwrap().get_pixel(1, 1).0[0]).collect())
    }

    #[test]
    fn frames_are_those_shown_each_second() {
        // Shown at 0 s: 0; at 1 s, the end of the second frame's 600 ms: 20; at 2 s and 3 s: 60.
        let film = gif(&[600, 600, 500, 2000]);
        let video = Media::Video("f.gif".into());
        assert_eq!(read(&[("f.gif", &film)], &video, 4, 0), Ok(vec![0, 20, 60, 60]));
        assert_eq!(read(&[("f.gif", &film)], &video, 6, 0), Ok(vec![0, 20, 60, 60, 60, 60]));
        assert_eq!(read(&[("f.gif", &film)], &Media::Picture("f.gif".into()), 4, 0), Ok(vec![0]));
        assert_eq!(
            read(&[("f.gif", &film)], &Media::Either("f.gif".into()), 4, 0),
            Ok(vec![0, 20, 60, 60])
        );
        assert_eq!(
            read(&[("f.gif", &gif(&[100]))], &Media::Either("f.gif".into()), 4, 0),
            Ok(vec![0])
        );
        assert_eq!(read(&[("f.gif", &film[..60])], &video, 4, 0), Err(PictureReject::Broken));
        assert_eq!(read(&[], &video, 4, 0), Err(PictureReject::Missing));
    }

    #[test]
    fn a_long_video_begins_anywhere() {
        let film = gif(&[1000; 6]);
        let starts =
            (0..60).map(|seed| read(&[("f.gif", &film)], &Media::Video("f.gif".into()), 4, seed));
        let starts: std::collections::BTreeSet<Vec<u8>> = starts.map(Result::unwrap).collect();
        assert_eq!(Vec::from_iter(starts), [[0, 20, 40, 60], [20, 40, 60, 80], [40, 60, 80, 100]]);
    }

    #[test]
    fn files_of_frames_at_their_rate() {
        let picture = |grey| png(&image::RgbImage::from_pixel(5, 5, image::Rgb([grey; 3])));
        let pictures = [0, 1, 2, 3, 4].map(picture);
        let names = ["0", "1", "2", "3", "4"];
        let files: Vec<(&str, &[u8])> =
            names.into_iter().zip(pictures.iter().map(|png| &png[..])).collect();
        let media =
            |per_second| Media::Frames { paths: names.map(Into::into).to_vec(), per_second };
        assert_eq!(read(&files, &media(2), 4, 0), Ok(vec![0, 2, 4, 4]));
        assert_eq!(read(&files, &media(1), 5, 0), Ok(vec![0, 1, 2, 3, 4]));
        assert_eq!(read(&files[1..], &media(1), 5, 0), Err(PictureReject::Missing));
        let none = Media::Frames { paths: Vec::new(), per_second: 1 };
        assert_eq!(read(&files, &none, 5, 0), Err(PictureReject::Broken));
    }

    proptest! {
        #[test]
        fn a_damaged_animation_never_panics(place: usize, byte: u8, end: usize) {
            let mut film = gif(&[100, 1000]);
            let len = film.len();
            film[place % len] = byte;
            film.truncate(end % (len + 1));
            let _ = read(&[("f.gif", &film)], &Media::Either("f.gif".into()), 2, 0);
        }
    }
}
