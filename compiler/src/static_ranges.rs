//! Explicit quantisation: which linears of bytes have one scale for all their activations that is written in the graph, and
//! what scale.
//!
//! The rows that meet each weight of bytes are counted while prompts run through the artifact's own graphs, an observer
//! takes a range, and the graphs so made are compared with the model in f32 on other prompts. As long as next tokens are too
//! far, or too many of them others, the linears whose activations lose most are left out: their activations stay f16.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use flamingo_ir::Graph;
use flamingo_ir::onnx::{Islands, Typing, inline_typed, linears_of_panels};
use flamingo_ir::op::{Flavour, Op, PanelFormat};
use flamingo_models::config::ModelConfig;
use flamingo_runtime::{LoadedGraphs, argmax};
use serde::{Deserialize, Serialize};

use crate::calibrate::Example;
use crate::observer::{Histogram, Observer};
use crate::parity::kl_divergence;
use crate::ranges::place;
use crate::walk::{Walk, on_all_cores};

/// The form of the graphs that is judged.
const FORM: Flavour = Flavour::Trt10_3;
/// Levels of a signed byte around 0.
const LEVELS: f32 = 127.0;
/// Share of tokens whose most likely successor must stay the same.
const MIN_TOP1: f64 = 0.99;
/// Share of the allowed KL that may be used on the prompts that judge: others may be worse.
const SHARE: f64 = 0.5;
/// One in so many of the linears that are left is left out when next tokens are too far.
const STEP: usize = 8;

/// Linears of bytes with the range of their activations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StaticRanges {
    /// What chose the ranges.
    pub observer: String,
    /// Tokens compared with f32.
    pub n_tokens: usize,
    /// Mean KL of next tokens from f32, of graphs with these ranges, in nats.
    pub mean_kl: f64,
    /// Share of tokens whose most likely successor is the same.
    pub top1_agreement: f64,
    /// Largest mean KL allowed.
    pub max_kl: f64,
    /// In the order of the graphs.
    pub linears: Vec<StaticRange>,
}

/// The activations of one linear.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StaticRange {
    /// The graph: `media` or `decoder`.
    pub stage: String,
    /// Name of the linear: `decoder.3.mlp/down`.
    pub linear: String,
    /// Largest magnitude seen.
    pub largest: f32,
    /// Magnitude that the levels reach.
    pub range: f32,
    /// Signal over noise of the rounded activations, in dB.
    pub sqnr_db: f64,
    /// Whether the graph rounds them so; otherwise they stay f16.
    pub is_static: bool,
}

impl StaticRanges {
    /// Distances of the levels of a stage's linears.
    pub fn x_scales(&self, stage: &str) -> BTreeMap<String, f32> {
        let own = self.linears.iter().filter(|linear| linear.is_static && linear.stage == stage);
        own.map(|linear| (linear.linear.clone(), linear.range / LEVELS)).collect()
    }

    fn typing(&self, stage: &str, islands: &Islands) -> Typing {
        Typing { islands: islands.clone(), x_scales: self.x_scales(stage) }
    }

    /// Leaves those out whose activations lose most; whether there were any.
    fn leave_out(&mut self) -> bool {
        let mut left: Vec<&mut StaticRange> =
            self.linears.iter_mut().filter(|linear| linear.is_static).collect();
        left.sort_by(|a, b| a.sqnr_db.total_cmp(&b.sqnr_db));
        let n = left.len().div_ceil(STEP);
        left.iter_mut().take(n).for_each(|linear| linear.is_static = false);
        n > 0
    }
}

/// An artifact's graphs, and what they are held against.
pub(crate) struct Subject<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) graphs: &'a LoadedGraphs,
    /// What of each stage is in f32 anyway.
    pub(crate) islands: &'a [Islands; 2],
    /// Prompts whose activations are counted.
    pub(crate) seen: &'a [Example],
    /// Prompts that judge, with the logits of the model in f32.
    pub(crate) judged: &'a [(Example, Vec<f32>)],
    pub(crate) max_kl: f64,
}

