//! What `doctor` says of a device: board, versions, memory and power; ONNX Runtime's provider libraries.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};

use super::super::output::bytes;
use crate::device::fatbin::{Architectures, GpuCode};
use crate::device::jetson::Jetson;
use crate::device::jetson::memory::Memory;
use crate::device::jetson::power::{PowerMode, PowerModes, Rail};
use crate::device::jetson::tegrastats::{TegraStats, stats_from_log};
use crate::device::jetson::versions::Version;
use crate::device::loader::Missing;
use crate::device::providers::Provider;

/// Bytes at the end of a log of `tegrastats` that are read.
const MAX_LOG_BYTES: u64 = 64 << 10;

/// The last line of a log of `tegrastats`.
pub(super) fn read_tegrastats(path: &Path) -> Result<TegraStats> {
    let place = || format!("`{}`", path.display());
    let mut file = File::open(path).with_context(place)?;
    let start = file.metadata().with_context(place)?.len().saturating_sub(MAX_LOG_BYTES);
    if start > 0 {
        file.seek(SeekFrom::Start(start)).with_context(place)?;
    }
    let mut end = Vec::new();
    file.take(MAX_LOG_BYTES).read_to_end(&mut end).with_context(place)?;
    stats_from_log(&String::from_utf8_lossy(&end)).ok_or_else(|| {
        anyhow!(
            "`{}`: expected lines of tegrastats, such as `RAM 2461/7620MB …`, got none\n\n\
             hint: on the device, `tegrastats --logfile FILE` writes them",
            path.display()
        )
    })
}

/// Lines about a Jetson, or one that says that there is none.
pub(super) fn jetson_lines(jetson: Option<&Jetson>) -> Vec<String> {
    let Some(jetson) = jetson else {
        return vec!["Jetson            no (/etc/nv_tegra_release is not there)".to_owned()];
    };
    let mut lines = vec![
        format!("Jetson            {}", jetson.board.as_deref().unwrap_or("board not known")),
        row("L4T", &l4t(jetson)),
        row("GPU", &gpu(jetson)),
        row("CUDA", &version(jetson.cuda.as_ref())),
        row("TensorRT", &version(jetson.tensorrt.as_ref())),
        row("memory", &jetson.memory.as_ref().map_or_else(not_found, memory)),
        row("power mode", &power_mode(&jetson.power)),
    ];
    let rail = |rail: &Rail| {
        let (mw, mv, ma) = (rail.milliwatts, rail.millivolts, rail.milliamperes);
        row(&rail.name, &format!("{mw} mW now ({mv} mV, {ma} mA)"))
    };
    lines.extend(jetson.rails.iter().map(rail));
    lines.push(row("", "(read by parsers tested on fixtures, not run on hardware)"));
    lines
}

/// Lines about a line of `tegrastats`.
pub(super) fn tegrastats_lines(stats: &TegraStats) -> Vec<String> {
    let (used, total) = (bytes(stats.ram_used_bytes), bytes(stats.ram_total_bytes));
    let percent = |load: Option<u32>| load.map_or("off".to_owned(), |load| format!("{load} %"));
    let clock = stats.gpu_mhz.map_or(String::new(), |mhz| format!(" at {mhz} MHz"));
    let cores: Vec<String> = stats.cpu_percent.iter().copied().map(percent).collect();
    let mut lines = vec![
        "tegrastats".to_owned(),
        row("memory", &format!("{used} of {total}")),
        row("CPU", &or_not_found(cores)),
        row("GPU", &stats.gpu_percent.map_or_else(not_found, |load| format!("{load} %{clock}"))),
    ];
    lines.extend(stats.milliwatts.iter().map(|(name, mw)| row(name, &format!("{mw} mW"))));
    lines.extend(stats.celsius.iter().map(|(name, celsius)| row(name, &format!("{celsius} °C"))));
    lines
}

/// Lines about provider libraries.
pub(super) fn provider_lines(
    folder: Option<&PathBuf>,
    providers: &[Provider],
    gpu: Option<u32>,
) -> Vec<String> {
    let Some(folder) = folder else { return Vec::new() };
    if providers.is_empty() {
        return vec![row(
            "providers",
            &format!("no libonnxruntime_providers_*.so in {}", folder.display()),
        )];
    }
    providers.iter().flat_map(|provider| lines_of_provider(provider, gpu)).collect()
}

