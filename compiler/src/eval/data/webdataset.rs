//! WebDataset shards: tar files whose members `KEY.jpg`, `KEY.txt` and `KEY.json` belong together.
//!
//! The shards of `flamingo-data` are such too, but hold tokens of one tokenizer; a data set holds texts.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value};

use super::jsonl::row_from_object;
use super::{Field, MediaSource, Row, name_of};

/// Most bytes of a text.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// The rows of a shard or of all shards of a folder, by name.
pub(super) fn rows(path: &Path) -> Result<Vec<Result<Row, String>>> {
    let mut rows = Vec::new();
    for shard in shards(path)? {
        let found = samples(&shard);
        // What was read before a shard breaks off can be used.
        let (samples, broken) = found.with_context(|| format!("`{}`", shard.display()))?;
        rows.extend(samples.into_iter().map(|sample| sample.row(&shard)));
        rows.extend(broken.map(Err));
    }
    Ok(rows)
}

fn shards(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let place = || format!("`{}`", path.display());
    let mut shards = Vec::new();
    for entry in fs::read_dir(path).with_context(place)? {
        let path = entry.with_context(place)?.path();
        if path.extension().is_some_and(|extension| extension == "tar") {
            shards.push(path);
        }
    }
    shards.sort();
    Ok(shards)
}

/// Members with one key.
struct Sample {
    key: String,
    /// Places and sizes of pictures.
    pictures: Vec<(u64, u64)>,
    /// Texts by what follows the key.
    texts: BTreeMap<String, Vec<u8>>,
}

/// Samples in order, and why the archive could not be read to its end.
fn samples(shard: &Path) -> std::io::Result<(Vec<Sample>, Option<String>)> {
    let mut archive = tar::Archive::new(File::open(shard)?);
    let mut samples: Vec<Sample> = Vec::new();
    for entry in archive.entries_with_seek()? {
        let Ok(mut entry) = entry else {
            return Ok((samples, Some("a shard that breaks off".to_owned())));
        };
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let file_at = name.rfind('/').map_or(0, |slash| slash + 1);
        let Some(dot) = name[file_at..].find('.') else { continue };
        let (key, rest) = (&name[..file_at + dot], &name[file_at + dot + 1..]);
        if !entry.header().entry_type().is_file() {
            continue;
        }
        if samples.last().is_none_or(|sample| sample.key != key) {
            let (pictures, texts) = (Vec::new(), BTreeMap::new());
            samples.push(Sample { key: key.to_owned(), pictures, texts });
        }
        let Some(sample) = samples.last_mut() else { continue };
        let extension = rest.rsplit('.').next().unwrap_or_default().to_lowercase();
        match extension.as_str() {
            "jpg" | "jpeg" | "png" | "webp" | "gif" => {
                sample.pictures.push((entry.raw_file_position(), entry.size()));
            }
            "txt" | "json" | "cls" => {
                let mut text = Vec::new();
                if entry.by_ref().take(MAX_TEXT_BYTES).read_to_end(&mut text).is_err() {
                    return Ok((samples, Some("a shard that breaks off".to_owned())));
                }
                sample.texts.insert(extension, text);
            }
            _ => {}
        }
    }
    Ok((samples, None))
}

impl Sample {
    fn row(self, shard: &Path) -> Result<Row, String> {
        if self.pictures.is_empty() {
            return Err("a sample without picture".to_owned());
        }
        let id = format!("{}:{}", name_of(shard), self.key);
        let object = match self.texts.get("json") {
            Some(json) => serde_json::from_slice::<Map<String, Value>>(json)
                .map_err(|_| "`json` is no object".to_owned())?,
            None => Map::new(),
        };
        // Media are members of the shard, never files beside it.
        let names = ["image", "images", "video", "frames"];
        let object = object.into_iter().filter(|(key, _)| !names.contains(&key.as_str())).collect();
        let mut row = row_from_object(id, object, Path::new("."))?;
        let text = |name: &str| {
            self.texts.get(name).map(|text| String::from_utf8_lossy(text).trim().to_owned())
        };
        if let Some(caption) = text("txt") {
            row.answers.push(caption);
        }
        if let Some(class) = text("cls") {
            row.fields.insert("class".to_owned(), Field::Text(class));
        }
        let member = |(place, len)| MediaSource::Member { shard: shard.to_owned(), place, len };
        row.media = self.pictures.into_iter().map(member).collect();
        Ok(row)
    }
}
