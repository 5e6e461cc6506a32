//! Lines of JSON beside a folder of pictures: `{"image": "a.jpg", "question": "…", "answer": "…"}`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value};

use super::{Field, MediaSource, Row, checked_len, inside, name_of};

/// The rows of a file, in its order; empty lines are none.
pub(super) fn rows(path: &Path, images: &Path) -> Result<Vec<Result<Row, String>>> {
    checked_len(path)?;
    let bytes = fs::read(path).with_context(|| format!("`{}`", path.display()))?;
    let lines = (1..).zip(bytes.split(|byte| *byte == b'\n'));
    let filled = lines.filter(|(_, line)| !line.trim_ascii().is_empty());
    let row = |(number, line): (usize, &[u8])| {
        let value: Value = serde_json::from_slice(line).map_err(|_| "not JSON".to_owned())?;
        let Value::Object(object) = value else { return Err("not an object".to_owned()) };
        row_from_object(format!("{}:{number}", name_of(path)), object, images)
    };
    Ok(filled.map(row).collect())
}

/// A row from an object: media by `image`, `images`, `video` or `frames`, answers by `answer` or `answers`, `candidates`,
/// `id`; what else is a text, a number or a list of pairs is a field.
pub(super) fn row_from_object(
    id: String,
    object: Map<String, Value>,
    images: &Path,
) -> Result<Row, String> {
    let mut row = Row {
        id,
        media: Vec::new(),
        fields: BTreeMap::new(),
        answers: Vec::new(),
        candidates: None,
    };
    for (key, value) in object {
        let wrong = || format!("`{key}` has another form");
        match key.as_str() {
            "id" => row.id = text(&value).ok_or_else(wrong)?,
            "image" => row.media.push(MediaSource::File(path(&value, images)?)),
            "images" => {
                for path in paths(&value, images)? {
                    row.media.push(MediaSource::File(path));
                }
            }
            "video" => row.media.push(MediaSource::Video(path(&value, images)?)),
            "frames" => row.media.push(MediaSource::Frames(paths(&value, images)?)),
            "answer" => row.answers = vec![text(&value).ok_or_else(wrong)?],
            "answers" => row.answers = texts(&value).ok_or_else(wrong)?,
            "candidates" => row.candidates = Some(texts(&value).ok_or_else(wrong)?),
            _ => {
                row.fields.insert(key.clone(), field(&value).ok_or_else(wrong)?);
            }
        }
    }
    Ok(row)
}

fn field(value: &Value) -> Option<Field> {
    match value {
        Value::Array(pairs) => {
            let pair = |pair: &Value| <[String; 2]>::try_from(texts(pair)?).ok();
            pairs.iter().map(pair).collect::<Option<_>>().map(Field::Turns)
        }
        value => text(value).map(Field::Text),
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(value) => Some(if *value { "yes" } else { "no" }.to_owned()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn texts(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(text).collect()
}

fn path(value: &Value, images: &Path) -> Result<PathBuf, String> {
    let path = value.as_str().ok_or("a path that is no text")?;
    inside(images, Path::new(path))
}

fn paths(value: &Value, images: &Path) -> Result<Vec<PathBuf>, String> {
    let paths = value.as_array().ok_or("paths that are no list")?;
    paths.iter().map(|value| path(value, images)).collect()
}