fn lines_of_provider(provider: &Provider, gpu: Option<u32>) -> Vec<String> {
    let name = provider.file.rsplit('/').next().unwrap_or(&provider.file);
    let mut lines = vec![format!("  {name}")];
    let row = |name: &str, value: &str| format!("    {name:<13} {value}");
    if let Some(found) = &provider.architectures {
        lines.extend(architectures(found).into_iter().map(|(name, value)| row(name, &value)));
    }
    if let (Some(code), Some(gpu)) = (provider.gpu, gpu) {
        let texts = on_gpu(code, gpu).into_iter().enumerate();
        let name = |index| if index == 0 { format!("on sm_{gpu}") } else { String::new() };
        lines.extend(texts.map(|(index, text)| row(&name(index), &text)));
    }
    match &provider.missing {
        Some(missing) if missing.is_empty() => lines.push(row("missing", "nothing")),
        Some(missing) => {
            lines.extend(missing.iter().map(|library| row("missing", &missing_text(library))))
        }
        None => {}
    }
    lines.extend(provider.problems.iter().map(|problem| row("not readable", problem)));
    lines
}

fn architectures(found: &Architectures) -> Vec<(&'static str, String)> {
    let list = |numbers: &BTreeSet<u32>| match numbers.is_empty() {
        true => "none".to_owned(),
        false => numbers.iter().map(|number| format!("sm_{number}")).collect::<Vec<_>>().join(", "),
    };
    match found.machine_code.is_empty() && found.ptx.is_empty() {
        true => vec![("GPU code", "none".to_owned())],
        false => vec![("machine code", list(&found.machine_code)), ("PTX", list(&found.ptx))],
    }
}

/// What a library can do on a GPU, and what to do about it.
fn on_gpu(code: GpuCode, gpu: u32) -> Vec<String> {
    match code {
        GpuCode::MachineCode => vec!["machine code for this GPU".to_owned()],
        GpuCode::Ptx => {
            vec!["only PTX, which the driver compiles when it is first used".to_owned()]
        }
        GpuCode::Nothing => vec![
            "nothing for this GPU: the library cannot use it".to_owned(),
            format!("hint: build ONNX Runtime with CMAKE_CUDA_ARCHITECTURES={gpu}, or take a"),
            "build that was made for this board and JetPack".to_owned(),
        ],
        GpuCode::NotNeeded => Vec::new(),
    }
}

fn missing_text(library: &Missing) -> String {
    let Missing { name, needed_by, unusable } = library;
    match unusable {
        None => format!("{name}, needed by {needed_by}"),
        Some(file) => {
            format!("{name}, needed by {needed_by}: {file} is no usable library")
        }
    }
}

fn l4t(jetson: &Jetson) -> String {
    let jetpack = match (jetson.jetpack, &jetson.l4t) {
        (Some(jetpack), _) => format!(", JetPack {jetpack}"),
        (None, Some(_)) => ", of a JetPack that is not known".to_owned(),
        (None, None) => String::new(),
    };
    format!("{}{jetpack}", jetson.l4t.as_deref().unwrap_or("release not known"))
}

fn gpu(jetson: &Jetson) -> String {
    let Some(soc) = &jetson.soc else { return "not known".to_owned() };
    let architecture = soc.gpu_architecture.map(|number| format!("sm_{number}"));
    format!("{}, {}", soc.name, architecture.as_deref().unwrap_or("architecture not known"))
}

fn version(version: Option<&Version>) -> String {
    version.map_or_else(not_found, |version| format!("{} ({})", version.version, version.file))
}

fn memory(memory: &Memory) -> String {
    let available = memory.available_bytes.map(|n| format!(", {} available", bytes(n)));
    let swap = memory.swap_bytes.map(|n| format!(", swap {}", bytes(n)));
    let text = [Some(bytes(memory.total_bytes)), available, swap];
    text.into_iter().flatten().collect()
}

fn power_mode(power: &PowerModes) -> String {
    let name = |mode: &PowerMode| match &mode.name {
        Some(name) => format!("{name} ({})", mode.id),
        None => mode.id.to_string(),
    };
    let current = power.current.as_ref().map_or_else(not_found, name);
    let modes: Vec<String> = power.modes.iter().map(name).collect();
    match modes.is_empty() {
        true => current,
        false => format!("{current}, of {}", modes.join(", ")),
    }
}

