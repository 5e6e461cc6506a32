//! The GPU architectures inside a CUDA library: nvcc puts machine code and PTX of every architecture into "fat binaries"
//! in the sections `.nv_fatbin` and `__nv_relfatbin` of the ELF file.
//!
//! A section is a sequence of containers: a header of 16 bytes (magic, version, bytes of the header, bytes of what
//! follows), then entries, each a header (kind, its bytes, bytes of the code, architecture at byte 28) before its code.
//! NVIDIA documents none of it; the fields are those that public readers of the format agree on (ZLUDA, `nvopen-tools`).
//! Only headers are touched, so a library of hundreds of megabytes costs a few pages of its map.

use std::collections::BTreeSet;
use std::path::Path;

use flamingo_models::map::MappedFile;
use serde::Serialize;

use super::DeviceError;
use super::elf::Elf;

/// Sections that hold fat binaries.
const SECTIONS: [&str; 2] = [".nv_fatbin", "__nv_relfatbin"];

/// First four bytes of a container.
const MAGIC: u32 = 0xba55_ed50;

/// Bytes of a container's header.
const CONTAINER_BYTES: usize = 16;

/// Bytes of an entry's header up to and with the architecture; whole ones have 64 or more.
const ENTRY_BYTES: usize = 32;

/// Kinds of entries: PTX, machine code, and machine code that the driver finishes ("Mercury", from sm_100 on).
const PTX: u16 = 1;
const MACHINE_CODE: u16 = 2;
const MERCURY: u16 = 16;

/// Architectures that a library has code for, as numbers: 87 is sm_87.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Architectures {
    /// Machine code.
    pub machine_code: BTreeSet<u32>,
    /// PTX, which the driver compiles for its GPU when the library is used.
    pub ptx: BTreeSet<u32>,
    /// Kinds of entries that are neither.
    pub other_kinds: BTreeSet<u16>,
}

/// What a library can do on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GpuCode {
    /// Machine code for its architecture.
    MachineCode,
    /// PTX that the driver can compile for it.
    Ptx,
    /// Nothing that it can run.
    Nothing,
    /// The library has no GPU code, of any architecture.
    NotNeeded,
}

impl Architectures {
    /// What the library can do on a Tegra GPU of this architecture. Machine code must be of just this one: [the CUDA
    /// guide] promises compatibility within a major version "only for the desktop", and not for Tegra. PTX of an
    /// earlier architecture can be compiled for a later one; PTX of the variants `a` and `f`, which cannot, is not told
    /// apart.
    ///
    /// [the CUDA guide]: https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#binary-compatibility
    pub fn on_tegra(&self, architecture: u32) -> GpuCode {
        if self.machine_code.contains(&architecture) {
            return GpuCode::MachineCode;
        }
        if self.ptx.iter().any(|ptx| *ptx <= architecture) {
            return GpuCode::Ptx;
        }
        match self.machine_code.is_empty() && self.ptx.is_empty() {
            true => GpuCode::NotNeeded,
            false => GpuCode::Nothing,
        }
    }
}

/// The architectures inside a library.
///
/// # Errors
/// If it cannot be read, is no ELF library of 64 bits, or has a fat binary that is not what the format says.
pub fn architectures(library: &Path) -> Result<Architectures, DeviceError> {
    let read = |reason| DeviceError::Read { path: library.to_owned(), reason };
    let map = MappedFile::open(library).map_err(read)?;
    let elf = Elf::parse(library, map.bytes())?;
    let mut found = Architectures::default();
    for section in SECTIONS {
        for bytes in elf.sections(section)? {
            found.read_section(bytes).map_err(|broken| DeviceError::FatBinary {
                path: library.to_owned(),
                section,
                offset: broken.offset,
                expected: broken.expected,
                got: broken.got,
            })?;
        }
    }
    Ok(found)
}

/// Where a section is not what the format says.
#[derive(Debug, PartialEq, Eq)]
struct Broken {
    offset: usize,
    expected: &'static str,
    got: String,
}

