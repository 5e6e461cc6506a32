//! `flamingoc engine`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use clap::{Args, Subcommand};
use flamingo_models::manifest::FileEntry;
use flamingo_runtime::engines::{BuiltWith, EngineFile, Engines};
use flamingo_runtime::{Artifact, Model, OpenOptions};
use serde::Serialize;
use serde_json::json;

use super::Outcome;
use super::output::{Output, bytes, count_bar};
use crate::device::jetson;
use crate::device::root::Root;
use crate::emit::WEIGHTS;

/// Build, list or remove the engines that TensorRT makes of an artifact on this device
///
/// TensorRT turns graphs into engines for one GPU and one version, which takes minutes. They are
/// kept in the artifact, in device/engines, and `--ep tensorrt` runs only with engines that fit.
#[derive(Args)]
#[command(after_help = "Examples:
  flamingoc engine build demo.flamingo
  flamingoc engine list demo.flamingo
  flamingoc engine prune demo.flamingo")]
pub(super) struct Engine {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build all engines anew
    Build(Place),
    /// Show the engines, and whether they would be used here
    List(Place),
    /// Remove engines that would not be used here
    Prune {
        #[command(flatten)]
        place: Place,
        /// Remove those that would be used, too
        #[arg(long)]
        all: bool,
    },
}

#[derive(Args)]
struct Place {
    /// The artifact
    artifact: PathBuf,
    /// Graphs that the engines are of
    #[arg(long, value_name = "FLAVOUR", default_value = "trt-10.3", value_parser = ["trt-10.3", "trt-10.15"])]
    flavour: String,
    /// ONNX Runtime's shared library [default: ORT_DYLIB_PATH, then known places]
    #[arg(long, value_name = "FILE")]
    ort_lib: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

impl Engine {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        match self.verb {
            Verb::Build(place) => place.build(output)?,
            Verb::List(place) => place.list(output)?,
            Verb::Prune { place, all } => place.prune(all, output)?,
        }
        Ok(Outcome::Ok)
    }
}

impl Place {
    fn build(&self, output: &mut Output) -> Result<()> {
        let artifact = Artifact::open(&self.artifact, false)?;
        let is_weights = |file: &&FileEntry| file.path.ends_with(WEIGHTS);
        let weights = artifact.manifest.files.iter().filter(is_weights).map(|file| file.bytes);
        output.note(&format!(
            "building engines of {}: minutes, and about {} of memory (twice the weight file, estimated)",
            self.flavour,
            bytes(weights.fold(0, u64::saturating_add).saturating_mul(2))
        ));
        let bar = count_bar().with_message("media and decoder");
        let start = Instant::now();
        let opened = Model::open(
            &self.artifact,
            &OpenOptions {
                backend: Some("ort".to_owned()),
                execution_provider: Some("tensorrt".to_owned()),
                flavour: Some(self.flavour.clone()),
                ort_library: self.ort_lib.clone(),
                build_engines: true,
                ..OpenOptions::default()
            },
        );
        bar.finish_and_clear();
        opened?;
        output.note(&format!("built in {:.0} s", start.elapsed().as_secs_f64()));
        self.list(output)
    }

    fn list(&self, output: &mut Output) -> Result<()> {
        let (engines, now) = self.engines()?;
        let state = EngineState::of(&engines, now)?;
        if self.json {
            return output.json(&state);
        }
        show(&state.files, output)?;
        output.line(&state.line())
    }

    fn prune(&self, all: bool, output: &mut Output) -> Result<()> {
        let (engines, now) = self.engines()?;
        let is_kept = !all && engines.problems(&now).is_empty();
        let gone = if is_kept { Vec::new() } else { engines.prune()? };
        if self.json {
            return output.json(&json!({"removed": gone}));
        }
        match gone.is_empty() {
            true => output.line("nothing to remove"),
            false => {
                output.line("removed")?;
                show(&gone, output)
            }
        }
    }

    fn engines(&self) -> Result<(Engines, BuiltWith)> {
        engines(&self.artifact, &self.flavour, self.ort_lib.as_deref())
    }
}

/// The engines, and what new ones would be built with, as far as this machine's files tell.
fn engines(path: &Path, flavour: &str, ort_lib: Option<&Path>) -> Result<(Engines, BuiltWith)> {
    let mut now = Artifact::open(path, false)?.built_with(flavour)?;
    now.tensorrt = jetson::versions::tensorrt(&Root::own()).map(|version| version.version);
    now.provider = provider_hash(ort_lib);
    Ok((Engines::of(path), now))
}

/// The engines of an artifact, and whether they would be used here.
#[derive(Serialize)]
pub(super) struct EngineState {
    folder: PathBuf,
    files: Vec<EngineFile>,
    built_with: Option<BuiltWith>,
    here: BuiltWith,
    problems: Vec<String>,
}

impl EngineState {
    /// Of the flavour that engines were built of, else of the default one.
    pub(super) fn read(artifact: &Path, ort_lib: Option<&Path>) -> Result<EngineState> {
        let built_with = Engines::of(artifact).built_with();
        let flavour = built_with.map_or_else(|| "trt-10.3".to_owned(), |record| record.flavour);
        let (engines, here) = engines(artifact, &flavour, ort_lib)?;
        EngineState::of(&engines, here)
    }

    fn of(engines: &Engines, here: BuiltWith) -> Result<EngineState> {
        Ok(EngineState {
            folder: engines.folder().to_owned(),
            files: engines.files()?,
            built_with: engines.built_with(),
            problems: engines.problems(&here),
            here,
        })
    }

    pub(super) fn line(&self) -> String {
        match &self.problems[..] {
            [] => "they would be used here".to_owned(),
            problems => format!("they would not be used here: {}", problems.join("; ")),
        }
    }
}

fn show(files: &[EngineFile], output: &mut Output) -> Result<()> {
    let row = |file: &EngineFile| vec![file.name.clone(), bytes(file.bytes)];
    match files.is_empty() {
        true => output.line("no engines"),
        false => output.table(&["engine", "size"], &files.iter().map(row).collect::<Vec<_>>()),
    }
}

#[cfg(feature = "ort")]
fn provider_hash(library: Option<&Path>) -> Option<String> {
    flamingo_runtime::ort::provider_hash(library)
}

#[cfg(not(feature = "ort"))]
fn provider_hash(_library: Option<&Path>) -> Option<String> {
    None
}
