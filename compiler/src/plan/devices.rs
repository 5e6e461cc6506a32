//! Devices that a model can be planned for: memory, bandwidth and peak rates, each with its source.

use flamingo_runtime::profile::Arithmetic;
use serde::Serialize;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A device in one power mode. Figures are the vendor's; nothing was measured by this project.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Device {
    /// Name on the command line.
    pub name: &'static str,
    /// The power mode, or the clock, that bandwidth and rates hold for.
    pub mode: &'static str,
    /// Memory of the module, shared by processor and GPU.
    pub memory_bytes: u64,
    /// Of it, what Linux sees: firmware and hardware blocks keep the rest.
    pub visible_bytes: u64,
    /// Peak bandwidth of the memory, GB/s.
    pub bandwidth_gb_per_s: f64,
    /// What a model runs on.
    pub processor: Processor,
    /// Where the figures come from.
    pub sources: &'static [&'static str],
}

/// What a model runs on, with its peak rates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Processor {
    /// An Ampere GPU.
    Gpu {
        /// Published peak of int8 with 2:4 sparsity, TOPS. Dense int8 is half of it, and dense fp16 a quarter.
        sparse_int8_tops: f64,
    },
    /// Cores with NEON and `sdot`.
    Cpu {
        /// Dense peak of f32, GFLOP/s.
        f32_gflop_per_s: f64,
        /// Dense peak of dot products of bytes, GOP/s.
        int8_gop_per_s: f64,
    },
}

/// Every device, by memory.
pub const DEVICES: &[Device] = &[
    jetson("orin-nano-4", "10 W", 4, NANO_4, 34.0, 20.0, &[NANO, CARVED]),
    jetson("orin-nano-4-super", "MAXN_SUPER", 4, NANO_4, 51.0, 34.0, &[SUPER, CARVED]),
    jetson("orin-nano-8", "15 W", 8, 7620, 68.0, 40.0, &[NANO, SEEN]),
    jetson("orin-nano-8-super", "MAXN_SUPER", 8, 7620, 102.0, 67.0, &[SUPER, SEEN]),
    jetson("orin-nx-8", "20 W", 8, 7620, 102.4, 50.0, &[NX, CARVED]),
    jetson("orin-nx-8-super", "MAXN_SUPER", 8, 7620, 102.4, 77.0, &[NX, SUPER, CARVED]),
    Device {
        name: "raspberry-pi-5-8",
        mode: "4 cores at 2.4 GHz",
        memory_bytes: 8 * GIB,
        visible_bytes: 8 * GIB - 128 * MIB,
        bandwidth_gb_per_s: 17.1,
        processor: Processor::Cpu { f32_gflop_per_s: 153.6, int8_gop_per_s: 614.4 },
        sources: &[
            "Raspberry Pi 5 product brief: LPDDR4X-4267, 32 bits; 4 Cortex-A76 at 2.4 GHz",
            "Arm Cortex-A76 Software Optimization Guide: two FMLA or SDOT of 128 bits a cycle",
            "assumption: Linux does not see 128 MiB",
        ],
    },
    jetson("orin-nx-16", "25 W", 16, 15656, 102.4, 60.0, &[NX, SEEN]),
    jetson("orin-nx-16-super", "MAXN_SUPER", 16, 15656, 102.4, 77.0, &[NX, SUPER, SEEN]),
    jetson("agx-orin-32", "MAXN", 32, 30536, 204.8, 107.0, &[AGX_32, SEEN]),
    jetson("agx-orin-64", "MAXN", 64, 62841, 204.8, 171.0, &[AGX, DLA, SEEN]),
];

/// MiB that Linux sees of 4 GB if firmware keeps as much as it does of 8 GB.
const NANO_4: u64 = 7620 - 4096;
const NANO: &str = "NVIDIA Jetson Orin Nano Series data sheet: 40 (8 GB) and 20 (4 GB) sparse int8 TOPS, half \
                    of them dense, at 625 MHz; 68 and 34 GB/s";
const NX: &str = "NVIDIA Jetson Orin NX Series data sheet: 100 (16 GB) and 70 (8 GB) sparse int8 TOPS, of them \
                  40 and 20 of the DLAs; 102.4 GB/s";
const AGX: &str = "NVIDIA Jetson AGX Orin Series data sheet: 204.8 GB/s";
const AGX_32: &str = "NVIDIA Jetson AGX Orin Series data sheet: 56 tensor cores at 930 MHz, 2048 sparse int8 \
                      operations a cycle each; 204.8 GB/s";
const DLA: &str =
    "github.com/NVIDIA/Deep-Learning-Accelerator-SW: 171 sparse int8 TOPS of the GPU at MAXN";
