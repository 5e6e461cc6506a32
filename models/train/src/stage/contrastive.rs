//! Stage 1: pictures against captions (CLIP's loss: picture → text and text → picture), and regions of
//! pictures against the words for what is there, so that patches know their own objects.

use anyhow::Result;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use flamingo_scenes::Split;
use flamingo_scenes::draw::{Medium, Region, draw};
use flamingo_scenes::facts::Facts;
use flamingo_scenes::words::{PAD, Vocabulary};

use super::{Losses, Stage, in_pieces};
use crate::batch::{UNSEEN, floats};
use crate::model::text::TextEncoder;
use crate::model::vision::Vision;
use crate::optimiser::{Gradients, Rule};
use crate::recipe::{Contrastive, Recipe, Schedule};
use crate::weights::Weights;
use flamingo_scenes::random::stream;

/// ln of 1 / temperature.
pub const LOGIT_SCALE: &str = "logit_scale";
/// 1 / temperature is cut here, as in CLIP.
const MAX_SCALE: f32 = 100.0;

/// The stage.
pub struct ContrastiveStage<'a> {
    seed: u64,
    threads: usize,
    vision: &'a Vision,
    text: &'a TextEncoder,
    options: &'a Contrastive,
    vocabulary: Vocabulary,
}

impl<'a> ContrastiveStage<'a> {
    /// The stage of a recipe.
    pub fn new(recipe: &'a Recipe, threads: usize) -> Self {
        ContrastiveStage {
            seed: recipe.seed,
            threads,
            vision: &recipe.vision,
            text: &recipe.text,
            options: &recipe.contrastive,
            vocabulary: Vocabulary::default(),
        }
    }

    /// Random weights of both encoders and the temperature.
    pub fn start(&self) -> Weights {
        let mut rng = stream(self.seed, "start/contrastive");
        let mut weights = self.vision.start(&mut rng);
        let joint = self.vision.joint_width;
        weights.extend(self.text.start(self.vocabulary.size(), joint, &mut rng));
        weights.insert(LOGIT_SCALE, &[1], vec![self.options.start_scale.ln()]);
        weights
    }

    fn examples(&self, step: usize, piece: usize) -> Vec<(Facts, Medium)> {
        let mut rng = stream(self.seed, &format!("contrastive/{step}/{piece}"));
        let count = self.options.batch / self.options.schedule.pieces;
        let mut facts: Vec<Facts> = Vec::with_capacity(count);
        while facts.len() < count {
            let mut next = Facts::picture(Split::Train, &mut rng);
            for _ in 0..self.options.variations.min(count - facts.len()) {
                facts.push(next);
                next = next.varied(Split::Train, &mut rng);
            }
        }
        facts.into_iter().map(|facts| (facts, draw(facts, Split::Train, &mut rng))).collect()
    }

    fn loss(&self, w: &Weights, examples: &[(Facts, Medium)]) -> Tensor<1> {
        let (n, patches) = (examples.len(), self.vision.n_patches());
        let pixels = self.vision.patches(examples.iter().map(|(_, m)| m.frames[0].as_slice()));
        let pixels = Tensor::from_inner(floats(pixels, [n, patches, self.vision.patch_width()]));
        let features = self.vision.forward(w, pixels);
        let mean = floats(vec![1.0 / patches as f32; n * patches], [n, 1, patches]);
        let pooled = self.vision.pooled(w, features.clone(), Tensor::from_inner(mean));
        let captions: Vec<Vec<&str>> = examples.iter().map(|(facts, _)| facts.caption()).collect();
        let whole = self.compare(w, pooled, &captions);
        if self.options.region_weight == 0.0 {
            return whole;
        }
        let regions: Vec<(usize, Region)> = examples
            .iter()
            .enumerate()
            .flat_map(|(index, (_, medium))| medium.regions.iter().map(move |r| (index, *r)))
            .collect();
        whole + self.regions(w, features, &regions) * self.options.region_weight
    }

    fn regions(&self, w: &Weights, features: Tensor<3>, regions: &[(usize, Region)]) -> Tensor<1> {
        let (count, patches) = (regions.len(), self.vision.n_patches());
        let pictures = regions.iter().map(|(index, _)| *index as i32).collect();
        let pictures: Tensor<1, Int> =
            Tensor::from_data(TensorData::new::<i32, _>(pictures, [count]), &Device::flex());
        let pooling = regions.iter().flat_map(|(_, region)| self.inside(region)).collect();
        let pooling = Tensor::from_inner(floats(pooling, [count, 1, patches]));
        let own = features.select(0, Tensor::from_inner(pictures));
        let words: Vec<Vec<&str>> = regions
            .iter()
            .map(|(_, region)| vec![region.object.colour(), region.object.kind()])
            .collect();
        self.compare(w, self.vision.pooled(w, own, pooling), &words)
    }

