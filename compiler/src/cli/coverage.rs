//! `inspect --coverage`: what would run where.

use std::path::Path;

use anyhow::{Context as _, Result};
use flamingo_ir::op::Flavour;
use flamingo_runtime::Artifact;

use super::output::{Output, bytes};
use crate::coverage::COLUMNS;
use crate::coverage::report::{StageReport, flavour_for, reports_page, stage_reports};

/// Shows the stages of an artifact on a target; writes the page where one is asked for.
pub(super) fn show(
    artifact: &Artifact,
    target: &str,
    flavour: Option<&str>,
    html: Option<&Path>,
    json: bool,
    output: &mut Output,
) -> Result<()> {
    let flavour = flavour.and_then(Flavour::from_name).unwrap_or_else(|| flavour_for(target));
    let manifest = &artifact.manifest;
    let reports =
        stage_reports(&artifact.path, &manifest.graphs, &manifest.limits, target, flavour)?;
    if let Some(path) = html {
        let title = format!("{} graphs on {target}", flavour.name());
        std::fs::write(path, reports_page(&title, &reports)?)
            .with_context(|| format!("cannot write `{}`", path.display()))?;
    }
    if json {
        return output.json(&reports);
    }
    output.line(&format!(
        "{} graphs on {target}: expected of kernel tables, no GPU was asked",
        flavour.name()
    ))?;
    reports.iter().try_for_each(|report| stage(report, output))
}

fn stage(report: &StageReport, output: &mut Output) -> Result<()> {
    let StageReport { stage, coverage, memory, .. } = report;
    let mut rows: Vec<Vec<String>> =
        coverage.summary().into_iter().map(|(what, n)| vec![what, n.to_string()]).collect();
    rows.push(vec!["weights".to_owned(), bytes(memory.initializer_bytes)]);
    if let Some(largest) = &memory.largest {
        let what = format!("largest value (`{}`)", largest.value);
        rows.push(vec![what, bytes(largest.bytes)]);
    }
    output.line("")?;
    output.table(&[stage, ""], &rows)?;
    match coverage.is_full() {
        true => output.line("the preferred provider runs every node"),
        false => {
            let rows: Vec<Vec<String>> =
                coverage.table().into_iter().map(|row| row.to_vec()).collect();
            output.table(&COLUMNS, &rows)
        }
    }
}