impl Architectures {
    /// Reads containers, with zeros between them, to the end of a section.
    fn read_section(&mut self, section: &[u8]) -> Result<(), Broken> {
        let mut offset = 0;
        while offset < section.len() {
            let left = &section[offset..];
            if left.iter().take(8).all(|byte| *byte == 0) {
                offset += 8;
                continue;
            }
            let n_bytes = self
                .read_container(left)
                .map_err(|broken| Broken { offset: offset + broken.offset, ..broken })?;
            offset += n_bytes;
        }
        Ok(())
    }

    /// Reads the container at the beginning of `bytes` and gives its size, which is not 0.
    fn read_container(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        let broken = |offset, expected, got| Err(Broken { offset, expected, got });
        let Some(header) = bytes.first_chunk::<CONTAINER_BYTES>() else {
            return broken(0, "a header of 16 bytes", format!("{} bytes", bytes.len()));
        };
        let magic = u32_at(header, 0);
        if magic != MAGIC {
            return broken(0, "0xba55ed50", format!("{magic:#010x}"));
        }
        let start = usize::from(u16_at(header, 6));
        let end = size(u64_at(header, 8)).and_then(|n_bytes| start.checked_add(n_bytes));
        let Some(end) = end.filter(|end| start >= CONTAINER_BYTES && *end <= bytes.len()) else {
            let got = format!("{start} and {}", u64_at(header, 8));
            return broken(6, "sizes of header and code that fit into the section", got);
        };
        let mut offset = start;
        while offset < end {
            offset += self
                .read_entry(&bytes[offset..end])
                .map_err(|broken| Broken { offset: offset + broken.offset, ..broken })?;
        }
        Ok(end)
    }

    /// Reads the entry at the beginning of `bytes` and gives its size, which is not 0.
    fn read_entry(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        let broken = |offset, expected, got| Err(Broken { offset, expected, got });
        let Some(header) = bytes.first_chunk::<ENTRY_BYTES>() else {
            return broken(0, "an entry of 32 bytes or more", format!("{} bytes", bytes.len()));
        };
        let (header_bytes, code_bytes) = (u64::from(u32_at(header, 4)), u64_at(header, 8));
        let n_bytes = header_bytes.checked_add(code_bytes).and_then(size);
        let is_whole = |n_bytes: &usize| *n_bytes <= bytes.len();
        let has_header = size(header_bytes).is_some_and(|n_bytes| n_bytes >= ENTRY_BYTES);
        let Some(n_bytes) = n_bytes.filter(is_whole).filter(|_| has_header) else {
            let got = format!("{header_bytes} and {code_bytes}");
            return broken(4, "sizes of header and code that fit into the container", got);
        };
        let architecture = u32_at(header, 28);
        match u16_at(header, 0) {
            PTX => self.ptx.insert(architecture),
            MACHINE_CODE | MERCURY => self.machine_code.insert(architecture),
            other => self.other_kinds.insert(other),
        };
        Ok(n_bytes)
    }
}

/// Little-endian numbers of a header, at offsets that it has.
fn u16_at(header: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([header[at], header[at + 1]])
}

fn u32_at(header: &[u8], at: usize) -> u32 {
    u32::from(u16_at(header, at)) | u32::from(u16_at(header, at + 2)) << 16
}

fn u64_at(header: &[u8], at: usize) -> u64 {
    u64::from(u32_at(header, at)) | u64::from(u32_at(header, at + 4)) << 32
}

