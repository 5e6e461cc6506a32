//! Web pages → sequences of text and pictures → sampled windows (the paper's M3W).
//!
//! A page becomes one text with `<EOC><image>` at the place of each picture and `<EOC>` at its end. A
//! sample is a window of L tokens with the first N pictures in it. What is refused is counted, page by page
//! and picture by picture, and stops nothing.

#![deny(clippy::as_conversions)]

mod document;
pub mod filter;
pub mod html;
pub mod pictures;
mod warc;
pub mod window;

use std::path::{Path, PathBuf};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use self::document::{Document, Fetch};
use self::filter::TextFilter;
use self::html::Piece;
use self::pictures::{PictureFilter, UnsafeScorer};
use crate::picture::Fit;
use crate::report::{PageReject, PictureReject};
use crate::vocabulary::{EOC, IMAGE, Vocabulary};
use crate::{Error, Progress, Report, Sample, ShardWriter};

/// How pages become samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Side of the pictures in samples, in pixels.
    pub image_size: u32,
    /// How a picture becomes a square.
    pub fit: Fit,
    /// L, tokens of a window.
    pub window: usize,
    /// N, most pictures of a window.
    pub max_images: usize,
    /// Probability that φ of a page points to the next picture.
    pub next: f64,
    /// Fewest words of a page.
    pub min_words: usize,
    /// Seed of windows and coins.
    pub seed: u64,
    /// Samples of a shard.
    pub shard_size: u64,
}

impl Default for Options {
    /// The paper's.
    fn default() -> Self {
        Self {
            image_size: 320,
            fit: Fit::Crop,
            window: 256,
            max_images: 5,
            next: 0.5,
            min_words: 50,
            seed: 0,
            shard_size: 1000,
        }
    }
}

/// Reads the pages of files, folders and archives and writes a sample of each that is kept, and
/// `stats.json`, into `folder`.
///
/// # Errors
/// An input that is not there or is no page, or a shard that cannot be written. A bad page is neither.
pub fn build(
    inputs: &[PathBuf],
    folder: &Path,
    vocabulary: &Vocabulary,
    options: &Options,
    scorer: Option<Box<dyn UnsafeScorer>>,
    progress: &mut dyn Progress,
) -> Result<Report, Error> {
    let mut report = Report::new(scorer.as_ref().map_or("off", |scorer| scorer.name()));
    let mut shards = ShardWriter::create(folder, options.shard_size)?;
    let mut builder = Builder {
        vocabulary,
        options,
        texts: TextFilter::new(options.min_words),
        pictures: PictureFilter::new(options.image_size, options.fit, scorer),
    };
    for input in inputs {
        document::visit(input, &mut |document, fetch| {
            let sample = document.and_then(|document| builder.sample(document, fetch, &mut report));
            report.pages.add(sample.as_ref().err().map(|reason| reason.name()));
            if let Ok(sample) = sample {
                report.count(&sample);
                shards.push(&sample)?;
            }
            progress.advance(report.pages.read, report.samples);
            Ok(())
        })?;
    }
    report.finish(shards)
}

struct Builder<'a> {
    vocabulary: &'a Vocabulary,
    options: &'a Options,
    texts: TextFilter,
    pictures: PictureFilter,
}

impl Builder<'_> {
    fn sample(
        &mut self,
        document: Document,
        fetch: &mut dyn Fetch,
        report: &mut Report,
    ) -> Result<Sample, PageReject> {
        let content = html::read(&document.html).ok_or(PageReject::Unreadable)?;
        let identity = self.texts.check(&content.text())?;
        let base = content.base.and_then(|base| document.base.join(&base).ok());
        let base = base.unwrap_or(document.base);
        let mut page = Page::default();
        for piece in &content.pieces {
            match piece {
                Piece::Text(text) => page.add_text(&self.vocabulary.clean(text)),
                Piece::Picture(addresses) => {
                    let bytes =
                        addresses.iter().filter_map(|a| document::bytes_at(a, &base, fetch));
                    let picture = self.picture(bytes);
                    report.pictures.add(picture.as_ref().err().map(|reason| reason.name()));
                    page.add_picture(picture.ok());
                }
            }
        }
        let sample = self.window(page, identity, document.source)?;
        self.texts.keep(identity);
        Ok(sample)
    }

    /// The first of the candidates that can be decoded.
    fn picture(
        &mut self,
        candidates: impl Iterator<Item = Vec<u8>>,
    ) -> Result<Vec<u8>, PictureReject> {
        let mut result = Err(PictureReject::Missing);
        for bytes in candidates {
            result = self.pictures.check(&bytes);
            if result != Err(PictureReject::Broken) {
                break;
            }
        }
        result
    }

    fn window(
        &self,
        page: Page,
        identity: blake3::Hash,
        source: String,
    ) -> Result<Sample, PageReject> {
        if page.pictures.is_empty() {
            return Err(PageReject::NoPictures);
        }
        let options = self.options;
        let ids = self.vocabulary.ids_from_text(&page.sequence());
        let ids = ids.map_err(|_| PageReject::Untokenised)?;
        let mut rng = page_rng(options.seed, identity);
        let next = rng.random_bool(options.next.clamp(0.0, 1.0));
        let (length, max_images) = (options.window, options.max_images);
        let window = window::draw(&ids, self.vocabulary.image, length, max_images, &mut rng);
        let window = window.ok_or(PageReject::NoPictures)?;
        let text = &ids[window.tokens];
        let pictures = page.pictures[window.pictures].to_vec();
        Ok(Sample::new(text, length, self.vocabulary, next, 1, pictures, source))
    }
}

/// Chance that depends on the seed and the text only, not on the pages before or where a page lies.
fn page_rng(seed: u64, identity: blake3::Hash) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(identity.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// A page as a sequence: text form and kept pictures.
#[derive(Default)]
struct Page {
    text: String,
    pictures: Vec<Vec<u8>>,
}

impl Page {
    fn add_text(&mut self, text: &str) {
        // Where a picture was refused two texts meet.
        if !self.text.is_empty() && !self.text.ends_with(IMAGE) {
            self.text.push('\n');
        }
        self.text.push_str(text);
    }

    fn add_picture(&mut self, picture: Option<Vec<u8>>) {
        if let Some(picture) = picture {
            self.text.push_str(EOC);
            self.text.push_str(IMAGE);
            self.pictures.push(picture);
        }
    }

    fn sequence(&self) -> String {
        format!("{}{EOC}", self.text)
    }
}
