//! Data sets as rows: media, texts by name, right answers. Bad rows are counted, never fatal.

mod coco;
mod jsonl;
mod media;
mod vqa;
mod webdataset;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

pub use media::MediaSource;

/// Most bytes of a file of rows that is read.
const MAX_FILE_BYTES: u64 = 4 << 30;

/// Where rows lie.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// Lines of JSON (`.jsonl`), captions of COCO or questions of VQAv2 (`.json`), a WebDataset shard (`.tar`) or a folder
    /// of such.
    pub file: PathBuf,
    /// Annotations of VQAv2, which have the answers.
    pub annotations: Option<PathBuf>,
    /// The folder of pictures [default: that of `file`].
    pub images: Option<PathBuf>,
    /// The names of VQAv2's pictures, with `{}` for the number; `{:012}` is filled up with zeros.
    pub image_name: Option<String>,
}

/// What a row says.
#[derive(Clone, Debug, PartialEq)]
pub enum Field {
    /// A text.
    Text(String),
    /// A dialogue: what the user said, and what was answered.
    Turns(Vec<[String; 2]>),
}

/// One example or question.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its name.
    pub id: String,
    /// Pictures and videos, in the order of the text.
    pub media: Vec<MediaSource>,
    /// Texts by name.
    pub fields: BTreeMap<String, Field>,
    /// Right answers; the first is shown in examples.
    pub answers: Vec<String>,
    /// Candidates of this row alone.
    pub candidates: Option<Vec<String>>,
}

/// Rows of a file, and how many lines were left out for which reason.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// What can be used.
    pub rows: Vec<Row>,
    /// Numbers of bad rows by reason.
    pub bad: BTreeMap<String, usize>,
}

impl Dataset {
    /// Reads the rows of a file; paths in it are relative to `folder`.
    ///
    /// # Errors
    /// A file that cannot be read, or has no row that can be used.
    pub fn read(folder: &Path, data: &DataFile) -> Result<Dataset> {
        let path = folder.join(&data.file);
        let parent = path.parent().unwrap_or(Path::new(".")).to_owned();
        let images = data.images.as_ref().map_or(parent, |images| folder.join(images));
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        let rows = match (extension.as_str(), &data.annotations) {
            ("jsonl" | "ndjson", _) => jsonl::rows(&path, &images)?,
            ("json", Some(annotations)) => {
                let name = data.image_name.as_deref().unwrap_or("{:012}.jpg");
                vqa::rows(&path, &folder.join(annotations), &images, name)?
            }
            ("json", None) => coco::rows(&path, &images)?,
            ("tar", _) => webdataset::rows(&path)?,
            _ if path.is_dir() => webdataset::rows(&path)?,
            _ => bail!(
                "`{}`: not a data set\n\nhint: expected .jsonl, .json (captions of COCO; with `annotations` \
                 questions of VQAv2), .tar or a folder of .tar",
                path.display()
            ),
        };
        let dataset = Dataset::of(rows);
        ensure!(
            !dataset.rows.is_empty(),
            "`{}`: no row that can be used, {} bad: {:?}\n\nhint: are `images` and the form of the rows right?",
            path.display(),
            dataset.bad.values().sum::<usize>(),
            dataset.bad
        );
        Ok(dataset)
    }

    /// Keeps what can be used, and counts the rest.
    pub fn of(rows: impl IntoIterator<Item = Result<Row, String>>) -> Dataset {
        let mut dataset = Dataset::default();
        for row in rows {
            let checked =
                row.and_then(|row| match row.media.iter().find_map(MediaSource::problem) {
                    Some(problem) => Err(problem),
                    None => Ok(row),
                });
            match checked {
                Ok(row) => dataset.rows.push(row),
                Err(reason) => dataset.reject(reason),
            }
        }
        dataset
    }

    /// Counts a row that cannot be used.
    pub fn reject(&mut self, reason: String) {
        *self.bad.entry(reason).or_insert(0) += 1;
    }
}

