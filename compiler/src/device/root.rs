//! A folder that stands for `/`: the machine's own, or a copy of a device's files.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

/// Most bytes of a text file that are read; a larger file counts as none.
pub const MAX_TEXT_BYTES: u64 = 64 << 10;

/// Most entries of a folder that are looked at.
const MAX_ENTRIES: usize = 1 << 14;

/// Most links that one path may go through, as for Linux.
const MAX_LINKS: usize = 40;

/// A folder that stands for `/`. Symbolic links are followed within it, so that a copy of a device's files shows the
/// device and not the machine that it lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    folder: PathBuf,
}

impl Root {
    /// The folder as root.
    pub fn new(folder: &Path) -> Root {
        Root { folder: fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned()) }
    }

    /// The root of this machine.
    pub fn own() -> Root {
        Root::new(Path::new("/"))
    }

    /// Whether this is the root of this machine.
    pub fn is_own(&self) -> bool {
        self.folder == Path::new("/")
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the file or folder that the device calls `path` is on this machine; links are followed. None if it is
    /// not there.
    pub fn find(&self, path: &Path) -> Option<PathBuf> {
        let (mut left, mut here) = (steps(path), PathBuf::new());
        let mut n_links = 0;
        while let Some(step) = left.pop() {
            if step == ".." {
                here.pop();
                continue;
            }
            here.push(step);
            let Ok(target) = fs::read_link(self.folder.join(&here)) else { continue };
            n_links += 1;
            if n_links > MAX_LINKS {
                return None;
            }
            here.pop();
            if target.is_absolute() {
                here = PathBuf::new();
            }
            left.extend(steps(&target));
        }
        let found = self.folder.join(here);
        found.symlink_metadata().is_ok().then_some(found)
    }

    /// What the device calls a file or folder of this machine; none if it lies outside of the root.
    pub fn name_of(&self, found: &Path) -> Option<PathBuf> {
        found.strip_prefix(&self.folder).ok().map(|rest| Path::new("/").join(rest))
    }

    /// The text of a regular file of at most [`MAX_TEXT_BYTES`]; what is no UTF-8 becomes U+FFFD.
    pub fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let found = self.find(path.as_ref())?;
        found.metadata().ok().filter(fs::Metadata::is_file)?;
        let mut bytes = Vec::new();
        File::open(found).ok()?.take(MAX_TEXT_BYTES + 1).read_to_end(&mut bytes).ok()?;
        let fits = u64::try_from(bytes.len()).is_ok_and(|n_bytes| n_bytes <= MAX_TEXT_BYTES);
        fits.then(|| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Names in a folder that are text, sorted; none where there is no folder.
    pub fn names(&self, folder: impl AsRef<Path>) -> Vec<String> {
        let entries = self.find(folder.as_ref()).and_then(|found| fs::read_dir(found).ok());
        let entries = entries.into_iter().flatten().take(MAX_ENTRIES).filter_map(Result::ok);
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }
}

/// The steps of a path from the root, the last one first.
fn steps(path: &Path) -> Vec<OsString> {
    let step = |component| match component {
        Component::Normal(name) => Some(name),
        Component::ParentDir => Some(OsStr::new("..")),
        Component::CurDir | Component::RootDir | Component::Prefix(_) => None,
    };
    path.components().rev().filter_map(step).map(OsStr::to_owned).collect()
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_stay_within_the_root() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::new(folder.path());
        let path = |name: &str| root.folder().join(name);
        fs::create_dir_all(path("usr/local/cuda-12.6")).unwrap();
        fs::create_dir_all(path("etc/alternatives")).unwrap();
        fs::write(path("usr/local/cuda-12.6/version.json"), "{}").unwrap();
        symlink("/etc/alternatives/cuda", path("usr/local/cuda")).unwrap();
        symlink("../../usr/local/cuda-12.6", path("etc/alternatives/cuda")).unwrap();
        symlink("../../../../../../../../../etc/hostname", path("out")).unwrap();
        symlink("again", path("again")).unwrap();

        let found = root.find(Path::new("/usr/local/cuda/version.json")).unwrap();
        assert_eq!(found, path("usr/local/cuda-12.6/version.json"));
        let name = root.name_of(&found).unwrap();
        assert_eq!(name, Path::new("/usr/local/cuda-12.6/version.json"));
        assert_eq!(root.text("/usr/local/cuda/version.json").as_deref(), Some("{}"));
        assert_eq!(root.find(Path::new("/out")), None, "the root has no /etc/hostname");
        assert_eq!(root.find(Path::new("/again")), None);
        assert_eq!(root.find(Path::new("/../..")), Some(root.folder().join("")));
        assert_eq!(root.name_of(Path::new("/elsewhere")), None);
    }

    #[test]
    fn large_files_and_folders_are_no_text() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::new(folder.path());
        let limit = usize::try_from(MAX_TEXT_BYTES).unwrap();
        fs::write(folder.path().join("fits"), vec![b'a'; limit]).unwrap();
        fs::write(folder.path().join("large"), vec![b'a'; limit + 1]).unwrap();
        fs::write(folder.path().join("bytes"), [b'a', 0xff]).unwrap();
        assert_eq!(root.text("/fits").map(|text| text.len()), Some(limit));
        assert_eq!(root.text("/large"), None);
        assert_eq!(root.text("/"), None);
        assert_eq!(root.text("/missing"), None);
        assert_eq!(root.text("/bytes").as_deref(), Some("a\u{fffd}"));
        assert_eq!(root.names("/"), ["bytes", "fits", "large"]);
        assert_eq!(root.names("/missing"), Vec::<String>::new());
    }
}
