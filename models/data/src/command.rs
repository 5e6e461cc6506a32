//! The commands that build data, for a program to nest: `data pages`, `data pairs`.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use crate::picture::Fit;
use crate::vocabulary::Vocabulary;
use crate::{Error, Report, pages, pairs};

/// Hears how far the work is.
pub trait Progress {
    /// So many pages or pairs were read and so many samples written.
    fn advance(&mut self, n_read: u64, n_samples: u64);
}

/// Hears nothing.
impl Progress for () {
    fn advance(&mut self, _: u64, _: u64) {}
}

/// Build training data
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Make interleaved samples of web pages
    Pages(PagesArgs),
    /// Make samples of pictures or videos with a text each
    Pairs(PairsArgs),
}

impl DataCommand {
    /// Does it. The result, a table or JSON, goes to `output`.
    ///
    /// # Errors
    /// Those of [`pages::build`] and [`pairs::build`]; a tokenizer without the markers; `output` closed.
    pub fn run(self, output: &mut dyn Write, progress: &mut dyn Progress) -> Result<(), Error> {
        let (report, writing) = match self {
            Self::Pages(args) => (args.build(progress)?, args.common.writing),
            Self::Pairs(args) => (args.build(progress)?, args.common.writing),
        };
        writing.print(&report, output)
    }
}

/// How samples are written and counted, the same for all commands.
#[derive(Debug, Args)]
pub struct WritingArgs {
    /// Seed of all chance
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Samples in a shard
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    pub shard_size: u64,
    /// Print the counts as JSON
    #[arg(long)]
    pub json: bool,
}

impl WritingArgs {
    /// Writes the counts, a table or JSON, to `output`.
    ///
    /// # Errors
    /// `output` is closed.
    pub fn print(&self, report: &Report, output: &mut dyn Write) -> Result<(), Error> {
        let text = if self.json { report.json() } else { report.table() };
        writeln!(output, "{text}").map_err(Error::file(Path::new("output")))
    }
}

/// What all commands take.
#[derive(Debug, Args)]
pub struct CommonArgs {
    /// Folder for the shards and `stats.json`
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Tokenizer with `<image>` and `<|endofchunk|>`, `<eoc>` or `<EOC>`
    #[arg(long, value_name = "TOKENIZER.json")]
    tokenizer: PathBuf,
    /// Side of the pictures in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 320, value_parser = clap::value_parser!(u32).range(1..=4096))]
    image_size: u32,
    /// How a picture becomes a square
    #[arg(long, value_enum, default_value_t = Fit::Crop)]
    fit: Fit,
    #[command(flatten)]
    writing: WritingArgs,
}

/// Arguments of `data pages`.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  flamingo-train data pages crawl/ --tokenizer tokenizer.json -o shards/")]
pub struct PagesArgs {
    /// HTML files, folders of them, or web archives (.warc, .warc.gz)
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// Tokens of a sample
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = length)]
    window: usize,
    /// Most pictures of a sample
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = length)]
    max_images: usize,
    /// Probability that a page's tokens look at the next picture, not the last one
    #[arg(long, value_name = "P", default_value_t = 0.5, value_parser = probability)]
    next: f64,
    /// Fewest words of a page
    #[arg(long, value_name = "N", default_value_t = 50)]
    min_words: usize,
    #[command(flatten)]
    common: CommonArgs,
}

impl PagesArgs {
    fn build(&self, progress: &mut dyn Progress) -> Result<Report, Error> {
        let common = &self.common;
        let options = pages::Options {
            image_size: common.image_size,
            fit: common.fit,
            window: self.window,
            max_images: self.max_images,
            next: self.next,
            min_words: self.min_words,
            seed: common.writing.seed,
            shard_size: common.writing.shard_size,
        };
        let vocabulary = Vocabulary::open(&common.tokenizer)?;
        pages::build(&self.inputs, &common.out, &vocabulary, &options, None, progress)
    }
}

/// Arguments of `data pairs`.
#[derive(Debug, Args)]
#[command(after_help = "A line of a list:
  {\"text\": \"A boat\", \"image\": \"boat.jpg\"}
  {\"text\": \"It sails\", \"video\": \"boat.gif\"}
  {\"text\": \"It sails\", \"frames\": [\"1.jpg\", \"2.jpg\"], \"fps\": 1}

Example:
  flamingo-train data pairs captions_train2017.json --media train2017 --tokenizer tokenizer.json -o shards/")]
pub struct PairsArgs {
    /// Lists (.jsonl, COCO captions in .json) or folders with NAME.txt beside NAME.png or NAME/
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// Folder of the media [default: where the list lies]
    #[arg(long, value_name = "DIR")]
    media: Option<PathBuf>,
    /// Tokens of a sample
    #[arg(long, value_name = "TOKENS", default_value_t = 32, value_parser = length)]
    length: usize,
    /// Frames of a video, one a second
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = length)]
    frames: usize,
    /// Probability of a space before the text
    #[arg(long, value_name = "P", default_value_t = 0.5, value_parser = probability)]
    space: f64,
    #[command(flatten)]
    common: CommonArgs,
}

impl PairsArgs {
    fn build(&self, progress: &mut dyn Progress) -> Result<Report, Error> {
        let common = &self.common;
        let options = pairs::Options {
            media: self.media.clone(),
            image_size: common.image_size,
            fit: common.fit,
            length: self.length,
            frames: self.frames,
            space: self.space,
            seed: common.writing.seed,
            shard_size: common.writing.shard_size,
        };
        let vocabulary = Vocabulary::open(&common.tokenizer)?;
        pairs::build(&self.inputs, &common.out, &vocabulary, &options, progress)
    }
}

fn length(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 1..=65_536) => Ok(number),
        _ => Err("expected a number from 1 to 65536".to_owned()),
    }
}

fn probability(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (0.0..=1.0).contains(&number) => Ok(number),
        _ => Err("expected a number from 0 to 1".to_owned()),
    }
}
