//! The frozen vision encoder on its own, frame by frame: frames that clips share are encoded once, and what it sees in a
//! medium is what pictures are compared by.

use std::sync::{Arc, Mutex, PoisonError};

use flamingo_ir::{Dim, Graph, Node, ValueId};

use super::stage::{Buffers, NativeStage};
use super::{bindings, give_back, media_call, take};
use crate::backend::BackendError;
use crate::lru::Lru;

/// Most bytes of frames that are kept: some clips of 8 frames of a ViT-L.
const FRAME_BYTES: usize = 64 << 20;

/// Name of the patches between the two graphs of [`cut`].
const PATCHES: &str = "patches";

/// Cuts the graph pixels → visual tokens where the frozen encoder ends, which time embeddings or the merging of frames
/// tell: pixels → patches, patches → visual tokens. `None` if it has neither.
pub(super) fn cut(vision: &Graph) -> Option<[Graph; 2]> {
    let is_next = |node: &&Node| ["FrameEmbedding", "MergeFrames"].contains(&node.op.name());
    let patches: ValueId = *vision.nodes().iter().find(is_next)?.inputs.first()?;
    let patches = (PATCHES.to_owned(), patches);
    let pixels = vision.inputs().iter().filter(|(name, _)| name == "pixel_values");
    let encoder = vision.part(pixels.cloned().collect(), vec![patches.clone()]).ok()?;
    let inputs = vision.inputs().iter().cloned().chain([patches]).collect();
    let resampler = vision.part(inputs, vision.outputs().to_vec()).ok()?;
    Some([encoder, resampler])
}

/// Pixels → patches of the frozen encoder.
#[derive(Debug)]
pub(super) struct Encoder {
    stage: NativeStage,
    /// Width of a patch.
    width: usize,
    buffers: Mutex<Vec<Buffers>>,
    /// Patches of frames of clips, by the hash of their pixels.
    frames: Mutex<Lru<[u8; 32], Arc<Vec<f32>>>>,
}

impl Encoder {
    /// An encoder over the first graph of [`cut`], planned.
    pub(super) fn new(graph: &Graph, stage: NativeStage) -> Encoder {
        let output = graph.outputs().first();
        let width = output.and_then(|(_, id)| graph.fact(*id).shape.last().and_then(Dim::known));
        Encoder {
            stage,
            width: width.unwrap_or(0),
            buffers: Mutex::default(),
            frames: Mutex::new(Lru::new(FRAME_BYTES)),
        }
    }

    /// Its stage.
    pub(super) fn stage(&self) -> &NativeStage {
        &self.stage
    }

    /// Memory of its buffers and of the frames that it keeps, in bytes.
    pub(super) fn bytes(&self) -> usize {
        let buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.iter().map(Buffers::bytes).sum::<usize>() + frames.bytes()
    }

    /// Patches of a medium, `[n_frames, n_patches, width]`. Of a clip the frames are kept; a picture is not, since its
    /// visual tokens are.
    pub(super) fn patches(
        &self,
        pixel_values: &[f32],
        n_frames: usize,
    ) -> Result<Vec<f32>, BackendError> {
        if n_frames == 1 {
            return Ok(Arc::unwrap_or_clone(self.frame(pixel_values, false)?));
        }
        let mut patches = Vec::new();
        for frame in pixel_values.chunks_exact((pixel_values.len() / n_frames.max(1)).max(1)) {
            patches.extend_from_slice(&self.frame(frame, true)?);
        }
        Ok(patches)
    }

    /// Patches of a frame, found among those kept or encoded, and then kept or not.
    fn frame(&self, frame: &[f32], keeps: bool) -> Result<Arc<Vec<f32>>, BackendError> {
        let lock = || self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        if !keeps && lock().len() == 0 {
            return Ok(Arc::new(self.encode(frame)?));
        }
        let key = *blake3::hash(bytemuck::cast_slice(frame)).as_bytes();
        let known = lock().get(&key);
        if let Some(known) = known {
            return Ok(known);
        }
        let new = Arc::new(self.encode(frame)?);
        if keeps {
            lock().insert(key, Arc::clone(&new), size_of_val(new.as_slice()), false);
        }
        Ok(new)
    }

    fn encode(&self, frame: &[f32]) -> Result<Vec<f32>, BackendError> {
        let bindings = bindings([("n_media", 1), ("n_frames", 1)]);
        let numbers = [("pixel_values", frame)];
        let mut buffers = take(&self.buffers);
        let outputs = self.stage.run(&media_call(&bindings, &numbers), &mut [], &mut buffers);
        give_back(&self.buffers, buffers);
        Ok(outputs?.into_iter().next().unwrap_or_default())
    }

    /// The mean patch of all frames, scaled to length 1, `[width]`. What is compared is read next: a picture is kept too.
    pub(super) fn features(
        &self,
        pixel_values: &[f32],
        n_frames: usize,
    ) -> Result<Vec<f32>, BackendError> {
        if n_frames == 1 {
            return Ok(mean_direction(&self.frame(pixel_values, true)?, self.width));
        }
        Ok(mean_direction(&self.patches(pixel_values, n_frames)?, self.width))
    }
}

/// What the resampler's graph reads of a medium.
pub(super) fn resampler_inputs<'a>(
    patches: &'a [f32],
    frame_weights: &'a [f32],
) -> [(&'static str, &'a [f32]); 2] {
    [(PATCHES, patches), ("frame_weights", frame_weights)]
}

/// The mean of rows of this width, scaled to length 1.
fn mean_direction(rows: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0_f64; width];
    for row in rows.chunks_exact(width.max(1)) {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += f64::from(*value);
        }
    }
    let length = sums.iter().map(|sum| sum * sum).sum::<f64>().sqrt();
    let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
    sums.iter().map(|sum| (sum * scale) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_have_length_one() {
        assert_eq!(mean_direction(&[1.0, 2.0, 5.0, 6.0], 2), [0.6, 0.8]);
        assert_eq!(mean_direction(&[0.0; 4], 2), [0.0; 2]);
        assert!(mean_direction(&[], 0).is_empty());
    }
}
