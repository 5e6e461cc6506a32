//! What beside the processor decides how fast it is: the system's settings, and versions.

use std::fs;
use std::thread;

use serde::Serialize;

/// The system a report was made on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct System {
    /// Version of this program.
    pub flamingoc: &'static str,
    /// Kernel, as `Linux 6.1.0`.
    pub os: String,
    /// Logical processors that this process may use.
    pub processors: usize,
    /// Frequency governors of the processors, each once; none where the system does not tell, as in most virtual machines.
    pub governors: Vec<String>,
    /// Memory of the machine, bytes.
    pub memory_bytes: Option<u64>,
    /// Where ONNX Runtime was loaded from, if it was.
    pub onnx_runtime: Option<String>,
}

impl System {
    /// Asks the system; `onnx_runtime` is the path of the library in use.
    pub(super) fn read(onnx_runtime: Option<String>) -> System {
        let text = |path: &str| fs::read_to_string(path).ok();
        let word = |path: &str| text(path).map(|text| text.trim().to_owned());
        let kernel = ["/proc/sys/kernel/ostype", "/proc/sys/kernel/osrelease"].map(word);
        let known: Vec<String> = kernel.into_iter().flatten().collect();
        System {
            flamingoc: env!("CARGO_PKG_VERSION"),
            os: if known.is_empty() { std::env::consts::OS.to_owned() } else { known.join(" ") },
            processors: thread::available_parallelism().map_or(1, |n| n.get()),
            governors: governors(),
            memory_bytes: text("/proc/meminfo").as_deref().and_then(memory_bytes),
            onnx_runtime,
        }
    }

    /// For the head of a table: system, governors, memory.
    pub fn line(&self) -> String {
        let governors = match self.governors.as_slice() {
            [] => "governor not told".to_owned(),
            known => format!("governor {}", known.join("+")),
        };
        let memory = self.memory_bytes.map_or(String::new(), |bytes| {
            format!(", {:.1} GiB", bytes as f64 / f64::from(1 << 30))
        });
        format!("{}, {} processors, {governors}{memory}", self.os, self.processors)
    }
}

fn governors() -> Vec<String> {
    let policies = fs::read_dir("/sys/devices/system/cpu/cpufreq").into_iter().flatten().flatten();
    let governor =
        |policy: fs::DirEntry| fs::read_to_string(policy.path().join("scaling_governor")).ok();
    let mut names: Vec<String> =
        policies.filter_map(governor).map(|name| name.trim().to_owned()).collect();
    names.sort();
    names.dedup();
    names
}

/// `MemTotal` of `/proc/meminfo`.
fn memory_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_is_told_in_a_line() {
        assert_eq!(memory_bytes("MemTotal:  2048 kB\nMemFree: 1 kB\n"), Some(2 << 20));
        assert_eq!(memory_bytes("MemFree: 1 kB\n"), None);
        let mut system = System::read(None);
        assert!(system.processors > 0 && !system.os.is_empty());
        system.governors = vec!["performance".into(), "powersave".into()];
        assert!(system.line().contains("governor performance+powersave"), "{}", system.line());
    }
}
