//! Checkpoints: named tensors in files of other people's making, read lazily from a map.
//!
//! [`Checkpoint::open`] reads headers only; [`Checkpoint::bytes`] gives the elements of one
//! tensor, borrowed from the file wherever they are contiguous there. Nothing in a checkpoint
//! is executed: pickles pass through a restricted reader that knows tensors and containers.
#![deny(clippy::as_conversions)]

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use flamingo_ir::DType;

use crate::map::MappedFile;

mod error;
mod folder;
mod json;
mod names;
mod pickle;
mod safetensors;
mod torch_zip;
mod view;

pub use error::{CheckpointError, PickleError};
pub use folder::{WEIGHT_FILES, shard_names};
use view::View;

/// A view may be this many times larger than its storage …
const MAX_EXPANSION: usize = 8;
/// … and this many bytes more.
const EXPANSION_SLACK_BYTES: usize = 1 << 20;
/// Bytes of a tensor from which on the disk is asked for it, and for what comes after it, at once.
const READ_AHEAD_FROM: usize = 1 << 20;
/// Bytes after a tensor that are asked for with it: tensors are mostly read in the order of their file.
const READ_AHEAD: usize = 128 << 20;

/// Name, element type and shape of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Flat state-dict name: `perceiver.layers.0.1.1.weight`.
    pub name: String,
    /// Element type in the file.
    pub dtype: DType,
    /// Sizes of the dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// How many numbers it has.
    pub fn n_values(&self) -> u64 {
        let sizes = self.shape.iter().map(|size| u64::try_from(*size).unwrap_or(u64::MAX));
        sizes.fold(1, u64::saturating_mul)
    }

    /// How many bytes they take.
    pub fn n_bytes(&self) -> u64 {
        self.n_values().saturating_mul(u64::try_from(self.dtype.size()).unwrap_or(u64::MAX))
    }
}

/// An open checkpoint: a set of named tensors in memory-mapped files.
///
/// The files must not be truncated or rewritten in place while the checkpoint is open.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// All files read, in order; indices before their shards.
    files: Vec<PathBuf>,
    /// The weight files.
    maps: Vec<(PathBuf, MappedFile)>,
    /// Sorted by name; names are unique.
    entries: Vec<Entry>,
}

/// A tensor and where it lies.
#[derive(Debug)]
struct Entry {
    info: TensorInfo,
    source: Source,
}

/// Where a tensor lies: a view of a storage of a file. Bounds were checked on opening.
#[derive(Debug)]
struct Source {
    /// Index into [`Checkpoint::maps`].
    file: usize,
    storage: Storage,
    view: View,
}

/// A run of bytes in a file.
#[derive(Clone, Copy, Debug)]
struct Storage {
    /// First byte in the file.
    start: usize,
    /// Bytes, after decompression; inside the file where not compressed.
    size: usize,
    /// Index of the zip entry, where that is compressed.
    compressed: Option<usize>,
}

/// Formats of weight files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Safetensors,
    TorchZip,
}

impl Checkpoint {
    /// Opens a weight file or a Hugging Face folder and checks all headers.
    ///
    /// `path` is a `.safetensors` file, a `.pt`, `.pth` or `.bin` file as `torch.save` or
    /// `torch.jit.save` writes it, or a folder with (in this order) `model.safetensors`,
    /// `model.safetensors.index.json`, `pytorch_model.bin` or `pytorch_model.bin.index.json`.
    ///
    /// Names are those of the state dict: a training checkpoint's `model_state_dict`,
    /// `state_dict` or `model` is entered, its siblings ignored, and `module.` stripped where
    /// all names begin so; other nested containers and TorchScript modules give dotted paths.
    ///
    /// # Errors
    /// Files that are missing, broken, of unknown format, that name anything but tensors and
    /// containers in a pickle, have tensors outside their storage, twice, or of an element type
    /// that [`DType`] lacks.
    pub fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
        let weights = if path.is_dir() { folder::find(path)? } else { single_file(path)? };
        let mut checkpoint = Checkpoint {
            path: path.into(),
            files: weights.index.iter().cloned().collect(),
            maps: Vec::new(),
            entries: Vec::new(),
        };
        for (file, promised) in &weights.shards {
            let first = checkpoint.entries.len();
            checkpoint.read_file(file, weights.format)?;
            check_shard(&weights, file, promised, &checkpoint.entries[first..])?;
        }
        checkpoint.sort()?;
        Ok(checkpoint)
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors, sorted by name.
    pub fn infos(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.entries.iter().map(|entry| &entry.info)
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.find(name).map(|entry| &entry.info)
    }

