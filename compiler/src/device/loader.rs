//! Shared libraries that the loader would not find for a library, by name: what `ldd` shows as "not found", without
//! running anything, and for a device's copied files too.
//!
//! The rules are those of `ld.so(8)`: `DT_RPATH` of a library without `DT_RUNPATH` and of those that led to it,
//! `LD_LIBRARY_PATH`, `DT_RUNPATH`, the folders of `/etc/ld.so.conf` (for its cache), the default folders. Not looked
//! into: `glibc-hwcaps` folders, `$LIB` and `$PLATFORM` in paths, folders relative to the working folder.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flamingo_models::map::MappedFile;
use serde::Serialize;

use super::DeviceError;
use super::elf::{Dynamic, Elf};
use super::root::Root;

/// Most libraries that are looked at for one.
const MAX_LIBRARIES: usize = 512;

/// Most files that are read as `/etc/ld.so.conf`.
const MAX_FILES: usize = 256;

/// Most folders of a list of them.
const MAX_FOLDERS: usize = 256;

/// A library that is needed and not found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Missing {
    /// Its name, as the loader looks for it.
    pub name: String,
    /// File name of the library that needs it.
    pub needed_by: String,
    /// A file of the name that is no library for the processor, such as the empty files that containers have in the
    /// place of a device's libraries.
    pub unusable: Option<String>,
}

/// Where the loader of a device looks for libraries.
#[derive(Clone, Debug)]
pub struct Places<'a> {
    root: &'a Root,
    /// Folders of `LD_LIBRARY_PATH`.
    named: Vec<PathBuf>,
    /// Folders of `/etc/ld.so.conf`.
    configured: Vec<PathBuf>,
}

/// A library that is needed.
struct Wanted {
    name: String,
    needed_by: String,
    /// Folders of `DT_RPATH` of the library that needs it and of those that led there.
    inherited: Vec<PathBuf>,
    /// Folders of `DT_RUNPATH` of the library that needs it, which are instead of the inherited ones.
    own: Option<Vec<PathBuf>>,
}

