//! What a source is before it is compiled: its parts, its numbers by component, what it will take in memory at each
//! precision, and which devices have that much.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use flamingo_models::checkpoint::Checkpoint;
use flamingo_models::components::{Component, Count, is_alias};
use flamingo_models::config::Family;
use flamingo_models::manifest::Limits;
use flamingo_models::{Graphs, Source, Survey, SurveyedPart};
use serde::Serialize;

use crate::plan::devices::DEVICES;
use crate::plan::{Model, Needs};
use crate::scheme::{Precision, Scheme};

/// Precisions of the table of memory.
const PRECISIONS: [Precision; 4] =
    [Precision::F32, Precision::F16, Precision::Int8, Precision::Int4];

/// What a source is.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// In words.
    pub what: String,
    /// Whether it can be compiled: no part is missing.
    pub complete: bool,
    /// Its parts.
    pub parts: Vec<Part>,
    /// Numbers by component; of a source that is not complete those of the parts that are there.
    pub parameters: Vec<Parameters>,
    /// Tensors that say again what others say.
    pub aliases: Tally,
    /// Tensors that nothing computes with: buffers, CLIP's text tower, embeddings that the checkpoint replaces.
    pub unread: Tally,
    /// What it takes in memory; empty if it is not complete, or was not asked for.
    pub memory: Vec<Memory>,
}

/// A part of a source.
#[derive(Clone, Debug, Serialize)]
pub struct Part {
    /// `checkpoint`, `language_model` or `vision_encoder`.
    pub part: &'static str,
    /// File or folder.
    pub path: PathBuf,
    /// Tensors.
    pub tensors: usize,
    /// Numbers in them.
    pub values: u64,
    /// Bytes that they take.
    pub bytes: u64,
    /// Their element types.
    pub types: BTreeSet<String>,
    /// Why it is of no use: there is no such file, or what is wrong with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Numbers of a component.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Parameters {
    /// Which.
    pub component: Component,
    /// How many.
    #[serde(flatten)]
    pub count: Count,
}

/// How many tensors, with how many numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Tensors.
    pub tensors: usize,
    /// Numbers in them.
    pub values: u64,
}

/// What a model takes in memory at a precision.
#[derive(Clone, Debug, Serialize)]
pub struct Memory {
    /// The precision.
    pub precision: &'static str,
    /// Weights.
    pub weights_bytes: u64,
    /// Keys and values of as many tokens as a sequence may have.
    pub text_bytes: u64,
    /// Visual tokens, keys and values of as many pictures as a prompt may have.
    pub pictures_bytes: u64,
    /// Buffers that encode a picture and read a piece of a prompt.
    pub buffers_bytes: u64,
    /// The sum.
    pub total_bytes: u64,
    /// Devices that have that much beside what the runtime and the system take.
    pub fits: Vec<&'static str>,
}

impl Inspection {
    /// Of a source with all parts.
    pub fn of(source: &Source, graphs: &Graphs) -> Inspection {
        let used = source.used(graphs);
        let mut parts = Vec::new();
        let (mut aliases, mut unread) = (Tally::default(), Tally::default());
        for name in source.parts.names() {
            let Some(checkpoint) = source.parts.part(name) else { continue };
            parts.push(Part::of(name, checkpoint.path(), Some(Ok(checkpoint))));
            for info in checkpoint.infos() {
                let tensor = format!("{name}/{}", info.name);
                if !used.contains_key(&tensor) {
                    let tally = if is_alias(&tensor) { &mut aliases } else { &mut unread };
                    tally.add(info.n_values());
                }
            }
        }
        let family = source.config.family;
        let counted = used.iter().map(|(name, n)| (name.as_str(), *n));
        Inspection {
            what: family_name(family).to_owned(),
            complete: true,
            parts,
            parameters: parameters(family, counted),
            aliases,
            unread,
            memory: Vec::new(),
        }
    }

    /// The same with what the source takes in memory for prompts up to `limits`.
    ///
    /// # Errors
    /// A source that cannot be compiled.
    pub fn with_memory(self, source: &Source, limits: &Limits) -> Result<Inspection> {
        let memory = PRECISIONS.into_iter().map(|precision| Memory::of(source, precision, limits));
        Ok(Inspection { memory: memory.collect::<Result<_>>()?, ..self })
    }

