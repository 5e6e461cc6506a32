//! Engines that TensorRT built of an artifact on this device, in the artifact's `device/engines/`, and a record of what
//! they were built with. TensorRT builds anew, for minutes, whatever does not fit; a record tells so before.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Folder of an artifact that has the engines.
const FOLDER: &str = "device/engines";
/// File in it that says what they were built with.
const RECORD: &str = "built_with.json";
/// Largest record that is read.
const MAX_RECORD_BYTES: u64 = 64 << 10;

/// What stands for what a machine's files do not tell.
const UNKNOWN: &str = "unknown";

/// What an engine depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuiltWith {
    /// Flavour of the graphs.
    pub flavour: String,
    /// Hash of the graphs and of the sizes that the engine is for.
    pub graphs: String,
    /// Version of TensorRT; none where its library does not tell.
    pub tensorrt: Option<String>,
    /// The GPU.
    pub gpu: Option<String>,
    /// Hash of ONNX Runtime's TensorRT provider.
    pub provider: Option<String>,
}

/// A file that TensorRT keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EngineFile {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// The engines of one artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engines {
    folder: PathBuf,
}

impl BuiltWith {
    /// Why an engine built with `self` is not used where these are `now`; empty if it is, as far as they are known.
    pub fn differences(&self, now: &BuiltWith) -> Vec<String> {
        let known = |value: &Option<String>| value.clone().unwrap_or_else(|| UNKNOWN.to_owned());
        let pairs = [
            ("flavour", self.flavour.clone(), now.flavour.clone()),
            ("graphs and sizes", self.graphs.clone(), now.graphs.clone()),
            ("TensorRT", known(&self.tensorrt), known(&now.tensorrt)),
            ("GPU", known(&self.gpu), known(&now.gpu)),
            ("ONNX Runtime's TensorRT provider", known(&self.provider), known(&now.provider)),
        ];
        let different =
            pairs.into_iter().filter(|(_, before, now)| before != now && now != UNKNOWN);
        different
            .map(|(what, before, now)| format!("{what}: built with {before}, here is {now}"))
            .collect()
    }
}

impl Engines {
    /// Those of the artifact in `artifact`.
    pub fn of(artifact: &Path) -> Engines {
        Engines { folder: artifact.join(FOLDER) }
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What they were built with; none if there are none, or the record cannot be read.
    pub fn built_with(&self) -> Option<BuiltWith> {
        let path = self.folder.join(RECORD);
        let is_small = fs::metadata(&path).ok()?.len() <= MAX_RECORD_BYTES;
        serde_json::from_slice(&fs::read(path).ok().filter(|_| is_small)?).ok()
    }

    /// Why they would not be used; empty if they are.
    pub fn problems(&self, now: &BuiltWith) -> Vec<String> {
        match self.built_with() {
            Some(record) => record.differences(now),
            None => vec![format!("expected `{}`, found none", self.folder.join(RECORD).display())],
        }
    }

    /// The files, by name.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn files(&self) -> io::Result<Vec<EngineFile>> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_file() && entry.file_name() != RECORD {
                let name = entry.file_name().to_string_lossy().into_owned();
                files.push(EngineFile { name, bytes: metadata.len() });
            }
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(files)
    }

    /// Makes the folder, empty: what was built before is not used again.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn begin(&self) -> io::Result<()> {
        self.prune()?;
        fs::create_dir_all(&self.folder)
    }

    /// Says what they were built with, which makes them whole.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn finish(&self, built_with: &BuiltWith) -> io::Result<()> {
        let temporary = self.folder.join("built_with.json.new");
        fs::write(&temporary, serde_json::to_vec_pretty(built_with)?)?;
        fs::rename(temporary, self.folder.join(RECORD))
    }

    /// Removes them, the record first; returns the files that are gone.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub fn prune(&self) -> io::Result<Vec<EngineFile>> {
        let files = self.files()?;
        match fs::remove_file(self.folder.join(RECORD)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        for file in &files {
            fs::remove_file(self.folder.join(&file.name))?;
        }
        Ok(files)
    }
}

/// Hash of files and of what else an engine depends on.
///
/// # Errors
/// A file that cannot be read.
pub fn hash_of(files: &[&Path], rest: &str) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update_reader(fs::File::open(file)?)?;
    }
    hasher.update(rest.as_bytes());
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

