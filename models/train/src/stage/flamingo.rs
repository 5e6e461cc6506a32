//! Stage 3: vision encoder and language model frozen; Perceiver Resampler, gated blocks and the row of
//! `<eoc>` learn. Loss: Σ λ_m · −log p over the data sets, whose gradients are summed in every step.

use std::sync::Arc;

use anyhow::{Result, bail};
use burn::tensor::{Tensor, TensorData};
use flamingo_scenes::Split;
use flamingo_scenes::episode::{Episode, Style, Task};
use flamingo_scenes::words::{END_OF_CHUNK, Vocabulary};
use rand::Rng as _;

use super::language::by_length;
use super::{Losses, Stage, in_pieces};
use crate::batch::{Batch, MediaOptions};
use crate::model::language::EMBEDDING;
use crate::optimiser::{Gradients, Rule, accumulate};
use crate::parallel;
use crate::pictures::{Painting, Pictures, encode};
use crate::recipe::{DataSet, FlamingoTraining, Recipe, Schedule, random_task};
use crate::shards::{ShardStream, Shown};
use crate::weights::Weights;
use flamingo_scenes::random::stream;

/// The stage.
pub struct FlamingoStage<'a> {
    recipe: &'a Recipe,
    threads: usize,
    vision: &'a Weights,
    pictures: Pictures<'a>,
    streams: Vec<Option<ShardStream<'a>>>,
    vocabulary: Vocabulary,
}

type Features = Vec<Arc<[f32]>>;

/// Prompts of like length, and the features of their media.
type Piece = (Batch, Features);

impl<'a> FlamingoStage<'a> {
    /// The stage of a recipe, over a trained vision encoder and the streams of its data sets.
    pub fn new(
        recipe: &'a Recipe,
        vision: &'a Weights,
        streams: Vec<Option<ShardStream<'a>>>,
        threads: usize,
    ) -> Self {
        let split = Split::Train;
        FlamingoStage {
            recipe,
            threads,
            vision,
            pictures: Pictures::new(&recipe.vision, vision, recipe.seed, split, threads),
            streams,
            vocabulary: Vocabulary::default(),
        }
    }

    /// Random weights of the resampler and the gated blocks.
    pub fn start(recipe: &Recipe) -> Weights {
        let mut rng = stream(recipe.seed, "start/flamingo");
        let (language, vision) = (&recipe.language, recipe.vision.width);
        let mut weights = recipe.resampler.start(vision, &mut rng);
        weights.extend(recipe.gated.start(language.layers, language.width, vision, &mut rng));
        weights
    }

    fn options(&self) -> &'a FlamingoTraining {
        &self.recipe.flamingo
    }

    fn episodes(&self, data: &DataSet, step: usize) -> Result<Vec<Episode>> {
        let mut rng = stream(self.recipe.seed, &format!("flamingo/{}/{step}", data.name));
        let style = Style { split: Split::Train, dense: true, described: false };
        let mut episode = || {
            let task = random_task(&data.tasks, &mut rng)?;
            Ok(Episode::random(task, style, &self.vocabulary, &mut rng))
        };
        (0..data.batch).map(|_| episode()).collect()
    }

    /// Generated prompts of a data set in a step.
    fn generated(&mut self, data: &DataSet, step: usize) -> Result<Vec<Piece>> {
        let length = |episode: &Episode| episode.tokens.len();
        let episodes = self.episodes(data, step)?;
        let pieces = by_length(episodes, length, self.options().schedule.pieces);
        let purpose = format!("flamingo/{}/{step}/paintings", data.name);
        let mut rng = stream(self.recipe.seed, &purpose);
        let mut piece = |episodes: Vec<Episode>| {
            let media = episodes.iter().flat_map(|episode| &episode.media);
            let paintings: Vec<Painting> = media
                .map(|facts| {
                    let number = rng.random_range(0..self.recipe.flamingo.paintings as u64);
                    Painting { facts: *facts, number }
                })
                .collect();
            (Batch::new(&episodes, |weight| weight), self.pictures.features(&paintings))
        };
        Ok(pieces.into_iter().map(&mut piece).collect())
    }

    /// Prompts of a data set that is read from shards, in its `turn`.
    fn streamed(&mut self, index: usize, turn: usize) -> Result<Vec<Piece>> {
        let Some(stream) = &mut self.streams[index] else {
            bail!("data set `{}`: its shards are not open", self.recipe.flamingo.data[index].name)
        };
        let shown = stream.turn(turn, self.threads)?;
        let length = |shown: &Shown| shown.prompt.tokens.len();
        let pieces = by_length(shown, length, self.options().schedule.pieces);
        Ok(pieces.into_iter().map(|piece| self.encoded(piece)).collect())
    }

    fn encoded(&self, shown: Vec<Shown>) -> Piece {
        let vision = &self.recipe.vision;
        let (mut prompts, mut frames) = (Vec::new(), Vec::new());
        for one in shown {
            prompts.push(one.prompt);
            frames.extend(one.frames);
        }
        let values = encode(vision, self.vision, &frames, self.threads);
        let mut rest = values.as_slice();
        let take = |n_frames: &usize| {
            let (own, later) = rest.split_at(n_frames * vision.n_patches() * vision.width);
            rest = later;
            own.into()
        };
        let features = prompts.iter().flat_map(|prompt| &prompt.n_frames).map(take).collect();
        (Batch::of(&prompts, |weight| weight), features)
    }

    /// The loss of one data set and its gradients. `turn` counts the steps that the data set had before.
    fn data_set(
        &mut self,
        index: usize,
        step: usize,
        turn: usize,
        weights: &Weights,
    ) -> Result<(f64, Gradients)> {
        let data = &self.options().data[index];
        let pieces = match data.shards.is_empty() {
            true => self.generated(data, step)?,
            false => self.streamed(index, turn)?,
        };
        let total: f64 = pieces.iter().map(|(batch, _)| batch.total_weight()).sum();
        let own = weights.filtered(is_run);
        let options = media_options(self.recipe, false);
        let (loss, mut gradients) =
            in_pieces(pieces.len(), self.threads, &own, &is_trained, |piece, w| {
                let (batch, features) = &pieces[piece];
                batch.loss(logits(self.recipe, w, batch, features, &options)) / total
            });
        if let Some(gradient) = gradients.remove(EMBEDDING) {
            gradients.insert(EMBEDDING.into(), only_end_of_chunk(gradient));
        }
        Ok((loss, gradients))
    }
}

