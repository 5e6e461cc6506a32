//! Examples as JSON lines: `{"segments": [...]}`, with the segments of prompt files.

use std::fs;
use std::path::Path;

use super::{BankError, failed};
use crate::model::{Model, RunError};
use crate::prompt::PromptFile;

/// A line that can be used.
#[derive(Debug)]
pub(super) struct Line {
    /// Its segments, with the paths as they stand in the file.
    pub(super) written: PromptFile,
    /// Its segments, with paths that can be opened.
    pub(super) resolved: PromptFile,
}

/// The lines of a file that can be used, and line and reason of each that cannot. Empty lines are none.
pub(super) fn read(path: &Path, model: &Model) -> Result<(Vec<Line>, Vec<String>), RunError> {
    let text = fs::read_to_string(path).map_err(|error| failed(path, error))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let (mut lines, mut problems) = (Vec::new(), Vec::new());
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        match example(line, folder, model) {
            Ok(line) => lines.push(line),
            Err(reason) => problems.push(format!("line {}: {reason}", index + 1)),
        }
    }
    Ok((lines, problems))
}

/// Bad lines are an error, unless they may be skipped and others are left.
pub(super) fn check(
    path: &Path,
    lines: &[Line],
    problems: &[String],
    skip_bad: bool,
) -> Result<(), BankError> {
    if problems.is_empty() && lines.is_empty() {
        return Err(failed(path, "no examples\n\nhint: one a line, {\"segments\": [...]}"));
    }
    match problems.is_empty() || (skip_bad && !lines.is_empty()) {
        true => Ok(()),
        false => Err(BankError::Examples { path: path.to_owned(), problems: problems.to_vec() }),
    }
}

/// Reads one line, encodes its text and decodes its pictures.
fn example(line: &str, folder: &Path, model: &Model) -> Result<Line, String> {
    let written = PromptFile::from_json(line)?;
    if written.max_new_tokens.is_some() || written.temperature.is_some() {
        return Err("expected `segments` alone, got `max_new_tokens` or `temperature` too".into());
    }
    let mut resolved = written.clone();
    resolved.resolve(folder);
    let words = |error: RunError| {
        let text = error.to_string();
        text.split("\n\n").next().unwrap_or_default().to_owned()
    };
    model.encode_prompt(&resolved).map_err(words)?;
    resolved.media().try_for_each(|segment| model.pixels(segment).map(drop)).map_err(words)?;
    Ok(Line { written, resolved })
}