const SUPER: &str = "developer.nvidia.com/blog/nvidia-jetpack-6-2-brings-super-mode-to-nvidia-jetson-orin-nano-\
                     and-jetson-orin-nx-modules: Nano 67 (8 GB) and 34 (4 GB) sparse int8 TOPS, 102 and 51 \
                     GB/s; NX 157 (16 GB) and 117 (8 GB), of them 80 and 40 of the DLAs";
const SEEN: &str = "memory that Linux sees: `tegrastats` in public logs";
const CARVED: &str = "assumption: firmware keeps as much memory as on the Orin Nano 8 GB";

const fn jetson(
    name: &'static str,
    mode: &'static str,
    memory_gib: u64,
    visible_mib: u64,
    bandwidth_gb_per_s: f64,
    sparse_int8_tops: f64,
    sources: &'static [&'static str],
) -> Device {
    Device {
        name,
        mode,
        memory_bytes: memory_gib * GIB,
        visible_bytes: visible_mib * MIB,
        bandwidth_gb_per_s,
        processor: Processor::Gpu { sparse_int8_tops },
        sources,
    }
}

impl Device {
    /// The device called `name`.
    pub fn from_name(name: &str) -> Option<&'static Device> {
        DEVICES.iter().find(|device| device.name == name)
    }

    /// Dense peak, GOP/s. A GPU unpacks weights and multiplies in fp16, whatever they are stored in: that is what the
    /// published measurements do, and int8 was no faster there.
    pub fn gop_per_s(&self, arithmetic: Arithmetic) -> f64 {
        match (self.processor, arithmetic) {
            (Processor::Gpu { .. }, _) => self.fp16_tflop_per_s() * 1e3,
            (Processor::Cpu { int8_gop_per_s, .. }, Arithmetic::Int8) => int8_gop_per_s,
            (Processor::Cpu { f32_gflop_per_s, .. }, Arithmetic::F32 | Arithmetic::Bf16) => {
                f32_gflop_per_s
            }
        }
    }

    /// Dense peak of fp16, TFLOP/s.
    pub fn fp16_tflop_per_s(&self) -> f64 {
        match self.processor {
            Processor::Gpu { sparse_int8_tops } => sparse_int8_tops / 4.0,
            Processor::Cpu { f32_gflop_per_s, .. } => 2.0 * f32_gflop_per_s / 1e3,
        }
    }

    /// Dense peak of int8, TOP/s.
    pub fn int8_top_per_s(&self) -> f64 {
        match self.processor {
            Processor::Gpu { sparse_int8_tops } => sparse_int8_tops / 2.0,
            Processor::Cpu { int8_gop_per_s, .. } => int8_gop_per_s / 1e3,
        }
    }

    /// What the system takes while nothing runs. Assumptions: a JetPack without a desktop takes 1 GiB (public
    /// `tegrastats` logs of idle boards: 620 to 930 MiB), a Raspberry Pi OS Lite 0.3 GiB.
    pub fn system_bytes(&self) -> u64 {
        match self.processor {
            Processor::Gpu { .. } => GIB,
            Processor::Cpu { .. } => 300 * MIB,
        }
    }

    /// What a runtime takes beside weights, caches and buffers. On a GPU 1.2 GB: with it the published peaks are met to
    /// within a quarter. On a CPU an assumption: code, tokenizer, frames that are kept.
    pub fn runtime_bytes(&self) -> u64 {
        match self.processor {
            Processor::Gpu { .. } => 1_200_000_000,
            Processor::Cpu { .. } => 200_000_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names_of_their_own_and_sources() {
        for (index, device) in DEVICES.iter().enumerate() {
            assert_eq!(Device::from_name(device.name), Some(device), "{index}");
            assert!(!device.sources.is_empty(), "{}", device.name);
            let kept = device.memory_bytes - device.visible_bytes;
            assert!(kept > 0 && kept < device.memory_bytes / 6, "{}", device.name);
        }
        assert_eq!(Device::from_name("orin-nano-9"), None);
    }

    #[test]
    fn dense_rates_are_halves_of_sparse_ones() {
        let agx = Device::from_name("agx-orin-64").unwrap();
        assert_eq!((agx.int8_top_per_s(), agx.fp16_tflop_per_s()), (85.5, 42.75));
        assert_eq!(agx.gop_per_s(Arithmetic::Int8), 42_750.0);
        let pi = Device::from_name("raspberry-pi-5-8").unwrap();
        assert_eq!(pi.gop_per_s(Arithmetic::Int8), 4.0 * pi.gop_per_s(Arithmetic::F32));
    }
}