/// How a recipe shows media.
pub fn media_options(recipe: &Recipe, blind: bool) -> MediaOptions {
    let only_last_image = recipe.flamingo.only_last_image;
    MediaOptions { width: recipe.vision.width, only_last_image, blind }
}

/// Logits `[rows, tokens, vocabulary]` of prompts, given the features of their media.
pub fn logits(
    recipe: &Recipe,
    w: &Weights,
    batch: &Batch,
    features: &[Arc<[f32]>],
    options: &MediaOptions,
) -> Tensor<3> {
    let media = batch.media(w, &recipe.resampler, features, options);
    recipe.language.forward(w, batch.ids(), Some((&recipe.gated, &media)))
}

/// Weights that stage 3 runs.
fn is_run(name: &str) -> bool {
    name.starts_with("model.") || name.starts_with("perceiver.")
}

/// Weights that stage 3 trains; of the embedding, one row.
fn is_trained(name: &str) -> bool {
    name.contains("gated_cross_attn_layer") || name.starts_with("perceiver.") || name == EMBEDDING
}

/// The layer of the language model before which the block of a weight stands.
fn gated_layer(name: &str) -> Option<usize> {
    let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    part.starts_with("gated_cross_attn_layer.").then(|| layer.parse().ok())?
}

/// Zero for all rows but that of `<eoc>`.
fn only_end_of_chunk(gradient: Tensor<2>) -> Tensor<2> {
    let rows = gradient.dims()[0];
    let keep: Vec<f32> =
        (0..rows).map(|row| f32::from(u8::from(row == END_OF_CHUNK as usize))).collect();
    let keep = Tensor::<2>::from_data(TensorData::new(keep, [rows, 1]), &gradient.device());
    gradient * keep
}

impl Stage for FlamingoStage<'_> {
    fn name(&self) -> &'static str {
        "flamingo"
    }

    fn schedule(&self) -> &Schedule {
        &self.options().schedule
    }

    fn rule(&self, step: usize, name: &str) -> Rule {
        let is_gate = name.ends_with("_gate");
        let is_bridge = name.starts_with("perceiver.") || name == EMBEDDING;
        let decays = !(is_gate || is_bridge);
        let waits = gated_layer(name).is_some_and(|layer| {
            self.recipe.gated.index(layer) * self.options().steps_per_block > step
        });
        let rate = if is_gate { self.options().gate_rate } else { 1.0 };
        let rule = self.options().schedule.rule(name);
        Rule {
            rate: if waits { 0.0 } else { rate },
            decay: if decays { rule.decay } else { 0.0 },
            ..rule
        }
    }

    fn step(&mut self, step: usize, weights: &Weights) -> Result<(Losses, Gradients)> {
        let (mut losses, mut sum) = (Losses::new(), Gradients::new());
        let sets = &self.options().data;
        for (index, data) in sets.iter().enumerate() {
            let turn = match self.options().accumulate {
                true => step,
                false if step % sets.len() == index => step / sets.len(),
                false => continue,
            };
            let (loss, gradients) = self.data_set(index, step, turn, weights)?;
            accumulate(&mut sum, gradients, data.weight);
            losses.push((data.name.clone(), loss));
        }
        let total = losses.iter().map(|(name, loss)| {
            loss * sets.iter().filter(|set| set.name == *name).map(|set| set.weight).sum::<f64>()
        });
        let total = total.sum();
        losses.insert(0, ("loss".into(), total));
        Ok((losses, sum))
    }
}

