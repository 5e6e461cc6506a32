//! Pairs of a picture or a short video with its text → samples `<BOS><image>text<EOC><EOS>`.
//!
//! A picture has T = 1; a video T frames, one a second, from a random second where it is longer; the last
//! frame stands where it is shorter. With probability `space` a space stands before the text, so that both
//! ways of tokenising its first word are learnt.

#![deny(clippy::as_conversions)]

mod list;
mod media;

use std::path::{Path, PathBuf};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use self::list::Pair;
use self::media::MediaReader;
use crate::picture::Fit;
use crate::report::PageReject;
use crate::vocabulary::{EOC, IMAGE, Vocabulary};
use crate::{Error, Progress, Report, Sample, ShardWriter};

/// How pairs become samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Folder that paths of media are relative to; where the list lies if none is given.
    pub media: Option<PathBuf>,
    /// Side of the pictures in samples, in pixels.
    pub image_size: u32,
    /// How a picture becomes a square.
    pub fit: Fit,
    /// L, tokens of a sample; longer texts are cut.
    pub length: usize,
    /// T, frames of a video.
    pub frames: usize,
    /// Probability of a space before the text.
    pub space: f64,
    /// Seed of spaces and of where videos begin.
    pub seed: u64,
    /// Samples of a shard.
    pub shard_size: u64,
}

impl Default for Options {
    /// The paper's.
    fn default() -> Self {
        Self {
            media: None,
            image_size: 320,
            fit: Fit::Crop,
            length: 32,
            frames: 8,
            space: 0.5,
            seed: 0,
            shard_size: 1000,
        }
    }
}

/// Reads lists of pairs, lines of JSON, captions of COCO, or a folder, and writes a sample of each pair, and
/// `stats.json`, into `folder`.
///
/// # Errors
/// An input that is not there or is no list, or a shard that cannot be written. A bad pair is neither.
pub fn build(
    inputs: &[PathBuf],
    folder: &Path,
    vocabulary: &Vocabulary,
    options: &Options,
    progress: &mut dyn Progress,
) -> Result<Report, Error> {
    let mut report = Report::new("off");
    let mut shards = ShardWriter::create(folder, options.shard_size)?;
    for input in inputs {
        let media = MediaReader::open(input, options)?;
        for pair in list::pairs(input)? {
            let sample =
                pair.and_then(|pair| sample(pair, &media, vocabulary, options, &mut report));
            report.pages.add(sample.as_ref().err().map(|reason| reason.name()));
            if let Ok(sample) = sample {
                report.count(&sample);
                shards.push(&sample)?;
            }
            progress.advance(report.pages.read, report.samples);
        }
    }
    report.finish(shards)
}

fn sample(
    pair: Pair,
    media: &MediaReader,
    vocabulary: &Vocabulary,
    options: &Options,
    report: &mut Report,
) -> Result<Sample, PageReject> {
    let text = vocabulary.clean(pair.text.trim());
    if text.trim().is_empty() {
        return Err(PageReject::Empty);
    }
    let mut rng = pair_rng(options.seed, &pair.source);
    let space = if rng.random_bool(options.space.clamp(0.0, 1.0)) { " " } else { "" };
    let pictures = media.read(&pair.media, &mut rng);
    report.pictures.add(pictures.as_ref().err().map(|reason| reason.name()));
    let pictures = pictures.map_err(|_| PageReject::NoPictures)?;
    let ids = vocabulary.ids_from_text(&format!("{IMAGE}{space}{text}{EOC}"));
    let ids = ids.map_err(|_| PageReject::Untokenised)?;
    let n_frames = pictures.len();
    Ok(Sample::new(&ids, options.length, vocabulary, false, n_frames, pictures, pair.source))
}

/// Chance that depends on the seed and the pair's place in its list only.
fn pair_rng(seed: u64, source: &str) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(source.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}
