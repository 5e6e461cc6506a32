//! Versions of Jetson Linux, JetPack, CUDA and TensorRT.

use std::collections::BTreeMap;

use serde::Serialize;

use super::super::root::Root;
use super::super::version_from_text;

/// A version, and the file that says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Version {
    /// Numbers with dots between them.
    pub version: String,
    /// The file, as the device calls it.
    pub file: String,
}

/// JetPack by L4T release, exact releases only: NVIDIA's JetPack archive, as `jetson_stats`
/// (`jtop/core/jetson_variables.py`) and `jetson-containers` (`jetson_containers/l4t_version.py`) have it. A patch of
/// L4T that came without a JetPack of its own stands with the one that it updates.
const JETPACKS: [(&str, &str); 33] = [
    ("39.2.1", "7.2.1"),
    ("39.2.0", "7.2"),
    ("38.4.0", "7.1"),
    ("38.2.2", "7.0"),
    ("38.2.1", "7.0"),
    ("38.2.0", "7.0"),
    ("36.5.2", "6.2.3"),
    ("36.5.0", "6.2.2"),
    ("36.4.7", "6.2.1"),
    ("36.4.4", "6.2.1"),
    ("36.4.3", "6.2"),
    ("36.4.0", "6.1"),
    ("36.3.0", "6.0"),
    ("36.2.0", "6.0 DP"),
    ("35.6.2", "5.1.5"),
    ("35.6.1", "5.1.5"),
    ("35.6.0", "5.1.4"),
    ("35.5.0", "5.1.3"),
    ("35.4.1", "5.1.2"),
    ("35.3.1", "5.1.1"),
    ("35.2.1", "5.1"),
    ("35.1.0", "5.0.2"),
    ("32.7.6", "4.6.6"),
    ("32.7.5", "4.6.5"),
    ("32.7.4", "4.6.4"),
    ("32.7.3", "4.6.3"),
    ("32.7.2", "4.6.2"),
    ("32.7.1", "4.6.1"),
    ("32.6.1", "4.6"),
    ("32.5.2", "4.5.1"),
    ("32.5.1", "4.5.1"),
    ("32.5.0", "4.5"),
    ("32.4.4", "4.4.1"),
];

/// Folders with libraries of CUDA's runtime.
const CUDA_FOLDERS: [&str; 2] =
    ["/usr/local/cuda/lib64", "/usr/local/cuda/targets/aarch64-linux/lib"];

/// Folders with TensorRT's libraries, and its headers.
const TENSORRT_FOLDERS: [&str; 3] =
    ["/usr/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu/tegra", "/usr/lib"];
const TENSORRT_HEADERS: [&str; 2] =
    ["/usr/include/aarch64-linux-gnu/NvInferVersion.h", "/usr/include/NvInferVersion.h"];

/// The release of L4T, out of `/etc/nv_tegra_release`: `# R36 (release), REVISION: 4.7, …` → `36.4.7`.
pub fn l4t_from_release(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with('#') && line.contains("(release)"))?;
    let major = line.trim_start_matches(['#', ' ']).strip_prefix('R')?;
    let major = major.split_whitespace().next()?;
    let revision = line.split(',').find_map(|part| part.trim().strip_prefix("REVISION:"))?;
    version_from_text(&format!("{major}.{}", revision.trim()))
}

/// The JetPack that an L4T release came with.
pub fn jetpack_from_l4t(l4t: &str) -> Option<&'static str> {
    JETPACKS.iter().find(|(release, _)| *release == l4t).map(|(_, jetpack)| *jetpack)
}

/// CUDA's version: out of its `version.json`, else by the name of its runtime library.
pub fn cuda(root: &Root) -> Option<Version> {
    let file = "/usr/local/cuda/version.json";
    let version = root.text(file).and_then(|text| cuda_from_json(&text));
    let named = version.map(|version| Version { version, file: file.to_owned() });
    named.or_else(|| newest_library(root, &CUDA_FOLDERS, "libcudart.so."))
}

/// TensorRT's version: by the name of its library, else out of its header.
pub fn tensorrt(root: &Root) -> Option<Version> {
    let header = |file: &&str| {
        let version = tensorrt_from_header(&root.text(file)?)?;
        Some(Version { version, file: (*file).to_owned() })
    };
    newest_library(root, &TENSORRT_FOLDERS, "libnvinfer.so.")
        .or_else(|| TENSORRT_HEADERS.iter().find_map(header))
}

/// The version in CUDA's `version.json`: `{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}, …}`.
pub fn cuda_from_json(text: &str) -> Option<String> {
    let json: serde_json::Value = serde_json::from_str(text).ok()?;
    version_from_text(json.get("cuda")?.get("version")?.as_str()?)
}