/// Tasks that are measured during and after training.
pub const MEASURED: [Task; 18] = [
    Task::Caption,
    Task::Attribute,
    Task::Count,
    Task::Pair,
    Task::YesNo,
    Task::Video,
    Task::Which(2),
    Task::Which(4),
    Task::FewShot(0),
    Task::FewShot(2),
    Task::FewShot(8),
    Task::FewShot(32),
    Task::Bind(2),
    Task::Bind(4),
    Task::Alike(8),
    Task::Alike(32),
    Task::Captions(3),
    Task::Questions(3),
];

/// Share of prompts of the test split of which every answer is right, token by token, given the right tokens
/// before it. `described` asks the language model alone, in text.
pub fn accuracy(
    recipe: &Recipe,
    weights: &Weights,
    task: Task,
    count: usize,
    how: How,
    threads: usize,
) -> f64 {
    let vocabulary = Vocabulary::default();
    let mut rng = stream(recipe.seed, &format!("accuracy/{task:?}/{:?}", how.split));
    let described = how.described;
    let style = Style { split: how.split, dense: false, described };
    let episodes: Vec<Episode> =
        (0..count).map(|_| Episode::random(task, style, &vocabulary, &mut rng)).collect();
    let pieces: Vec<&[Episode]> = episodes.chunks(16).collect();
    let vision = weights.filtered(|name| !is_run(name));
    let mut pictures = Pictures::new(&recipe.vision, &vision, recipe.seed ^ 1, how.split, threads);
    let features: Vec<Features> = pieces
        .iter()
        .map(|piece| match described {
            true => Vec::new(),
            false => {
                let facts = piece.iter().flat_map(|episode| &episode.media);
                let paintings: Vec<Painting> =
                    facts.map(|facts| Painting { facts: *facts, number: rng.random() }).collect();
                pictures.features(&paintings)
            }
        })
        .collect();
    let own = weights.filtered(is_run);
    let right = parallel::map(pieces.len(), threads, |piece| {
        let (w, batch) = (own.tracked(|_| false), Batch::new(pieces[piece], |weight| weight));
        let logits = match described {
            true => recipe.language.forward(&w, batch.ids(), None),
            false => {
                let options = media_options(recipe, how.blind);
                logits(recipe, &w, &batch, &features[piece], &options)
            }
        };
        batch.all_right(logits, 0.9).into_iter().filter(|right| *right).count()
    });
    right.into_iter().sum::<usize>() as f64 / count as f64
}

/// How accuracy is measured.
#[derive(Debug, Clone, Copy)]
pub struct How {
    /// Which pictures.
    pub split: Split,
    /// With visual tokens of zeros.
    pub blind: bool,
    /// In words instead of pictures.
    pub described: bool,
}

impl How {
    /// Test pictures.
    pub const SEES: How = How { split: Split::Test, blind: false, described: false };
    /// Visual tokens of zeros.
    pub const BLIND: How = How { blind: true, ..How::SEES };
    /// Descriptions instead of pictures.
    pub const READS: How = How { described: true, ..How::SEES };
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn blocks_begin_one_after_the_other_and_only_the_bridge_is_not_decayed() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tiny.toml");
        let mut recipe = Recipe::read(&path).unwrap();
        recipe.flamingo.steps_per_block = 10;
        let (vision, gate) = (Weights::default(), recipe.flamingo.gate_rate);
        let stage = FlamingoStage::new(&recipe, &vision, Vec::new(), 1);
        let block = |layer, part| format!("model.layers.{layer}.gated_cross_attn_layer.{part}");
        let rate = |step, name: &str| stage.rule(step, name).rate;
        assert_eq!(rate(0, &block(0, "attn_gate")), gate);
        assert_eq!(rate(9, &block(1, "attn_gate")), 0.0);
        assert_eq!(rate(9, &block(1, "attn.to_q.weight")), 0.0);
        assert_eq!(rate(10, &block(1, "attn.to_q.weight")), 1.0);
        assert_eq!(rate(0, "perceiver.latents"), 1.0);
        let decay = |name: &str| stage.rule(50, name).decay;
        assert_eq!(decay(&block(0, "attn.to_q.weight")), 0.1);
        for name in ["perceiver.latents", EMBEDDING, &block(0, "ff_gate"), &block(0, "ff.0.weight")]
        {
            assert_eq!(decay(name), 0.0, "{name}");
        }
    }
}
