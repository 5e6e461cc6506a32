//! The parts of an ELF library that are asked for: sections by name, and what the loader reads.

use std::path::Path;

use object::LittleEndian;
use object::elf::{
    DT_NEEDED, DT_RPATH, DT_RUNPATH, DT_SONAME, DynamicTag, FileHeader64, SectionHeader64,
};
use object::read::elf::{FileHeader, SectionHeader, SectionTable};

use super::{DeviceError, name_from_text};

/// Most entries of a library's dynamic section that are read.
const MAX_DYNAMIC: usize = 4096;

/// Most bytes of a name or a list of folders.
const MAX_TEXT_BYTES: usize = 1 << 16;

/// A 64-bit little-endian ELF file.
pub(super) struct Elf<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    header: &'a FileHeader64<LittleEndian>,
    sections: SectionTable<'a, FileHeader64<LittleEndian>>,
}

/// What the loader reads of a library.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Dynamic {
    /// Names of the libraries that it needs.
    pub(super) needed: Vec<String>,
    /// Its own name.
    pub(super) soname: Option<String>,
    /// `DT_RPATH`, folders with colons between them.
    pub(super) rpath: Option<String>,
    /// `DT_RUNPATH`, likewise.
    pub(super) runpath: Option<String>,
}

impl<'a> Elf<'a> {
    /// Reads the headers of the file `path` with content `bytes`, which begin at a multiple of 8 in memory, as maps
    /// do.
    pub(super) fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Elf<'a>, DeviceError> {
        let failed = |error: object::read::Error| DeviceError::elf(path, error);
        let header = FileHeader64::<LittleEndian>::parse(bytes).map_err(failed)?;
        let endian = header.endian().map_err(failed)?;
        let sections = header.sections(endian, bytes).map_err(failed)?;
        Ok(Elf { path, bytes, header, sections })
    }

    /// The processor, `e_machine`.
    pub(super) fn machine(&self) -> u16 {
        self.header.e_machine(LittleEndian).0
    }

    /// Contents of the sections called `name`.
    pub(super) fn sections(&self, name: &str) -> Result<Vec<&'a [u8]>, DeviceError> {
        let is_named = |section: &&SectionHeader64<LittleEndian>| {
            let found = self.sections.section_name(LittleEndian, section);
            found.is_ok_and(|found| found == name.as_bytes())
        };
        let data = |section: &'a SectionHeader64<LittleEndian>| {
            section
                .data(LittleEndian, self.bytes)
                .map_err(|error| DeviceError::elf(self.path, error))
        };
        self.sections.iter().filter(is_named).map(data).collect()
    }

    /// What the loader reads.
    pub(super) fn dynamic(&self) -> Result<Dynamic, DeviceError> {
        let failed = |error: object::read::Error| DeviceError::elf(self.path, error);
        let table = self.sections.dynamic_table(LittleEndian, self.bytes).map_err(failed)?;
        if table.is_empty() {
            return Err(DeviceError::elf(self.path, "no dynamic section"));
        }
        let mut dynamic = Dynamic::default();
        for entry in table.iter().take(MAX_DYNAMIC) {
            if !is_read(entry.tag) {
                continue;
            }
            let unreadable = || DeviceError::elf(self.path, "a library's name that is no text");
            let text = Some(table.string(entry).map_err(failed)?);
            let text = text.filter(|text| text.len() <= MAX_TEXT_BYTES).ok_or_else(unreadable)?;
            let text = String::from_utf8_lossy(text);
            match entry.tag {
                DT_NEEDED => dynamic.needed.push(name_from_text(&text).ok_or_else(unreadable)?),
                DT_SONAME => dynamic.soname = name_from_text(&text),
                DT_RPATH => dynamic.rpath = Some(text.into_owned()),
                _ => dynamic.runpath = Some(text.into_owned()),
            }
        }
        Ok(dynamic)
    }
}

fn is_read(tag: DynamicTag) -> bool {
    [DT_NEEDED, DT_SONAME, DT_RPATH, DT_RUNPATH].contains(&tag)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use flamingo_models::map::MappedFile;

    use super::super::elf_file::{AARCH64, ElfFile};
    use super::*;

    #[test]
    fn sections_and_dynamic_entries_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.so");
        let file = ElfFile {
            machine: AARCH64,
            needed: &["libb.so.1", "libc.so.6"],
            soname: Some("liba.so"),
            runpath: Some("$ORIGIN/../lib:/opt"),
            sections: &[(".data", b"one"), (".data", b"two")],
            ..ElfFile::default()
        };
        fs::write(&path, file.bytes()).unwrap();
        let map = MappedFile::open(&path).unwrap();
        let elf = Elf::parse(&path, map.bytes()).unwrap();
        assert_eq!(elf.machine(), AARCH64);
        assert_eq!(elf.sections(".data").unwrap(), [&b"one"[..], b"two"]);
        assert_eq!(elf.sections(".none").unwrap(), Vec::<&[u8]>::new());
        let expected = Dynamic {
            needed: vec!["libb.so.1".into(), "libc.so.6".into()],
            soname: Some("liba.so".into()),
            rpath: None,
            runpath: Some("$ORIGIN/../lib:/opt".into()),
        };
        assert_eq!(elf.dynamic().unwrap(), expected);
    }

    /// Every file that is cut short, and every byte of the headers set to its extremes: a value or an error.
    #[test]
    fn broken_files_are_errors_and_no_panic() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.so");
        let file = ElfFile { needed: &["libc.so.6"], ..ElfFile::default() };
        let whole = file.bytes();
        let read = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let map = MappedFile::open(&path).unwrap();
            let elf = Elf::parse(&path, map.bytes())?;
            (elf.sections(".data")?, elf.dynamic()).1
        };
        assert!(read(&whole).is_ok());
        for length in 0..whole.len() {
            assert!(read(&whole[..length]).is_err(), "{length} of {} bytes", whole.len());
        }
        for index in 0..whole.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut broken = whole.clone();
                broken[index] = value;
                drop(read(&broken));
            }
        }
        for text in ["", "no library", "\x7fELF\x01\x01\x01"] {
            let message = read(text.as_bytes()).unwrap_err().to_string();
            assert!(message.contains("expected a 64-bit little-endian ELF library"), "{message}");
        }
    }
}
