//! What the cross-crate tests share: goldens, artifacts of them, comparisons.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flamingo_ir::Tensor;
use flamingo_ir::op::Flavour;
use flamingo_models::checkpoint::Checkpoint;
use flamingo_runtime::OpenOptions;
use flamingoc::compile::{CalibrateOn, CompileOptions, compile};
use flamingoc::scheme::{Precision, Scheme};

/// Folders below `tests/golden` that hold a checkpoint with goldens, sorted.
pub fn golden_folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let entries = std::fs::read_dir(&root).expect("tests/golden is part of the repository");
    let mut folders: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    folders.retain(|path| path.join("golden.safetensors").is_file());
    folders.sort();
    assert!(folders.len() >= 15, "golden folders are missing: {folders:?}");
    folders
}

/// A small trained Flamingo in genuine OpenFlamingo files, with pictures, prompts and PyTorch's answers.
pub fn tiny_scenes() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/tiny-scenes")
}

/// Compiles `source` in f32 into a temporary folder, which lives as long as the returned handle.
pub fn compiled(source: &Path) -> (tempfile::TempDir, PathBuf) {
    compiled_as(source, Scheme::default())
}

/// Compiles `source` with weights stored as `scheme` says; else as [`compiled`].
pub fn compiled_as(source: &Path, scheme: Scheme) -> (tempfile::TempDir, PathBuf) {
    compiled_with(source, scheme, Vec::new())
}

/// The same with graphs of every flavour.
pub fn compiled_for_all(source: &Path, precision: Precision) -> (tempfile::TempDir, PathBuf) {
    let flavours = Flavour::ALL.into_iter().filter(|flavour| flavour.half().is_some());
    compiled_with(source, precision.into(), flavours.collect())
}

fn compiled_with(
    source: &Path,
    scheme: Scheme,
    flavours: Vec<Flavour>,
) -> (tempfile::TempDir, PathBuf) {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let artifact = scratch.path().join("model.flamingo");
    let options = CompileOptions { flavours, ..compile_options(source, &artifact, scheme) };
    compile(&options, &mut |_| {})
        .unwrap_or_else(|error| panic!("{}: {error:#}", source.display()));
    (scratch, artifact)
}

/// How tests compile `source` to `output`: rounded to nearest and not judged.
pub fn compile_options(source: &Path, output: &Path, scheme: Scheme) -> CompileOptions {
    CompileOptions {
        flavours: Vec::new(),
        source: source.to_owned(),
        output: output.to_owned(),
        overwrite: false,
        max_context: None,
        max_images: 64,
        scheme,
        calibrate: CalibrateOn::Nothing,
        calibration_cache: None,
        observer: None,
        gate: None,
        dump: None,
    }
}

/// How to open an artifact with a backend; ONNX Runtime's library is the one the tests install.
pub fn opening(backend: &str) -> OpenOptions {
    let library = std::env::var_os("FLAMINGO_TEST_ORT_LIB").map(PathBuf::from);
    if backend == "ort" {
        assert!(
            library.as_ref().is_some_and(|path| path.is_file()),
            "FLAMINGO_TEST_ORT_LIB does not name ONNX Runtime's library; run `cargo xtask test`, which installs it"
        );
    }
    OpenOptions {
        backend: Some(backend.to_owned()),
        ort_library: library,
        ..OpenOptions::default()
    }
}

/// The tensors of a golden file.
pub struct Golden {
    tensors: BTreeMap<String, Tensor>,
}

impl Golden {
    /// Reads `golden.safetensors` of a folder.
    pub fn read(folder: &Path) -> Golden {
        let file = Checkpoint::open(&folder.join("golden.safetensors")).expect("a golden file");
        let read = |info: &flamingo_models::checkpoint::TensorInfo| {
            let bytes = file.bytes(&info.name).expect("a tensor of the file");
            let tensor = Tensor::from_le_bytes(info.dtype, &info.shape, &bytes);
            (info.name.clone(), tensor.expect("bytes of the right size"))
        };
        Golden { tensors: file.infos().map(read).collect() }
    }

    /// Names of the cases.
    pub fn cases(&self) -> Vec<String> {
        let ids = self.tensors.keys().filter_map(|name| name.strip_suffix(".input_ids"));
        ids.map(str::to_owned).collect()
    }

    /// A tensor of a case.
    pub fn get(&self, case: &str, name: &str) -> Option<&Tensor> {
        self.tensors.get(&format!("{case}.{name}"))
    }

    /// An f32 tensor of a case.
    pub fn f32(&self, case: &str, name: &str) -> Option<Vec<f32>> {
        self.get(case, name).and_then(Tensor::to_f32_vec)
    }

    /// Token ids of a case.
    pub fn ids(&self, case: &str, name: &str) -> Option<Vec<u32>> {
        let array = self.get(case, name)?.as_i64()?;
        array.iter().map(|id| u32::try_from(*id).ok()).collect()
    }
}
