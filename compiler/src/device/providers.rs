//! ONNX Runtime's provider libraries, which lie beside its own: what GPUs they are for, and what they lack.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::fatbin::{Architectures, GpuCode, architectures};
use super::loader::{Missing, Places};
use super::root::Root;

/// Most provider libraries of a folder that are looked at.
const MAX_PROVIDERS: usize = 16;

/// A provider library.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Provider {
    /// The file.
    pub file: String,
    /// Architectures of the GPU code in it; `None` if they cannot be read.
    pub architectures: Option<Architectures>,
    /// What that means for the GPU of the device; `None` if the GPU is not known.
    pub gpu: Option<GpuCode>,
    /// Libraries that it or its libraries need and that are not found; `None` if that cannot be told, or if the library
    /// lies outside of the device's root.
    pub missing: Option<Vec<Missing>>,
    /// Why something cannot be read.
    pub problems: Vec<String>,
}

/// The provider libraries in a folder, by name, held against the architecture of a device's GPU. What they need is
/// looked for where `device` has libraries, if they lie under its root; `library_path` is its `LD_LIBRARY_PATH`.
pub fn providers(
    folder: &Path,
    device: &Root,
    library_path: Option<&OsStr>,
    gpu_architecture: Option<u32>,
) -> Vec<Provider> {
    let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    let is_provider =
        |name: &String| name.starts_with("libonnxruntime_providers_") && name.ends_with(".so");
    let names = Root::new(&folder).names("/").into_iter().filter(is_provider).take(MAX_PROVIDERS);
    let places = Places::new(device, library_path);
    names.map(|name| provider(folder.join(name), device, &places, gpu_architecture)).collect()
}

fn provider(file: PathBuf, device: &Root, places: &Places, gpu: Option<u32>) -> Provider {
    let mut problems = Vec::new();
    let architectures = architectures(&file).map_err(|error| problems.push(error.to_string())).ok();
    let missing = device.name_of(&file).and_then(|name| {
        places.missing(&name).map_err(|error| problems.push(error.to_string())).ok()
    });
    problems.dedup();
    let gpu = architectures.as_ref().and_then(|found| Some(found.on_tegra(gpu?)));
    Provider { file: file.display().to_string(), architectures, gpu, missing, problems }
}

#[cfg(all(test, unix))]
mod tests {
    use super::super::elf_file::{AARCH64, ElfFile, fat_binary};
    use super::*;

    #[test]
    fn providers_beside_a_library_are_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let ort = folder.path().join("opt/ort");
        fs::create_dir_all(&ort).unwrap();
        let code = fat_binary(&[(2, 80, 8), (2, 90, 8)]);
        let cuda = ElfFile {
            machine: AARCH64,
            needed: &["libonnxruntime_providers_shared.so", "libcudnn.so.9"],
            runpath: Some("$ORIGIN"),
            sections: &[(".nv_fatbin", &code)],
            ..ElfFile::default()
        };
        let shared = ElfFile { machine: AARCH64, soname: Some("x"), ..ElfFile::default() };
        fs::write(ort.join("libonnxruntime.so"), "").unwrap();
        fs::write(ort.join("libonnxruntime_providers_cuda.so"), cuda.bytes()).unwrap();
        fs::write(ort.join("libonnxruntime_providers_shared.so"), shared.bytes()).unwrap();
        fs::write(ort.join("libonnxruntime_providers_tensorrt.so"), "no library").unwrap();
        let root = Root::new(folder.path());

        let found = providers(&ort, &root, None, Some(87));
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].file.ends_with("/libonnxruntime_providers_cuda.so"), "{found:?}");
        assert_eq!(found[0].gpu, Some(GpuCode::Nothing));
        let missing = found[0].missing.as_ref().unwrap();
        assert_eq!(missing.len(), 1, "{missing:?}");
        assert_eq!(missing[0].name, "libcudnn.so.9");
        assert_eq!((found[1].gpu, &found[1].missing), (Some(GpuCode::NotNeeded), &Some(vec![])));
        assert_eq!((&found[2].architectures, &found[2].missing), (&None, &None));
        assert!(!found[2].problems.is_empty());
        assert_eq!(providers(&ort, &root, None, None)[0].gpu, None);
        assert_eq!(providers(Path::new("/nowhere"), &root, None, None), []);

        let elsewhere = tempfile::tempdir().unwrap();
        let found = providers(&ort, &Root::new(elsewhere.path()), None, Some(80));
        assert_eq!((found[0].gpu, &found[0].missing), (Some(GpuCode::MachineCode), &None));
    }
}
