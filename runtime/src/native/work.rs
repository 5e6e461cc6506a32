//! What an instruction of a plan reads and computes, counted from its views and the sizes of the
//! call.
#![forbid(unsafe_code)]

use flamingo_kernels::PanelFormat;

use super::execute::Context;
use super::plan::{Action, MediaInput, Source, View, WeightOperand};
use crate::profile::{Arithmetic, Work};

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
            | Action::Add { .. }
            | Action::Mul { .. }
            | Action::Product { .. }
            | Action::Copy { .. } => None,
        }
    }
}

impl Context<'_> {
    /// What `action` reads and computes to give `[n_rows, n_cols]`.
    pub(super) fn work(&self, action: &Action, (n_rows, n_cols): (usize, usize)) -> Work {
        let cols = |view: &View| self.sizes.get(view.cols);
        let views: usize = action.views().iter().map(|view| self.weight_bytes(view)).sum();
        let panels = action.weight().map_or(0, |weight| self.panel_bytes(weight));
        let all = views.saturating_add(panels);
        let (weight_bytes, multiply_adds) = match action {
            Action::Linear { x, weight, only_seen, .. } => {
                let stretches = self.stretches(*only_seen, n_rows);
                let n_seen: usize = stretches.iter().map(|stretch| stretch.len()).sum();
                let again = stretches.len().saturating_sub(1) * self.operand_bytes(weight);
                let read = if stretches.is_empty() { 0 } else { all + again };
                (read, product([n_seen, n_cols, cols(x)]))
            }
            Action::GatedLinear { x, .. } => (all, 2 * product([n_rows, n_cols, cols(x)])),
            Action::Attention { q, segments, n_groups, .. } => {
                let n_groups = self.sizes.get(*n_groups).max(1);
                let n_keys: usize = segments.iter().map(|[k, _]| self.sizes.get(k.rows)).sum();
                (all, 2 * product([n_rows, n_keys / n_groups, cols(q)]))
            }
            Action::SelfAttention { q, .. } => (all, 2 * product([self.n_scores, cols(q)])),
            Action::CrossAttention { q, media, .. } => {
                (all, 2 * self.seen_latents(*media) * to_u64(cols(q)))
            }
            Action::Product { a, .. } => (all, product([n_rows, n_cols, cols(a)])),
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
            | Action::Add { .. }
            | Action::Mul { .. }
            | Action::Copy { .. } => (all, 0),
        };
        let arithmetic = action.weight().map_or(Arithmetic::F32, arithmetic);
        Work { weight_bytes, operations: 2 * multiply_adds, arithmetic }
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
            WeightOperand::Panels(_) => self.weight(weight).map_or(0, |weight| weight.bytes()),
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
