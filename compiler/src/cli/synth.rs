//! `flamingoc synth`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::Outcome;
use super::output::{Output, byte_bar, bytes};
use crate::synth::{outline, presets, synthesize};

/// Write a seeded random checkpoint of a named shape, in its family's real format
///
/// For latency work and tests: the answers mean nothing.
#[derive(Args)]
#[command(after_help = after_help())]
pub(super) struct Synth {
    /// Shape of the model
    preset: String,
    /// Where to write it
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Seed of the weights
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    /// Make a few channels of the residual stream 8 to 80 times as large as the others, and logits as unlike, as in
    /// trained models
    #[arg(long)]
    outliers: bool,
    /// Names and shapes only, in files that take no room on the disk: for `inspect`
    #[arg(long, conflicts_with_all = ["seed", "outliers"])]
    shapes_only: bool,
    /// Print what was written as JSON
    #[arg(long)]
    json: bool,
}

fn after_help() -> String {
    format!(
        "Presets: {}\n\nExamples:\n  flamingoc synth of-mini -o of-mini\n  flamingoc synth idefics-80b --shapes-only -o shapes",
        presets().join(", ")
    )
}

impl Synth {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        let bar = byte_bar("weights");
        let mut progress = |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        };
        let report = match self.shapes_only {
            true => outline(&self.preset, &self.output)?,
            false => {
                synthesize(&self.preset, &self.output, self.seed, self.outliers, &mut progress)?
            }
        };
        bar.finish_and_clear();
        let path = self.output.display().to_string();
        match self.json {
            true => output.json(&json!({"source": path, "bytes": report.tensor_bytes, "tensors": report.n_tensors, "values": report.n_values}))?,
            false => output.line(&format!("{path}: {}", bytes(report.tensor_bytes)))?,
        }
        Ok(Outcome::Ok)
    }
}
