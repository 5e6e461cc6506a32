//! The artifact's manifest: everything the runtime must know without the checkpoint.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::ModelConfig;
use crate::image_spec::ImageSpec;

/// Schema of manifests that this version writes and reads.
pub const SCHEMA_VERSION: u32 = 1;

/// The one layout of packed weights: panels of 16 rows. Weights of f32 are row-major.
pub const WEIGHT_LAYOUT: &str = "panel16";

/// `manifest.json` of an artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// Version of flamingoc that wrote the artifact.
    pub compiler_version: String,
    /// The model.
    pub config: ModelConfig,
    /// How pictures become pixel values.
    pub image: ImageSpec,
    /// Limits the artifact was planned for.
    pub limits: Limits,
    /// How the weights of each layer group (`vision`, `resampler`, `media`, `language`, `gated`,
    /// `embedding`, `head`) are stored: `f32`, `f16`, `bf16`, `int8` or `int4/BLOCK`; joined by `+`
    /// where a group has several.
    pub precision: BTreeMap<String, String>,
    /// How packed weights lie in the file: [`WEIGHT_LAYOUT`].
    #[serde(default)]
    pub weight_layout: String,
    /// Graphs by stage and flavour.
    pub graphs: Vec<GraphEntry>,
    /// Every other file, with size and hash, sorted by path.
    pub files: Vec<FileEntry>,
    /// Where the artifact comes from.
    pub provenance: Provenance,
}

/// Limits of prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Most tokens of a sequence.
    pub max_context: usize,
    /// Most pictures and videos of a prompt.
    pub max_images: usize,
}

/// One graph file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GraphEntry {
    /// `media` or `decoder`.
    pub stage: String,
    /// Flavour of the definitions.
    pub flavour: String,
    /// File, relative to the artifact.
    pub path: String,
    /// Inputs in order.
    pub inputs: Vec<TensorEntry>,
    /// Outputs in order.
    pub outputs: Vec<TensorEntry>,
}

/// Name, element type and shape of an input or output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Name.
    pub name: String,
    /// Element type, `f32`.
    pub dtype: String,
    /// Dimensions: sizes, symbols and sums of products of them.
    pub shape: Vec<String>,
}

/// A file with what tells whether it is whole.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileEntry {
    /// Path, relative to the artifact (or, of a source, its file name).
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// BLAKE3 hash of the content, hexadecimal.
    pub blake3: String,
}

/// Source files and options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Checkpoint files.
    pub sources: Vec<FileEntry>,
    /// Options that changed the result.
    pub options: BTreeMap<String, String>,
}

impl Manifest {
    /// The graph of a stage in a flavour.
    pub fn graph(&self, stage: &str, flavour: &str) -> Option<&GraphEntry> {
        self.graphs.iter().find(|graph| graph.stage == stage && graph.flavour == flavour)
    }
}
