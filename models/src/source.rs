//! A model's files, opened: which parts there are, and every tensor by part and name.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use flamingo_ir::{DType, Dim, Fact, Graph, Tensor, ValueId, Weights};

use crate::checkpoint::{Checkpoint, CheckpointError, TensorInfo};

/// Why a source cannot be turned into a model.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A checkpoint is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A config or recipe is wrong.
    #[error("{path}: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// Place, expected, found, hint.
        reason: String,
    },
    /// Tensors are missing, of another shape, or left over; all of them.
    #[error("{}", list_problems(.0))]
    Weights(Vec<WeightProblem>),
    /// The graph builder refused.
    #[error(transparent)]
    Graph(#[from] flamingo_ir::GraphError),
}

/// What is wrong with one tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum WeightProblem {
    /// It is in no file.
    Missing {
        /// Part and name.
        name: String,
        /// Shape the model needs.
        expected: Vec<usize>,
    },
    /// It has another shape.
    Shape {
        /// Part and name.
        name: String,
        /// Shape the model needs.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// It is in a file and no part of the model uses it.
    Unused {
        /// Part and name.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
    },
}

fn list_problems(problems: &[WeightProblem]) -> String {
    let line = |problem: &WeightProblem| match problem {
        WeightProblem::Missing { name, expected } => format!("  missing `{name}` {expected:?}"),
        WeightProblem::Shape { name, expected, found } => {
            format!("  shape of `{name}`: expected {expected:?}, got {found:?}")
        }
        WeightProblem::Unused { name, found } => format!("  unused `{name}` {found:?}"),
    };
    let lines: Vec<String> = problems.iter().map(line).collect();
    format!(
        "{} weights do not fit the model:\n{}\n\nhint: check that the recipe names the language model and \
         vision encoder that the checkpoint was trained with",
        problems.len(),
        lines.join("\n")
    )
}

/// Bytes of a tensor after which the memory of what was read is given back.
const LARGE_TENSOR: usize = 1 << 20;

/// The checkpoints of a model by part: `checkpoint`, `language_model`, `vision_encoder`.
pub struct Parts {
    parts: Vec<(&'static str, Checkpoint)>,
}

impl Parts {
    /// Opens each part's file or folder.
    pub fn open(files: &[(&'static str, PathBuf)]) -> Result<Parts, SourceError> {
        let open = |(part, path): &(&'static str, PathBuf)| Ok((*part, Checkpoint::open(path)?));
        Ok(Parts { parts: files.iter().map(open).collect::<Result<_, SourceError>>()? })
    }

    /// The tensor `part/key`.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        let (part, key) = name.split_once('/')?;
        self.part(part)?.get(key)
    }

    /// All tensors of a part.
    pub fn infos(&self, part: &str) -> impl Iterator<Item = &TensorInfo> {
        self.part(part).into_iter().flat_map(Checkpoint::infos)
    }

    /// All files, for provenance.
    pub fn files(&self) -> Vec<&Path> {
        let files = self.parts.iter().flat_map(|(_, checkpoint)| checkpoint.files());
        files.map(PathBuf::as_path).collect()
    }

    /// Names of the parts, in opening order.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.parts.iter().map(|(name, _)| *name)
    }

    /// The file or folder of a part, opened.
    pub fn part(&self, part: &str) -> Option<&Checkpoint> {
        self.parts.iter().find(|(name, _)| *name == part).map(|(_, checkpoint)| checkpoint)
    }
}

impl Weights for Parts {
    fn tensor(&self, name: &str) -> Result<Tensor, String> {
        let found = name.split_once('/').and_then(|(part, key)| Some((self.part(part)?, key)));
        let (checkpoint, key) = found.ok_or_else(|| format!("weight `{name}` has no part"))?;
        let info = checkpoint.get(key).ok_or_else(|| format!("no weight `{name}`"))?;
        let bytes = checkpoint.bytes(key).map_err(|error| error.to_string())?;
        let tensor = Tensor::from_le_bytes(info.dtype, &info.shape, &bytes);
        if bytes.len() >= LARGE_TENSOR {
            // It was copied: one tensor at a time is in memory, not all that were ever read.
            checkpoint.release();
        }
        tensor.map_err(|e| format!("`{name}`: {e}"))
    }
}

/// Hands weights to graph builders, and keeps account of what was used and what was wrong.
pub(crate) struct Binder<'a> {
    parts: &'a Parts,
    used: BTreeSet<String>,
    problems: Vec<WeightProblem>,
}

impl<'a> Binder<'a> {
    /// Nothing used yet.
    pub(crate) fn new(parts: &'a Parts) -> Binder<'a> {
        Binder { parts, used: BTreeSet::new(), problems: Vec::new() }
    }

    /// Whether a tensor of this name exists.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.parts.get(name).is_some()
    }

    /// Shape of the tensor `name`, if it exists.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.parts.get(name).map(|info| info.shape.as_slice())
    }

    /// The first of `names` that exists; the last one if none does.
    pub(crate) fn first<'n>(&self, names: &[&'n str]) -> &'n str {
        let found = names.iter().find(|name| self.has(name));
        found.or(names.last()).copied().unwrap_or("")
    }

    /// The float tensor `name` as a value of `graph`. A missing tensor or another shape is
    /// remembered, and the value is made all the same, so that all problems are found at once.
    pub(crate) fn weight(&mut self, graph: &mut Graph, name: &str, shape: &[usize]) -> ValueId {
        self.used.insert(name.to_owned());
        match self.parts.get(name) {
            None => self
                .problems
                .push(WeightProblem::Missing { name: name.to_owned(), expected: shape.to_vec() }),
            Some(info) if info.shape != shape => self.problems.push(WeightProblem::Shape {
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: info.shape.clone(),
            }),
            Some(_) => {}
        }
        graph.weight(name, Fact::new(DType::F32, shape.iter().map(|size| Dim::from(*size))))
    }

    /// Counts `name` as used although no graph reads it (an alias of another tensor).
    pub(crate) fn alias(&mut self, name: &str) {
        self.used.insert(name.to_owned());
    }

    /// Ends the binding: every tensor must have been used, or be `ignorable`.
    pub(crate) fn finish(mut self, ignorable: &dyn Fn(&str) -> bool) -> Result<(), SourceError> {
        for part in self.parts.names() {
            for info in self.parts.infos(part) {
                let name = format!("{part}/{}", info.name);
                if !self.used.contains(&name) && !ignorable(&name) {
                    self.problems.push(WeightProblem::Unused { name, found: info.shape.clone() });
                }
            }
        }
        self.problems.dedup();
        match self.problems.is_empty() {
            true => Ok(()),
            false => Err(SourceError::Weights(self.problems)),
        }
    }
}
