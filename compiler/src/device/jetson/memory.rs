//! Memory, out of `/proc/meminfo`.

use serde::Serialize;

/// Memory of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// All of it, without what firmware keeps.
    pub total_bytes: u64,
    /// What programs can have without swapping.
    pub available_bytes: Option<u64>,
    /// Swap, compressed memory (zram) included.
    pub swap_bytes: Option<u64>,
    /// Swap that is not in use.
    pub swap_free_bytes: Option<u64>,
}

/// Reads lines such as `MemTotal:        7802916 kB`.
pub fn memory_from_meminfo(text: &str) -> Option<Memory> {
    let bytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
        kilobytes.checked_mul(1024)
    };
    Some(Memory {
        total_bytes: bytes("MemTotal").filter(|total| *total > 0)?,
        available_bytes: bytes("MemAvailable"),
        swap_bytes: bytes("SwapTotal"),
        swap_free_bytes: bytes("SwapFree"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kilobytes_become_bytes() {
        let text = "MemTotal:        7802916 kB\nMemFree:  1 kB\nMemAvailable:    5123456 kB\n\
                    SwapTotal:       3901452 kB\nSwapFree:        3901452 kB\n";
        let expected = Memory {
            total_bytes: 7_990_185_984,
            available_bytes: Some(5_246_418_944),
            swap_bytes: Some(3_995_086_848),
            swap_free_bytes: Some(3_995_086_848),
        };
        assert_eq!(memory_from_meminfo(text), Some(expected));
        let little = memory_from_meminfo("MemTotal: 4 kB").unwrap();
        assert_eq!((little.total_bytes, little.swap_bytes), (4096, None));
    }

    #[test]
    fn absurd_sizes_are_none() {
        for text in [
            "",
            "MemTotal:",
            "MemTotal: kB",
            "MemTotal: -4 kB",
            "MemTotal: 0 kB",
            "MemTotal: 4 MB",
            "MemTotal: 18446744073709551615 kB",
            "MemTotalled: 4 kB",
        ] {
            assert_eq!(memory_from_meminfo(text), None, "{text:?}");
        }
    }
}