    /// Elements of the tensor called `name`: row-major, little-endian, without gaps; of no
    /// particular alignment.
    ///
    /// Borrowed from the file where they lie there like this; copied where the tensor is a
    /// strided view or its file entry is compressed.
    ///
    /// # Errors
    /// No such tensor; a broken compressed entry; a tensor expanded from a storage so small
    /// that copying it would waste memory.
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let unknown = || CheckpointError::Unknown { path: self.path.clone(), tensor: name.into() };
        let Entry { info, source } = self.find(name).ok_or_else(unknown)?;
        let (file, map) = &self.maps[source.file];
        let size = self.bounded_size(file, info, source)?;
        if size >= READ_AHEAD_FROM {
            map.will_need(source.storage.start, source.storage.size.saturating_add(READ_AHEAD));
        }
        let storage = source.storage.bytes(file, map.bytes())?;
        if !source.view.is_contiguous() {
            return Ok(Cow::Owned(source.view.gather(&storage, info.dtype.size())));
        }
        let start = if size == 0 { 0 } else { source.view.offset * info.dtype.size() };
        Ok(match storage {
            Cow::Borrowed(storage) => Cow::Borrowed(&storage[start..][..size]),
            Cow::Owned(storage) if storage.len() == size => Cow::Owned(storage),
            Cow::Owned(storage) => Cow::Owned(storage[start..][..size].to_vec()),
        })
    }

    /// Gives back the memory that tensors took when they were read; those that are read again come from the files.
    pub fn release(&self) {
        self.maps.iter().for_each(|(_, map)| map.release());
    }

    /// All files read, for provenance: the index where there is one, then the weight files.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    fn find(&self, name: &str) -> Option<&Entry> {
        let found = self.entries.binary_search_by(|entry| entry.info.name.as_str().cmp(name));
        found.ok().map(|idx| &self.entries[idx])
    }

    fn read_file(&mut self, file: &Path, format: Format) -> Result<(), CheckpointError> {
        let open = |source| CheckpointError::Open { file: file.into(), source };
        let map = MappedFile::open(file).map_err(open)?;
        let mut entries = match format {
            Format::Safetensors => safetensors::read(file, map.bytes())?,
            Format::TorchZip => torch_zip::read(file, map.bytes())?,
        };
        for entry in &mut entries {
            entry.source.file = self.maps.len();
        }
        self.entries.append(&mut entries);
        self.maps.push((file.into(), map));
        self.files.push(file.into());
        Ok(())
    }

    fn sort(&mut self) -> Result<(), CheckpointError> {
        self.entries.sort_by(|a, b| a.info.name.cmp(&b.info.name));
        for pair in self.entries.windows(2) {
            if pair[0].info.name == pair[1].info.name {
                let file = self.maps[pair[1].source.file].0.clone();
                return Err(CheckpointError::Duplicate { file, tensor: pair[1].info.name.clone() });
            }
        }
        Ok(())
    }

    /// Bytes of the contiguous tensor.
    fn bounded_size(
        &self,
        file: &Path,
        info: &TensorInfo,
        source: &Source,
    ) -> Result<usize, CheckpointError> {
        let storage_bytes = source.storage.size;
        let limit =
            storage_bytes.saturating_mul(MAX_EXPANSION).saturating_add(EXPANSION_SLACK_BYTES);
        let n_elements = source.view.n_elements().unwrap_or(usize::MAX);
        let size = n_elements.saturating_mul(info.dtype.size());
        if size > limit {
            let (file, tensor) = (file.into(), info.name.clone());
            return Err(CheckpointError::Expanded { file, tensor, size, storage_bytes, limit });
        }
        Ok(size)
    }
}

impl Storage {
    /// Content, out of the `bytes` of the whole `file`.
    fn bytes<'a>(&self, file: &Path, bytes: &'a [u8]) -> Result<Cow<'a, [u8]>, CheckpointError> {
        match self.compressed {
            None => Ok(Cow::Borrowed(&bytes[self.start..][..self.size])),
            Some(index) => torch_zip::decompress(file, bytes, index, self.size).map(Cow::Owned),
        }
    }
}

fn single_file(path: &Path) -> Result<folder::Weights, CheckpointError> {
    let format = match path.extension().and_then(|extension| extension.to_str()) {
        Some("safetensors") => Format::Safetensors,
        Some("pt" | "pth" | "bin") => Format::TorchZip,
        _ => return Err(CheckpointError::Extension { file: path.into() }),
    };
    Ok(folder::Weights { format, index: None, shards: vec![(path.into(), Vec::new())] })
}

/// Checks that a shard holds what the index promises.
fn check_shard(
    weights: &folder::Weights,
    file: &Path,
    promised: &[String],
    entries: &[Entry],
) -> Result<(), CheckpointError> {
    let mut found: Vec<&str> = entries.iter().map(|entry| entry.info.name.as_str()).collect();
    found.sort_unstable();
    let is_missing = |tensor: &&String| found.binary_search(&tensor.as_str()).is_err();
    let tensors: Vec<String> = promised.iter().filter(is_missing).cloned().collect();
    if tensors.is_empty() {
        return Ok(());
    }
    let index = weights.index.clone().unwrap_or_else(|| file.into());
    let shard = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Err(CheckpointError::Shard { file: index, shard, tensors })
}

#[cfg(test)]
mod tests;
