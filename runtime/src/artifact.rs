//! Artifacts on disk: checked manifest, mapped weights, graphs.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::{panic, thread};

use flamingo_ir::onnx::{OnnxError, ReadLimits, ReadModel, WeightPlace, read_onnx};
use flamingo_ir::{DType, Verified};
use flamingo_models::manifest::{FileEntry, GraphEntry, Manifest, SCHEMA_VERSION};
use flamingo_models::map::MappedFile;
use flamingo_models::profile::Profiles;

use crate::backend::WeightBytes;
use crate::engines::{BuiltWith, gpu, hash_of};
use crate::session::PREFILL_TOKENS;

/// Largest manifest that is read, in bytes.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// Why an artifact cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArtifactError {
    /// A file cannot be read.
    #[error("{path}: {source}\n\nhint: {hint}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// The manifest is not one.
    #[error("{path}: {reason}\n\nhint: compile the artifact again")]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Place, expected, found.
        reason: String,
    },
    /// The artifact was written by a newer version.
    #[error(
        "{path}: schema version: expected up to {SCHEMA_VERSION}, got {found}\n\n\
         hint: this artifact was written by a newer flamingoc; update this program, or compile again with this version"
    )]
    Schema {
        /// The manifest.
        path: PathBuf,
        /// Its schema version.
        found: u64,
    },
    /// Files differ from the manifest; all of them.
    #[error("{path}: files differ from the manifest:\n  {}\n\nhint: copy the artifact again", .problems.join("\n  "))]
    Files {
        /// The artifact.
        path: PathBuf,
        /// Each file with what was expected and found.
        problems: Vec<String>,
    },
    /// A graph cannot be read.
    #[error("{path}: {}", with_hint(source.as_ref()))]
    Graph {
        /// The graph's file.
        path: PathBuf,
        /// The reason.
        source: Box<OnnxError>,
    },
}

/// The error with what to do, if it does not say so itself.
fn with_hint(error: &OnnxError) -> String {
    let text = error.to_string();
    let hint = "copy the artifact again, or compile it again with this version";
    if text.contains("\n\nhint: ") { text } else { format!("{text}\n\nhint: {hint}") }
}

/// An opened artifact.
pub struct Artifact {
    /// Its folder.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
}

impl Artifact {
    /// Reads the manifest and checks every file's size; with `verify` also its hash.
    ///
    /// # Errors
    /// A missing or broken manifest, a newer schema, files that are missing or differ.
    pub fn open(path: &Path, verify: bool) -> Result<Artifact, ArtifactError> {
        let manifest = read_manifest(&path.join("manifest.json"))?;
        let mut problems = Vec::new();
        for entry in &manifest.files {
            if let Some(problem) = check_file(path, entry, verify) {
                problems.push(problem);
            }
        }
        match problems.is_empty() {
            true => Ok(Artifact { path: path.to_owned(), manifest }),
            false => Err(ArtifactError::Files { path: path.to_owned(), problems }),
        }
    }

    /// The file of a graph.
    ///
    /// # Errors
    /// If the artifact has no such graph.
    pub fn graph_path(&self, stage: &str, flavour: &str) -> Result<PathBuf, ArtifactError> {
        self.graph(stage, flavour).map(|graph| self.path.join(&graph.path))
    }

    /// A graph as the manifest describes it; its path is inside the artifact.
    fn graph(&self, stage: &str, flavour: &str) -> Result<&GraphEntry, ArtifactError> {
        let missing = || {
            let of_stage = self.manifest.graphs.iter().filter(|graph| graph.stage == stage);
            let mut found: Vec<&str> = of_stage.map(|graph| graph.flavour.as_str()).collect();
            if found.is_empty() {
                found.push("none");
            }
            ArtifactError::Manifest {
                path: self.path.join("manifest.json"),
                reason: format!(
                    "expected a {stage} graph of flavour `{flavour}`, found {}; compile for it with `--target`",
                    found.join(", ")
                ),
            }
        };
        let graph = self.manifest.graph(stage, flavour);
        graph.filter(|graph| inside(&graph.path)).ok_or_else(missing)
    }

