//! A folder of input whose files are read by relative path and never from outside of it.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use crate::Error;

/// The folder, with symbolic links resolved.
pub(crate) struct Folder {
    root: PathBuf,
}

impl Folder {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let root = path.canonicalize().map_err(Error::file(path))?;
        Ok(Self { root })
    }

    /// The bytes of a plain file of at most `max_bytes`; `None` for all else, a way out of the folder too.
    pub(crate) fn read(&self, relative: &Path, max_bytes: u64) -> Option<Vec<u8>> {
        let is_inner = |part: Component| matches!(part, Component::Normal(_) | Component::CurDir);
        if !relative.components().all(is_inner) {
            return None;
        }
        let path = self.root.join(relative).canonicalize().ok()?;
        let metadata = path.metadata().ok()?;
        if !path.starts_with(&self.root) || !metadata.is_file() || metadata.len() > max_bytes {
            return None;
        }
        let mut bytes = Vec::new();
        // A file can grow while it is read.
        File::open(path).ok()?.take(max_bytes).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::Folder;

    #[test]
    fn no_path_leaves_the_folder() {
        let outer = tempfile::tempdir().unwrap();
        let inner = outer.path().join("inner");
        fs::create_dir_all(inner.join("deep")).unwrap();
        fs::write(outer.path().join("secret"), "secret").unwrap();
        fs::write(inner.join("deep/file"), "open").unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(outer.path().join("secret"), inner.join("link")).unwrap();
        let folder = Folder::open(&inner).unwrap();
        let read = |path: &str| folder.read(Path::new(path), 5);
        assert_eq!(read("deep/./file").as_deref(), Some(&b"open"[..]));
        let absolute = outer.path().join("secret");
        for path in
            ["../secret", "deep/../../secret", "link", "deep", "none", absolute.to_str().unwrap()]
        {
            assert_eq!(read(path), None, "{path}");
        }
        assert_eq!(folder.read(Path::new("deep/file"), 3), None, "larger than allowed");
    }
}
