//! PyTorch's zip archives: `torch.save` since version 1.6, and TorchScript.
//!
//! An archive has one root folder of any name with `data.pkl` (the structure), `data/KEY` (one
//! storage each, usually uncompressed) and `byteorder`; TorchScript adds `constants.pkl` and
//! `code/`. Checksums of uncompressed storages are not verified: that would read whole files
//! to look at one tensor.

use std::{
    borrow::Cow,
    collections::HashMap,
    io::{Cursor, Read},
    path::Path,
};

use flamingo_ir::DType;
use zip::{CompressionMethod, ZipArchive};

use super::{
    Entry, Source, Storage, TensorInfo,
    error::CheckpointError,
    names,
    pickle::{self, Dialect, Element, MAX_PICKLE_BYTES, TensorRef, shorten},
};

/// First bytes of a zip archive with at least one entry.
const ZIP_MAGIC: &[u8] = b"PK\x03\x04";
/// A pickle of protocol 2, as the legacy format starts with.
const PICKLE_MAGIC: &[u8] = b"\x80\x02";
/// Deflate cannot shrink by more than this.
const MAX_DEFLATE_RATIO: u64 = 1032;

/// The tensors of the archive `bytes`, which is the content of `file`.
pub(super) fn read(file: &Path, bytes: &[u8]) -> Result<Vec<Entry>, CheckpointError> {
    let archive = Archive::open(file, bytes)?;
    archive.check_byte_order()?;
    let dialect = archive.dialect();
    let pickle_bytes = archive.small("data.pkl", MAX_PICKLE_BYTES)?;
    let unpickled = pickle::unpickle(&pickle_bytes, dialect)
        .map_err(|(offset, error)| CheckpointError::Pickle { file: file.into(), offset, error })?;
    let tensors = names::collect(&unpickled, dialect).map_err(|misfit| {
        let names::Misfit { place, expected, found } = misfit;
        CheckpointError::Structure { file: file.into(), place, expected, found }
    })?;
    tensors.into_iter().map(|(name, tensor)| archive.entry(name, tensor)).collect()
}

/// Decompresses the entry `index`, whose size was checked when the archive was opened.
pub(super) fn decompress(
    file: &Path,
    bytes: &[u8],
    index: usize,
    size: usize,
) -> Result<Vec<u8>, CheckpointError> {
    let broken = |detail: String| CheckpointError::Zip { file: file.into(), detail };
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| broken(e.to_string()))?;
    let entry = archive.by_index(index).map_err(|e| broken(e.to_string()))?;
    let limit = u64::try_from(size).unwrap_or(u64::MAX).saturating_add(1);
    let mut content = Vec::with_capacity(size);
    entry.take(limit).read_to_end(&mut content).map_err(|e| broken(e.to_string()))?;
    if content.len() != size {
        let found = content.len();
        return Err(broken(format!("entry {index}: expected {size} bytes, decompressed {found}")));
    }
    Ok(content)
}

struct Archive<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    /// Entries by full name.
    storages: HashMap<String, Storage>,
    /// Prefix of all names: the root folder with its slash.
    root: String,
}

