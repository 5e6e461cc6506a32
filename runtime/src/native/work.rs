//! What an instruction of a plan reads and computes, counted from its views and the sizes of the
//! call.
#![forbid(unsafe_code)]

use std::sync::Arc;

use flamingo_kernels::PanelFormat;

use super::execute::stretches;
use super::plan::{Action, MediaInput, Plan, Source, View, WeightOperand};
use super::size::Sizes;
use crate::backend::Media;
use crate::profile::{Arithmetic, Work};

/// What the counts of a call depend on.
#[derive(Clone, Copy)]
pub(super) struct Tally<'a> {
    pub(super) plan: &'a Plan,
    pub(super) sizes: &'a Sizes,
    pub(super) media: &'a [Arc<Media>],
    /// For each row the medium that it sees.
    pub(super) media_time: &'a [u32],
    /// Pairs of a new token and a token that it may see.
    pub(super) n_scores: usize,
}

impl Action {
    /// Name of what it does.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Action::Linear { .. } => "linear",
            Action::GatedLinear { .. } => "gated_linear",
            Action::Activate { .. } => "activate",
            Action::Norm { .. } => "norm",
            Action::Attention { .. } => "attention",
            Action::SelfAttention { .. } => "self_attention",
            Action::CrossAttention { .. } => "cross_attention",
            Action::Patches { .. } => "patches",
            Action::Convolution { .. } => "convolution",
            Action::MeanPool { .. } => "mean_pool",
            Action::PictureMean { .. } => "picture_mean",
            Action::ChannelGate { .. } => "channel_gate",
            Action::Add { .. } => "add",
            Action::Mul { .. } => "mul",
            Action::Product { .. } => "product",
            Action::Gather { .. } => "gather",
            Action::Copy { .. } => "copy",
        }
    }

    /// The weight that it multiplies with, or picks rows of.
    fn weight(&self) -> Option<&WeightOperand> {
        match self {
            Action::Linear { weight, .. } | Action::GatedLinear { weight, .. } => Some(weight),
            Action::Gather { table, .. } => Some(table),
            Action::Activate { .. }
            | Action::Norm { .. }
            | Action::Attention { .. }
            | Action::SelfAttention { .. }
            | Action::CrossAttention { .. }
            | Action::Patches { .. }
            | Action::Convolution { .. }
            | Action::MeanPool { .. }
            | Action::PictureMean { .. }
            | Action::ChannelGate { .. }
            | Action::Add { .. }
            | Action::Mul { .. }
            | Action::Product { .. }
            | Action::Copy { .. } => None,
        }
    }
}

impl Tally<'_> {
    /// What `action` reads and computes to give `[n_rows, n_cols]`.
    pub(super) fn work(&self, action: &Action, (n_rows, n_cols): (usize, usize)) -> Work {
        let cols = |view: &View| self.sizes.get(view.cols);
        let views: usize = action.views().iter().map(|view| self.weight_bytes(view)).sum();
        let panels = action.weight().map_or(0, |weight| self.panel_bytes(weight));
        let all = views.saturating_add(panels);
        let (weight_bytes, multiply_adds) = match action {
            Action::Linear { x, weight, only_seen, .. } => {
                let stretches = stretches(self.media_time, *only_seen, n_rows);
                let n_seen: usize = stretches.iter().map(|stretch| stretch.len()).sum();
                let again =
                    stretches.len().saturating_sub(1).saturating_mul(self.operand_bytes(weight));
                let read = if stretches.is_empty() { 0 } else { all.saturating_add(again) };
                (read, product([n_seen, n_cols, cols(x)]))
            }
            Action::GatedLinear { x, .. } => (all, product([2, n_rows, n_cols, cols(x)])),
            Action::Attention { q, segments, n_groups, .. } => {
                let n_groups = self.sizes.get(*n_groups).max(1);
                let n_keys: usize = segments.iter().map(|[k, _]| self.sizes.get(k.rows)).sum();
                (all, product([2, n_rows, n_keys / n_groups, cols(q)]))
            }
            Action::SelfAttention { q, .. } => (all, product([2, self.n_scores, cols(q)])),
            Action::CrossAttention { q, media, .. } => {
                (all, self.seen_latents(*media).saturating_mul(product([2, cols(q)])))
            }
            Action::Product { a, .. } => (all, product([n_rows, n_cols, cols(a)])),
            Action::Convolution { weight, .. } => (all, product([n_rows, n_cols, cols(weight)])),
            // Only the rows that are picked are read.
            Action::Gather { table, .. } => {
                let n_table_rows = match table {
                    WeightOperand::Numbers(view) => self.sizes.get(view.rows),
                    WeightOperand::Panels(places) => places.n,
                };
                ((all / n_table_rows.max(1)).saturating_mul(n_rows).min(all), 0)
            }
            Action::Activate { .. }
            | Action::Norm { .. }
            | Action::Patches { .. }
            | Action::MeanPool { .. }
            | Action::PictureMean { .. }
            | Action::ChannelGate { .. }
            | Action::Add { .. }
            | Action::Mul { .. }
            | Action::Copy { .. } => (all, 0),
        };
        let arithmetic = action.weight().map_or(Arithmetic::F32, arithmetic);
        Work { weight_bytes, operations: multiply_adds.saturating_mul(2), arithmetic }
    }

    fn operand_bytes(&self, weight: &WeightOperand) -> usize {
        match weight {
            WeightOperand::Numbers(view) => self.weight_bytes(view),
            WeightOperand::Panels(_) => self.panel_bytes(weight),
        }
    }

    /// Bytes of panels, scales included; 0 of f32 numbers, which are views.
    fn panel_bytes(&self, weight: &WeightOperand) -> usize {
        match weight {
            WeightOperand::Numbers(_) => 0,
            WeightOperand::Panels(places) => {
                [Some(places.data), places.row_scales, places.block_scales]
                    .into_iter()
                    .flatten()
                    .map(|place| self.plan.weights[place].bytes())
                    .sum()
            }
        }
    }

    /// Bytes of a view of a weight, 0 of another.
    fn weight_bytes(&self, view: &View) -> usize {
        match view.source {
            Source::Weight(_) => {
                let n_elements =
                    self.sizes.get(view.rows).saturating_mul(self.sizes.get(view.cols));
                n_elements.saturating_mul(size_of::<f32>())
            }
            Source::Literal(_) | Source::Input(_) | Source::Buffer(_) => 0,
        }
    }

    /// Latents that all rows together look at.
    fn seen_latents(&self, input: MediaInput) -> u64 {
        let latents = |time: &u32| {
            let index = usize::try_from(*time).ok()?.checked_sub(1)?;
            let media = self.media.get(index)?;
            Some(to_u64(input.n_latents.unwrap_or(media.n_latents)))
        };
        self.media_time.iter().filter_map(latents).sum()
    }
}

/// What products with a weight are done in.
fn arithmetic(weight: &WeightOperand) -> Arithmetic {
    match weight {
        WeightOperand::Numbers(_) => Arithmetic::F32,
        WeightOperand::Panels(places) => match places.format {
            PanelFormat::F16 => Arithmetic::F32,
            PanelFormat::Bf16 => Arithmetic::Bf16,
            PanelFormat::Int8 | PanelFormat::Int4 { .. } => Arithmetic::Int8,
        },
    }
}

fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

fn product<const N: usize>(sizes: [usize; N]) -> u64 {
    sizes.into_iter().map(to_u64).fold(1, u64::saturating_mul)
}