    /// The sizes for which TensorRT builds engines of a flavour's graphs.
    ///
    /// # Errors
    /// If the artifact has no such graphs, or a symbol that this version does not know.
    pub fn profiles(&self, flavour: &str) -> Result<Profiles, ArtifactError> {
        let (media, decoder) = (self.graph("media", flavour)?, self.graph("decoder", flavour)?);
        let profiles = Profiles::new(media, decoder, &self.manifest.limits, PREFILL_TOKENS);
        let path = || self.path.join("manifest.json");
        profiles.map_err(|reason| ArtifactError::Manifest { path: path(), reason })
    }

    /// What engines of a flavour's graphs depend on, as far as artifact and machine tell.
    ///
    /// # Errors
    /// If the artifact has no such graphs, or they cannot be read.
    pub fn built_with(&self, flavour: &str) -> Result<BuiltWith, ArtifactError> {
        let files = [self.graph_path("media", flavour)?, self.graph_path("decoder", flavour)?];
        let profiles = format!("{:?}", self.profiles(flavour)?);
        let graphs = hash_of(&[&files[0], &files[1]], &profiles).map_err(|source| {
            ArtifactError::Io { path: files[0].clone(), source, hint: "copy the artifact again" }
        })?;
        Ok(BuiltWith {
            flavour: flavour.to_owned(),
            graphs,
            tensorrt: None,
            gpu: gpu(Path::new("/")),
            provider: None,
        })
    }

    /// Reads the media and the decoder graph, and maps the weights they share.
    ///
    /// # Errors
    /// Graphs that cannot be read, or weights outside the weight file.
    pub fn load(&self) -> Result<LoadedGraphs, ArtifactError> {
        let read = |stage: &str| {
            let path = self.graph_path(stage, "portable")?;
            let hint = "copy the artifact again";
            let bytes = fs::read(&path).map_err(|source| ArtifactError::Io {
                path: path.clone(),
                source,
                hint,
            })?;
            let model = read_onnx(&bytes, &ReadLimits::default()).map_err(|source| {
                ArtifactError::Graph { path: path.clone(), source: source.into() }
            })?;
            Ok((path, model))
        };
        let (media, decoder) = both(|| read("media"), || read("decoder"));
        let mut places = BTreeMap::new();
        let mut location = PathBuf::new();
        let mut graph = |(path, model): (PathBuf, ReadModel)| {
            places.extend(model.weights);
            if !model.location.is_empty() {
                location = path.with_file_name(&model.location);
            }
            model.graph
        };
        let (media, decoder) = (graph(media?), graph(decoder?));
        let weights = MappedWeights::open(&location, places)?;
        Ok(LoadedGraphs { media, decoder, weights: Arc::new(weights) })
    }
}

/// What two closures give that run side by side.
pub(crate) fn both<A: Send, B>(
    one: impl FnOnce() -> A + Send,
    other: impl FnOnce() -> B,
) -> (A, B) {
    thread::scope(|scope| {
        let one = scope.spawn(one);
        let other = other();
        (one.join().unwrap_or_else(|panic| panic::resume_unwind(panic)), other)
    })
}

/// The graphs of an artifact with their weights.
pub struct LoadedGraphs {
    /// Pixels → visual tokens, keys and values.
    pub media: Verified,
    /// New tokens → logits.
    pub decoder: Verified,
    /// Weights of both.
    pub weights: Arc<MappedWeights>,
}

