//! Media of rows: files, members of shards, or painted pictures.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use flamingo_runtime::image::{self, MAX_BYTES, Mode, Picture, preprocess};
use flamingo_runtime::{Model, PromptFile, Segment, VideoFiles};

/// A picture or a video.
#[derive(Clone, Debug, PartialEq)]
pub enum MediaSource {
    /// A picture file.
    File(PathBuf),
    /// A file with several frames.
    Video(PathBuf),
    /// Frames as picture files.
    Frames(Vec<PathBuf>),
    /// A picture inside a tar file.
    Member {
        /// The tar file.
        shard: PathBuf,
        /// Where it begins.
        place: u64,
        /// Its bytes.
        len: u64,
    },
    /// Painted frames, `[side, side, 3]` each.
    Painted {
        /// Side of a frame in pixels.
        side: usize,
        /// Frames.
        frames: Vec<Vec<u8>>,
    },
}

impl MediaSource {
    /// What tells it from others: where it lies, or a hash of what is painted.
    pub fn identity(&self) -> String {
        match self {
            MediaSource::Painted { frames, .. } => {
                let mut hasher = blake3::Hasher::new();
                for frame in frames {
                    hasher.update(frame);
                }
                hasher.finalize().to_hex().to_string()
            }
            source => format!("{source:?}"),
        }
    }

    /// Why it cannot be there, without reading it.
    pub(super) fn problem(&self) -> Option<String> {
        let missing = |path: &Path| !path.is_file();
        let is_missing = match self {
            MediaSource::File(path) | MediaSource::Video(path) => missing(path),
            MediaSource::Frames(paths) => {
                paths.is_empty() || paths.iter().any(|path| missing(path))
            }
            MediaSource::Member { .. } | MediaSource::Painted { .. } => false,
        };
        is_missing.then(|| "a picture that is not there".to_owned())
    }

    /// Pixel values `[n_frames, 3, size, size]` as a model takes them, and the number of frames.
    ///
    /// # Errors
    /// A picture that cannot be decoded.
    pub fn pixel_values(&self, model: &Model) -> Result<(Vec<f32>, usize)> {
        if let MediaSource::Video(path) = self {
            let video = VideoFiles::File(path.clone());
            let segments = vec![Segment::Video { video, fps: None, frames: None }];
            let values = model.pixel_values(&PromptFile { segments, ..PromptFile::default() })?;
            return values.into_iter().next().context("a prompt with one medium");
        }
        let pictures = self.pictures()?;
        let mut values = Vec::new();
        for picture in &pictures {
            values.extend(preprocess(picture, &model.manifest().image)?);
        }
        Ok((values, pictures.len()))
    }

    /// Its frames; of a video file the first.
    ///
    /// # Errors
    /// A picture that cannot be decoded.
    pub fn pictures(&self) -> Result<Vec<Picture>> {
        match self {
            MediaSource::File(path) | MediaSource::Video(path) => Ok(vec![image::open(path)?]),
            MediaSource::Frames(paths) => paths.iter().map(|path| Ok(image::open(path)?)).collect(),
            MediaSource::Member { shard, place, len } => {
                let bytes = member(shard, *place, *len)
                    .with_context(|| format!("`{}` at {place}", shard.display()))?;
                Ok(vec![image::decode(&bytes)?])
            }
            MediaSource::Painted { side, frames } => {
                let picture =
                    |frame: &Vec<u8>| Picture::new(*side, *side, Mode::Rgb, frame.clone());
                Ok(frames.iter().map(picture).collect::<Result<_, _>>()?)
            }
        }
    }
}

fn member(shard: &Path, place: u64, len: u64) -> Result<Vec<u8>> {
    let most = u64::try_from(MAX_BYTES)?;
    ensure!(len <= most, "expected a picture of at most {most} bytes, found {len}");
    let mut file = File::open(shard)?;
    file.seek(SeekFrom::Start(place))?;
    let mut bytes = Vec::new();
    file.take(len).read_to_end(&mut bytes)?;
    Ok(bytes)
}