impl<'a> Places<'a> {
    /// The places of a device, with a value of `LD_LIBRARY_PATH`.
    pub fn new(root: &'a Root, library_path: Option<&OsStr>) -> Places<'a> {
        let named = library_path.map(|path| std::env::split_paths(path).collect());
        let named: Vec<PathBuf> = named.unwrap_or_default();
        let named = named.into_iter().filter(|folder| folder.is_absolute()).collect();
        Places { root, named, configured: configured_folders(root) }
    }

    /// Libraries that the library at `path`, as the device calls it, or those that it needs, need and that are not
    /// found, sorted.
    ///
    /// # Errors
    /// If the library itself is not there, or cannot be read.
    pub fn missing(&self, path: &Path) -> Result<Vec<Missing>, DeviceError> {
        let not_there = || DeviceError::elf(path, "no such file");
        let file = self.root.find(path).ok_or_else(not_there)?;
        let (machine, dynamic) = read(&file)?;
        let mut missing = BTreeSet::new();
        let mut known: BTreeSet<String> = dynamic.soname.iter().cloned().collect();
        let mut wanted: VecDeque<Wanted> = self.wanted(&file, &dynamic, &[]).into();
        while let Some(next) = wanted.pop_front() {
            if known.len() >= MAX_LIBRARIES || !known.insert(next.name.clone()) {
                continue;
            }
            match self.search(&next, machine) {
                Ok((file, dynamic)) => {
                    known.extend(dynamic.soname.iter().cloned());
                    wanted.extend(self.wanted(&file, &dynamic, &next.inherited));
                }
                Err(unusable) => {
                    let unusable = unusable.and_then(|file| self.root.name_of(&file));
                    let unusable = unusable.map(|file| file.display().to_string());
                    let Wanted { name, needed_by, .. } = next;
                    missing.insert(Missing { name, needed_by, unusable });
                }
            }
        }
        Ok(missing.into_iter().collect())
    }

    /// What a library needs, and where to look for that first.
    fn wanted(&self, file: &Path, dynamic: &Dynamic, inherited: &[PathBuf]) -> Vec<Wanted> {
        let needed_by = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let folder = self.root.name_of(file.parent().unwrap_or(file)).unwrap_or_default();
        let folders = |list: &String| folders_from_list(list, &folder);
        let own = dynamic.runpath.as_ref().map(folders);
        let rpath = dynamic.rpath.as_ref().filter(|_| own.is_none()).map(folders);
        let mut inherited = [rpath.unwrap_or_default(), inherited.to_vec()].concat();
        inherited.truncate(MAX_FOLDERS);
        let wanted = |name: &String| Wanted {
            name: name.clone(),
            needed_by: needed_by.clone(),
            inherited: inherited.clone(),
            own: own.clone(),
        };
        dynamic.needed.iter().map(wanted).collect()
    }

    /// The first usable file of the name; else the first that is not usable, if any.
    fn search(&self, wanted: &Wanted, machine: u16) -> Result<(PathBuf, Dynamic), Option<PathBuf>> {
        let defaults = default_folders(machine);
        let (before, after) = match &wanted.own {
            Some(own) => (&[][..], own.as_slice()),
            None => (wanted.inherited.as_slice(), &[][..]),
        };
        let lists = [before, &self.named, after, &self.configured, &defaults];
        let by_folder = |folder: &PathBuf| folder.join(&wanted.name);
        let paths: Vec<PathBuf> = match wanted.name.contains('/') {
            true => vec![PathBuf::from(&wanted.name)],
            false => lists.into_iter().flatten().map(by_folder).collect(),
        };
        let mut unusable = None;
        for file in paths.iter().filter_map(|path| self.root.find(path)) {
            match is_for(&file, machine).then(|| read(&file)) {
                Some(Ok((_, dynamic))) => return Ok((file, dynamic)),
                Some(Err(_)) | None => unusable = unusable.or(Some(file)),
            }
        }
        Err(unusable)
    }
}

/// Processor and dynamic section of a library.
fn read(file: &Path) -> Result<(u16, Dynamic), DeviceError> {
    let failed = |reason| DeviceError::Read { path: file.to_owned(), reason };
    let map = MappedFile::open(file).map_err(failed)?;
    let elf = Elf::parse(file, map.bytes())?;
    Ok((elf.machine(), elf.dynamic()?))
}

/// Whether a file begins as a 64-bit little-endian library for the processor does.
fn is_for(file: &Path, machine: u16) -> bool {
    let mut start = [0; 20];
    let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
    let read =
        is_file && File::open(file).is_ok_and(|mut file| file.read_exact(&mut start).is_ok());
    read && start.starts_with(b"\x7fELF\x02\x01") && start[18..] == machine.to_le_bytes()
}

/// Absolute folders of a `DT_RPATH` or `DT_RUNPATH` of a library in `origin`.
fn folders_from_list(list: &str, origin: &Path) -> Vec<PathBuf> {
    let origin = origin.to_string_lossy();
    let folder = |entry: &str| {
        let entry = entry.replace("${ORIGIN}", &origin).replace("$ORIGIN", &origin);
        (entry.starts_with('/') && !entry.contains('$')).then(|| PathBuf::from(entry))
    };
    list.split(':').filter_map(folder).take(MAX_FOLDERS).collect()
}

/// Folders that loaders have built in: Debian's for a processor, then everybody's.
fn default_folders(machine: u16) -> Vec<PathBuf> {
    let debian = match machine {
        62 => Some("x86_64-linux-gnu"),
        183 => Some("aarch64-linux-gnu"),
        _ => None,
    };
    let debian = debian
        .into_iter()
        .flat_map(|name| ["/lib", "/usr/lib"].map(|folder| Path::new(folder).join(name)));
    debian.chain(["/lib", "/usr/lib", "/lib64", "/usr/lib64"].map(PathBuf::from)).collect()
}

/// Folders of `/etc/ld.so.conf` and of the files that it includes, each read once.
fn configured_folders(root: &Root) -> Vec<PathBuf> {
    let (mut folders, mut files) = (Vec::new(), BTreeSet::new());
    let mut left = VecDeque::from([PathBuf::from("/etc/ld.so.conf")]);
    while let Some(file) = left.pop_front() {
        if files.len() >= MAX_FILES || !files.insert(file.clone()) {
            continue;
        }
        for line in root.text(file).unwrap_or_default().lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            match line.split_once(char::is_whitespace) {
                Some(("include", pattern)) => left.extend(files_from_pattern(root, pattern.trim())),
                _ if line.starts_with('/') => folders.push(folder_from_line(line)),
                _ => {}
            }
        }
    }
    folders.truncate(MAX_FOLDERS);
    folders
}

/// The folder of a line, which may say of which kind its libraries are: `/opt/lib=libc6`.
fn folder_from_line(line: &str) -> PathBuf {
    PathBuf::from(line.split('=').next().unwrap_or(line).trim())
}

/// Files of an `include` line, whose last step may have one `*`; relative to `/etc`.
fn files_from_pattern(root: &Root, pattern: &str) -> Vec<PathBuf> {
    let pattern = Path::new("/etc").join(pattern);
    let (Some(folder), Some(name)) = (pattern.parent(), pattern.file_name()) else {
        return Vec::new();
    };
    let name = name.to_string_lossy();
    let Some((start, end)) = name.split_once('*') else { return vec![pattern.clone()] };
    let fits = |name: &String| {
        name.strip_prefix(start).is_some_and(|rest| rest.ends_with(end)) && !name.starts_with('.')
    };
    root.names(folder).into_iter().filter(fits).map(|name| folder.join(name)).collect()
}

#[cfg(all(test, unix))]
mod tests {
    use std::fs;

    use super::super::elf_file::{AARCH64, ElfFile, X86_64};
    use super::*;