/// The version in TensorRT's `NvInferVersion.h`: `#define NV_TENSORRT_MAJOR 10` and so on, where a value may be the
/// name of another define.
pub fn tensorrt_from_header(text: &str) -> Option<String> {
    let define = |line: &'_ str| -> Option<(String, String)> {
        let mut words = line.trim().strip_prefix("#define")?.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    };
    let defines: BTreeMap<String, String> = text.lines().filter_map(define).collect();
    let value = |part: &str| {
        let value = defines.get(&format!("NV_TENSORRT_{part}"))?;
        Some(defines.get(value).unwrap_or(value).as_str())
    };
    let mut parts = vec![value("MAJOR")?, value("MINOR")?, value("PATCH")?];
    parts.extend(value("BUILD"));
    version_from_text(&parts.join("."))
}

/// The newest version of a library by file name: `libnvinfer.so.` of a folder with `libnvinfer.so.10.3.0` → `10.3.0`.
/// A name with a major version only, which is a link, says nothing.
pub fn newest_from_names(names: &[String], start: &str) -> Option<String> {
    let numbers = |version: &String| -> Vec<u64> {
        version.split('.').filter_map(|part| part.parse().ok()).collect()
    };
    let versions = names.iter().filter_map(|name| version_from_text(name.strip_prefix(start)?));
    versions.filter(|version| version.contains('.')).max_by_key(numbers)
}

/// The newest version of a library in the first folder that has one.
fn newest_library(root: &Root, folders: &[&str], start: &str) -> Option<Version> {
    folders.iter().find_map(|folder| {
        let version = newest_from_names(&root.names(folder), start)?;
        Some(Version { file: format!("{folder}/{start}{version}"), version })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_l4t_are_read() {
        let l4t = |text| l4t_from_release(text);
        let line = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, \
                    DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n";
        assert_eq!(l4t(line).as_deref(), Some("36.4.3"));
        let old = "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t186ref, EABI: aarch64\n";
        assert_eq!(l4t(old).as_deref(), Some("32.7.1"));
        for text in [
            "",
            "# R36 (release)",
            "# R36 (release), REVISION: \x1b[2J",
            "# R (release), REVISION: 4.3",
            "R36 (release), REVISION: 4.3",
            "# R36.4 release, REVISION: 4.3",
            "# R36 (release), REVISION: 4.3.2.1.9.8.7",
        ] {
            assert_eq!(l4t(text), None, "{text:?}");
        }
    }

    #[test]
    fn jetpacks_are_of_exact_releases() {
        assert_eq!(jetpack_from_l4t("36.4.3"), Some("6.2"));
        assert_eq!(jetpack_from_l4t("36.4.5"), None);
        assert_eq!(jetpack_from_l4t("36"), None);
    }

    #[test]
    fn cuda_is_read_out_of_its_json() {
        let json = r#"{ "cuda" : { "name" : "CUDA SDK", "version" : "12.2.140" } }"#;
        assert_eq!(cuda_from_json(json).as_deref(), Some("12.2.140"));
        let deep = "[".repeat(60_000);
        for text in
            ["", "{}", r#"{"cuda": 12}"#, r#"{"cuda": {"version": "twelve"}}"#, &deep, "\u{fffd}"]
        {
            assert_eq!(cuda_from_json(text), None);
        }
    }

    #[test]
    fn tensorrt_is_read_out_of_either_header() {
        let plain = "#define NV_TENSORRT_MAJOR 8 //!< TensorRT major version.\n\
                     #define NV_TENSORRT_MINOR 5\n#define NV_TENSORRT_PATCH 2\n#define NV_TENSORRT_BUILD 2\n";
        assert_eq!(tensorrt_from_header(plain).as_deref(), Some("8.5.2.2"));
        let indirect = "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 16\n\
                        #define TRT_PATCH_ENTERPRISE 1\n#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE\n\
                        #define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE\n\
                        #define NV_TENSORRT_PATCH TRT_PATCH_ENTERPRISE\n";
        assert_eq!(tensorrt_from_header(indirect).as_deref(), Some("10.16.1"));
        let circle = "#define NV_TENSORRT_MAJOR NV_TENSORRT_MAJOR\n#define NV_TENSORRT_MINOR 1\n\
                      #define NV_TENSORRT_PATCH 1\n";
        for text in ["", "#define NV_TENSORRT_MAJOR 10\n", "#define\n", circle] {
            assert_eq!(tensorrt_from_header(text), None, "{text:?}");
        }
    }

    #[test]
    fn libraries_tell_their_version_by_name() {
        let names =
            |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let found = names(&[
            "libnvinfer.so",
            "libnvinfer.so.10",
            "libnvinfer.so.9.11.0",
            "libnvinfer.so.10.3.0",
            "libnvinfer.so.99.1.0.bak",
            "libnvinfer_plugin.so.11.0.0",
        ]);
        assert_eq!(newest_from_names(&found, "libnvinfer.so.").as_deref(), Some("10.3.0"));
        assert_eq!(newest_from_names(&names(&["libnvinfer.so.10"]), "libnvinfer.so."), None);
    }
}
