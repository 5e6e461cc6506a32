//! `flamingoc compile`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use serde_json::json;

use super::Outcome;
use super::output::{Output, byte_bar, bytes};
use crate::compile::{CalibrateOn, CompileOptions, Progress, compile, default_output};
use crate::passes::{pass_names, pass_reasons};
use crate::scheme::{INT4_BLOCK, Precision, Scheme};

/// Compile a checkpoint into an artifact
///
/// SOURCE is a recipe `.toml` that names the parts of an OpenFlamingo model, a folder
/// with a `recipe.toml`, or the Hugging Face folder of an IDEFICS-1 or Otter model.
#[derive(Args)]
#[command(after_help = after_help())]
pub(super) struct Compile {
    /// Recipe or checkpoint folder
    source: PathBuf,
    /// Where to write the artifact [default: SOURCE's name with .flamingo]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// How weights are stored
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// Columns of a row that share a scale in int4: 32 or 128
    #[arg(long, value_name = "N", value_parser = int4_block)]
    int4_block: Option<usize>,
    /// Prompts that int8 and int4 are fitted to, one in JSON a line [default: generated ones]
    #[arg(long, value_name = "FILE.jsonl")]
    calibrate: Option<PathBuf>,
    /// Round int8 and int4 to nearest
    #[arg(long, conflicts_with = "calibrate")]
    no_calibration: bool,
    /// What the artifact is for; this version targets the CPU
    #[arg(long, value_enum, default_value = "cpu")]
    target: Vec<Target>,
    /// Most tokens of a sequence [default: what the language model was made for]
    #[arg(long, value_name = "N")]
    max_context: Option<usize>,
    /// Most pictures and videos of a prompt
    #[arg(long, value_name = "N", default_value = "64")]
    max_images: usize,
    /// Write the graphs' text after this pass (`source` for before the first)
    #[arg(long, value_name = "PASS")]
    dump_after: Option<String>,
    /// Where `--dump-after` writes
    #[arg(long, value_name = "DIR", default_value = ".")]
    dump_dir: PathBuf,
    /// Replace an artifact that is there
    #[arg(long)]
    overwrite: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Target {
    Cpu,
    Cuda,
    Tensorrt,
}

fn int4_block(text: &str) -> Result<usize, String> {
    match text {
        "32" => Ok(32),
        "128" => Ok(128),
        _ => Err("expected 32 or 128".to_owned()),
    }
}

fn after_help() -> String {
    let lines: Vec<String> =
        pass_reasons().map(|(name, reason)| format!("  {name}: {reason}")).collect();
    format!(
        "Example:\n  flamingoc compile models/demo/recipe.toml -o demo.flamingo\n\nPasses:\n{}",
        lines.join("\n")
    )
}

impl Compile {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        self.refuse_what_is_not_there()?;
        let dump = self.dump_after.clone().map(|pass| (pass, self.dump_dir.clone()));
        let options = CompileOptions {
            output: self.output.clone().unwrap_or_else(|| default_output(&self.source)),
            source: self.source,
            overwrite: self.overwrite,
            max_context: self.max_context,
            max_images: self.max_images,
            scheme: Scheme {
                precision: self.precision,
                int4_block: self.int4_block.unwrap_or(INT4_BLOCK),
            },
            calibrate: match (self.no_calibration, self.calibrate) {
                (true, _) => CalibrateOn::Nothing,
                (false, Some(file)) => CalibrateOn::File(file),
                (false, None) => CalibrateOn::Bundled,
            },
            dump,
        };
        let bar = byte_bar("weights");
        let (manifest, report) = compile(&options, &mut |progress| match progress {
            Progress::Stage(stage) => bar.println(stage),
            Progress::Bytes(done, total) => {
                bar.set_length(total);
                bar.set_position(done);
            }
        })?;
        bar.finish_and_clear();
        for note in &report.notes {
            output.note(&format!("note: {note}"));
        }
        let path = options.output.display().to_string();
        if self.json {
            output.json(&json!({"artifact": path, "report": report}))?;
            return Ok(Outcome::Ok);
        }
        let total = manifest.files.iter().map(|file| file.bytes).sum();
        output.line(&format!("{path}: {} in {} files", bytes(total), manifest.files.len() + 1))?;
        let count = |stage: &str, last: bool| {
            let records = &report.passes[stage];
            let record = if last { records.last() } else { records.first() };
            record.map_or(0, |record| record.ops.values().sum::<usize>())
        };
        for stage in ["media", "decoder"] {
            let (before, after) = (count(stage, false), count(stage, true));
            output
                .line(&format!("{stage}: {before} ops in the source, {after} after the passes"))?;
        }
        Ok(Outcome::Ok)
    }

    fn refuse_what_is_not_there(&self) -> Result<()> {
        if self.int4_block.is_some() && self.precision != Precision::Int4 {
            let precision = self.precision.name();
            bail!(
                "`--int4-block`: `--precision {precision}` has no blocks\n\n\
                 hint: pass `--precision int4`, or leave the option out"
            );
        }
        if self.target.iter().any(|target| *target != Target::Cpu) {
            bail!("`--target`: this version targets the CPU only\n\nhint: leave the option out");
        }
        if let Some(pass) = &self.dump_after {
            let known: Vec<&str> = ["source"].into_iter().chain(pass_names()).collect();
            if !known.contains(&pass.as_str()) {
                bail!(
                    "`--dump-after {pass}`: no such pass\n\nhint: choose one of {}",
                    known.join(", ")
                );
            }
        }
        Ok(())
    }
}
