//! Graphs for GPUs, and what is said on a machine without one.

use std::fs;
use std::path::{Path, PathBuf};

use super::common::{Ran, flamingoc, repository};
use super::{at, parse};

/// A library that `cargo xtask test` installs.
fn library(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable).map(PathBuf::from);
    let hint = "run `cargo xtask test`, which installs it";
    path.unwrap_or_else(|| panic!("{variable} does not name ONNX Runtime's library; {hint}"))
}

fn compiled(targets: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let (source, artifact) =
        (repository("tests/golden/openflamingo-mpt"), scratch.path().join("m.flamingo"));
    let mut arguments: Vec<&std::ffi::OsStr> = vec!["compile".as_ref(), source.as_ref()];
    arguments.extend(["-o".as_ref(), artifact.as_os_str()]);
    arguments.extend(targets.iter().map(std::ffi::OsStr::new));
    super::common::run(&arguments).ok();
    (scratch, artifact)
}

#[test]
fn targets_add_graphs_and_what_is_known_of_devices() {
    let (scratch, artifact) = compiled(&["--target", "tensorrt", "--target", "cuda"]);
    for path in [
        "graphs/decoder.cuda.onnx",
        "graphs/media.trt-10.3.onnx",
        "graphs/media.trt-10.15.onnx",
        "device/coverage.html",
    ] {
        assert!(artifact.join(path).is_file(), "{path}");
    }
    let profiles = fs::read_to_string(artifact.join("device/trt-10.3.profiles.json")).unwrap();
    let profiles = parse(&profiles);
    assert_eq!(at(&profiles, "/decoder/1/max/input_ids"), &serde_json::json!([1]));
    let reports = parse(&fs::read_to_string(artifact.join("device/coverage.json")).unwrap());
    assert_eq!(reports.as_array().unwrap().len(), 8, "two stages on four targets");

    let text = flamingoc!("inspect", artifact, "--coverage", "tensorrt-10.3").ok();
    assert_eq!(text.matches("the preferred provider runs every node").count(), 2, "{text}");
    let page = scratch.path().join("page.html");
    let ran = flamingoc!(
        "inspect",
        artifact,
        "--coverage",
        "tensorrt-10.3",
        "--flavour",
        "ort-cpu",
        "--html",
        page
    );
    let text = ran.ok();
    assert!(text.contains("com.microsoft:FusedMatMul"), "{text}");
    assert!(fs::read_to_string(page).unwrap().contains("FusedMatMul"));
    let found = parse(&flamingoc!("inspect", artifact, "--coverage", "cuda", "--json").ok());
    assert_eq!(at(&found, "/0/coverage/fallbacks"), &serde_json::json!([]));

    let source = repository("tests/golden/openflamingo-mpt");
    let ran = flamingoc!("inspect", source, "--coverage", "cuda");
    assert!(ran.stderr.contains("is not an artifact"), "{}", ran.stderr);
}

/// Runs one step with an execution provider of a library.
fn run(artifact: &Path, ep: &str, library: &Path) -> Ran {
    let options = ["--backend", "ort", "--ep", ep, "--max-new-tokens", "1"];
    let [backend, ort, ep, name, most, one] = options;
    flamingoc!(
        "run",
        artifact,
        "--prompt",
        "a",
        backend,
        ort,
        ep,
        name,
        most,
        one,
        "--ort-lib",
        library
    )
}

#[track_caller]
fn check(ran: Ran, expected: &str) {
    assert_eq!((ran.status, ran.stderr.trim_end()), (Some(2), expected));
}

