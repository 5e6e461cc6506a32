//! The frozen vision encoder on its own: what it sees in a medium, as features to compare pictures by.

use std::sync::Arc;

use flamingo_ir::{Dim, Graph, Node};
use flamingo_kernels::Kernels;

use super::stage::{Buffers, NativeStage};
use super::{bindings, media_call};
use crate::backend::{BackendError, WeightBytes};

/// Pixels → patches of the frozen encoder.
#[derive(Debug)]
pub(super) struct Encoder {
    stage: NativeStage,
    /// Width of a patch.
    width: usize,
}

impl Encoder {
    /// Plans the media graph up to what time embeddings, or the merging of frames, read; `None` if it has neither.
    pub(super) fn new(
        media: &Graph,
        weights: &Arc<dyn WeightBytes>,
        kernels: &Arc<Kernels>,
    ) -> Option<Encoder> {
        let is_next = |node: &&Node| ["FrameEmbedding", "MergeFrames"].contains(&node.op.name());
        let patches = *media.nodes().iter().find(is_next)?.inputs.first()?;
        let width = media.fact(patches).shape.last().and_then(Dim::known)?;
        let pixels = media.inputs().iter().filter(|(name, _)| name == "pixel_values");
        let part = media.part(pixels.cloned().collect(), vec![("patches".into(), patches)]);
        let stage = NativeStage::new(&part.ok()?, Arc::clone(weights), Arc::clone(kernels));
        Some(Encoder { stage: stage.ok()?, width })
    }

    /// The mean patch of all frames, scaled to length 1, `[width]`.
    pub(super) fn features(
        &self,
        pixel_values: &[f32],
        n_frames: usize,
    ) -> Result<Vec<f32>, BackendError> {
        let bindings = bindings([("n_media", 1), ("n_frames", n_frames)]);
        let numbers = [("pixel_values", pixel_values)];
        let call = media_call(&bindings, &numbers);
        let outputs = self.stage.run(&call, &mut [], &mut Buffers::default())?;
        let patches = outputs.into_iter().next().unwrap_or_default();
        Ok(mean_direction(&patches, self.width))
    }
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
