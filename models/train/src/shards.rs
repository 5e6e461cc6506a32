//! A data set that is read from shards: samples as prompts, a batch at a time. Which samples a turn has, and where
//! the words of each look, depends on the turn alone.

use anyhow::{Context as _, Result, bail, ensure};
use flamingo_data::phi::media_indices;
use flamingo_data::picture::{Fit, pixels};
use flamingo_data::{Place, Sample, Shards};
use flamingo_scenes::episode::Token;
use flamingo_scenes::random::stream;
use flamingo_scenes::words::{BEGIN, IMAGE, PAD, vocabulary};
use rand::Rng as _;

use crate::batch::Prompt;
use crate::parallel;
use crate::recipe::{DataSet, Recipe};

/// A prompt and its pictures.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown {
    /// The prompt.
    pub prompt: Prompt,
    /// Frames of all media, medium after medium, `[side, side, 3]` bytes each.
    pub frames: Vec<Vec<u8>>,
}

/// The shards of a data set.
pub struct ShardStream<'a> {
    recipe: &'a Recipe,
    data: &'a DataSet,
    n_words: usize,
    shards: Shards,
}

impl<'a> ShardStream<'a> {
    /// The streams of a recipe's data sets, nothing for those that are generated.
    ///
    /// # Errors
    /// Shards that cannot be read, or hold no samples.
    pub fn open_all(recipe: &'a Recipe) -> Result<Vec<Option<Self>>> {
        let open = |data: &'a DataSet| match data.shards.is_empty() {
            true => Ok(None),
            false => ShardStream::open(recipe, data).map(Some),
        };
        recipe.flamingo.data.iter().map(open).collect()
    }

    /// Opens the shards of one data set.
    ///
    /// # Errors
    /// Shards that cannot be read, or hold no samples.
    pub fn open(recipe: &'a Recipe, data: &'a DataSet) -> Result<Self> {
        let paths: Vec<_> = data.shards.iter().map(|path| recipe.folder.join(path)).collect();
        let shards = Shards::open(&paths).with_context(|| format!("data set `{}`", data.name))?;
        Ok(ShardStream { recipe, data, n_words: vocabulary().len(), shards })
    }

    /// The samples of a turn: `turn · batch` to `(turn + 1) · batch`, and round again after the last sample.
    ///
    /// # Errors
    /// A sample that cannot be read or used, with its shard and key.
    pub fn turn(&mut self, turn: usize, threads: usize) -> Result<Vec<Shown>> {
        let batch = self.data.batch;
        let read = (turn * batch..(turn + 1) * batch).map(|number| {
            let (place, sample) = self.shards.read(number)?;
            Ok((number, place, sample))
        });
        let read: Vec<(usize, Place, Sample)> = read.collect::<Result<_>>()?;
        let shown = parallel::map(read.len(), threads, |index| {
            let (number, place, sample) = &read[index];
            self.shown(*number, sample).with_context(|| place.to_string())
        });
        shown.into_iter().collect()
    }

    fn shown(&self, number: usize, sample: &Sample) -> Result<Shown> {
        let text = &sample.text[..sample.text_len];
        self.check(sample, text)?;
        let tokens: Vec<Token> =
            text.iter().zip(0..).map(|(id, index)| token(sample, *id, index)).collect();
        // The first token is never a target.
        let counts = tokens.iter().skip(1).any(|token| token.weight > 0.0);
        ensure!(counts, "no text that counts: nothing can be learned from it");
        let side = self.recipe.vision.image_size as u32;
        let frame = |(index, bytes): (usize, &Vec<u8>)| {
            let pixels = pixels(bytes, side, Fit::Crop);
            pixels
                .with_context(|| format!("picture {index}: not a picture, or one over the limits"))
        };
        let frames = sample.pictures.iter().enumerate().map(frame).collect::<Result<_>>()?;
        let n_frames = vec![sample.n_frames; sample.pictures.len() / sample.n_frames];
        let phi = self.phi(number, sample, text);
        Ok(Shown { prompt: Prompt { tokens, phi, n_frames }, frames })
    }

    /// That the models of the recipe can take it.
    fn check(&self, sample: &Sample, text: &[u32]) -> Result<()> {
        if let Some(id) = text.iter().find(|id| **id as usize >= self.n_words) {
            bail!(
                "token {id}: the language model has {} words\n\n\
                 hint: build the shards with the `tokenizer.json` of a trained model or of `data scenes`",
                self.n_words
            );
        }
        let (n_tokens, most) = (text.len(), self.recipe.language.max_tokens);
        ensure!(n_tokens <= most, "{n_tokens} tokens: `language.max_tokens` is {most}");
        let (n_frames, most) = (sample.n_frames, self.recipe.resampler.max_frames);
        ensure!(
            n_frames <= most,
            "media of {n_frames} frames: the resampler has embeddings for {most}\n\n\
             hint: build the shards with `--frames {most}`, or raise `resampler.max_frames`"
        );
        let n_images = text.iter().filter(|id| **id == IMAGE).count();
        let n_media = sample.pictures.len() / n_frames;
        ensure!(n_images == n_media, "{n_images} `<image>` in the text, and {n_media} media");
        Ok(())
    }

    /// φ as the coin has it; that of the sample for videos, and where the data set has no coin.
    fn phi(&self, number: usize, sample: &Sample, text: &[u32]) -> Vec<u32> {
        let shift = self.data.shift.unwrap_or(DataSet::SHIFT);
        if sample.n_frames > 1 || shift == 0.0 {
            return sample.phi[..text.len()].to_vec();
        }
        let purpose = format!("flamingo/{}/shift/{number}", self.data.name);
        let next = stream(self.recipe.seed, &purpose).random_bool(shift);
        media_indices(text, IMAGE, next)
    }
}

/// A token with its weight: the sample's, or 1 for words and 0 for what no words are.
fn token(sample: &Sample, id: u32, index: usize) -> Token {
    let weight = match &sample.weights {
        Some(weights) => weights[index],
        None => f32::from(u8::from(![PAD, BEGIN, IMAGE].contains(&id))),
    };
    Token { id, weight }
}
