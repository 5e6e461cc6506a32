//! An artifact, opened as one variant of a run: its engine, its threads, and inputs in its shape.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flamingo_models::manifest::Manifest;
use flamingo_runtime::backend::Media;
use flamingo_runtime::machine::Machine;
use flamingo_runtime::{Artifact, Model, OpenOptions, RunError};
use serde::Serialize;

use super::few_shot::FewShot;
use super::inputs::image_tokens;
use super::stages::{Case, Inputs, cases, encoded};
use super::{BenchError, BenchOptions};

/// What takes turns with other variants in one run.
#[derive(Clone, Debug)]
pub struct Variant {
    /// The artifact's folder.
    pub artifact: PathBuf,
    /// Engine and threads.
    pub opening: OpenOptions,
}

/// What tells variants apart in a report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Label {
    /// The artifact's name.
    pub artifact: String,
    /// Engine.
    pub backend: String,
    /// Threads.
    pub threads: usize,
}

impl Variant {
    /// The artifact's name, without the end of its folder's; its path where another of `all` is called the same.
    fn name(&self, all: &[Variant]) -> String {
        let stem =
            |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let is_namesake = |other: &Variant| {
            other.artifact != self.artifact && stem(&other.artifact) == stem(&self.artifact)
        };
        match all.iter().any(is_namesake) {
            true => self.artifact.display().to_string(),
            false => stem(&self.artifact),
        }
    }
}

/// A variant, opened.
pub(super) struct Subject {
    pub(super) label: Label,
    pub(super) path: PathBuf,
    pub(super) opening: OpenOptions,
    pub(super) manifest: Manifest,
    pub(super) model: Model,
    pub(super) inputs: Inputs,
    pub(super) media: Vec<Arc<Media>>,
    few_shot: Option<FewShot>,
}

impl Subject {
    /// Opens a variant; `machine` was measured with its threads.
    pub(super) fn open(
        variant: &Variant,
        machine: &Machine,
        options: &BenchOptions,
    ) -> Result<Subject, BenchError> {
        let Variant { artifact: path, opening } = variant.clone();
        let model = Model::open(&path, &opening)?;
        if options.reproject && model.backend().token_format().is_none() {
            return Err(BenchError::NoBaseline(model.backend().name().to_owned()));
        }
        let manifest = model.manifest().clone();
        let inputs = Inputs::new(&manifest, options)?;
        let most = options.images.iter().copied().max().unwrap_or(0).max(1);
        let media = encoded(&model, &inputs, most)?;
        let few_shot = options.few_shot.as_ref();
        let few_shot = few_shot.map(|few_shot| FewShot::new(&path, &opening, few_shot));
        let label = Label {
            artifact: variant.name(&options.variants),
            backend: model.backend().name().to_owned(),
            threads: machine.threads,
        };
        let few_shot = few_shot.transpose()?;
        Ok(Subject { label, path, opening, manifest, model, inputs, media, few_shot })
    }

    /// All cases but `load`.
    pub(super) fn cases(&self, options: &BenchOptions) -> Result<Vec<Case<'_>>, BenchError> {
        let mut cases = cases(&self.model, &self.inputs, &self.media, options)?;
        if let Some(few_shot) = &self.few_shot {
            cases.extend(few_shot.cases()?);
        }
        Ok(cases)
    }
}

/// The manifest of an artifact that options fit.
pub(super) fn checked_manifest(
    path: &Path,
    verify: bool,
    options: &BenchOptions,
) -> Result<Manifest, BenchError> {
    let manifest = Artifact::open(path, verify).map_err(RunError::from)?.manifest;
    let problems = problems(&manifest, options);
    match problems.is_empty() {
        true => Ok(manifest),
        false => Err(BenchError::Options { path: path.to_owned(), problems }),
    }
}

/// What the artifact has no room for, all at once.
fn problems(manifest: &Manifest, options: &BenchOptions) -> Vec<String> {
    let mut problems = Vec::new();
    let mut check = |is_fine: bool, flag: &str, expected: String, found: String| {
        if !is_fine {
            problems.push(format!("`--{flag}`: expected {expected}, found {found}"));
        }
    };
    let list =
        |numbers: &[usize]| numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let limits = &manifest.limits;
    let most = options.images.iter().copied().max();
    let expected = format!("numbers up to {}", limits.max_images);
    let is_fine = most.is_some_and(|most| most <= limits.max_images);
    check(is_fine, "images", expected, list(&options.images));
    let image_len = image_tokens(&manifest.config.tokens).len();
    let needed = most.unwrap_or(0).saturating_mul(image_len).max(1);
    for (flag, tokens, room) in [
        ("context", options.contexts.as_slice(), limits.max_context.saturating_sub(1)),
        ("prompt-tokens", &[options.prompt_tokens], limits.max_context),
    ] {
        let expected = format!("{needed} (for the pictures) to {room} tokens");
        let is_fine = tokens.iter().all(|tokens| (needed..=room).contains(tokens));
        check(is_fine && !tokens.is_empty(), flag, expected, list(tokens));
    }
    let is_fine = !options.batches.is_empty() && options.batches.iter().all(|batch| *batch > 0);
    check(is_fine, "batch", "numbers from 1".into(), list(&options.batches));
    check(options.reps > 0, "reps", "1 or more".into(), options.reps.to_string());
    problems
}