fn row(name: &str, value: &str) -> String {
    format!("  {name:<15} {value}")
}

fn or_not_found(values: Vec<String>) -> String {
    if values.is_empty() { not_found() } else { values.join(", ") }
}

fn not_found() -> String {
    "not found".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::jetson::read;
    use crate::device::root::Root;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/jetson").join(name)
    }

    fn jetson_text(name: &str) -> String {
        jetson_lines(read(&Root::new(&fixture(name))).as_ref()).join("\n")
    }

    #[test]
    fn a_jetson_is_described() {
        let expected = "\
Jetson            NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super
  L4T             36.4.7, JetPack 6.2.1
  GPU             tegra234, sm_87
  CUDA            12.6.11 (/usr/local/cuda/version.json)
  TensorRT        10.3.0 (/usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0)
  memory          8.0 GB, 5.2 GB available, swap 4.0 GB
  power mode      25W (1), of 15W (0), 25W (1), MAXN_SUPER (2), 7W (3)
  VDD_IN          5703 mW now (4968 mV, 1148 mA)
  VDD_CPU_GPU_CV  833 mW now (4960 mV, 168 mA)
  VDD_SOC         1629 mW now (4968 mV, 328 mA)
                  (read by parsers tested on fixtures, not run on hardware)";
        assert_eq!(jetson_text("orin-nano"), expected);
        let none = jetson_lines(None);
        assert_eq!(none, ["Jetson            no (/etc/nv_tegra_release is not there)"]);
        let broken = jetson_text("broken");
        assert!(broken.contains("board not known") && !broken.contains('\x1b'), "{broken}");
        assert_eq!(broken.matches("not found").count(), 4, "{broken}");
    }

    #[test]
    fn the_end_of_a_log_is_read() {
        let log = fixture("tegrastats.log");
        let text = tegrastats_lines(&read_tegrastats(&log).unwrap()).join("\n");
        for part in [
            "memory          1.8 GB of 8.2 GB",
            "GPU             36 % at 140 MHz",
            "VDD_IN          1776 mW",
            "Tdiode          37.25 °C",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("long.log");
        let line = "RAM 1/2MB GR3D_FREQ 1%\n".repeat(10_000);
        std::fs::write(&long, line + "RAM 1/2MB GR3D_FREQ 7%\n").unwrap();
        assert_eq!(read_tegrastats(&long).unwrap().gpu_percent, Some(7));
        let error = read_tegrastats(&fixture("README.md")).unwrap_err().to_string();
        assert!(
            error.contains("expected lines of tegrastats") && error.contains("hint: "),
            "{error}"
        );
        assert!(read_tegrastats(&folder.path().join("none.log")).is_err());
    }

    #[test]
    fn a_library_without_code_for_the_gpu_has_a_hint() {
        let architectures =
            Architectures { machine_code: [80, 90].into(), ..Architectures::default() };
        let missing = Missing {
            name: "libnvdla_compiler.so".into(),
            needed_by: "libnvinfer.so.10".into(),
            unusable: None,
        };
        let provider = Provider {
            file: "/ort/libonnxruntime_providers_cuda.so".into(),
            gpu: Some(architectures.on_tegra(87)),
            architectures: Some(architectures),
            missing: Some(vec![missing]),
            problems: Vec::new(),
        };
        let folder = PathBuf::from("/ort");
        let text = provider_lines(Some(&folder), &[provider], Some(87)).join("\n");
        let expected = "  libonnxruntime_providers_cuda.so
    machine code  sm_80, sm_90
    PTX           none
    on sm_87      nothing for this GPU: the library cannot use it
                  hint: build ONNX Runtime with CMAKE_CUDA_ARCHITECTURES=87, or take a
                  build that was made for this board and JetPack
    missing       libnvdla_compiler.so, needed by libnvinfer.so.10";
        assert_eq!(text, expected);
        assert_eq!(provider_lines(None, &[], None), Vec::<String>::new());
        assert_eq!(provider_lines(Some(&folder), &[], None).len(), 1);
    }
}
