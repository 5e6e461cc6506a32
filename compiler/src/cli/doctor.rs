//! `flamingoc doctor`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use flamingo_runtime::machine::{Machine, features, instruction_sets};
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
        let machine = Machine::measure(None)?;
        let (ort, providers) = ort_report(self.ort_lib.as_deref());
        if self.json {
            let flags = |flags: Vec<(&'static str, bool)>| -> BTreeMap<&str, bool> {
                flags.into_iter().collect()
            };
            output.json(&json!({
                "cpu": machine.cpu, "isa": machine.isa,
                "isa_available": flags(instruction_sets()), "features": flags(features()),
                "threads": machine.threads,
                "read_gb_per_s": machine.read_gb_per_s, "f32_gop_per_s": machine.f32_gop_per_s,
                "bf16_gop_per_s": machine.bf16_gop_per_s,
                "int8_gop_per_s": machine.int8_gop_per_s, "onnx_runtime": ort,
                "execution_providers": providers, "tract": cfg!(feature = "tract"),
            }))?;
            return Ok(Outcome::Ok);
        }
        show(&machine, output)?;
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

fn show(machine: &Machine, output: &mut Output) -> Result<()> {
    let names = |flags: Vec<(&'static str, bool)>, wanted: bool| {
        let names = flags.into_iter().filter(|(_, has)| *has == wanted).map(|(name, _)| name);
        names.collect::<Vec<_>>().join(", ")
    };
    let available = names(instruction_sets(), true);
    output.line(&format!("processor         {}", machine.cpu))?;
    output.line(&format!("instruction set   {} (available: {available})", machine.isa))?;
    output.line(&format!("features          {}", names(features(), true)))?;
    let missing = names(features(), false);
    if !missing.is_empty() {
        output.line(&format!("  not there       {missing}"))?;
    }
    output.line(&format!("threads           {}", machine.threads))?;
    output.line(&format!("read bandwidth    {:.1} GB/s, measured now", machine.read_gb_per_s))?;
    let peaks = [
        ("f32", Some(machine.f32_gop_per_s)),
        ("bf16", machine.bf16_gop_per_s),
        ("int8", machine.int8_gop_per_s),
    ];
    for (name, peak) in peaks {
        let name = format!("{name} peak");
        match peak {
            Some(peak) => output.line(&format!("{name:<17} {peak:.0} GOP/s, measured now"))?,
            None => output.line(&format!("{name:<17} no instructions for it"))?,
        }
    }
    Ok(())
}

#[cfg(feature = "ort")]
fn ort_report(library: Option<&std::path::Path>) -> (String, Vec<(&'static str, String)>) {
    flamingo_runtime::ort::report(library)
}

#[cfg(not(feature = "ort"))]
fn ort_report(_library: Option<&std::path::Path>) -> (String, Vec<(&'static str, String)>) {
    ("not built in (`--features ort`)".to_owned(), Vec::new())
}