    /// Equal weights, summing to 1, on the patches whose centres lie in a region; the nearest if none does.
    fn inside(&self, region: &Region) -> Vec<f32> {
        let (patch, grid) =
            (self.vision.patch_size as f32, self.vision.image_size / self.vision.patch_size);
        let distance = |index: usize| {
            let centre = |i: usize| (i as f32 + 0.5) * patch;
            let x = (centre(index % grid) - region.centre.0).abs();
            x.max((centre(index / grid) - region.centre.1).abs())
        };
        let nearest = (0..grid * grid).map(distance).fold(f32::INFINITY, f32::min);
        let reach = region.half.max(nearest);
        let inside: Vec<bool> = (0..grid * grid).map(|index| distance(index) <= reach).collect();
        let count = inside.iter().filter(|inside| **inside).count() as f32;
        inside.into_iter().map(|inside| if inside { 1.0 / count } else { 0.0 }).collect()
    }

    /// CLIP's loss of pooled features `[n, joint]` and their texts; other rows with the same text do not count
    /// as wrong.
    fn compare(&self, w: &Weights, pooled: Tensor<2>, texts: &[Vec<&str>]) -> Tensor<1> {
        let n = texts.len();
        let scale = w.get(LOGIT_SCALE).clamp_max(MAX_SCALE.ln()).exp();
        let (pictures, words) = (unit(pooled), unit(self.encode(w, texts)));
        let same = (0..n * n).map(|i| {
            let (row, column) = (i / n, i % n);
            if row != column && texts[row] == texts[column] { UNSEEN } else { 0.0 }
        });
        let same = Tensor::from_inner(matrix(same.collect(), [n, n]));
        let scores = pictures.matmul(words.transpose()) * scale + same;
        let both = log_softmax(scores.clone(), 1) + log_softmax(scores, 0);
        let diagonal = Tensor::from_inner(Tensor::<2>::eye(n, &Device::flex()));
        (both * diagonal).sum() * (-0.5 / n as f64)
    }

    fn encode(&self, w: &Weights, texts: &[Vec<&str>]) -> Tensor<2> {
        let (n, tokens) = (texts.len(), texts.iter().map(Vec::len).max().unwrap_or(1));
        let (mut ids, mut mask) = (vec![PAD as i32; n * tokens], vec![UNSEEN; n * tokens]);
        let mut pooling = vec![0.0; n * tokens];
        for (row, text) in texts.iter().enumerate() {
            for (i, word) in text.iter().enumerate() {
                ids[row * tokens + i] = self.vocabulary.id(word) as i32;
                mask[row * tokens + i] = 0.0;
                pooling[row * tokens + i] = 1.0 / text.len() as f32;
            }
        }
        let ids: Tensor<2, Int> =
            Tensor::from_data(TensorData::new(ids, [n, tokens]), &Device::flex());
        let mask = Tensor::from_inner(floats(mask, [n, 1, tokens])).unsqueeze_dim::<4>(1);
        let pooling = Tensor::from_inner(floats(pooling, [n, 1, tokens]));
        self.text.forward(w, Tensor::from_inner(ids), mask, pooling)
    }
}

impl Stage for ContrastiveStage<'_> {
    fn name(&self) -> &'static str {
        "contrastive"
    }

    fn schedule(&self) -> &Schedule {
        &self.options.schedule
    }

    fn rule(&self, _step: usize, name: &str) -> Rule {
        self.options.schedule.rule(name)
    }

    fn step(&mut self, step: usize, weights: &Weights) -> Result<(Losses, Gradients)> {
        let pieces = self.options.schedule.pieces;
        let trained = |name: &str| weights.contains(name);
        let (loss, gradients) = in_pieces(pieces, self.threads, weights, &trained, |piece, w| {
            self.loss(w, &self.examples(step, piece)) / pieces as f64
        });
        Ok((vec![("loss".into(), loss)], gradients))
    }
}

/// Rows of length 1.
fn unit(x: Tensor<2>) -> Tensor<2> {
    let length = (x.clone().square().sum_dim(1) + 1e-8).sqrt();
    x / length
}

fn matrix(values: Vec<f32>, shape: [usize; 2]) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}