    /// Of a source that lacks parts.
    pub fn of_survey(survey: &Survey) -> Inspection {
        let mut tensors: BTreeMap<String, u64> = BTreeMap::new();
        let mut aliases = Tally::default();
        let replaced: BTreeSet<&str> = survey
            .parts
            .iter()
            .filter_map(SurveyedPart::checkpoint)
            .flat_map(Checkpoint::infos)
            .filter_map(|info| info.name.strip_prefix("lang_encoder."))
            .collect();
        for (part, checkpoint) in
            survey.parts.iter().filter_map(|part| Some((part.part, part.checkpoint()?)))
        {
            for info in checkpoint.infos() {
                let name = format!("{part}/{}", info.name);
                if part == "language_model" && replaced.contains(info.name.as_str()) {
                    continue;
                }
                match is_alias(&name) {
                    true => aliases.add(info.n_values()),
                    false => drop(tensors.insert(name, info.n_values())),
                }
            }
        }
        let counted = tensors.iter().map(|(name, n)| (name.as_str(), *n));
        let parts = survey.parts.iter().map(|part| {
            let found = part.found.as_ref();
            Part::of(
                part.part,
                &part.path,
                found.map(|found| found.as_ref().map_err(String::as_str)),
            )
        });
        Inspection {
            what: survey.what.clone(),
            complete: false,
            parts: parts.collect(),
            parameters: survey.family.map_or_else(Vec::new, |family| parameters(family, counted)),
            aliases,
            unread: Tally::default(),
            memory: Vec::new(),
        }
    }

    /// All numbers that it computes with.
    pub fn total(&self) -> Count {
        let add = |sum: Count, own: &Parameters| Count {
            trained: sum.trained.saturating_add(own.count.trained),
            frozen: sum.frozen.saturating_add(own.count.frozen),
        };
        self.parameters.iter().fold(Count::default(), add)
    }
}

impl Part {
    fn of(part: &'static str, path: &Path, found: Option<Result<&Checkpoint, &str>>) -> Part {
        let (checkpoint, problem) = match found {
            None => (None, Some("missing".to_owned())),
            Some(Err(problem)) => (None, Some(problem.to_owned())),
            Some(Ok(checkpoint)) => (Some(checkpoint), None),
        };
        let infos = || checkpoint.into_iter().flat_map(Checkpoint::infos);
        Part {
            part,
            path: path.to_owned(),
            tensors: infos().count(),
            values: infos().fold(0, |sum, info| sum.saturating_add(info.n_values())),
            bytes: infos().fold(0, |sum, info| sum.saturating_add(info.n_bytes())),
            types: infos().map(|info| info.dtype.to_string()).collect(),
            problem,
        }
    }
}

impl Tally {
    fn add(&mut self, values: u64) {
        self.tensors += 1;
        self.values = self.values.saturating_add(values);
    }
}

impl Memory {
    fn of(source: &Source, precision: Precision, limits: &Limits) -> Result<Memory> {
        let needs = Model::of_source(source, &Scheme::from(precision))?.needs()?;
        let Needs { weights, token, picture, buffers } = needs;
        let times =
            |bytes: u64, n: usize| bytes.saturating_mul(u64::try_from(n).unwrap_or(u64::MAX));
        let text_bytes = times(token, limits.max_context);
        let pictures_bytes = times(picture, limits.max_images);
        let all = [weights, text_bytes, pictures_bytes, buffers];
        let fits = DEVICES.iter().filter(|device| needs.on(limits, device).fits());
        Ok(Memory {
            precision: precision.name(),
            weights_bytes: weights,
            text_bytes,
            pictures_bytes,
            buffers_bytes: buffers,
            total_bytes: all.into_iter().fold(0, u64::saturating_add),
            fits: fits.map(|device| device.name).collect(),
        })
    }
}

fn parameters<'n>(
    family: Family,
    tensors: impl Iterator<Item = (&'n str, u64)>,
) -> Vec<Parameters> {
    let counts = Count::of(family, tensors);
    counts.into_iter().map(|(component, count)| Parameters { component, count }).collect()
}

fn family_name(family: Family) -> &'static str {
    match family {
        Family::OpenFlamingo => "an OpenFlamingo",
        Family::Idefics => "an IDEFICS-1",
        Family::Otter => "an Otter",
        Family::FlamingoPytorch => "a FlamingoPaLM of flamingo-pytorch",
    }
}
