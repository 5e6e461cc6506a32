//! Captions of COCO: <https://cocodataset.org/#format-data>. A picture's captions are one row.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{MediaSource, Row, checked_len, inside};

#[derive(Deserialize)]
struct Coco {
    images: Vec<Image>,
    annotations: Vec<Caption>,
}

#[derive(Deserialize)]
struct Image {
    id: u64,
    file_name: PathBuf,
}

#[derive(Deserialize)]
struct Caption {
    image_id: u64,
    caption: String,
}

/// A row for each picture, in the order of the file.
pub(super) fn rows(path: &Path, images: &Path) -> Result<Vec<Result<Row, String>>> {
    let coco: Coco = read(path, "captions of COCO, with `images` and `annotations`")?;
    let mut captions: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for Caption { image_id, caption } in coco.annotations {
        captions.entry(image_id).or_default().push(caption);
    }
    let row = |image: Image| {
        let answers = captions.remove(&image.id).ok_or("a picture without caption")?;
        let media = vec![MediaSource::File(inside(images, &image.file_name)?)];
        let (id, fields) = (image.id.to_string(), BTreeMap::new());
        Ok(Row { id, media, fields, answers, candidates: None })
    };
    Ok(coco.images.into_iter().map(row).collect())
}

/// Reads a file of JSON.
pub(super) fn read<T: for<'a> Deserialize<'a>>(path: &Path, form: &str) -> Result<T> {
    checked_len(path)?;
    let file = File::open(path).with_context(|| format!("`{}`", path.display()))?;
    serde_json::from_reader(BufReader::new(file))
        .with_context(|| format!("`{}`: expected {form}", path.display()))
}
