//! The plans of a model's graphs without its weights: what a device must hold and do, counted before there is a file
//! of weights, and without running anything.
#![forbid(unsafe_code)]

use std::sync::Arc;

use flamingo_ir::{Bindings, Graph};
use flamingo_kernels::KvFormat;

use super::plan::{CacheShape, Instruction, Plan, Role};
use super::work::Tally;
use super::{bindings, cut_at_tokens, encoder};
use crate::backend::{BackendError, Media};
use crate::contract::Contract;
use crate::profile::Work;

/// The stages of the native backend over graphs alone.
#[derive(Debug)]
pub struct Plans {
    /// Pixels → patches → visual tokens → keys and values, in as many parts as the backend runs.
    media: Vec<Plan>,
    decoder: Plan,
    /// Visual tokens of a picture, and their width.
    visual_tokens: [usize; 2],
}

/// Tokens of text that are read together; each sees one picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text {
    /// New tokens.
    pub len: usize,
    /// Tokens before them.
    pub past_len: usize,
}

impl Plans {
    /// Plans the two graphs of a model.
    ///
    /// # Errors
    /// Those of [`NativeBackend::new`](super::NativeBackend::new) that do not come from weights.
    pub fn new(media: &Graph, decoder: &Graph) -> Result<Plans, BackendError> {
        Contract::new(media, decoder)?;
        let [vision, media_kv] = cut_at_tokens(media)?;
        let vision = encoder::cut(&vision).map_or_else(|| vec![vision], Vec::from);
        let media: Vec<Plan> =
            vision.iter().chain([&media_kv]).map(Plan::new).collect::<Result<_, _>>()?;
        let mut visual_tokens = [0; 2];
        for plan in &media {
            let sizes = plan.evaluate(&picture())?;
            let outputs = plan.outputs.iter().filter(|(name, _)| name == "visual_tokens");
            outputs.for_each(|(_, view)| {
                visual_tokens = [view.rows, view.cols].map(|size| sizes.get(size));
            });
        }
        Ok(Plans { media, decoder: Plan::new(decoder)?, visual_tokens })
    }

    /// Bytes of the keys and values of one token of text.
    pub fn token_bytes(&self, format: KvFormat) -> usize {
        let bytes = |shape: &CacheShape| format.token_bytes(shape.n_kv_heads, shape.head_dim);
        self.decoder.caches.iter().map(bytes).fold(0, usize::saturating_add)
    }

    /// Bytes of what is kept of a picture: its visual tokens, and keys and values of every gated block.
    pub fn picture_bytes(&self, format: KvFormat) -> usize {
        let [n_latents, width] = self.visual_tokens;
        let heads = self.decoder.media_heads();
        let keys_values = |role: &Role| match role {
            Role::Media(media) if media.is_key => {
                let n_heads = heads.get(media.block).map_or(1, |n| (*n).max(1));
                format.rows_bytes(n_heads, media.width / n_heads, n_latents)
            }
            Role::Media(_) | Role::Numbers | Role::Indices | Role::PastK(_) | Role::PastV(_) => 0,
        };
        let tokens = n_latents.saturating_mul(width).saturating_mul(size_of::<f32>());
        let blocks = self.decoder.inputs.iter().map(|input| keys_values(&input.role));
        blocks.fold(tokens, usize::saturating_add)
    }

    /// Bytes of the buffers that encode a picture.
    ///
    /// # Errors
    /// If a size overflows.
    pub fn picture_buffer_bytes(&self) -> Result<usize, BackendError> {
        let one = picture();
        self.media.iter().try_fold(0usize, |total, plan| {
            Ok(total.saturating_add(plan.memory(&one)?.buffer_bytes))
        })
    }

    /// Bytes of the buffers that read text.
    ///
    /// # Errors
    /// If a size overflows.
    pub fn text_buffer_bytes(&self, text: Text) -> Result<usize, BackendError> {
        Ok(self.decoder.memory(&self.bindings(text))?.buffer_bytes)
    }

    /// What encoding a picture reads and computes, by node.
    ///
    /// # Errors
    /// If a size overflows.
    pub fn picture_work(&self) -> Result<Vec<(&str, Work)>, BackendError> {
        let parts = self.media.iter().map(|plan| self.work(plan, &picture(), None));
        Ok(parts.collect::<Result<Vec<_>, _>>()?.concat())
    }

    /// What reading text reads and computes, by node; the caches of keys and values are not counted.
    ///
    /// # Errors
    /// If a size overflows.
    pub fn text_work(&self, text: Text) -> Result<Vec<(&str, Work)>, BackendError> {
        self.work(&self.decoder, &self.bindings(text), Some(text))
    }

    fn bindings(&self, text: Text) -> Bindings {
        bindings([
            ("text_len", text.len),
            ("past_len", text.past_len),
            ("n_media", 1),
            ("n_latents", self.visual_tokens[0]),
            ("n_logits", 1),
        ])
    }

    fn work<'p>(
        &self,
        plan: &'p Plan,
        bindings: &Bindings,
        text: Option<Text>,
    ) -> Result<Vec<(&'p str, Work)>, BackendError> {
        let sizes = plan.evaluate(bindings)?;
        let Text { len, past_len } = text.unwrap_or(Text { len: 0, past_len: 0 });
        let medium = Media { n_latents: self.visual_tokens[0], ..Media::default() };
        let tally = Tally {
            plan,
            sizes: &sizes,
            media: &[Arc::new(medium)],
            media_time: &vec![1; len],
            n_scores: len.saturating_mul(past_len.saturating_add(len)),
        };
        let of = |instruction: &'p Instruction| {
            let shape = (sizes.get(instruction.rows), sizes.get(instruction.cols));
            (instruction.node.as_str(), tally.work(&instruction.action, shape))
        };
        Ok(plan.instructions.iter().map(of).collect())
    }
}

fn picture() -> Bindings {
    bindings([("n_media", 1), ("n_frames", 1)])
}