#[test]
fn a_library_without_the_provider_says_so() {
    let (_scratch, artifact) = compiled(&["--target", "cuda", "--target", "tensorrt"]);
    let library = library("FLAMINGO_TEST_ORT_LIB");
    for ep in ["cuda", "tensorrt"] {
        check(
            run(&artifact, ep, &library),
            &format!(
                "error: ort: execution provider {ep}: expected an ONNX Runtime with the provider {ep}, found one \
                 without it\n\nhint: pass `--ort-lib` with an ONNX Runtime that has it, or `--ep cpu`"
            ),
        );
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_machine_without_cuda_says_what_is_missing() {
    let (_scratch, artifact) = compiled(&["--target", "cuda", "--target", "tensorrt"]);
    let library = library("FLAMINGO_TEST_ORT_GPU_LIB");
    for (ep, missing) in [("cuda", "libcublasLt.so.13"), ("tensorrt", "libcublas.so.13")] {
        check(
            run(&artifact, ep, &library),
            &format!(
                "error: ort: execution provider {ep}: expected CUDA's libraries: `{missing}`, which \
                 `libonnxruntime_providers_{ep}.so` needs, found none\n\nhint: install them for this ONNX Runtime, or \
                 put their folder into LD_LIBRARY_PATH; `flamingoc doctor` lists all that are missing"
            ),
        );
    }
    let ran = flamingoc!("engine", "build", artifact, "--ort-lib", library);
    assert_eq!(ran.status, Some(2));
    assert!(ran.stderr.contains("libcublas.so.13"), "{}", ran.stderr);
    assert!(!artifact.join("device/engines").exists());
}

#[test]
fn libraries_and_graphs_that_are_not_there_are_named() {
    let (_scratch, artifact) = compiled(&[]);
    check(
        run(&artifact, "cpu", Path::new("/nowhere/libonnxruntime.so")),
        "error: ort: /nowhere/libonnxruntime.so: No such file or directory (os error 2)\n\nhint: get the library with \
         `pip download --no-deps onnxruntime`, unzip the wheel, and pass `--ort-lib` with the path of \
         onnxruntime/capi/libonnxruntime.so.*",
    );
    let ran = run(&artifact, "cuda", &library("FLAMINGO_TEST_ORT_LIB"));
    let manifest = artifact.join("manifest.json");
    check(
        ran,
        &format!(
            "error: {}: expected a media graph of flavour `cuda`, found portable, ort-cpu; compile for it with \
             `--target`\n\nhint: compile the artifact again",
            manifest.display()
        ),
    );
}

#[test]
fn engines_are_listed_and_removed() {
    let (_scratch, artifact) = compiled(&["--target", "tensorrt"]);
    let list = || flamingoc!("engine", "list", artifact).ok();
    let text = list();
    assert!(text.starts_with("no engines\nthey would not be used here: expected `"), "{text}");
    assert_eq!(flamingoc!("engine", "prune", artifact).ok(), "nothing to remove\n");
    let engines = artifact.join("device/engines");
    fs::create_dir_all(&engines).unwrap();
    fs::write(engines.join("media.engine"), [0; 2000]).unwrap();
    let here = parse(&flamingoc!("engine", "list", artifact, "--json").ok());
    fs::write(engines.join("built_with.json"), at(&here, "/here").to_string()).unwrap();
    assert!(list().ends_with("they would be used here\n"), "{}", list());
    assert_eq!(flamingoc!("engine", "prune", artifact).ok(), "nothing to remove\n");
    let mut other = at(&here, "/here").clone();
    other["tensorrt"] = "9.9.9".into();
    fs::write(engines.join("built_with.json"), other.to_string()).unwrap();
    assert_eq!(
        flamingoc!("engine", "prune", artifact).ok(),
        "nothing to remove\n",
        "no TensorRT tells its version here"
    );
    other["graphs"] = "0000".into();
    fs::write(engines.join("built_with.json"), other.to_string()).unwrap();
    assert!(list().contains("graphs and sizes: built with 0000, here is "), "{}", list());
    let doctor = flamingoc!("doctor", "--engines", artifact).ok();
    assert!(
        doctor.contains("engines           they would not be used here: graphs and sizes: "),
        "{doctor}"
    );
    let gone = flamingoc!("engine", "prune", artifact).ok();
    assert!(gone.contains("media.engine") && gone.contains("2.0 kB"), "{gone}");
    assert!(list().starts_with("no engines\n"));
}