fn read_manifest(path: &Path) -> Result<Manifest, ArtifactError> {
    let hint = "an artifact is a folder with a manifest.json; make one with `flamingoc compile SOURCE -o DIR`";
    let io = |source| ArtifactError::Io { path: path.to_owned(), source, hint };
    let wrong = |reason: String| ArtifactError::Manifest { path: path.to_owned(), reason };
    let file = fs::File::open(path).map_err(io)?;
    let mut text = String::new();
    file.take(MAX_MANIFEST_BYTES + 1).read_to_string(&mut text).map_err(io)?;
    if text.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(wrong(format!("expected at most {MAX_MANIFEST_BYTES} bytes")));
    }
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    match value.get("schema_version").and_then(serde_json::Value::as_u64) {
        Some(found) if found > u64::from(SCHEMA_VERSION) => {
            return Err(ArtifactError::Schema { path: path.to_owned(), found });
        }
        Some(_) => {}
        None => return Err(wrong("`schema_version`: expected a number, got nothing".into())),
    }
    serde_json::from_value(value).map_err(|error| wrong(error.to_string()))
}

/// Whether a path stays in the artifact's folder.
fn inside(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)))
}

fn check_file(folder: &Path, entry: &FileEntry, verify: bool) -> Option<String> {
    let name = &entry.path;
    if !inside(name) {
        return Some(format!("`{name}`: the path leaves the artifact"));
    }
    let path = folder.join(name);
    match fs::symlink_metadata(&path) {
        Err(error) => return Some(format!("`{name}`: {error}")),
        Ok(metadata) if !metadata.is_file() => {
            return Some(format!("`{name}`: not a regular file"));
        }
        Ok(metadata) if metadata.len() != entry.bytes => {
            return Some(format!(
                "`{name}`: expected {} bytes, got {}",
                entry.bytes,
                metadata.len()
            ));
        }
        Ok(_) => {}
    }
    if !verify {
        return None;
    }
    let mut hasher = blake3::Hasher::new();
    let hashed = fs::File::open(&path).and_then(|file| hasher.update_reader(file).map(|_| ()));
    match hashed {
        Err(error) => Some(format!("`{name}`: {error}")),
        Ok(()) if hasher.finalize().to_hex().as_str() == entry.blake3 => None,
        Ok(()) => Some(format!("`{name}`: the content differs from its hash")),
    }
}

/// Weights in a memory map.
pub struct MappedWeights {
    file: Option<MappedFile>,
    places: BTreeMap<String, WeightPlace>,
}

impl MappedWeights {
    fn open(
        path: &Path,
        places: BTreeMap<String, WeightPlace>,
    ) -> Result<MappedWeights, ArtifactError> {
        if places.is_empty() {
            return Ok(MappedWeights { file: None, places });
        }
        let hint = "copy the artifact again";
        let io = |source| ArtifactError::Io { path: path.to_owned(), source, hint };
        let file = MappedFile::open(path).map_err(io)?;
        let size = file.bytes().len() as u64;
        let outside = places.iter().filter(|(_, place)| {
            place.offset.checked_add(place.length).is_none_or(|end| end > size)
        });
        let problems: Vec<String> = outside
            .map(|(name, place)| {
                format!("weight `{name}` at {} + {} of {size} bytes", place.offset, place.length)
            })
            .collect();
        match problems.is_empty() {
            true => Ok(MappedWeights { file: Some(file), places }),
            false => Err(ArtifactError::Files { path: path.to_owned(), problems }),
        }
    }

    /// Bytes of all weights.
    pub fn total_bytes(&self) -> u64 {
        self.places.values().map(|place| place.length).sum()
    }
}

impl WeightBytes for MappedWeights {
    fn bytes(&self, name: &str) -> Option<(DType, &[u8])> {
        let place = self.places.get(name)?;
        let start = usize::try_from(place.offset).ok()?;
        let end = start.checked_add(usize::try_from(place.length).ok()?)?;
        Some((place.dtype, self.file.as_ref()?.bytes().get(start..end)?))
    }

    fn release(&self) {
        if let Some(file) = &self.file {
            file.release();
        }
    }
}
