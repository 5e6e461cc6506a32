//! Read-only memory maps of whole files: the one place of this crate with `unsafe`.

use std::{fs::File, io, path::Path};

use memmap2::Mmap;

/// A regular file mapped for reading.
///
/// The file must keep its length and content for as long as the map lives: writers replace
/// checkpoints and artifacts by renaming a new file over the old one, which leaves maps of the
/// old one intact. Truncating a mapped file in place raises `SIGBUS` on the next read beyond
/// its new end.
#[derive(Debug)]
pub struct MappedFile {
    /// `None` for an empty file, which cannot be mapped everywhere.
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps the file at `path`; symbolic links are followed.
    ///
    /// # Errors
    /// Those of opening and mapping; [`io::ErrorKind::InvalidInput`] for what is not a regular
    /// file (folders, pipes, devices).
    pub fn open(path: &Path) -> io::Result<MappedFile> {
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(MappedFile { map: None });
        }
        map_file(&file).map(|map| MappedFile { map: Some(map) })
    }

    /// The content of the file, page-aligned.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    /// Tells the system that bytes from `start` on are read soon, so that the disk is not waited for at each page. Does
    /// nothing where the system cannot.
    pub fn will_need(&self, start: usize, n_bytes: usize) {
        if let Some(map) = &self.map {
            let start = start.min(map.len());
            ask_for(map, start, n_bytes.min(map.len() - start));
        }
    }

    /// Gives back the memory of the pages that were read. The content stays what it is: pages that are read again come
    /// from the file. Does nothing where the system cannot.
    pub fn release(&self) {
        if let Some(map) = &self.map {
            release_pages(map);
        }
    }
}

#[cfg(unix)]
fn ask_for(map: &Mmap, start: usize, n_bytes: usize) {
    // Refused: then pages are read when they are touched.
    let _ = map.advise_range(memmap2::Advice::WillNeed, start, n_bytes);
}

#[cfg(not(unix))]
fn ask_for(_map: &Mmap, _start: usize, _n_bytes: usize) {}

#[cfg(unix)]
#[expect(unsafe_code, reason = "the system is told to forget pages that references may point to")]
fn release_pages(map: &Mmap) {
    // SAFETY: the map is read-only, private and of a file that does not change (as `MappedFile` asks), so that a
    // forgotten page is read again with the same content.
    // Refused: then the memory stays in use, and nothing else changes.
    let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
}

#[cfg(not(unix))]
fn release_pages(_map: &Mmap) {}

#[expect(unsafe_code, reason = "the operating system cannot promise that a mapped file stays")]
fn map_file(file: &File) -> io::Result<Mmap> {
    // SAFETY: the map is read-only and private to this process; the file must not be truncated
    // or rewritten in place while it lives, which `MappedFile` asks of its users.
    unsafe { Mmap::map(file) }
}

#[cfg(test)]
mod tests {
    use super::MappedFile;

    #[test]
    fn content_is_mapped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for content in [&b""[..], b"flamingo"] {
            std::fs::write(&path, content).unwrap();
            let map = MappedFile::open(&path).unwrap();
            assert_eq!(map.bytes(), content);
            map.will_need(2, 3);
            map.will_need(100, usize::MAX);
            map.release();
            assert_eq!(map.bytes(), content, "read again");
        }
    }

    #[test]
    fn folders_and_missing_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        assert!(MappedFile::open(folder.path()).is_err());
        assert!(MappedFile::open(&folder.path().join("missing")).is_err());
    }
}
