//! Folders that a command fills beside its output: its own goes when it ends, those of killed commands when the next one
//! begins. A folder is locked for as long as its command lives.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

/// What the names of all such folders begin with.
const PREFIX: &str = ".flamingoc-";
/// What an artifact that was there is called while another takes its place; it is never removed unasked.
pub(crate) const REPLACED: &str = "replaced";
/// A folder may be this young before it is locked.
const YOUNG: Duration = Duration::from_secs(60);

/// A folder that is removed with this value.
pub struct Scratch {
    folder: TempDir,
    _lock: File,
}

impl Scratch {
    /// Makes one in `parent`, and removes those there that nobody uses any more.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn new(parent: &Path) -> io::Result<Scratch> {
        remove_abandoned(parent)?;
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?;
        let lock = File::open(folder.path())?;
        // A file system without locks shows all folders as used: nothing is removed there.
        let _ = lock.lock();
        Ok(Scratch { folder, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

fn remove_abandoned(parent: &Path) -> io::Result<()> {
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let path = entry.path();
        let is_ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if is_ours && entry.file_type()?.is_dir() && is_abandoned(&path) {
            // It may be gone, or another's: that is no reason to stop.
            let _ = fs::remove_dir_all(&path);
        }
    }
    Ok(())
}

fn is_abandoned(folder: &Path) -> bool {
    let Ok(file) = File::open(folder) else { return false };
    let made = file.metadata().and_then(|metadata| metadata.modified());
    let age = made.ok().and_then(|made| SystemTime::now().duration_since(made).ok());
    let is_old = age.is_some_and(|age| age > YOUNG);
    is_old && !folder.join(REPLACED).exists() && file.try_lock().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder as a killed command leaves it, an hour ago.
    fn abandoned(parent: &Path, name: &str, content: &str) -> std::path::PathBuf {
        let folder = parent.join(name);
        fs::create_dir_all(folder.join(content)).unwrap();
        let hour = SystemTime::now() - Duration::from_secs(3600);
        File::open(&folder).unwrap().set_modified(hour).unwrap();
        folder
    }

    #[test]
    fn what_killed_commands_leave_goes_and_all_else_stays() {
        let parent = tempfile::tempdir().unwrap();
        let left = abandoned(parent.path(), ".flamingoc-left", "graphs");
        let used = abandoned(parent.path(), ".flamingoc-used", "graphs");
        let replaced = abandoned(parent.path(), ".flamingoc-aside", REPLACED);
        let other = abandoned(parent.path(), "flamingoc-other", "graphs");
        let young = parent.path().join(".flamingoc-young");
        fs::create_dir(&young).unwrap();
        let lock = File::open(&used).unwrap();
        lock.lock().unwrap();
        let scratch = Scratch::new(parent.path()).unwrap();
        assert!(!left.exists());
        assert!([&used, &replaced, &other, &young].iter().all(|folder| folder.exists()));
        let own = scratch.path().to_owned();
        assert!(own.is_dir() && File::open(&own).unwrap().try_lock().is_err());
        drop(scratch);
        assert!(!own.exists());
        drop(lock);
        Scratch::new(parent.path()).unwrap();
        assert!(!used.exists(), "its command ended");
    }
}