/// The GPU, as the machine's files under `root` name it: a Jetson's processor, or NVIDIA's driver.
pub fn gpu(root: &Path) -> Option<String> {
    if let Ok(text) = fs::read_to_string(root.join("proc/device-tree/compatible")) {
        let mut names = text.split('\0').filter_map(|name| name.strip_prefix("nvidia,"));
        if let Some(soc) = names.find(|name| name.starts_with("tegra")) {
            return Some(soc.to_owned());
        }
    }
    let entries = fs::read_dir(root.join("proc/driver/nvidia/gpus")).ok()?;
    let mut folders: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    folders.sort();
    let text = fs::read_to_string(folders.first()?.join("information")).ok()?;
    let model = text.lines().find_map(|line| line.strip_prefix("Model:"))?;
    Some(model.trim().to_owned())
}

/// The version of the TensorRT that this process has loaded, from the name of its file.
pub fn loaded_tensorrt(maps: &str) -> Option<String> {
    let files = maps.lines().filter_map(|line| line.rsplit('/').next());
    let mut versions = files.filter_map(|file| file.strip_prefix("libnvinfer.so."));
    versions.next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built_with() -> BuiltWith {
        BuiltWith {
            flavour: "trt-10.3".into(),
            graphs: "0123".into(),
            tensorrt: Some("10.3.0".into()),
            gpu: Some("tegra234".into()),
            provider: None,
        }
    }

    #[test]
    fn engines_are_whole_when_the_record_is_there_and_fits() {
        let folder = tempfile::tempdir().unwrap();
        let engines = Engines::of(folder.path());
        let now = built_with();
        assert!(engines.problems(&now)[0].contains("found none"));
        assert_eq!(engines.files().unwrap(), []);
        engines.begin().unwrap();
        fs::write(engines.folder().join("b.engine"), "12345").unwrap();
        fs::write(engines.folder().join("a.timing"), "1").unwrap();
        assert_eq!(engines.problems(&now).len(), 1, "interrupted before the end");
        engines.finish(&now).unwrap();
        assert_eq!(engines.problems(&now), Vec::<String>::new());
        let sizes: Vec<u64> = engines.files().unwrap().iter().map(|file| file.bytes).collect();
        assert_eq!(sizes, [1, 5]);
        let other = BuiltWith { tensorrt: Some("10.7.0".into()), gpu: None, ..built_with() };
        let expected = ["TensorRT: built with 10.3.0, here is 10.7.0"];
        assert_eq!(engines.problems(&other), expected, "what is not known does not differ");
        fs::write(engines.folder().join(RECORD), "{").unwrap();
        assert_eq!(engines.problems(&now).len(), 1);
        assert_eq!(engines.prune().unwrap().len(), 2);
        assert_eq!((engines.files().unwrap(), engines.built_with()), (vec![], None));
    }

    #[test]
    fn hashes_are_of_content_and_of_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("graph.onnx");
        fs::write(&file, "graph").unwrap();
        let hash = |rest: &str| hash_of(&[&file], rest).unwrap();
        assert_eq!(hash("a"), hash("a"));
        assert_ne!(hash("a"), hash("b"));
        assert!(hash_of(&[Path::new("/nowhere")], "").is_err());
    }

    #[test]
    fn machines_name_their_gpu_and_processes_their_tensorrt() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(gpu(folder.path()), None);
        let driver = folder.path().join("proc/driver/nvidia/gpus/0000:01:00.0");
        fs::create_dir_all(&driver).unwrap();
        fs::write(driver.join("information"), "Model: \t\t NVIDIA L4\nIRQ: 1\n").unwrap();
        assert_eq!(gpu(folder.path()).as_deref(), Some("NVIDIA L4"));
        fs::create_dir_all(folder.path().join("proc/device-tree")).unwrap();
        let compatible = folder.path().join("proc/device-tree/compatible");
        fs::write(&compatible, "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0").unwrap();
        assert_eq!(gpu(folder.path()).as_deref(), Some("tegra234"));
        let maps = "7f00-7f01 r-xp 0 0:0 1 /usr/lib/libc.so.6\n\
                    7f02-7f03 r-xp 0 0:0 2 /usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0\n";
        assert_eq!(loaded_tensorrt(maps).as_deref(), Some("10.3.0"));
        assert_eq!(loaded_tensorrt(""), None);
    }
}
