//! What RICES compares pictures by, kept in a file, so that a later run encodes none of them again.
//!
//! A line each, appended as they come: the key, which tells pixel values, artifact and engine from others, and the features
//! as base64 of f32. Several artifacts and tasks may share a file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use flamingo_runtime::Model;
use serde::{Deserialize, Serialize};

use super::data::Row;
use super::lines;

/// The first line of a file, without its end.
const HEADER: &str = "{\"flamingoc_rices\":1}";

/// Features of pictures by their keys.
#[derive(Debug, Default)]
pub struct Features {
    file: Option<(PathBuf, File)>,
    known: BTreeMap<String, Vec<f32>>,
    /// Why the file lacks some.
    failure: Option<anyhow::Error>,
}

#[derive(Serialize, Deserialize)]
struct Line {
    key: String,
    features: String,
}

impl Features {
    /// Features that are kept for this run alone.
    pub fn in_memory() -> Features {
        Features::default()
    }

    /// Opens a file of features, or begins it.
    ///
    /// # Errors
    /// A file that cannot be read or written, or holds something else.
    pub fn open(path: &Path) -> Result<Features> {
        let place = || format!("features `{}`", path.display());
        let Some((file, lines)) = lines::open(path, HEADER).with_context(place)? else {
            bail!(
                "features `{}`: it holds something else\n\nhint: name another file, or remove this one",
                path.display()
            )
        };
        let known = lines.iter().filter_map(|line| read_line(line)).collect();
        Ok(Features { file: Some((path.to_owned(), file)), known, failure: None })
    }

    /// What the frozen vision encoder sees in the first medium of a row; `None` without one, or if the engine cannot say.
    ///
    /// # Errors
    /// A picture that cannot be decoded or encoded.
    pub fn of(&mut self, model: &Model, row: &Row) -> Result<Option<Vec<f32>>> {
        let Some(source) = row.media.first() else { return Ok(None) };
        let (values, n_frames) = source.pixel_values(model)?;
        let key = model.media_key(&values, n_frames).to_string();
        let width = model.manifest().config.vision.width;
        if let Some(known) = self.known.get(&key).filter(|known| known.len() == width) {
            return Ok(Some(known.clone()));
        }
        let found = model.backend().vision_features(&values, n_frames)?;
        if let Some(found) = &found {
            self.failure = self.keep(key, found).err().or(self.failure.take());
        }
        Ok(found)
    }

    /// Tells if the file could not be written.
    ///
    /// # Errors
    /// Then.
    pub fn check(&mut self) -> Result<()> {
        self.failure.take().map_or(Ok(()), Err)
    }

    fn keep(&mut self, key: String, features: &[f32]) -> Result<()> {
        if let Some((path, file)) = &mut self.file {
            let bytes: Vec<u8> = features.iter().flat_map(|value| value.to_le_bytes()).collect();
            let line = Line { key: key.clone(), features: BASE64.encode(bytes) };
            writeln!(file, "{}", serde_json::to_string(&line)?)
                .with_context(|| format!("features `{}`", path.display()))?;
        }
        self.known.insert(key, features.to_vec());
        Ok(())
    }
}

/// Key and features of a line; a damaged one is as if it were not there.
fn read_line(text: &str) -> Option<(String, Vec<f32>)> {
    let line: Line = serde_json::from_str(text).ok()?;
    let bytes = BASE64.decode(line.features).ok()?;
    let (values, rest) = bytes.as_chunks::<4>();
    let values: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    (rest.is_empty() && values.iter().all(|value| value.is_finite())).then_some((line.key, values))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn features_go_on_where_the_file_was_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let mut features = Features::open(&path).unwrap();
        for (key, values) in [("a", [0.1, -2.0]), ("b", [f32::MIN_POSITIVE, 1e30])] {
            features.keep(key.to_owned(), &values).unwrap();
        }
        let bytes = fs::read(&path).unwrap();
        for len in 0..=bytes.len() {
            fs::write(&path, &bytes[..len]).unwrap();
            let mut again = Features::open(&path).unwrap();
            let lacking = features.known.iter().filter(|(key, _)| !again.known.contains_key(*key));
            let lacking: Vec<_> =
                lacking.map(|(key, values)| (key.clone(), values.clone())).collect();
            for (key, values) in lacking {
                again.keep(key, &values).unwrap();
            }
            assert_eq!(fs::read(&path).unwrap(), bytes, "{len} bytes");
            assert_eq!(Features::open(&path).unwrap().known, features.known);
        }
    }

    #[test]
    fn other_files_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        for other in ["not features\n", "not features", "{\"flamingoc_eval\":\"x\"}\n"] {
            fs::write(&path, other).unwrap();
            let error = Features::open(&path).unwrap_err().to_string();
            assert!(error.contains("something else") && error.contains("hint: "), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), other);
        }
        let damaged = format!("{HEADER}\n{{\"key\":\"a\",\"features\":\"AAA=\"}}\nx\n");
        fs::write(&path, damaged).unwrap();
        assert!(Features::open(&path).unwrap().known.is_empty());
    }
}