    /// A device with libraries by path.
    struct Device {
        folder: tempfile::TempDir,
        root: Root,
    }

    impl Device {
        fn new() -> Device {
            let folder = tempfile::tempdir().unwrap();
            let root = Root::new(folder.path());
            Device { folder, root }
        }

        fn write(&self, path: &str, bytes: &[u8]) {
            let path = self.folder.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }

        fn add(&self, path: &str, needed: &[&str]) {
            self.write(path, &ElfFile { machine: AARCH64, needed, ..ElfFile::default() }.bytes());
        }

        /// What is missing for `/ort/lib.so`, and for whom.
        fn missing(&self, library_path: Option<&str>) -> Vec<(String, String)> {
            let places = Places::new(&self.root, library_path.map(OsStr::new));
            let missing = places.missing(Path::new("/ort/lib.so")).unwrap();
            missing.into_iter().map(|library| (library.name, library.needed_by)).collect()
        }
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, by)| ((*name).to_owned(), (*by).to_owned())).collect()
    }

    #[test]
    fn libraries_of_libraries_are_looked_for() {
        let device = Device::new();
        device.add("/ort/lib.so", &["libnvinfer.so.10", "libc.so.6", "libcudnn.so.9"]);
        device.add(
            "/usr/lib/aarch64-linux-gnu/libnvinfer.so.10",
            &["libnvdla_compiler.so", "libc.so.6"],
        );
        device.add("/lib/aarch64-linux-gnu/libc.so.6", &[]);
        let expected = [("libcudnn.so.9", "lib.so"), ("libnvdla_compiler.so", "libnvinfer.so.10")];
        assert_eq!(device.missing(None), pairs(&expected));
    }

    #[test]
    fn configured_and_named_folders_are_searched() {
        let device = Device::new();
        device.add("/ort/lib.so", &["liba.so", "libb.so", "libc.so"]);
        device.add("/opt/a/liba.so", &[]);
        device.add("/opt/b/libb.so", &[]);
        device.add("/opt/c/libc.so", &[]);
        assert_eq!(device.missing(None).len(), 3);
        device.write("/etc/ld.so.conf", b"# folders\ninclude ld.so.conf.d/*.conf\n/opt/b # b\n");
        device.write("/etc/ld.so.conf.d/a.conf", b"/opt/a\ninclude /etc/ld.so.conf\n");
        device.write("/etc/ld.so.conf.d/c.conf.bak", b"/opt/c\n");
        assert_eq!(device.missing(None), pairs(&[("libc.so", "lib.so")]));
        assert_eq!(device.missing(Some("relative:/opt/c")), pairs(&[]));
    }

    #[test]
    fn a_runpath_is_for_its_library_and_an_rpath_for_all_that_follow() {
        let device = Device::new();
        for (run, expected) in [(true, &[("libb.so", "liba.so")][..]), (false, &[])] {
            let path = Some("/nowhere:${ORIGIN}/deps:$LIB/x");
            let (runpath, rpath) = if run { (path, None) } else { (None, path) };
            let library = ElfFile {
                machine: AARCH64,
                needed: &["liba.so"],
                rpath,
                runpath,
                ..ElfFile::default()
            };
            device.write("/ort/lib.so", &library.bytes());
            device.add("/ort/deps/liba.so", &["libb.so"]);
            device.add("/ort/deps/libb.so", &[]);
            assert_eq!(device.missing(None), pairs(expected));
        }
    }

    #[test]
    fn files_that_are_no_library_for_the_processor_are_named() {
        let device = Device::new();
        device.add("/ort/lib.so", &["libempty.so", "libother.so", "libtwice.so"]);
        device.write("/usr/lib/aarch64-linux-gnu/libempty.so", b"");
        let other = ElfFile { machine: X86_64, ..ElfFile::default() }.bytes();
        device.write("/lib/libother.so", &other);
        device.write("/lib/libtwice.so", &other);
        device.add("/usr/lib64/libtwice.so", &[]);
        let places = Places::new(&device.root, None);
        let missing = places.missing(Path::new("/ort/lib.so")).unwrap();
        let unusable = |index: usize| missing[index].unusable.as_deref();
        assert_eq!(missing.len(), 2, "{missing:?}");
        assert_eq!(unusable(0), Some("/usr/lib/aarch64-linux-gnu/libempty.so"));
        assert_eq!(unusable(1), Some("/lib/libother.so"));
    }

    #[test]
    fn circles_end_and_a_missing_library_is_an_error() {
        let device = Device::new();
        device.add("/ort/lib.so", &["liba.so"]);
        device.add("/lib/liba.so", &["libb.so"]);
        device.add("/lib/libb.so", &["liba.so", "/opt/libc.so"]);
        assert_eq!(device.missing(None), pairs(&[("/opt/libc.so", "libb.so")]));
        let places = Places::new(&device.root, None);
        assert!(places.missing(Path::new("/ort/none.so")).is_err());
    }
}
