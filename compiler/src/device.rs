//! What a device has, read from its files and never by running something: a Jetson's board, versions, memory and power
//! ([`jetson`]); the GPU architectures inside a CUDA library ([`fatbin`]); shared libraries that the loader would not
//! find ([`loader`]); both for ONNX Runtime's provider libraries ([`providers`]).
//!
//! Parsers are functions from text to values, and tested on fixtures; nothing here was run on a Jetson.

pub mod fatbin;
pub mod jetson;
pub mod loader;
pub mod providers;
pub mod root;

mod elf;
#[cfg(test)]
#[path = "../tests/common/elf.rs"]
mod elf_file;

use std::io;
use std::path::{Path, PathBuf};

/// A library that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The file cannot be opened or mapped.
    #[error("`{}`: {reason}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: io::Error,
    },
    /// The file is no ELF library of 64 bits, or a broken one.
    #[error("`{}`: expected a 64-bit little-endian ELF library, got: {reason}", path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A section of CUDA code is not what the format says.
    #[error("`{}`: section {section}, offset {offset}: expected {expected}, got {got}", path.display())]
    FatBinary {
        /// The file.
        path: PathBuf,
        /// The section's name.
        section: &'static str,
        /// Where in the section.
        offset: usize,
        /// What should stand there.
        expected: &'static str,
        /// What does.
        got: String,
    },
}

impl DeviceError {
    fn elf(path: &Path, reason: impl ToString) -> DeviceError {
        DeviceError::Elf { path: path.to_owned(), reason: reason.to_string() }
    }
}

/// Most characters of a name that a device tells of itself.
const MAX_NAME_CHARS: usize = 200;

/// A name as a file tells it, without the space and NUL around it; none if it is empty, long, or would do more to a
/// terminal than be read.
fn name_from_text(text: &str) -> Option<String> {
    let name = text.trim_matches(|c: char| c == '\0' || c.is_whitespace());
    let is_name = !name.is_empty()
        && name.chars().count() <= MAX_NAME_CHARS
        && !name.chars().any(|c| c.is_control() || c == '\u{fffd}');
    is_name.then(|| name.to_owned())
}

/// A version as a file tells it: up to six numbers with dots between them.
fn version_from_text(text: &str) -> Option<String> {
    let is_number = |part: &str| {
        (1..=10).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit())
    };
    let version = text.trim();
    let parts: Vec<&str> = version.split('.').take(7).collect();
    (parts.len() <= 6 && parts.into_iter().all(is_number)).then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_readable_and_short() {
        assert_eq!(name_from_text(" NVIDIA Jetson\0\n"), Some("NVIDIA Jetson".into()));
        for text in ["", "\0\0", "a\x1b[2J", "a\nb", "a\u{fffd}", &"a".repeat(MAX_NAME_CHARS + 1)] {
            assert_eq!(name_from_text(text), None, "{text:?}");
        }
    }

    #[test]
    fn versions_are_numbers_with_dots() {
        for text in ["12.6.20241114", "36.4.7", "13", " 10.3.0.30\n"] {
            assert_eq!(version_from_text(text), Some(text.trim().into()));
        }
        for text in ["", ".", "1.", "1..2", "1.2a", "-1", "1.2.3.4.5.6.7", "12345678901"] {
            assert_eq!(version_from_text(text), None, "{text:?}");
        }
    }
}
