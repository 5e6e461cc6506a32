//! The coverage of an artifact's stages, for what it was compiled for.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use flamingo_ir::Bindings;
use flamingo_ir::onnx::{ReadLimits, list_nodes, read_onnx};
use flamingo_ir::op::Flavour;
use flamingo_models::manifest::{GraphEntry, Limits};
use flamingo_models::profile::{Profile, Profiles};
use flamingo_runtime::PREFILL_TOKENS;
use serde::Serialize;

use super::memory::{Memory, memory};
use super::page::{StageCoverage, coverage_page};
use super::{Coverage, TARGETS};

/// A stage on a target.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageReport {
    /// `media` or `decoder`.
    pub stage: String,
    /// Of its graph.
    pub flavour: String,
    /// What would run where.
    pub coverage: Coverage,
    /// What it holds with the largest sizes.
    pub memory: Memory,
}

/// The flavour of the graphs that are meant for a target.
pub fn flavour_for(target: &str) -> Flavour {
    match target {
        "cuda" => Flavour::Cuda,
        "tensorrt-10.3" => Flavour::Trt10_3,
        "tensorrt-10.15" | "tensorrt-11" => Flavour::Trt10_15,
        _ => Flavour::OrtCpu,
    }
}

/// The targets that a flavour is meant for.
pub fn targets_of(flavour: Flavour) -> impl Iterator<Item = &'static str> {
    let names = TARGETS.iter().map(|(name, _)| *name);
    names.filter(move |target| flavour_for(target) == flavour)
}

/// The stages of the artifact in `folder` on a target, from the graphs of a flavour. Functions count as what they are
/// defined as.
///
/// # Errors
/// An unknown target, no graphs of that flavour, or files that are not an artifact's.
pub fn stage_reports(
    folder: &Path,
    graphs: &[GraphEntry],
    limits: &Limits,
    target: &str,
    flavour: Flavour,
) -> Result<Vec<StageReport>> {
    let entry = |stage: &str| {
        let found = graphs.iter().find(|g| g.stage == stage && g.flavour == flavour.name());
        let known: Vec<&str> =
            graphs.iter().filter(|g| g.stage == stage).map(|g| g.flavour.as_str()).collect();
        found.with_context(|| {
            let (name, known) = (flavour.name(), known.join(", "));
            format!(
                "{stage}: expected graphs of flavour {name}, found {known}\n\n\
                 hint: compile for it with `--target`, or choose another `--flavour`"
            )
        })
    };
    let [media, decoder] = [entry("media")?, entry("decoder")?];
    let profiles = Profiles::new(media, decoder, limits, PREFILL_TOKENS);
    let profiles = profiles.map_err(anyhow::Error::msg)?;
    let mut reports = Vec::new();
    for graph in [media, decoder] {
        let path = folder.join(&graph.path);
        let context = || format!("cannot read `{}`", path.display());
        let mut bytes = fs::read(&path).with_context(context)?;
        let read_limits = ReadLimits::default();
        if flavour.half().is_none() {
            bytes = read_onnx(&bytes, &read_limits)?.inlined(flavour)?;
        }
        let listing = list_nodes(&bytes, &read_limits).with_context(context)?;
        let sizes = sizes(graph, profiles.of(&graph.stage))?;
        reports.push(StageReport {
            stage: graph.stage.clone(),
            flavour: flavour.name().to_owned(),
            coverage: Coverage::new(&listing, target)?,
            memory: memory(&listing, &sizes),
        });
    }
    Ok(reports)
}

/// The largest size of each symbol that is a dimension of its own.
fn sizes(graph: &GraphEntry, profiles: &[Profile]) -> Result<Bindings> {
    let mut sizes = Bindings::new();
    for input in &graph.inputs {
        for profile in profiles {
            let Some(shape) = profile.max.get(&input.name) else { continue };
            if shape.len() != input.shape.len() {
                bail!("input `{}`: a profile of another rank", input.name);
            }
            let symbols = input.shape.iter().zip(shape).filter(|(dim, _)| is_symbol(dim));
            for (symbol, size) in symbols {
                let largest = sizes.entry(symbol.clone()).or_insert(*size);
                *largest = (*largest).max(*size);
            }
        }
    }
    Ok(sizes)
}

fn is_symbol(dim: &str) -> bool {
    !dim.starts_with(|c: char| c.is_ascii_digit()) && !dim.contains(['+', '*'])
}

/// The page of several reports.
///
/// # Errors
/// A plot that cannot be drawn.
pub fn reports_page(title: &str, reports: &[StageReport]) -> Result<Vec<u8>> {
    let stages = reports.iter().map(|report| StageCoverage {
        name: &report.stage,
        coverage: &report.coverage,
        memory: &report.memory,
    });
    coverage_page(title, &stages.collect::<Vec<_>>())
}
