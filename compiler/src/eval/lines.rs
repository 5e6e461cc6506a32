//! Files of lines that are appended as they come. The first line says what the others are of; a run that was killed leaves at
//! most one that breaks off.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::Path;

/// Opens such a file, or begins it, and reads its whole lines after the first. Nothing if it holds something else: then it
/// stays as it is.
///
/// # Errors
/// A file that cannot be read or written.
pub(super) fn open(path: &Path, header: &str) -> io::Result<Option<(File, Vec<String>)>> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let n_whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let text = String::from_utf8_lossy(&bytes[..n_whole]);
    let mut lines = text.lines().map(str::to_owned);
    let is_begun = header.as_bytes().starts_with(&bytes);
    if lines.next().as_deref() != Some(header) && !is_begun {
        return Ok(None);
    }
    // What is left of a line that was being written would spoil the next one.
    file.set_len(u64::try_from(n_whole).map_err(io::Error::other)?)?;
    if n_whole == 0 {
        writeln!(file, "{header}")?;
    }
    Ok(Some((file, lines.collect())))
}
