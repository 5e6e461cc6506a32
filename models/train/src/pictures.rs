//! Features of media by the frozen vision encoder: each painting encoded once, pictures of shards when they come.

use std::collections::HashMap;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use flamingo_scenes::Split;
use flamingo_scenes::draw::draw;
use flamingo_scenes::facts::Facts;

use crate::model::vision::Vision;
use crate::parallel;
use crate::weights::Weights;
use flamingo_scenes::random::stream;

/// Pictures that one job encodes.
const CHUNK: usize = 32;

/// One painting of some facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Painting {
    /// What it shows.
    pub facts: Facts,
    /// Which of several paintings of the same facts.
    pub number: u64,
}

/// Features of paintings that were asked for.
pub struct Pictures<'a> {
    vision: &'a Vision,
    weights: &'a Weights,
    seed: u64,
    threads: usize,
    split: Split,
    known: HashMap<Painting, Arc<[f32]>>,
}

impl<'a> Pictures<'a> {
    /// Nothing encoded yet.
    pub fn new(
        vision: &'a Vision,
        weights: &'a Weights,
        seed: u64,
        split: Split,
        threads: usize,
    ) -> Self {
        Pictures { vision, weights, seed, threads, split, known: HashMap::new() }
    }

    /// Features of paintings, `[frames × patches, width]` each, in order.
    pub fn features(&mut self, paintings: &[Painting]) -> Vec<Arc<[f32]>> {
        let mut missing: Vec<Painting> = Vec::new();
        for painting in paintings {
            if !self.known.contains_key(painting) && !missing.contains(painting) {
                missing.push(*painting);
            }
        }
        let chunks: Vec<&[Painting]> = missing.chunks(CHUNK).collect();
        let made = parallel::map(chunks.len(), self.threads, |i| self.encode(chunks[i]));
        self.known.extend(made.into_iter().flatten());
        paintings.iter().map(|painting| Arc::clone(&self.known[painting])).collect()
    }

    /// The frames of a painting, `[side, side, 3]` bytes each.
    pub fn frames(&self, painting: &Painting) -> Vec<Vec<u8>> {
        let purpose = format!("painting/{:?}/{}", painting.facts, painting.number);
        draw(painting.facts, self.split, &mut stream(self.seed, &purpose)).frames
    }

    fn encode(&self, paintings: &[Painting]) -> Vec<(Painting, Arc<[f32]>)> {
        let frames: Vec<Vec<u8>> = paintings.iter().flat_map(|p| self.frames(p)).collect();
        let values = features(self.vision, self.weights, &frames);
        let frame = self.vision.n_patches() * self.vision.width;
        let mut rest = values.as_slice();
        let take = |painting: &Painting| {
            let (own, later) = rest.split_at(painting.facts.n_frames() * frame);
            rest = later;
            (*painting, own.into())
        };
        paintings.iter().map(take).collect()
    }
}

/// Features of frames of `[side, side, 3]` bytes each, `[frames × patches × width]`, on threads and without keeping
/// any.
pub fn encode(vision: &Vision, w: &Weights, frames: &[Vec<u8>], threads: usize) -> Vec<f32> {
    let chunks: Vec<&[Vec<u8>]> = frames.chunks(CHUNK).collect();
    parallel::map(chunks.len(), threads, |i| features(vision, w, chunks[i])).concat()
}

/// Features of frames, all at once.
fn features(vision: &Vision, w: &Weights, frames: &[Vec<u8>]) -> Vec<f32> {
    let patches = vision.patches(frames.iter().map(Vec::as_slice));
    let shape = [frames.len(), vision.n_patches(), vision.patch_width()];
    let patches = Tensor::from_data(TensorData::new(patches, shape), &Device::flex());
    let features = vision.forward(w, patches).into_data();
    features.try_into_vec().expect("features are f32")
}
