//! The artifact as files: the same bytes from the same source, tensors where any reader finds
//! them, whole or not there.

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{copy, flamingoc, repository};
use flamingo_models::manifest::Manifest;
use safetensors::tensor::{Dtype, SafeTensors};

/// Every file of a folder by its relative path.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_owned()];
    while let Some(path) = open.pop() {
        for entry in fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => open.push(path),
                false => {
                    let name = path.strip_prefix(folder).unwrap().to_owned();
                    assert!(found.insert(name, fs::read(path).unwrap()).is_none());
                }
            }
        }
    }
    found
}

/// Checkpoints of each family and file format.
const SOURCES: [&str; 5] = [
    "tests/golden/tiny-scenes",
    "tests/golden/idefics-vector",
    "tests/golden/openflamingo-mpt1b",
    "tests/golden/openflamingo-opt-training",
    "tests/golden/otter-image",
];

#[test]
fn the_same_source_and_options_give_the_same_bytes() {
    for source in SOURCES {
        let scratch = tempfile::tempdir().unwrap();
        let elsewhere = scratch.path().join("elsewhere");
        copy(&repository(source), &elsewhere);
        let (first, second) = (scratch.path().join("a"), scratch.path().join("b.flamingo"));
        flamingoc!("compile", repository(source), "-o", first, "--max-images", "7").ok();
        flamingoc!("compile", elsewhere, "-o", second, "--max-images", "7").ok();
        let (first, second) = (files(&first), files(&second));
        assert!(first.len() >= 7, "{source}: {:?}", first.keys());
        assert!(first.keys().eq(second.keys()), "{source}");
        for (name, bytes) in &first {
            assert!(*bytes == second[name], "{source}: `{}` differs", name.display());
        }
        let third = scratch.path().join("c");
        flamingoc!("compile", repository(source), "-o", third, "--max-images", "8").ok();
        let differ: Vec<PathBuf> = files(&third)
            .into_iter()
            .filter_map(|(name, bytes)| (bytes != first[&name]).then_some(name))
            .collect();
        assert_eq!(differ, [PathBuf::from("manifest.json")], "{source}: other options");
    }
}

