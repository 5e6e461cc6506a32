//! ONNX form of graphs: [`write_onnx`] and [`read_onnx`]; [`list_nodes`] lists what any file has.
//!
//! A file holds one stage's runtime part. Values known at build time are initializers that
//! point into one file of weights; each function op is a node of domain `flamingo` whose
//! definition is stored in the file, so that any ONNX reader can execute it.

mod cuda;
mod function;
mod inline;
mod listing;
mod lower;
mod message;
mod name;
mod node;
#[expect(unreachable_pub, clippy::enum_variant_names, reason = "generated code")]
mod proto;
mod read;
mod scan;
mod target;
mod typing;
mod write;

use std::collections::BTreeMap;

pub use inline::{inline_functions, inline_typed, linears_of_panels};
pub use listing::{ListedInput, ListedNode, ListedValue, Listing, list_nodes};
pub use read::read_onnx;
pub use typing::{Island, Islands, Typing};
pub use write::{graph_of_flavour, typed_graph, write_graph, write_onnx};

use crate::op::Flavour;
use crate::{DType, GraphError, ValueId, Verified};

/// Domain of function ops.
const FLAMINGO: &str = "flamingo";

/// Literals up to this size may be stored in the file itself.
pub const MAX_INLINE_BYTES: usize = 1024;

/// Where a build-time value is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightEntry {
    /// Name of the initializer.
    pub name: String,
    /// First byte in the weight file.
    pub offset: u64,
    /// Size in bytes.
    pub length: u64,
}

/// Where build-time values live.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct WeightLayout {
    /// Path of the weight file, relative to the ONNX file's folder, with `/`, without `..`:
    /// ONNX readers refuse external data outside the model's folder.
    pub location: String,
    /// Place of each build-time value that a runtime node reads or that is an output;
    /// literals of i64 or of at most [`MAX_INLINE_BYTES`] need none.
    pub entries: BTreeMap<ValueId, WeightEntry>,
}

/// Whether function ops stay functions in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Functions {
    /// Nodes of domain `flamingo` with their definitions in the file.
    #[default]
    Keep,
    /// Ordinary nodes only, for readers without functions.
    Inline,
}

/// What [`write_onnx`] writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// Which operators definitions may use.
    pub flavour: Flavour,
    /// Whether function ops stay functions.
    pub functions: Functions,
}

impl From<Flavour> for WriteOptions {
    fn from(flavour: Flavour) -> WriteOptions {
        WriteOptions { flavour, functions: Functions::Keep }
    }
}

/// What [`read_onnx`] accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadLimits {
    /// Largest file, in bytes.
    pub max_bytes: usize,
    /// Most fields of all messages together.
    pub max_fields: usize,
    /// Largest known size of a dimension.
    pub max_dim: usize,
    /// Largest rank.
    pub max_rank: usize,
}

impl Default for ReadLimits {
    fn default() -> ReadLimits {
        ReadLimits { max_bytes: 64 << 20, max_fields: 500_000, max_dim: 1 << 24, max_rank: 8 }
    }
}

/// A file as a graph.
#[derive(Clone, Debug, PartialEq)]
pub struct ReadModel {
    /// The runtime graph; its weights are the file's external initializers.
    pub graph: Verified,
    /// The flavour of its definitions.
    pub flavour: Flavour,
    /// Path of the weight file, relative to the ONNX file's folder and inside it; empty if the
    /// graph has no weights.
    pub location: String,
    /// Place of each weight, by name. The length is that of the weight's fact; whether the
    /// weight file is long enough is for the caller to check.
    pub weights: BTreeMap<String, WeightPlace>,
}

/// Where a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightPlace {
    /// Element type.
    pub dtype: DType,
    /// First byte in the weight file.
    pub offset: u64,
    /// Size in bytes; `offset + length` does not overflow.
    pub length: u64,
}

/// Why a graph cannot be written, or a file cannot be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OnnxError {
    /// The graph, or one that the file describes, is broken.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// Build-time values that runtime nodes read have no place.
    #[error("build-time values without a place in the weight file: {}", .0.join(", "))]
    MissingWeights(Vec<String>),
    /// A weight's place does not fit its value.
    #[error("initializer \"{name}\": expected {expected}, got {found}")]
    Weight {
        /// Name of the initializer.
        name: String,
        /// What would fit.
        expected: String,
        /// What came.
        found: String,
    },
    /// The weight file's path is not one inside the ONNX file's folder.
    #[error("weight file `{0}`: expected a relative path with `/`, without `..`")]
    Location(String),
    /// Two values of the file would have the same name.
    #[error("graph \"{graph}\": two values are called \"{name}\"")]
    Name {
        /// The graph or function.
        graph: String,
        /// The name.
        name: String,
    },
    /// A target shape cannot be expressed.
    #[error("node \"{node}\": dimension `{dim}` is of no value before it")]
    Dim {
        /// The node.
        node: String,
        /// The dimension.
        dim: String,
    },
    /// An op that is evaluated when an artifact is made reads a value that is not known then.
    #[error("node \"{node}\" ({op}): is for build time, but reads a value of the device")]
    BuildTime {
        /// The node.
        node: String,
        /// The op's name.
        op: &'static str,
    },
    /// The file does not have the form that this program writes.
    #[error("{place}: expected {expected}, got {found}")]
    Malformed {
        /// Where in the file.
        place: String,
        /// What would fit.
        expected: String,
        /// What came.
        found: String,
    },
    /// Operators or attributes that no op has: all of them.
    #[error("unknown operators or attributes: {}", .0.join("; "))]
    Unknown(Vec<String>),
    /// The file differs from what this version writes for the same graph.
    #[error("{place}: written by another version or altered\n\nhint: compile the artifact again")]
    Altered {
        /// Where in the file.
        place: String,
    },
}
