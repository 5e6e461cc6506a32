//! Every exported graph of every flavour, under the checker and shape inference of the `onnx`
//! Python package (`golden/check_onnx.py`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use flamingo_ir::op::Flavour;
use flamingo_tests::{compile_options, compiled, compiled_for_all, golden_folders, tiny_scenes};
use flamingoc::compile::{CalibrateOn, CompileOptions, compile};
use flamingoc::observer::Observer;
use flamingoc::scheme::Precision;
use serde_json::{Map, Value};

/// What the script finds in each file.
fn findings(files: &[PathBuf]) -> Map<String, Value> {
    let python = std::env::var_os("FLAMINGO_TEST_PYTHON").unwrap_or_else(|| {
        panic!("FLAMINGO_TEST_PYTHON does not name a Python with `onnx`; run `cargo xtask test`")
    });
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/check_onnx.py");
    let output = Command::new(python).arg(script).args(files).output().unwrap();
    let found: Map<String, Value> = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(found.len(), files.len());
    let n_problems = found.values().filter(|problem| !problem.is_null()).count();
    assert_eq!(output.status.code(), Some(i32::from(n_problems > 0)));
    found
}

/// Graph files of an artifact, sorted.
fn graphs(artifact: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(artifact.join("graphs")).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "onnx"));
    files.sort();
    files
}

#[test]
fn every_graph_passes_the_checker() {
    let folders = golden_folders();
    let artifacts: Vec<_> =
        folders.iter().map(|folder| compiled_for_all(folder, Precision::F32)).collect();
    let files: Vec<PathBuf> = artifacts.iter().flat_map(|(_, path)| graphs(path)).collect();
    assert_eq!(files.len(), 2 * Flavour::ALL.len() * folders.len(), "two graphs of each flavour");
    for (file, problem) in findings(&files) {
        assert!(problem.is_null(), "{file}: {problem}");
    }
}

#[test]
fn graphs_of_every_precision_pass_the_checker() {
    let precisions = [Precision::F16, Precision::Bf16, Precision::Int8, Precision::Int4];
    let artifacts = precisions.map(|precision| compiled_for_all(&tiny_scenes(), precision));
    let files: Vec<PathBuf> = artifacts.iter().flat_map(|(_, path)| graphs(path)).collect();
    assert_eq!(files.len(), 2 * Flavour::ALL.len() * precisions.len());
    for (file, problem) in findings(&files) {
        assert!(problem.is_null(), "{file}: {problem}");
    }
}

#[test]
fn graphs_with_explicit_quantisation_pass_the_checker() {
    let scratch = tempfile::tempdir().unwrap();
    let prompts = scratch.path().join("prompts.jsonl");
    let text = fs::read_to_string(tiny_scenes().join("prompts.jsonl")).unwrap();
    let images = format!("\"{}/images/", tiny_scenes().display());
    let few: Vec<String> =
        text.lines().take(8).map(|line| line.replace("\"images/", &images)).collect();
    fs::write(&prompts, few.join("\n")).unwrap();
    let options = CompileOptions {
        flavours: vec![Flavour::Trt10_3, Flavour::Trt10_15],
        calibrate: CalibrateOn::File(prompts),
        observer: Some(Observer::Mse),
        ..compile_options(
            &tiny_scenes().join("recipe.toml"),
            &scratch.path().join("model.flamingo"),
            Precision::Int8.into(),
        )
    };
    let report = compile(&options, &mut |_| {}).unwrap().1;
    let ranges = report.quantisation.static_ranges.unwrap();
    assert!(ranges.linears.iter().any(|linear| linear.is_static), "{ranges:?}");
    let files = graphs(&options.output);
    assert_eq!(files.len(), 8);
    for (file, problem) in findings(&files) {
        assert!(problem.is_null(), "{file}: {problem}");
    }
}

/// Replaces a name in a file by one of the same length.
fn rename(file: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(file).unwrap();
    let places: Vec<usize> = (0..bytes.len() - from.len())
        .filter(|at| bytes[*at..].starts_with(from.as_bytes()))
        .collect();
    assert!(!places.is_empty(), "{}: no `{from}`", file.display());
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    }
    fs::write(file, bytes).unwrap();
}

#[test]
fn the_checker_finds_damage() {
    let (_scratch, artifact) = compiled(&tiny_scenes());
    let files = graphs(&artifact);
    let file = |name: &str| artifact.join("graphs").join(name);
    rename(&file("decoder.portable.onnx"), "Softmax", "Softmux");
    rename(&file("decoder.ort-cpu.onnx"), "transB", "transX");
    rename(&file("media.portable.onnx"), "weights.safetensors", "weighty.safetensors");
    let found = findings(&files);
    let problem = |name: &str| found[&file(name).display().to_string()].as_str();
    let expect = |name: &str, word: &str| {
        let problem = problem(name).unwrap_or_else(|| panic!("{name}: nothing found"));
        assert!(problem.contains(word), "{name}: {problem}");
    };
    expect("decoder.portable.onnx", "Softmux");
    expect("decoder.ort-cpu.onnx", "transX");
    expect("media.portable.onnx", "weighty.safetensors");
    assert_eq!(problem("media.ort-cpu.onnx"), None);

    let weights = fs::OpenOptions::new().write(true).open(file("weights.safetensors")).unwrap();
    weights.set_len(4096).unwrap();
    let problem =
        &findings(&[file("media.ort-cpu.onnx")])[&file("media.ort-cpu.onnx").display().to_string()];
    assert!(problem.as_str().unwrap().contains("past the end"), "{problem}");
}