#[test]
fn packed_weights_have_the_same_bytes_and_aligned_tensors() {
    for precision in ["f16", "bf16", "int8", "int4"] {
        let scratch = tempfile::tempdir().unwrap();
        let (first, second) = (scratch.path().join("a"), scratch.path().join("b"));
        let source = repository("tests/golden/idefics-vector");
        flamingoc!("compile", source, "-o", first, "--precision", precision).ok();
        flamingoc!("compile", source, "-o", second, "--precision", precision).ok();
        assert!(files(&first) == files(&second), "{precision}");
        let bytes = fs::read(first.join("graphs/weights.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut dtypes = Vec::new();
        for (name, tensor) in tensors.tensors().iter().filter(|(n, _)| !n.starts_with("__")) {
            let offset = tensor.data().as_ptr().addr() - bytes.as_ptr().addr();
            assert_eq!(offset % 64, 0, "{precision}: `{name}`");
            if name.ends_with(".data") {
                dtypes.push(tensor.dtype());
            }
        }
        dtypes.sort();
        dtypes.dedup();
        let expected = match precision {
            "f16" => vec![Dtype::F16],
            "bf16" => vec![Dtype::BF16],
            "int8" => vec![Dtype::I8],
            _ => vec![Dtype::U8, Dtype::I8],
        };
        assert!(dtypes.len() == expected.len() && expected.iter().all(|d| dtypes.contains(d)));
    }
}

#[test]
fn every_file_is_in_the_manifest_with_its_size_and_hash() {
    for source in SOURCES {
        let scratch = tempfile::tempdir().unwrap();
        let artifact = scratch.path().join("a.flamingo");
        flamingoc!("compile", repository(source), "-o", artifact).ok();
        let mut files = files(&artifact);
        let manifest = files.remove(Path::new("manifest.json")).unwrap();
        let manifest: Manifest = serde_json::from_slice(&manifest).unwrap();
        assert_eq!(manifest.files.len(), files.len(), "{source}");
        assert!(manifest.files.is_sorted(), "{source}");
        for entry in &manifest.files {
            let bytes = &files[Path::new(&entry.path)];
            assert_eq!(entry.bytes, bytes.len() as u64, "{source}: {}", entry.path);
            let hash = blake3::hash(bytes).to_hex();
            assert_eq!(entry.blake3, hash.as_str(), "{source}: {}", entry.path);
        }
        for graph in &manifest.graphs {
            assert!(files.contains_key(Path::new(&graph.path)), "{source}: {}", graph.path);
            assert!(!graph.inputs.is_empty() && !graph.outputs.is_empty());
        }
        let stages = |stage: &str| manifest.graphs.iter().filter(|g| g.stage == stage).count();
        assert_eq!((stages("media"), stages("decoder")), (2, 2), "{source}");
        let sources = &manifest.provenance.sources;
        assert!(!sources.is_empty());
        for entry in sources {
            let named = |path: &Path| path.file_name().is_some_and(|name| *name == *entry.path);
            let found = self::files(&repository(source));
            let bytes = found.iter().find(|(path, bytes)| {
                named(path) && blake3::hash(bytes).to_hex().as_str() == entry.blake3
            });
            assert!(bytes.is_some(), "{source}: provenance of `{}`", entry.path);
        }
    }
}

#[test]
fn weights_are_aligned_and_any_reader_reads_them() {
    for source in SOURCES {
        let scratch = tempfile::tempdir().unwrap();
        let artifact = scratch.path().join("a.flamingo");
        flamingoc!("compile", repository(source), "-o", artifact).ok();
        let bytes = fs::read(artifact.join("graphs/weights.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let begin = bytes.as_ptr() as usize;
        let mut n_tensors = 0;
        for (name, view) in tensors.tensors() {
            if name.starts_with("__padding__") {
                assert_eq!(view.dtype(), Dtype::U8, "{source}: `{name}`");
                assert!(view.data().len() < 64, "{source}: `{name}`");
                assert!(view.data().iter().all(|byte| *byte == 0), "{source}: `{name}`");
                continue;
            }
            n_tensors += 1;
            let offset = view.data().as_ptr() as usize - begin;
            assert_eq!(offset % 64, 0, "{source}: `{name}` at {offset}");
            assert_eq!(view.dtype(), Dtype::F32, "{source}: `{name}`");
            let (values, rest) = view.data().as_chunks::<4>();
            assert!(rest.is_empty());
            let finite = values.iter().all(|value| f32::from_le_bytes(*value).is_finite());
            assert!(finite, "{source}: `{name}`");
        }
        assert!(n_tensors > 20, "{source}: {n_tensors} tensors");
    }
}

#[test]
fn an_artifact_is_replaced_whole() {
    let scratch = tempfile::tempdir().unwrap();
    let artifact = scratch.path().join("a.flamingo");
    flamingoc!("compile", repository("tests/golden/tiny-scenes"), "-o", artifact).ok();
    fs::write(artifact.join("left over"), "").unwrap();
    let other = repository("tests/golden/idefics-plain");
    flamingoc!("compile", other, "-o", artifact, "--overwrite").ok();
    let names: Vec<PathBuf> = files(&artifact).into_keys().collect();
    assert!(!names.contains(&"left over".into()) && !names.contains(&"tokenizer.json".into()));
    let left: Vec<_> = fs::read_dir(scratch.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left, [artifact], "nothing else stays");
}

/// A process that ends with the test.
struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a compilation and kills it once it has begun to write weights.
fn kill_midway(source: &Path, target: &Path) {
    let folder = target.parent().unwrap();
    let null = || Stdio::from(File::open("/dev/null").unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_flamingoc"));
    command.arg("compile").arg(source).arg("-o").arg(target).arg("--overwrite");
    let child = command.stdout(null()).stderr(null()).spawn().unwrap();
    let mut running = Running(child);
    let deadline = Instant::now() + Duration::from_secs(60);
    let has_begun = || {
        let staging = fs::read_dir(folder).unwrap().filter_map(Result::ok);
        staging.map(|entry| entry.path().join("graphs/weights.safetensors")).any(|weights| {
            !weights.starts_with(target) && fs::metadata(weights).is_ok_and(|file| file.len() > 0)
        })
    };
    while !has_begun() {
        assert!(Instant::now() < deadline, "no weights were written");
        assert!(running.0.try_wait().unwrap().is_none(), "the compilation ended early");
        std::thread::sleep(Duration::from_micros(200));
    }
    running.0.kill().unwrap();
    let status = running.0.wait().unwrap();
    assert_eq!(status.code(), None, "the compilation ended before it was killed");
}

#[test]
fn a_compilation_that_is_killed_leaves_what_was_there() {
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("of-mini");
    flamingoc!("synth", "of-mini", "-o", source).ok();
    let target = scratch.path().join("out").join("a.flamingo");
    fs::create_dir(target.parent().unwrap()).unwrap();
    kill_midway(&source, &target);
    assert!(!target.exists());
    flamingoc!("compile", repository("tests/golden/tiny-scenes"), "-o", target).ok();
    let before = files(&target);
    kill_midway(&source, &target);
    assert!(files(&target) == before, "the artifact that was there is as it was");
}
