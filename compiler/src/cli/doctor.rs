//! `flamingoc doctor`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use flamingo_kernels::{Isa, Kernels, probe};
use serde_json::json;

use super::Outcome;
use super::output::Output;

/// Show what this machine can run, and why not
#[derive(Args)]
#[command(after_help = "Example:\n  flamingoc doctor --json")]
pub(super) struct Doctor {
    /// ONNX Runtime's shared library [default: ORT_DYLIB_PATH, then known places]
    #[arg(long, value_name = "FILE")]
    ort_lib: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        let kernels = Kernels::new(None)?;
        let sets = Isa::ALL.map(|isa| (isa.name(), isa.is_available()));
        let read = probe::read_bandwidth(&kernels);
        let peak = probe::fma_peak(&kernels);
        let (ort, providers) = ort_report(self.ort_lib.as_deref());
        if self.json {
            let sets: serde_json::Map<String, serde_json::Value> = sets
                .iter()
                .map(|(name, available)| ((*name).to_owned(), json!(available)))
                .collect();
            output.json(&json!({
                "isa": kernels.isa().name(), "isa_available": sets, "threads": kernels.n_threads(),
                "read_gb_per_s": read, "f32_gflop_per_s": peak, "onnx_runtime": ort,
                "execution_providers": providers, "tract": cfg!(feature = "tract"),
            }))?;
            return Ok(Outcome::Ok);
        }
        let available: Vec<&str> =
            sets.iter().filter(|(_, yes)| *yes).map(|(name, _)| *name).collect();
        output.line(&format!(
            "instruction set   {} (available: {})",
            kernels.isa().name(),
            available.join(", ")
        ))?;
        output.line(&format!("threads           {}", kernels.n_threads()))?;
        output.line(&format!("read bandwidth    {read:.0} GB/s, measured now"))?;
        output.line(&format!("f32 peak          {peak:.0} GFLOP/s, measured now"))?;
        output.line(&format!("ONNX Runtime      {ort}"))?;
        for (name, state) in providers {
            output.line(&format!("  {name:<15} {state}"))?;
        }
        let tract =
            if cfg!(feature = "tract") { "built in" } else { "not built in (`--features tract`)" };
        output.line(&format!("tract             {tract}"))?;
        Ok(Outcome::Ok)
    }
}

#[cfg(feature = "ort")]
fn ort_report(library: Option<&std::path::Path>) -> (String, Vec<(&'static str, String)>) {
    flamingo_runtime::ort::report(library)
}

#[cfg(not(feature = "ort"))]
fn ort_report(_library: Option<&std::path::Path>) -> (String, Vec<(&'static str, String)>) {
    ("not built in (`--features ort`)".to_owned(), Vec::new())
}
