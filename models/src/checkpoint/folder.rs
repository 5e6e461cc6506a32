//! Hugging Face folders: one weight file, or an index and its shards.

use std::{
    collections::BTreeMap,
    fs,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

use super::{Format, error::CheckpointError, json::Entries};

/// Weight files and indices of a Hugging Face folder, in the order in which the first existing one wins.
pub const WEIGHT_FILES: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The weight files of a folder.
#[derive(Debug)]
pub(super) struct Weights {
    pub(super) format: Format,
    /// Index file, where there is one.
    pub(super) index: Option<PathBuf>,
    /// Weight files with the tensors that the index promises in each.
    pub(super) shards: Vec<(PathBuf, Vec<String>)>,
}

/// Finds the weights of `folder`.
pub(super) fn find(folder: &Path) -> Result<Weights, CheckpointError> {
    let Some(name) = WEIGHT_FILES.iter().find(|name| folder.join(name).is_file()) else {
        return Err(CheckpointError::NoWeights { folder: folder.into(), expected: &WEIGHT_FILES });
    };
    let path = folder.join(name);
    let format = if name.contains("safetensors") { Format::Safetensors } else { Format::TorchZip };
    if !name.ends_with(".json") {
        return Ok(Weights { format, index: None, shards: vec![(path, Vec::new())] });
    }
    let shards = shards(folder, &path)?;
    Ok(Weights { format, index: Some(path), shards })
}

#[derive(Deserialize)]
struct Index {
    weight_map: Entries<String>,
}

/// Names of the shards of an index; every one a plain file name.
///
/// # Errors
/// An index that is missing, too large or broken.
pub fn shard_names(index: &Path) -> Result<Vec<String>, CheckpointError> {
    let folder = index.parent().unwrap_or(Path::new(""));
    let name = |(path, _): (PathBuf, Vec<String>)| {
        path.file_name().map(|name| name.to_string_lossy().into_owned())
    };
    Ok(shards(folder, index)?.into_iter().filter_map(name).collect())
}

/// The shards of an index, by name; every one a plain file name inside the folder.
fn shards(folder: &Path, index: &Path) -> Result<Vec<(PathBuf, Vec<String>)>, CheckpointError> {
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in read_index(index)?.weight_map.0 {
        if !is_plain_name(&shard) {
            return Err(CheckpointError::ShardName { file: index.into(), shard });
        }
        shards.entry(shard).or_default().push(tensor);
    }
    for tensors in shards.values_mut() {
        tensors.sort_unstable();
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0] == pair[1]) {
            let tensor = pair[0].clone();
            return Err(CheckpointError::Duplicate { file: index.into(), tensor });
        }
    }
    Ok(shards.into_iter().map(|(shard, tensors)| (folder.join(shard), tensors)).collect())
}

fn read_index(index: &Path) -> Result<Index, CheckpointError> {
    let open = |source| CheckpointError::Open { file: index.into(), source };
    let size = fs::metadata(index).map_err(open)?.len();
    if size > MAX_INDEX_BYTES {
        let detail = format!("expected at most {MAX_INDEX_BYTES} bytes of index, found {size}");
        return Err(CheckpointError::Index { file: index.into(), detail });
    }
    let json = fs::read(index).map_err(open)?;
    serde_json::from_slice(&json)
        .map_err(|e| CheckpointError::Index { file: index.into(), detail: e.to_string() })
}

/// Whether `name` is one plain path component on every platform.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(components.next(), Some(Component::Normal(first)) if first == name)
        && components.next().is_none()
        && !name.contains(['/', '\\', ':', '\0'])
}

#[cfg(test)]
mod tests {
    use super::is_plain_name;

    #[test]
    fn only_plain_names_are_shards() {
        assert!(is_plain_name("model-00001-of-00002.safetensors"));
        for name in ["", ".", "..", "../x", "a/b", "/x", "a\\b", "c:x", "x/", "./x", "a\0"] {
            assert!(!is_plain_name(name), "{name}");
        }
    }
}
