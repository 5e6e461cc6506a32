//! `flamingoc check`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use flamingo_ir::op::Flavour;
use flamingo_models::manifest::Manifest;
use flamingo_runtime::Model;
use serde_json::{Value, json};

use super::output::Output;
use super::source::PartOptions;
use super::{Opening, Outcome};
use crate::emit::write_file;
use crate::origin::Origin;
use crate::parity::{Comparison, Divergence, F32_BOUND, MIN_COSINE, Parity, check};

/// Compare an artifact with the checkpoint it was compiled from
///
/// Runs seeded random prompts through the artifact and through the reference evaluation of
/// the source's own arithmetic, and writes the result into the artifact's report.json.
/// Exit status 1 if a bound does not hold: of f32 weights on every number, of others on the
/// mean KL divergence of the next token (f16 1e-4, bf16 1e-3, int8 0.01, int4 0.05). Graphs for a GPU
/// (`--backend ort --flavour cuda`) compute in f16, whatever their weights are.
#[derive(Args)]
#[command(after_help = "Example:
  flamingoc check demo.flamingo --against models/demo/recipe.toml")]
pub(super) struct Check {
    /// The artifact
    artifact: PathBuf,
    /// The recipe, checkpoint folder or name on the hub that it was compiled from
    #[arg(long, value_name = "SOURCE")]
    against: PathBuf,
    #[command(flatten)]
    parts: PartOptions,
    /// Seed of the prompts
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    /// Leave the artifact's report as it is
    #[arg(long)]
    no_store: bool,
    #[command(flatten)]
    opening: Opening,
    /// Print the comparisons as JSON
    #[arg(long)]
    json: bool,
}

impl Check {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        let model = Model::open(&self.artifact, &self.opening.options())?;
        output.warnings(&model);
        let source = self.parts.open(&Origin::of(&self.against)?, output)?;
        let found = check(&model, &source, self.seed, self.opening.flavour())?;
        drop(model);
        let pass = found.pass();
        let verdict = if pass { "pass" } else { "fail" };
        let parity = json!({
            "backend": self.opening.engine.backend,
            "flavour": self.opening.flavour().map(Flavour::name),
            "seed": self.seed,
            "bound": F32_BOUND,
            "min_cosine": MIN_COSINE,
            "comparisons": found.comparisons,
            "kl_bound": found.kl_bound,
            "divergence": found.divergence,
        });
        if !self.no_store {
            store(&self.artifact, verdict, &parity, &found)?;
        }
        match self.json {
            true => output.json(&json!({"verdict": verdict, "parity": parity}))?,
            false => show(output, &found)?,
        }
        match pass {
            true => Ok(Outcome::Ok),
            false => Ok(Outcome::CheckFailed),
        }
    }
}

fn show(output: &mut Output, parity: &Parity) -> Result<()> {
    let comparisons = &parity.comparisons;
    let worst = comparisons.iter().map(|c| c.relative_error).fold(0.0, f32::max);
    let row = |comparison: &Comparison| {
        let mark = if comparison.relative_error == worst { " worst" } else { "" };
        vec![
            comparison.what.clone(),
            format!("{:.1e}", comparison.relative_error),
            format!("{:.9}", comparison.cosine),
            comparison.different_tokens.to_string(),
            format!("{}{mark}", if comparison.pass { "ok" } else { "FAILED" }),
        ]
    };
    let rows: Vec<Vec<String>> = comparisons.iter().map(row).collect();
    output.table(&["", "max error / max", "cosine", "tokens differ", ""], &rows)?;
    for failed in comparisons.iter().filter(|comparison| !comparison.pass) {
        let (index, found, reference) = failed.worst;
        output.line(&format!(
            "{}: element {index}: expected {reference}, got {found}; bound {F32_BOUND:e}, would pass at {:.1e}",
            failed.what, failed.relative_error
        ))?;
    }
    let Some(bound) = parity.kl_bound else { return Ok(()) };
    let Divergence { n_tokens, mean_kl, max_kl, top1_agreement } = parity.divergence;
    output.line(&format!(
        "next tokens: mean KL {mean_kl:.1e} of at most {bound:e}, largest {max_kl:.1e}, the same best token in \
         {:.1} % of {n_tokens}: {}",
        100.0 * top1_agreement,
        if parity.pass() { "ok" } else { "FAILED" }
    ))
}

/// Writes the verdict into report.json, and the report's new hash into the manifest; each file
/// is replaced whole.
fn store(artifact: &Path, verdict: &str, parity: &Value, found: &Parity) -> Result<()> {
    let path = artifact.join("report.json");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let mut report: Value = serde_json::from_str(&text)?;
    report["verdict"] = json!(verdict);
    report["parity"] = parity.clone();
    if found.kl_bound.is_some() {
        report["quantisation"]["mean_kl"] = json!(found.divergence.mean_kl);
        report["quantisation"]["top1_agreement"] = json!(found.divergence.top1_agreement);
    }
    let mut entry = replace(artifact, "report.json", &report)?;
    entry.path = "report.json".to_owned();
    let path = artifact.join("manifest.json");
    let mut manifest: Manifest = serde_json::from_str(&fs::read_to_string(&path)?)?;
    for file in &mut manifest.files {
        if file.path == entry.path {
            *file = entry.clone();
        }
    }
    replace(artifact, "manifest.json", &serde_json::to_value(&manifest)?)?;
    Ok(())
}

fn replace(
    artifact: &Path,
    name: &str,
    value: &Value,
) -> Result<flamingo_models::manifest::FileEntry> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    let temporary = format!("{name}.new");
    let entry = write_file(artifact, &temporary, &bytes)?;
    fs::rename(artifact.join(&temporary), artifact.join(name))?;
    Ok(entry)
}
