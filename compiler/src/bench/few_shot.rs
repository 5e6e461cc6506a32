//! A question after few-shot examples: all of it in the prompt with nothing known before, and with the examples in a bank
//! that was used before. Every question shows a picture that no cache has seen.

use std::path::{Path, PathBuf};
use std::{fs, io};

use flamingo_runtime::image::{ImageError, Picture};
use flamingo_runtime::visual_cache::{VisualCache, VisualCacheOptions};
use flamingo_runtime::{
    Answer, Bank, GenerateOptions, Model, OpenOptions, PromptFile, RunError, Segment, Selection,
    Shots,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

use super::stages::{Case, Stage, timed};
use super::{BenchError, FewShotOptions};

/// Examples, a bank of them, and what is needed to ask after them.
pub(super) struct FewShot {
    /// The bank, and pictures of questions.
    folder: TempDir,
    /// Keeps nothing.
    cold: Model,
    /// Keeps what it has read.
    warm: Model,
    shots: Shots,
    /// The same examples, to stand in a prompt.
    examples: Vec<Segment>,
    /// The first example's picture, to make others of.
    picture: Picture,
    /// The text after it.
    text: Segment,
}

/// Questions, each with a picture of its own.
struct Questions<'a> {
    few_shot: &'a FewShot,
    path: PathBuf,
    n_asked: u64,
}

impl FewShot {
    /// Makes a bank of the file's examples in a temporary folder.
    pub(super) fn new(
        artifact: &Path,
        opening: &OpenOptions,
        options: &FewShotOptions,
    ) -> Result<FewShot, BenchError> {
        let opening = OpenOptions { visual_cache: None, verify: false, ..opening.clone() };
        let nothing = Some(VisualCache::new(&VisualCacheOptions::off()).into());
        let cold = OpenOptions { visual_cache: nothing, prefix_bytes: Some(0), ..opening.clone() };
        let open = |opening: &OpenOptions| Model::open(artifact, opening);
        let (cold, warm) = (open(&cold)?, open(&opening)?);
        let folder = tempfile::tempdir().map_err(|error| wrong(options, error))?;
        let dir = folder.path().join("bank");
        // By a model of its own: one that compares pictures keeps what its encoder sees in them.
        Bank::build(&open(&opening)?, &options.examples, &dir, false, &mut |_, _| {})?;
        let bank = Bank::open(&dir, &warm)?;
        let n = options.shots.unwrap_or(bank.len());
        let shots = bank.choose(n, Selection::Fixed, &PromptFile::default())?;
        let lines = read(&options.examples).map_err(|error| wrong(options, error))?;
        let (picture, text) = question(&lines).ok_or_else(|| {
            wrong(options, "expected a picture with text after it in the first example")
        })?;
        let picture =
            flamingo_runtime::image::open(picture).map_err(RunError::from)?.to_rgb().into_owned();
        let examples = lines.iter().take(n).flatten().cloned().collect();
        Ok(FewShot { folder, cold, warm, shots, examples, picture, text })
    }

    /// Both cases: nothing known, and the examples in a bank.
    pub(super) fn cases(&self) -> Result<[Case<'_>; 2], BenchError> {
        let mut segments = self.examples.clone();
        segments.extend(self.questions("length").segments());
        let whole = PromptFile { segments, ..PromptFile::default() };
        let (images, context) = (whole.media().count(), self.cold.encode_prompt(&whole)?.len());
        let (mut cold, mut warm) = (self.questions("cold"), self.questions("warm"));
        let inline = move || {
            let mut segments = self.examples.clone();
            segments.extend(cold.next()?);
            let prompt = PromptFile { segments, ..PromptFile::default() };
            timed(|| first_token(&self.cold, &Shots::default(), &prompt))
        };
        let banked = move || {
            let prompt = PromptFile { segments: warm.next()?, ..PromptFile::default() };
            timed(|| first_token(&self.warm, &self.shots, &prompt))
        };
        Ok([
            Case::new(Stage::FewShot, images, context, Box::new(inline)),
            Case::new(Stage::FewShotBank, images, context, Box::new(banked)),
        ])
    }

    fn questions(&self, name: &str) -> Questions<'_> {
        let path = self.folder.path().join(name).with_extension("png");
        Questions { few_shot: self, path, n_asked: 0 }
    }
}

impl Questions<'_> {
    fn segments(&self) -> Vec<Segment> {
        vec![Segment::Image { image: self.path.clone() }, self.few_shot.text.clone()]
    }

    /// The next question: the picture with noise of its own.
    fn next(&mut self) -> Result<Vec<Segment>, RunError> {
        self.n_asked += 1;
        let picture = &self.few_shot.picture;
        let mut noise = ChaCha8Rng::seed_from_u64(self.n_asked);
        let noisy = |value: &u8| value ^ noise.random_range(0..8);
        let pixels: Vec<u8> = picture.pixels().iter().map(noisy).collect();
        let side = |side: usize| u32::try_from(side).unwrap_or(u32::MAX);
        let (width, height) = (side(picture.width()), side(picture.height()));
        let saved = image::save_buffer(&self.path, &pixels, width, height, image::ColorType::Rgb8);
        saved.map_err(|error| ImageError::Read(io::Error::other(error)))?;
        Ok(self.segments())
    }
}

/// The time to this token is what counts: it is the only one.
fn first_token(model: &Model, shots: &Shots, prompt: &PromptFile) -> Result<Answer, RunError> {
    let options = GenerateOptions { max_new_tokens: 1, ..GenerateOptions::default() };
    model.generate_after(shots, prompt, &options, &mut |_| {})
}

/// The segments of each line, with paths that can be opened.
fn read(path: &Path) -> Result<Vec<Vec<Segment>>, String> {
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let example = |line: &str| {
        let mut example = PromptFile::from_json(line)?;
        example.resolve(folder);
        Ok(example.segments)
    };
    text.lines().filter(|line| !line.trim().is_empty()).map(example).collect()
}

/// The first picture of the first example, and the text after it.
fn question(examples: &[Vec<Segment>]) -> Option<(&Path, Segment)> {
    let mut segments = examples.first()?.iter();
    let picture = segments.find_map(|segment| match segment {
        Segment::Image { image } => Some(image.as_path()),
        _ => None,
    })?;
    let text = segments.find(|segment| matches!(segment, Segment::Text { .. }))?;
    Some((picture, text.clone()))
}

fn wrong(options: &FewShotOptions, reason: impl ToString) -> BenchError {
    BenchError::Examples { path: options.examples.clone(), reason: reason.to_string() }
}
