//! A Jetson: what its files say of board, versions, memory and power. [`read`] reads them under a root; the modules
//! have the parsers, from text to values. What is not there, or is not in the form that is known, is `None`.

pub mod board;
pub mod memory;
pub mod power;
pub mod tegrastats;
pub mod versions;

use serde::Serialize;

use super::root::Root;
use board::Soc;
use memory::Memory;
use power::{PowerModes, Rail};
use versions::Version;

/// What a Jetson's files say.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Jetson {
    /// The board's name.
    pub board: Option<String>,
    /// Its processor, and the architecture of the GPU in it.
    pub soc: Option<Soc>,
    /// Release of Jetson Linux (L4T).
    pub l4t: Option<String>,
    /// Release of JetPack that this L4T came with, if it is known.
    pub jetpack: Option<&'static str>,
    /// CUDA.
    pub cuda: Option<Version>,
    /// TensorRT.
    pub tensorrt: Option<Version>,
    /// Memory, which CPU and GPU share.
    pub memory: Option<Memory>,
    /// Power modes, and which is set.
    pub power: PowerModes,
    /// What flows through the rails that are measured, now.
    pub rails: Vec<Rail>,
}

/// Reads the files under a root; `None` where neither L4T's release file nor a Tegra's device tree is.
pub fn read(root: &Root) -> Option<Jetson> {
    let release = root.text("/etc/nv_tegra_release");
    let soc = root.text("/proc/device-tree/compatible");
    let soc = soc.and_then(|text| board::soc_from_compatible(&text));
    if release.is_none() && soc.is_none() {
        return None;
    }
    let board = root.text("/proc/device-tree/model");
    let l4t = release.and_then(|text| versions::l4t_from_release(&text));
    let memory = root.text("/proc/meminfo");
    Some(Jetson {
        board: board.and_then(|text| board::name_from_model(&text)),
        soc,
        jetpack: l4t.as_deref().and_then(versions::jetpack_from_l4t),
        l4t,
        cuda: versions::cuda(root),
        tensorrt: versions::tensorrt(root),
        memory: memory.and_then(|text| memory::memory_from_meminfo(&text)),
        power: power::modes(root),
        rails: power::rails(root),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn fixture(name: &str) -> Option<Jetson> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/jetson").join(name);
        assert!(folder.is_dir(), "{}", folder.display());
        read(&Root::new(&folder))
    }

    fn version(version: &str, file: &str) -> Option<Version> {
        Some(Version { version: version.into(), file: file.into() })
    }

    #[test]
    fn an_orin_nano_says_what_it_has() {
        let found = fixture("orin-nano").unwrap();
        let board = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super";
        assert_eq!(found.board.as_deref(), Some(board));
        let soc = Soc { name: "tegra234".into(), gpu_architecture: Some(87) };
        assert_eq!(found.soc, Some(soc));
        assert_eq!((found.l4t.as_deref(), found.jetpack), (Some("36.4.7"), Some("6.2.1")));
        assert_eq!(found.cuda, version("12.6.11", "/usr/local/cuda/version.json"));
        let library = "/usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0";
        assert_eq!(found.tensorrt, version("10.3.0", library));
        assert_eq!(found.memory.unwrap().total_bytes, 7_802_916 * 1024);
        let mode = found.power.current.unwrap();
        assert_eq!((mode.id, mode.name.as_deref()), (1, Some("25W")));
        assert_eq!(found.power.modes.len(), 4);
        let rails: Vec<(&str, i64)> =
            found.rails.iter().map(|rail| (rail.name.as_str(), rail.milliwatts)).collect();
        assert_eq!(rails, [("VDD_IN", 5703), ("VDD_CPU_GPU_CV", 833), ("VDD_SOC", 1629)]);
    }

    #[test]
    fn an_agx_orin_and_a_xavier_of_other_releases_are_read() {
        let orin = fixture("agx-orin").unwrap();
        assert_eq!((orin.l4t.as_deref(), orin.jetpack), (Some("35.4.1"), Some("5.1.2")));
        assert_eq!(orin.soc.unwrap().gpu_architecture, Some(87));
        assert_eq!(orin.cuda, version("11.4.298", "/usr/local/cuda/lib64/libcudart.so.11.4.298"));
        let header = "/usr/include/aarch64-linux-gnu/NvInferVersion.h";
        assert_eq!(orin.tensorrt, version("8.5.2.2", header));
        let names: Vec<&str> = orin.rails.iter().map(|rail| rail.name.as_str()).collect();
        let expected = ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"];
        assert_eq!(names, expected, "and no NC");

        let xavier = fixture("xavier-release-only").unwrap();
        assert_eq!((xavier.l4t.as_deref(), xavier.jetpack), (Some("32.7.1"), Some("4.6.1")));
        assert_eq!((xavier.board, xavier.cuda, xavier.memory), (None, None, None));
        assert_eq!(xavier.power, PowerModes::default());
    }

    /// Files that are empty, binary or absurd: nothing is read out of them, and nothing fails.
    #[test]
    fn broken_files_give_nothing() {
        let found = fixture("broken").unwrap();
        let nothing = Jetson {
            board: None,
            soc: None,
            l4t: None,
            jetpack: None,
            cuda: None,
            tensorrt: None,
            memory: None,
            power: PowerModes::default(),
            rails: Vec::new(),
        };
        assert_eq!(found, nothing);
    }

    #[test]
    fn another_machine_is_no_jetson() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(&Root::new(folder.path())), None);
        assert_eq!(read(&Root::new(Path::new("/nowhere"))), None);
        fs::create_dir_all(folder.path().join("proc/device-tree")).unwrap();
        let compatible = folder.path().join("proc/device-tree/compatible");
        fs::write(&compatible, "raspberrypi,5-model-b\0brcm,bcm2712\0").unwrap();
        assert_eq!(read(&Root::new(folder.path())), None);
        fs::write(&compatible, "nvidia,p3737-0000+p3701-0000\0nvidia,tegra234\0").unwrap();
        assert!(read(&Root::new(folder.path())).is_some(), "a container without the release file");
    }
}
