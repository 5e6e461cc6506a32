//! Media of a prompt: files → pixel values → the cache, or the backend.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Model, RunError};
use crate::backend::Media;
use crate::bank::KeptMedium;
use crate::image;
use crate::prompt::{PromptFile, Segment, VideoFiles};
use crate::session::Medium;
use crate::video::{self, Decoder, Sampling};
use crate::visual_cache::{Found, MediaKey, VisualCache};

/// Pixels of one medium.
pub(crate) struct Pixels {
    /// [n_frames, 3, size, size].
    pub(crate) values: Vec<f32>,
    pub(crate) n_frames: usize,
}

impl Model {
    /// Where the model keeps visual tokens.
    pub fn visual_cache(&self) -> &VisualCache {
        &self.shared.visual_cache
    }

    /// What the user is to know of the caches' and the backend's troubles; each is told once.
    pub fn take_warnings(&self) -> Vec<String> {
        let mut warnings = self.backend().take_warnings();
        warnings.extend(self.visual_cache().take_warnings());
        warnings
    }

    /// Encodes the media of a prompt and keeps them in memory, as [`VisualCache::pin`] does: for
    /// examples that come back in every prompt.
    ///
    /// # Errors
    /// Pictures that cannot be read or encoded; those before stay pinned.
    pub fn pin_media(&self, prompt: &PromptFile) -> Result<Vec<MediaKey>, RunError> {
        let pin = |segment: &Segment| {
            let pixels = self.pixels(segment)?;
            let (medium, _) = self.medium(&pixels)?;
            let key = self.media_key(&pixels.values, pixels.n_frames);
            self.shared.visual_cache.pin(key, &medium.media);
            Ok(key)
        };
        prompt.media().map(pin).collect()
    }

    /// What tells pixel values `[n_frames, 3, size, size]`, normalised, from others, and this artifact and engine.
    pub fn media_key(&self, pixel_values: &[f32], n_frames: usize) -> MediaKey {
        MediaKey::new(&self.shared.fingerprint, pixel_values, n_frames)
    }

    /// Finds or encodes a medium of pixel values `[n_frames, 3, size, size]`, normalised.
    ///
    /// # Errors
    /// Sizes that do not fit the model.
    pub fn encode_medium(&self, pixel_values: &[f32], n_frames: usize) -> Result<Medium, RunError> {
        let pixels = Pixels { values: pixel_values.to_vec(), n_frames };
        Ok(self.medium(&pixels)?.0)
    }

    /// Finds pictures of pixel values `[3, size, size]`, normalised, or encodes them: all new ones in one call.
    ///
    /// # Errors
    /// Sizes that do not fit the model.
    pub fn encode_pictures(&self, pictures: &[Vec<f32>]) -> Result<Vec<Medium>, RunError> {
        let key = |values: &Vec<f32>| self.media_key(values, 1);
        let keys: Vec<MediaKey> = pictures.iter().map(key).collect();
        let (cache, backend) = (&self.shared.visual_cache, self.shared.backend.as_ref());
        let media = cache.pictures_with_keys(backend, &keys, pictures)?;
        let medium = |(media, key)| Medium { media, key: Some(key) };
        Ok(media.into_iter().zip(keys).map(medium).collect())
    }

    /// Pixel values `[n_frames, 3, size, size]` of each medium of a prompt, normalised, and its frames.
    ///
    /// # Errors
    /// Pictures that cannot be read.
    pub fn pixel_values(&self, prompt: &PromptFile) -> Result<Vec<(Vec<f32>, usize)>, RunError> {
        let of = |segment| self.pixels(segment).map(|pixels| (pixels.values, pixels.n_frames));
        prompt.media().map(of).collect()
    }

    /// Finds or encodes a medium; tells where it was found.
    pub(crate) fn medium(&self, pixels: &Pixels) -> Result<(Medium, Found), RunError> {
        let Pixels { values, n_frames } = pixels;
        let key = self.media_key(values, *n_frames);
        let backend = self.shared.backend.as_ref();
        let (media, found) =
            self.shared.visual_cache.medium_with_key(backend, key, values, *n_frames)?;
        Ok((Medium { media, key: Some(key) }, found))
    }

    /// A medium of a bank, and where it was found.
    pub(crate) fn kept_medium(&self, kept: &KeptMedium) -> Result<(Arc<Media>, Found), RunError> {
        let backend = self.shared.backend.as_ref();
        let tokens = || kept.tokens(backend.token_format()).map_err(RunError::from);
        self.shared.visual_cache.medium_from_tokens(backend, (kept.key, kept.n_frames), tokens)
    }

    /// The pixel values of a prompt's medium.
    pub(crate) fn pixels(&self, segment: &Segment) -> Result<Pixels, RunError> {
        let spec = &self.shared.manifest.image;
        match segment {
            Segment::Image { image } => {
                Ok(Pixels { values: image::load(image, spec)?, n_frames: 1 })
            }
            Segment::Video { video: VideoFiles::Frames(files), .. } => {
                let mut values = Vec::new();
                for file in files {
                    values.extend(image::load(file, spec)?);
                }
                let hint = "name at least one frame";
                match files.is_empty() {
                    false => Ok(Pixels { values, n_frames: files.len() }),
                    true => Err(RunError::Video {
                        path: PathBuf::new(),
                        reason: "a video without frames".into(),
                        hint,
                    }),
                }
            }
            Segment::Video { video: VideoFiles::File(file), fps, frames } => {
                self.video_pixels(file, fps.unwrap_or(1.0), frames.unwrap_or(8))
            }
            Segment::Text { .. } | Segment::EndOfChunk { .. } => {
                Ok(Pixels { values: Vec::new(), n_frames: 0 })
            }
        }
    }

    /// Frames of a file at `fps` frames a second, at most `max_frames`.
    fn video_pixels(&self, file: &Path, fps: f32, max_frames: usize) -> Result<Pixels, RunError> {
        let wrong = |reason: String, hint| RunError::Video { path: file.to_owned(), reason, hint };
        if !fps.is_finite() || fps <= 0.0 || max_frames == 0 {
            let reason = format!("expected `fps` and `frames` above 0, got {fps} and {max_frames}");
            return Err(wrong(reason, "leave them out for 1 frame a second and 8 frames"));
        }
        let mut values = Vec::new();
        // A file that cannot be opened is the error of `open_frames`.
        if let Ok(Some(container)) = video::container(file) {
            let sampling = Sampling { fps, max_frames };
            let on_frame = &mut |picture| {
                values.extend(image::preprocess(&picture, &self.shared.manifest.image)?);
                Ok::<(), RunError>(())
            };
            let n_frames = Decoder::default().frames(file, container, sampling, on_frame)?;
            return match n_frames {
                0 => Err(wrong("no frames".into(), "is there a picture in this file?")),
                _ => Ok(Pixels { values, n_frames }),
            };
        }
        let frames = image::open_frames(file)?;
        let (mut shown_until, mut due, mut n_frames) = (0.0f32, 0.0f32, 0usize);
        for frame in &frames {
            shown_until += frame.delay.as_secs_f32().max(1e-3);
            while due < shown_until && n_frames < max_frames {
                values.extend(image::preprocess(&frame.picture, &self.shared.manifest.image)?);
                n_frames += 1;
                due += 1.0 / fps;
            }
        }
        match n_frames {
            0 => Err(wrong("no frames".into(), "is this a picture? use an image segment")),
            _ => Ok(Pixels { values, n_frames }),
        }
    }
}