impl<'a> Archive<'a> {
    fn open(file: &'a Path, bytes: &'a [u8]) -> Result<Archive<'a>, CheckpointError> {
        if bytes.starts_with(PICKLE_MAGIC) {
            return Err(CheckpointError::LegacyTorch { file: file.into() });
        }
        if !bytes.starts_with(ZIP_MAGIC) {
            let found = bytes.iter().take(4).copied().collect();
            return Err(CheckpointError::NotZip { file: file.into(), found });
        }
        let mut archive = Archive { file, bytes, storages: HashMap::new(), root: String::new() };
        let mut zip = ZipArchive::new(Cursor::new(bytes)).map_err(|e| archive.broken(e))?;
        for index in 0..zip.len() {
            let (name, storage) = archive.storage(&mut zip, index)?;
            archive.storages.insert(name, storage);
        }
        archive.root = archive.find_root()?;
        Ok(archive)
    }

    /// Place and size of an entry, both checked against the file.
    fn storage(
        &self,
        zip: &mut ZipArchive<Cursor<&[u8]>>,
        index: usize,
    ) -> Result<(String, Storage), CheckpointError> {
        let entry = zip.by_index_raw(index).map_err(|e| self.broken(e))?;
        let name = entry.name().to_string();
        let unfit = |expected: &str, found: String| self.unfit(&name, expected, found);
        if entry.encrypted() {
            return Err(unfit("no encryption", "an encrypted entry".into()));
        }
        let end = entry.data_start().checked_add(entry.compressed_size());
        let range = usize::try_from(entry.data_start())
            .ok()
            .zip(end.and_then(|end| usize::try_from(end).ok()));
        let Some((start, _)) = range.filter(|(_, end)| *end <= self.bytes.len()) else {
            let found = format!("{} bytes at {}", entry.compressed_size(), entry.data_start());
            return Err(unfit("an entry inside the file", found));
        };
        let limit = match entry.compression() {
            CompressionMethod::Stored => entry.compressed_size(),
            CompressionMethod::Deflated => {
                entry.compressed_size().saturating_mul(MAX_DEFLATE_RATIO)
            }
            method => return Err(unfit("an uncompressed or deflated entry", method.to_string())),
        };
        let size = usize::try_from(entry.size()).ok().filter(|_| entry.size() <= limit);
        let Some(size) = size else {
            return Err(unfit(
                &format!("at most {limit} bytes"),
                format!("{} bytes", entry.size()),
            ));
        };
        let compressed = (entry.compression() != CompressionMethod::Stored).then_some(index);
        Ok((name, Storage { start, size, compressed }))
    }

    /// The folder of the only `data.pkl` on the first or second level.
    fn find_root(&self) -> Result<String, CheckpointError> {
        let roots = self.storages.keys().filter_map(|name| name.strip_suffix("data.pkl"));
        let is_root = |root: &&str| root.is_empty() || root.find('/') == Some(root.len() - 1);
        let mut roots: Vec<&str> = roots.filter(is_root).collect();
        roots.sort_unstable();
        match roots.as_slice() {
            [root] => Ok(root.to_string()),
            [] => Err(self.unfit("*/data.pkl", "one such entry", "none".into())),
            several => {
                Err(self.unfit("*/data.pkl", "one such entry", format!("{}", several.len())))
            }
        }
    }

    fn check_byte_order(&self) -> Result<(), CheckpointError> {
        if !self.storages.contains_key(&self.path("byteorder")) {
            return Ok(());
        }
        match self.small("byteorder", 16)?.as_ref() {
            b"little" => Ok(()),
            other => {
                let found = format!("`{}`", String::from_utf8_lossy(other));
                Err(self.unfit("byteorder", "`little`", found))
            }
        }
    }

    fn dialect(&self) -> Dialect {
        let code = self.path("code/");
        let scripted = self.storages.contains_key(&self.path("constants.pkl"))
            || self.storages.keys().any(|name| name.starts_with(&code));
        if scripted { Dialect::TorchScript } else { Dialect::Torch }
    }

    /// Content of an entry of at most `limit` bytes.
    fn small(&self, name: &str, limit: usize) -> Result<Cow<'a, [u8]>, CheckpointError> {
        let path = self.path(name);
        let Some(storage) = self.storages.get(&path) else {
            return Err(self.unfit(name, "an entry", "none".into()));
        };
        if storage.size > limit {
            let found = format!("{} bytes", storage.size);
            return Err(self.unfit(name, &format!("at most {limit} bytes"), found));
        }
        storage.bytes(self.file, self.bytes)
    }

    /// Checks a tensor against its storage.
    fn entry(&self, name: String, tensor: &TensorRef<'_>) -> Result<Entry, CheckpointError> {
        let dtype = self.dtype(&name, tensor.element)?;
        let path = self.path(&format!("data/{}", tensor.storage.key));
        let Some(storage) = self.storages.get(&path).copied() else {
            let expected = format!("the storage of tensor `{name}`");
            return Err(self.unfit(&path, &expected, "no such entry".into()));
        };
        let element_bytes = self.dtype(&name, tensor.storage.element)?.size();
        let declared = tensor.storage.len.checked_mul(element_bytes);
        if declared.is_none_or(|declared| declared > storage.size) {
            let expected = format!(
                "{} elements of {element_bytes} bytes for tensor `{name}`",
                tensor.storage.len
            );
            return Err(self.unfit(&path, &expected, format!("{} bytes", storage.size)));
        }
        self.check_view(&name, dtype, tensor, declared.unwrap_or(0))?;
        let shape = tensor.view.shape.clone();
        let info = TensorInfo { name, dtype, shape };
        Ok(Entry { info, source: Source { file: 0, storage, view: tensor.view.clone() } })
    }

    fn check_view(
        &self,
        name: &str,
        dtype: DType,
        tensor: &TensorRef<'_>,
        storage_bytes: usize,
    ) -> Result<(), CheckpointError> {
        let broken = |detail| {
            let tensor = shorten(name);
            Err(CheckpointError::View { file: self.file.into(), tensor, detail })
        };
        let view = &tensor.view;
        let bytes = |elements: Option<usize>| elements.and_then(|n| n.checked_mul(dtype.size()));
        if bytes(view.n_elements()).is_none() {
            return broken(format!("shape {:?} overflows", view.shape));
        }
        match bytes(view.extent()) {
            Some(extent) if extent <= storage_bytes => Ok(()),
            Some(extent) => {
                broken(format!("reaches byte {extent} of a storage of {storage_bytes} bytes"))
            }
            None => {
                broken(format!("offset {} and strides {:?} overflow", view.offset, view.strides))
            }
        }
    }

    fn dtype(&self, name: &str, element: Element<'_>) -> Result<DType, CheckpointError> {
        match element {
            Element::Known(dtype) => Ok(dtype),
            Element::Unsupported(found) => Err(CheckpointError::DType {
                file: self.file.into(),
                tensor: shorten(name),
                found: found.into(),
            }),
        }
    }

    fn path(&self, name: &str) -> String {
        format!("{}{name}", self.root)
    }

    fn broken(&self, error: impl ToString) -> CheckpointError {
        CheckpointError::Zip { file: self.file.into(), detail: error.to_string() }
    }

    fn unfit(&self, entry: &str, expected: &str, found: String) -> CheckpointError {
        let (entry, expected) = (shorten(entry), expected.into());
        CheckpointError::Entry { file: self.file.into(), entry, expected, found }
    }
}
