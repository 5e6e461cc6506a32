//! Stage 2: next-token training of the language model on text; it is frozen afterwards.

use anyhow::Result;
use flamingo_scenes::Split;
use flamingo_scenes::episode::{Episode, Style};
use flamingo_scenes::words::Vocabulary;
use rand::Rng as _;

use super::{Losses, Stage, in_pieces};
use crate::batch::Batch;
use crate::model::language::Language;
use crate::optimiser::{Gradients, Rule};
use crate::recipe::{LanguageTraining, Recipe, Schedule, random_task};
use crate::weights::Weights;
use flamingo_scenes::random::stream;

/// The stage.
pub struct LanguageStage<'a> {
    seed: u64,
    threads: usize,
    language: &'a Language,
    options: &'a LanguageTraining,
    vocabulary: Vocabulary,
}

impl<'a> LanguageStage<'a> {
    /// The stage of a recipe.
    pub fn new(recipe: &'a Recipe, threads: usize) -> Self {
        LanguageStage {
            seed: recipe.seed,
            threads,
            language: &recipe.language,
            options: &recipe.language_training,
            vocabulary: Vocabulary::default(),
        }
    }

    /// Random weights.
    pub fn start(&self) -> Weights {
        let mut rng = stream(self.seed, "start/language");
        self.language.start(self.vocabulary.size(), &mut rng)
    }

    fn episodes(&self, step: usize) -> Result<Vec<Episode>> {
        let mut rng = stream(self.seed, &format!("language/{step}"));
        let mut episode = || {
            let task = random_task(&self.options.tasks, &mut rng)?;
            let described = rng.random_bool(self.options.described);
            let style = Style { split: Split::Train, dense: true, described };
            Ok(Episode::random(task, style, &self.vocabulary, &mut rng))
        };
        (0..self.options.batch).map(|_| episode()).collect()
    }
}

impl Stage for LanguageStage<'_> {
    fn name(&self) -> &'static str {
        "language"
    }

    fn schedule(&self) -> &Schedule {
        &self.options.schedule
    }

    fn rule(&self, _step: usize, name: &str) -> Rule {
        self.options.schedule.rule(name)
    }

    fn step(&mut self, step: usize, weights: &Weights) -> Result<(Losses, Gradients)> {
        let other = self.options.other_words;
        let episodes = self.episodes(step)?;
        let length = |episode: &Episode| episode.tokens.len();
        let pieces = by_length(episodes, length, self.options.schedule.pieces);
        let batches: Vec<Batch> =
            pieces.iter().map(|p| Batch::new(p, |weight| other + weight)).collect();
        let total: f64 = batches.iter().map(Batch::total_weight).sum();
        let trained = |name: &str| name.starts_with("model.") && !name.contains("gated");
        let own = weights.filtered(trained);
        let (loss, gradients) =
            in_pieces(batches.len(), self.threads, &own, &trained, |piece, w| {
                let batch = &batches[piece];
                batch.loss(self.language.forward(w, batch.ids(), None)) / total
            });
        Ok((vec![("loss".into(), loss)], gradients))
    }
}

/// Prompts of like length together, so that little is padding. Pieces hold about equally many tokens.
pub(crate) fn by_length<T>(
    mut prompts: Vec<T>,
    length: impl Fn(&T) -> usize,
    pieces: usize,
) -> Vec<Vec<T>> {
    prompts.sort_by_key(&length);
    let total: usize = prompts.iter().map(&length).sum();
    let mut out: Vec<Vec<T>> = (0..pieces.max(1)).map(|_| Vec::new()).collect();
    let mut taken = 0;
    for prompt in prompts {
        let piece = taken * out.len() / total.max(1);
        taken += length(&prompt);
        out[piece].push(prompt);
    }
    out.retain(|piece| !piece.is_empty());
    out
}