fn size(n_bytes: u64) -> Option<usize> {
    usize::try_from(n_bytes).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::elf_file::{ElfFile, fat_binary};
    use super::*;

    fn read(section: &[u8]) -> Result<Architectures, Broken> {
        let mut found = Architectures::default();
        found.read_section(section).map(|()| found)
    }

    fn of(machine_code: &[u32], ptx: &[u32]) -> Architectures {
        let set = |numbers: &[u32]| numbers.iter().copied().collect();
        Architectures { machine_code: set(machine_code), ptx: set(ptx), ..Architectures::default() }
    }

    #[test]
    fn all_containers_of_both_sections_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libonnxruntime_providers_cuda.so");
        let mut first = fat_binary(&[(2, 75, 40), (2, 80, 3)]);
        first.extend([0; 24]);
        first.extend(fat_binary(&[(1, 90, 17), (2, 75, 0), (64, 0, 8)]));
        let second = fat_binary(&[(16, 110, 8)]);
        let sections = [(".nv_fatbin", &first[..]), ("__nv_relfatbin", &second), (".text", b"x")];
        fs::write(&path, ElfFile { sections: &sections, ..ElfFile::default() }.bytes()).unwrap();
        let found = architectures(&path).unwrap();
        let expected = Architectures { other_kinds: [64].into(), ..of(&[75, 80, 110], &[90]) };
        assert_eq!(found, expected);

        fs::write(&path, ElfFile::default().bytes()).unwrap();
        assert_eq!(architectures(&path).unwrap(), Architectures::default());
    }

    #[test]
    fn tegra_wants_its_own_machine_code_or_earlier_ptx() {
        assert_eq!(of(&[86, 87], &[]).on_tegra(87), GpuCode::MachineCode);
        assert_eq!(of(&[80, 86, 90], &[]).on_tegra(87), GpuCode::Nothing);
        assert_eq!(of(&[80, 90], &[80]).on_tegra(87), GpuCode::Ptx);
        assert_eq!(of(&[80], &[90]).on_tegra(87), GpuCode::Nothing);
        assert_eq!(of(&[], &[90]).on_tegra(87), GpuCode::Nothing);
        assert_eq!(of(&[], &[]).on_tegra(87), GpuCode::NotNeeded);
    }

    #[test]
    fn broken_sections_are_errors_with_their_place() {
        let whole = fat_binary(&[(2, 87, 16), (1, 87, 8)]);
        assert_eq!(read(&whole).unwrap(), of(&[87], &[87]));
        for length in 1..whole.len() {
            assert!(read(&whole[..length]).is_err(), "{length} of {} bytes", whole.len());
        }
        let change = |at: usize, value: &[u8]| {
            let mut broken = whole.clone();
            broken[at..at + value.len()].copy_from_slice(value);
            read(&broken).unwrap_err()
        };
        let magic = change(0, b"PK\x03\x04");
        assert_eq!((magic.offset, magic.expected), (0, "0xba55ed50"));
        assert_eq!(magic.got, "0x04034b50");
        assert_eq!(change(6, &[8, 0]).offset, 6, "the header is smaller than itself");
        assert_eq!(change(8, &[0xff; 8]).offset, 6, "more than can be counted");
        assert_eq!(change(20, &[0; 4]).offset, 20, "an entry without a header");
        assert_eq!(change(24, &[0xff; 8]).offset, 20, "more code than can be counted");
        assert_eq!(change(24, &[200, 0]).offset, 20, "more code than the container has");
        assert_eq!(change(100, &[0xff; 4]).offset, 100, "the second entry");
    }

    #[test]
    fn any_byte_may_be_any_value() {
        let whole = fat_binary(&[(2, 87, 16), (1, 87, 8)]);
        for index in 0..whole.len() {
            for value in 0..=u8::MAX {
                let mut broken = whole.clone();
                broken[index] = value;
                drop(read(&broken));
            }
        }
    }

    #[test]
    fn errors_name_file_section_and_offset() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.so");
        let sections = [(".nv_fatbin", &b"PK\x03\x04 and more bytes"[..])];
        fs::write(&path, ElfFile { sections: &sections, ..ElfFile::default() }.bytes()).unwrap();
        let message = architectures(&path).unwrap_err().to_string();
        let expected = "section .nv_fatbin, offset 0: expected 0xba55ed50, got 0x04034b50";
        assert!(message.contains("a.so`") && message.contains(expected), "{message}");
        let missing = architectures(&folder.path().join("b.so")).unwrap_err().to_string();
        assert!(missing.contains("b.so"), "{missing}");
    }
}
