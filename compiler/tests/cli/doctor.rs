//! `doctor` over a copy of a device's files.

#[path = "../common/elf.rs"]
mod elf;

use std::fs;
use std::path::Path;

use elf::{AARCH64, ElfFile, fat_binary};
use serde_json::json;

use super::common::{copy, flamingoc, repository};
use super::{at, parse};

/// Writes a library for aarch64 with code for sm_80 and sm_90.
fn write_library(path: &Path, needed: &[&str]) {
    let code = fat_binary(&[(2, 80, 24), (2, 90, 5)]);
    let sections = [(".nv_fatbin", &code[..])];
    let library = ElfFile { machine: AARCH64, needed, sections: &sections, ..ElfFile::default() };
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, library.bytes()).unwrap();
}

#[test]
fn a_copy_of_a_jetson_is_described() {
    let scratch = tempfile::tempdir().unwrap();
    let (root, ort) = (scratch.path().join("root"), scratch.path().join("root/opt/ort"));
    copy(&repository("compiler/tests/fixtures/jetson/orin-nano"), &root);
    let needed = ["libcudart.so.12", "libcudnn.so.9", "libnvinfer.so.10.3.0"];
    write_library(&ort.join("libonnxruntime_providers_cuda.so"), &needed);
    write_library(&root.join("usr/local/cuda/targets/aarch64-linux/lib/libcudart.so.12"), &[]);
    fs::write(ort.join("libonnxruntime.so.1.24.0"), "no library").unwrap();
    let log = repository("compiler/tests/fixtures/jetson/tegrastats.log");
    let ran = flamingoc!("doctor", "--json", "--root", root, "--ort-lib", ort, "--tegrastats", log);
    let found = parse(&ran.ok());
    for (pointer, expected) in [
        ("/jetson/soc", json!({"name": "tegra234", "gpu_architecture": 87})),
        ("/jetson/l4t", json!("36.4.7")),
        ("/jetson/jetpack", json!("6.2.1")),
        ("/jetson/cuda/version", json!("12.6.11")),
        ("/jetson/tensorrt/version", json!("10.3.0")),
        ("/jetson/memory/total_bytes", json!(7_990_185_984u64)),
        ("/jetson/power/current", json!({"id": 1, "name": "25W"})),
        ("/jetson/rails/0/milliwatts", json!(5703)),
        ("/tegrastats/gpu_percent", json!(36)),
        ("/provider_libraries/0/architectures/machine_code", json!([80, 90])),
        ("/provider_libraries/0/gpu", json!("nothing")),
        ("/provider_libraries/0/missing/0/name", json!("libcudnn.so.9")),
        ("/provider_libraries/0/missing/1/name", json!("libnvinfer.so.10.3.0")),
        (
            "/provider_libraries/0/missing/1/unusable",
            json!("/usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0"),
        ),
        ("/provider_libraries/0/problems", json!([])),
    ] {
        assert_eq!(at(&found, pointer), &expected, "{pointer}: {found:#}");
    }
    assert_eq!(at(&found, "/provider_libraries").as_array().unwrap().len(), 1);

    let text = flamingoc!("doctor", "--root", root, "--ort-lib", ort).ok();
    for line in [
        "  L4T             36.4.7, JetPack 6.2.1\n",
        "not run on hardware",
        "    on sm_87      nothing for this GPU: the library cannot use it\n",
        "    missing       libcudnn.so.9, needed by libonnxruntime_providers_cuda.so\n",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[test]
fn a_folder_without_a_device_is_no_jetson() {
    let empty = tempfile::tempdir().unwrap();
    let text = flamingoc!("doctor", "--root", empty.path()).ok();
    let line = "\nJetson            no (/etc/nv_tegra_release is not there)\n";
    assert!(text.contains(line), "{text}");
    for (flag, place) in [("--root", "/nowhere"), ("--tegrastats", "/nowhere/log")] {
        let ran = flamingoc!("doctor", flag, place);
        assert_eq!((ran.status, ran.stdout.as_str()), (Some(2), ""), "{flag}");
        assert!(ran.stderr.contains(place), "{}", ran.stderr);
    }
}
