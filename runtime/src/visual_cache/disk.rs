//! Visual tokens in a folder that programs share without locks.
//!
//! An entry is one file named by its key. It is written to a temporary file beside it and renamed,
//! so it is whole or not there, and it is never changed. A program killed at any time leaves at
//! most a temporary file, which is swept when it is old. After a loss of power an entry may be
//! broken, which its hash tells. The time of modification is that of the last use; what was used
//! least recently leaves first. A file that another program removed meanwhile is as good as
//! removed by us.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::MediaKey;
use super::entry::{MAX_BYTES, decode, encode};
use crate::backend::TokenFormat;

/// A temporary file that is older (or, after a change of the clock, younger) than this has no
/// writer any more.
const STALE: Duration = Duration::from_secs(60);

const PREFIX: &str = "visual-";
const ENTRY: &str = ".tokens";
const TEMPORARY: &str = ".tmp";

/// A folder of entries.
#[derive(Debug)]
pub(super) struct DiskCache {
    dir: PathBuf,
    limit: u64,
    /// Writing failed once: nothing more is written.
    is_stopped: AtomicBool,
    /// Tells the temporary files of this program apart.
    n_temporaries: AtomicU64,
    n_evicted: AtomicU64,
}

/// What lies under a key.
pub(super) enum Lookup {
    /// Nothing that can be read.
    Absent,
    /// These visual tokens.
    Found(Vec<f32>),
    /// A file that is no entry of this key.
    Broken(String),
}

/// What became of an entry that was to be written.
pub(super) enum Stored {
    /// It is there.
    Yes,
    /// Nothing is written since writing failed.
    Stopped,
    /// It is larger than all entries together may be.
    TooLarge {
        /// Its bytes.
        bytes: u64,
        /// The bytes allowed.
        limit: u64,
    },
    /// Writing failed.
    Failed(io::Error),
}

/// A file of the folder that is ours.
struct Listed {
    path: PathBuf,
    bytes: u64,
    last_use: SystemTime,
    is_temporary: bool,
}

impl DiskCache {
    /// Makes the folder if need be, sweeps it and brings it below `limit` bytes.
    pub(super) fn open(dir: &Path, limit: u64) -> io::Result<DiskCache> {
        fs::create_dir_all(dir)?;
        let cache = DiskCache {
            dir: dir.to_owned(),
            limit,
            is_stopped: AtomicBool::new(false),
            n_temporaries: AtomicU64::new(0),
            n_evicted: AtomicU64::new(0),
        };
        cache.make_room(0)?;
        Ok(cache)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn n_evicted(&self) -> u64 {
        self.n_evicted.load(Ordering::Relaxed)
    }

    /// Reads an entry and notes that it was used.
    pub(super) fn read(&self, key: &MediaKey, format: TokenFormat) -> Lookup {
        let path = self.path(key);
        // A symbolic link or a pipe is not ours.
        match fs::symlink_metadata(&path) {
            Err(_) => return Lookup::Absent,
            Ok(metadata) if !metadata.is_file() => return Lookup::Broken("it is no file".into()),
            Ok(metadata) if metadata.len() > MAX_BYTES => {
                return Lookup::Broken(format!("it has {} bytes", metadata.len()));
            }
            Ok(_) => {}
        }
        let Ok(file) = File::open(&path) else { return Lookup::Absent };
        let mut bytes = Vec::new();
        if (&file).take(MAX_BYTES + 1).read_to_end(&mut bytes).is_err() {
            return Lookup::Absent;
        }
        match decode(key, format, &bytes) {
            Err(reason) => Lookup::Broken(reason.to_owned()),
            Ok(tokens) => {
                // In a folder that is read-only, entries leave in the order in which they came.
                let _ = file.set_modified(SystemTime::now());
                Lookup::Found(tokens)
            }
        }
    }

    /// Removes an entry; its path.
    pub(super) fn remove(&self, key: &MediaKey) -> PathBuf {
        let path = self.path(key);
        let _ = fs::remove_file(&path);
        path
    }

    /// Writes an entry, after others made room for it.
    pub(super) fn write(&self, key: &MediaKey, format: TokenFormat, tokens: &[f32]) -> Stored {
        if self.is_stopped.load(Ordering::Relaxed) {
            return Stored::Stopped;
        }
        let entry = encode(key, format, tokens);
        let (bytes, limit) = (entry.len() as u64, self.limit.min(MAX_BYTES));
        if bytes > limit {
            return Stored::TooLarge { bytes, limit };
        }
        match self.make_room(bytes).and_then(|()| self.place(&self.path(key), &entry)) {
            Ok(()) => Stored::Yes,
            Err(error) => {
                self.is_stopped.store(true, Ordering::Relaxed);
                Stored::Failed(error)
            }
        }
    }

    fn path(&self, key: &MediaKey) -> PathBuf {
        self.dir.join(format!("{PREFIX}{key}{ENTRY}"))
    }

    /// Writes a file that is whole as soon as it is there.
    fn place(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let n = self.n_temporaries.fetch_add(1, Ordering::Relaxed);
        let start = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        let name = format!("{PREFIX}{}-{n}-{start}{TEMPORARY}", std::process::id());
        let temporary = self.dir.join(name);
        let mut file = File::create_new(&temporary)?;
        let written = file.write_all(bytes).and_then(|()| match fs::rename(&temporary, path) {
            // Swept by another program, after a long pause of this one.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => renamed,
        });
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    /// Removes stale temporary files, and the entries used least recently until `needed` bytes fit.
    fn make_room(&self, needed: u64) -> io::Result<()> {
        let mut listed = self.list()?;
        listed.sort_by(|a, b| (a.last_use, &a.path).cmp(&(b.last_use, &b.path)));
        let mut total = needed.saturating_add(listed.iter().map(|file| file.bytes).sum());
        for file in listed {
            let must_leave = match file.is_temporary {
                true => is_stale(file.last_use),
                false => total > self.limit,
            };
            if !must_leave {
                continue;
            }
            let n_evicted = u64::from(!file.is_temporary);
            match fs::remove_file(&file.path) {
                Ok(()) => self.n_evicted.fetch_add(n_evicted, Ordering::Relaxed),
                Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
                Err(error) => return Err(error),
            };
            total = total.saturating_sub(file.bytes);
        }
        Ok(())
    }

    /// Our files in the folder; all others are left alone.
    fn list(&self) -> io::Result<Vec<Listed>> {
        let mut listed = Vec::new();
        for found in fs::read_dir(&self.dir)? {
            let found = found?;
            let name = found.file_name();
            let Some(name) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else {
                continue;
            };
            let is_temporary = name.ends_with(TEMPORARY);
            if !is_temporary && !name.ends_with(ENTRY) {
                continue;
            }
            // Another program may have removed it since.
            let Ok(metadata) = found.metadata() else { continue };
            if metadata.is_file() {
                let (path, bytes) = (found.path(), metadata.len());
                let last_use = metadata.modified()?;
                listed.push(Listed { path, bytes, last_use, is_temporary });
            }
        }
        Ok(listed)
    }
}

fn is_stale(last_use: SystemTime) -> bool {
    let age = match SystemTime::now().duration_since(last_use) {
        Ok(age) => age,
        Err(ahead) => ahead.duration(),
    };
    age > STALE
}