impl Subject<'_> {
    /// The ranges that keep next tokens near f32's; tells each prompt before it is counted.
    pub(crate) fn choose(
        &self,
        observer: Observer,
        on_example: &mut dyn FnMut(usize),
    ) -> Result<StaticRanges> {
        let mut ranges = StaticRanges {
            observer: observer.name().to_owned(),
            n_tokens: 0,
            mean_kl: 0.0,
            top1_agreement: 1.0,
            max_kl: self.max_kl,
            linears: self.count(observer, on_example)?,
        };
        loop {
            self.judge(&mut ranges)?;
            let is_near =
                ranges.mean_kl <= SHARE * self.max_kl && ranges.top1_agreement >= MIN_TOP1;
            if is_near || !ranges.leave_out() {
                return Ok(ranges);
            }
        }
    }

    /// All linears of bytes with their ranges.
    fn count(
        &self,
        observer: Observer,
        on_example: &mut dyn FnMut(usize),
    ) -> Result<Vec<StaticRange>> {
        let stages =
            [linears_of_panels(&self.graphs.media)?, linears_of_panels(&self.graphs.decoder)?];
        let walk = Walk::new(self.config, self.graphs, stages);
        let mut counted: [BTreeMap<String, Histogram>; 2] = Default::default();
        for (index, example) in self.seen.iter().enumerate() {
            on_example(index);
            walk.run(example, &mut |graph, node, inputs, _| {
                if let Some(rows) = inputs.first().filter(|_| is_of_bytes(&node.op))
                    && let Some(rows) = rows.to_f32_vec()
                {
                    let counted = &mut counted[place(&graph.name)];
                    counted.entry(node.name.clone()).or_default().add(&rows);
                }
            })?;
        }
        let of_stage = |(graph, counted): (&Graph, &BTreeMap<String, Histogram>)| {
            let range = |linear: &String| {
                let seen = counted.get(linear)?;
                let range = observer.range(seen);
                Some(StaticRange {
                    stage: graph.name.clone(),
                    linear: linear.clone(),
                    largest: seen.largest(),
                    range,
                    sqnr_db: seen.sqnr_db(range),
                    // Nothing but zeros has no levels.
                    is_static: range / LEVELS >= f32::MIN_POSITIVE,
                })
            };
            graph.nodes().iter().filter_map(|node| range(&node.name)).collect::<Vec<_>>()
        };
        Ok(walk.stages.iter().zip(&counted).flat_map(of_stage).collect())
    }

    /// Compares next tokens of graphs with these ranges with f32's.
    fn judge(&self, ranges: &mut StaticRanges) -> Result<()> {
        let typed = |graph: &Graph| {
            let typing = ranges.typing(&graph.name, &self.islands[place(&graph.name)]);
            inline_typed(graph, FORM, &typing)
        };
        let stages = [typed(&self.graphs.media)?, typed(&self.graphs.decoder)?];
        let walk = Walk::new(self.config, self.graphs, stages);
        let vocabulary = self.config.language.vocabulary.max(1);
        let (mut n_tokens, mut kl, mut equal) = (0, 0.0, 0);
        let run = |(example, _): &(Example, _)| walk.run(example, &mut |_, _, _, _| ());
        let found = on_all_cores(self.judged, &mut |_| (), run)?;
        for (found, (_, expected)) in found.iter().zip(self.judged) {
            let Some(found) = found else { continue };
            for (found, expected) in found.chunks(vocabulary).zip(expected.chunks(vocabulary)) {
                n_tokens += 1;
                kl += kl_divergence(found, expected);
                equal += usize::from(argmax(found) == argmax(expected));
            }
        }
        ensure!(n_tokens > 0, "no prompts to judge by");
        ranges.n_tokens = n_tokens;
        ranges.mean_kl = kl / n_tokens as f64;
        ranges.top1_agreement = equal as f64 / n_tokens as f64;
        Ok(())
    }
}

fn is_of_bytes(op: &Op) -> bool {
    matches!(op, Op::PanelLinear(linear) if linear.weight.format == PanelFormat::Int8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_lose_most_are_left_out_first() {
        let linear = |name: &str, sqnr_db| StaticRange {
            stage: "decoder".into(),
            linear: name.into(),
            largest: 2.0,
            range: 1.27,
            sqnr_db,
            is_static: true,
        };
        let mut ranges = StaticRanges {
            observer: "mse".into(),
            n_tokens: 1,
            mean_kl: 0.0,
            top1_agreement: 1.0,
            max_kl: 0.01,
            linears: vec![linear("a", 30.0), linear("b", 12.0), linear("c", 20.0)],
        };
        let names =
            |ranges: &StaticRanges| ranges.x_scales("decoder").into_keys().collect::<Vec<_>>();
        assert!((ranges.x_scales("decoder")["a"] - 0.01).abs() < 1e-7);
        assert!(ranges.x_scales("media").is_empty());
        assert!(ranges.leave_out());
        assert_eq!(names(&ranges), ["a", "c"]);
        assert!(ranges.leave_out() && ranges.leave_out());
        assert!(names(&ranges).is_empty() && !ranges.leave_out());
    }
}