fn checked_len(path: &Path) -> Result<()> {
    let metadata = path.metadata().with_context(|| format!("`{}`", path.display()))?;
    ensure!(
        metadata.len() <= MAX_FILE_BYTES,
        "`{}`: expected at most {MAX_FILE_BYTES} bytes, found {}\n\nhint: cut the data set into several",
        path.display(),
        metadata.len()
    );
    Ok(())
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A path below a folder that does not lead out of it.
fn inside(folder: &Path, relative: &Path) -> Result<PathBuf, String> {
    use std::path::Component;
    let is_inner = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    match relative.components().all(is_inner) {
        true => Ok(folder.join(relative)),
        false => Err("a path that leads out of the folder".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const PNG: &[u8] = include_bytes!("../../../models/demo/images/caption-0-0-0.png");

    fn data(file: &str) -> DataFile {
        DataFile { file: file.into(), annotations: None, images: None, image_name: None }
    }

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("pictures")).unwrap();
        for name in ["a.png", "b.png", "000000000007.jpg", "x_42.jpg"] {
            fs::write(folder.path().join("pictures").join(name), PNG).unwrap();
        }
        folder
    }

    fn bad(dataset: &Dataset) -> usize {
        dataset.bad.values().sum()
    }

    #[test]
    fn lines_are_rows_or_counted() {
        let folder = folder();
        let lines = r#"{"id": 3, "image": "a.png", "question": "what ?", "answer": "cat"}

not json
{"image": "gone.png", "answer": "dog"}
{"image": "../a.png", "answer": "dog"}
{"images": ["a.png", "b.png"], "answers": ["x", "y"], "candidates": ["x", "z"], "turns": [["hi", "hello"]]}
{"frames": ["a.png", "b.png"], "answer": "runs", "n": 4}
{"image": "a.png", "answer": 7, "list": [1]}
{"image": "a.png"}
"#;
        fs::write(folder.path().join("rows.jsonl"), lines).unwrap();
        let mut file = data("rows.jsonl");
        file.images = Some("pictures".into());
        let found = Dataset::read(folder.path(), &file).unwrap();
        let ids: Vec<&str> = found.rows.iter().map(|row| row.id.as_str()).collect();
        assert_eq!(ids, ["3", "rows.jsonl:6", "rows.jsonl:7", "rows.jsonl:9"], "{:?}", found.bad);
        assert_eq!(bad(&found), 4, "{:?}", found.bad);
        assert_eq!(found.rows[0].fields["question"], Field::Text("what ?".into()));
        assert_eq!(found.rows[1].media.len(), 2);
        assert_eq!(found.rows[1].candidates, Some(vec!["x".to_owned(), "z".to_owned()]));
        let turns = Field::Turns(vec![["hi".to_owned(), "hello".to_owned()]]);
        assert_eq!(found.rows[1].fields["turns"], turns);
        assert_eq!(found.rows[2].media.len(), 1);
        assert_eq!(found.rows[2].fields["n"], Field::Text("4".into()));
        assert!(found.rows[3].answers.is_empty());
    }

    #[test]
    fn captions_of_coco_come_together() {
        let folder = folder();
        let text = r#"{"images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "gone.png"}, {"id": 9, "file_name": "b.png"}],
            "annotations": [{"image_id": 7, "caption": "A"}, {"image_id": 8, "caption": "B"}, {"image_id": 7, "caption": "C"}]}"#;
        fs::write(folder.path().join("c.json"), text).unwrap();
        let mut file = data("c.json");
        file.images = Some("pictures".into());
        let found = Dataset::read(folder.path(), &file).unwrap();
        assert_eq!((found.rows.len(), bad(&found)), (1, 2), "{:?}", found.bad);
        assert_eq!(found.rows[0].answers, ["A", "C"]);
    }

    #[test]
    fn questions_of_vqa_find_their_answers() {
        let folder = folder();
        let questions = r#"{"questions": [{"question_id": 1, "image_id": 42, "question": "who?"},
            {"question_id": 2, "image_id": 43, "question": "gone?"}, {"question_id": 3, "image_id": 42, "question": "none?"}]}"#;
        let answers = r#"{"annotations": [{"question_id": 1, "image_id": 42, "multiple_choice_answer": "b",
            "answers": [{"answer": "a", "answer_id": 1}, {"answer": "b", "answer_id": 2}, {"answer": "b"}]}]}"#;
        fs::write(folder.path().join("q.json"), questions).unwrap();
        fs::write(folder.path().join("a.json"), answers).unwrap();
        let mut file = data("q.json");
        (file.annotations, file.images) = (Some("a.json".into()), Some("pictures".into()));
        file.image_name = Some("x_{}.jpg".into());
        let found = Dataset::read(folder.path(), &file).unwrap();
        assert_eq!((found.rows.len(), bad(&found)), (1, 2), "{:?}", found.bad);
        assert_eq!(found.rows[0].answers, ["b", "a", "b"], "the one that most gave comes first");
        assert_eq!(found.rows[0].fields["question"], Field::Text("who?".into()));
    }

    #[test]
    fn shards_are_read_by_key() {
        let folder = folder();
        let mut tar = tar::Builder::new(fs::File::create(folder.path().join("0.tar")).unwrap());
        let mut add = |name: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, name, bytes).unwrap();
        };
        add("d/a.png", PNG);
        add("d/a.txt", b"a caption\n");
        add("d/b.png", PNG);
        add("d/b.json", br#"{"question": "what?", "answers": ["x", "y"]}"#);
        add("d/c.txt", b"no picture");
        add("d/e.jpg", PNG);
        add("d/e.cls", b"4");
        add("d/f.png", PNG);
        add("d/f.json", b"[]");
        tar.finish().unwrap();
        for file in ["0.tar", "."] {
            let found = Dataset::read(folder.path(), &data(file)).unwrap();
            let ids: Vec<&str> = found.rows.iter().map(|row| row.id.as_str()).collect();
            assert_eq!(ids, ["0.tar:d/a", "0.tar:d/b", "0.tar:d/e"], "{:?}", found.bad);
            assert_eq!(bad(&found), 2);
            assert_eq!(found.rows[0].answers, ["a caption"]);
            assert_eq!(found.rows[1].answers, ["x", "y"]);
            assert_eq!(found.rows[2].fields["class"], Field::Text("4".into()));
            let pictures = found.rows[0].media[0].pictures().unwrap();
            assert_eq!((pictures.len(), pictures[0].width()), (1, 48));
        }
    }

    #[test]
    fn a_data_set_without_rows_is_an_error() {
        let folder = folder();
        fs::write(folder.path().join("rows.jsonl"), "no\n").unwrap();
        let error = Dataset::read(folder.path(), &data("rows.jsonl")).unwrap_err().to_string();
        assert!(error.contains("rows.jsonl") && error.contains("hint: "), "{error}");
        assert!(Dataset::read(folder.path(), &data("rows.csv")).is_err());
    }
}
