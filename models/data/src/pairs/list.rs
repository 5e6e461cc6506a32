//! Lists of pairs: lines of JSON, captions of COCO, or a folder of media with a text file beside each.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::Error;
use crate::report::PageReject;

/// Most bytes of a line of a list, or of a text file.
const MAX_TEXT_BYTES: u64 = 1 << 20;
/// Most bytes of a file of COCO captions.
const MAX_COCO_BYTES: u64 = 1 << 30;

/// A medium and its text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pair {
    /// Name of the list and place in it.
    pub(super) source: String,
    pub(super) text: String,
    pub(super) media: Media,
}

/// Where a medium lies; paths are relative to the folder of media.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Media {
    /// A picture, the first of an animation.
    Picture(PathBuf),
    /// An animation.
    Video(PathBuf),
    /// A video if it moves, else a picture.
    Either(PathBuf),
    /// A video as its frames.
    Frames { paths: Vec<PathBuf>, per_second: usize },
}

type Pairs = Box<dyn Iterator<Item = Result<Pair, PageReject>>>;

/// The pairs of a list in its order.
pub(super) fn pairs(input: &Path) -> Result<Pairs, Error> {
    let extension = input.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    if input.metadata().map_err(Error::file(input))?.is_dir() {
        return folder(input);
    }
    match extension.to_lowercase().as_str() {
        "jsonl" | "ndjson" => lines(input),
        "json" => coco(input),
        found => Err(Error::Pairs {
            path: input.to_owned(),
            reason: format!("found a file with extension `{found}`, expected jsonl or json"),
        }),
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A line of a list.
#[derive(Deserialize)]
struct Line {
    #[serde(alias = "caption")]
    text: String,
    image: Option<PathBuf>,
    video: Option<PathBuf>,
    frames: Option<Vec<PathBuf>>,
    /// Frames that make a second.
    fps: Option<usize>,
}

impl Line {
    fn media(self) -> Option<(String, Media)> {
        let media = match (self.image, self.video, self.frames) {
            (Some(path), None, None) => Media::Picture(path),
            (None, Some(path), None) => Media::Video(path),
            (None, None, Some(paths)) => {
                Media::Frames { paths, per_second: self.fps.unwrap_or(1).max(1) }
            }
            _ => return None,
        };
        Some((self.text, media))
    }
}

fn lines(path: &Path) -> Result<Pairs, Error> {
    let mut reader = BufReader::new(File::open(path).map_err(Error::file(path))?);
    let name = name_of(path);
    let numbered = (1_u64..).map_while(move |number| Some((number, read_line(&mut reader)?)));
    let filled =
        numbered.filter(|(_, line)| line.as_ref().is_none_or(|line| !line.trim_ascii().is_empty()));
    Ok(Box::new(filled.map(move |(number, line)| {
        let line = line.ok_or(PageReject::Unreadable)?;
        let line: Line = serde_json::from_slice(&line).map_err(|_| PageReject::Unreadable)?;
        let (text, media) = line.media().ok_or(PageReject::Unreadable)?;
        Ok(Pair { source: format!("{name}:{number}"), text, media })
    })))
}

/// The next line; `Some(None)` if it is over the limit, `None` at the end of what can be read.
fn read_line(reader: &mut impl BufRead) -> Option<Option<Vec<u8>>> {
    let mut line = Vec::new();
    reader.take(MAX_TEXT_BYTES).read_until(b'\n', &mut line).ok()?;
    let is_cut =
        !line.ends_with(b"\n") && u64::try_from(line.len()).is_ok_and(|len| len == MAX_TEXT_BYTES);
    match (line.is_empty(), is_cut) {
        (true, _) => None,
        (false, false) => Some(Some(line)),
        (false, true) => {
            reader.skip_until(b'\n').ok()?;
            Some(None)
        }
    }
}

/// <https://cocodataset.org/#format-data>, captions.
#[derive(Deserialize)]
struct Coco {
    images: Vec<CocoImage>,
    annotations: Vec<CocoCaption>,
}

#[derive(Deserialize)]
struct CocoImage {
    id: u64,
    file_name: PathBuf,
}

#[derive(Deserialize)]
struct CocoCaption {
    image_id: u64,
    caption: String,
}

fn coco(path: &Path) -> Result<Pairs, Error> {
    let fail = |reason: String| Error::Pairs { path: path.to_owned(), reason };
    let file = File::open(path).map_err(Error::file(path))?;
    let list: Coco = serde_json::from_reader(BufReader::new(file.take(MAX_COCO_BYTES)))
        .map_err(|error| fail(format!("not captions of COCO: {error}")))?;
    let files: HashMap<u64, PathBuf> =
        list.images.into_iter().map(|image| (image.id, image.file_name)).collect();
    let name = name_of(path);
    Ok(Box::new((0_u64..).zip(list.annotations).map(move |(index, caption)| {
        let file = files.get(&caption.image_id).ok_or(PageReject::Unreadable)?;
        let source = format!("{name}:annotations[{index}]");
        Ok(Pair { source, text: caption.caption, media: Media::Picture(file.clone()) })
    })))
}

/// `NAME.txt` with `NAME.png` and its like, or with a folder `NAME` of frames, in the order of names.
fn folder(folder: &Path) -> Result<Pairs, Error> {
    let paths = sorted(folder)?;
    let has_text = |path: &&PathBuf| path.is_dir() || media_extension(path);
    let mut pairs = Vec::new();
    for path in paths.iter().filter(has_text) {
        let media = match path.is_dir() {
            false => Media::Either(name_of(path).into()),
            true => {
                let inside = |frame: &PathBuf| Path::new(&name_of(path)).join(name_of(frame));
                let frames = sorted(path)?;
                let frames = frames.iter().filter(|frame| media_extension(frame));
                Media::Frames { paths: frames.map(inside).collect(), per_second: 1 }
            }
        };
        let text = read_text(&path.with_extension("txt"));
        let source = name_of(path);
        pairs.push(text.map(|text| Pair { source, text, media }));
    }
    Ok(Box::new(pairs.into_iter()))
}

fn sorted(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = folder.read_dir().map_err(Error::file(folder))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()).map_err(Error::file(folder)));
    let mut paths: Vec<PathBuf> = paths.collect::<Result<_, _>>()?;
    paths.sort();
    Ok(paths)
}

fn media_extension(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    ["png", "apng", "jpg", "jpeg", "gif", "webp"]
        .iter()
        .any(|known| extension.eq_ignore_ascii_case(known))
}

fn read_text(path: &Path) -> Result<String, PageReject> {
    let file = File::open(path).map_err(|_| PageReject::Empty)?;
    let mut text = String::new();
    file.take(MAX_TEXT_BYTES).read_to_string(&mut text).map_err(|_| PageReject::Unreadable)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::{MAX_TEXT_BYTES, Media, Pair, pairs};
    use crate::report::PageReject;

    fn read(name: &str, content: &[u8]) -> Vec<Result<Pair, PageReject>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        pairs(&path).unwrap().collect()
    }

    fn pair(source: &str, text: &str, media: Media) -> Result<Pair, PageReject> {
        Ok(Pair { source: source.to_owned(), text: text.to_owned(), media })
    }

    #[test]
    fn lines_are_pairs_or_counted() {
        let long = "x".repeat(usize::try_from(MAX_TEXT_BYTES).unwrap());
        let list = format!(
            "{{\"image\": \"a.png\", \"text\": \"A\"}}\n\n{long}\nnot json\n{{\"text\": \"nothing\"}}\n\
             {{\"frames\": [\"1.png\"], \"fps\": 3, \"caption\": \"F\"}}\n{{\"video\": \"v.gif\", \"text\": \"V\"}}"
        );
        let frames = Media::Frames { paths: vec!["1.png".into()], per_second: 3 };
        let expected = [
            pair("l.jsonl:1", "A", Media::Picture("a.png".into())),
            Err(PageReject::Unreadable),
            Err(PageReject::Unreadable),
            Err(PageReject::Unreadable),
            pair("l.jsonl:6", "F", frames),
            pair("l.jsonl:7", "V", Media::Video("v.gif".into())),
        ];
        assert_eq!(read("l.jsonl", list.as_bytes()), expected);
    }

    #[test]
    fn captions_of_coco() {
        let list = br#"{"info": {}, "images": [{"id": 7, "file_name": "7.jpg", "width": 1}],
            "annotations": [{"image_id": 7, "id": 1, "caption": "A"}, {"image_id": 8, "caption": "B"},
                            {"image_id": 7, "caption": "C"}]}"#;
        let picture = || Media::Picture("7.jpg".into());
        let expected = [
            pair("c.json:annotations[0]", "A", picture()),
            Err(PageReject::Unreadable),
            pair("c.json:annotations[2]", "C", picture()),
        ];
        assert_eq!(read("c.json", list), expected);
    }

    #[test]
    fn a_folder_pairs_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        fs::create_dir(folder.path().join("film")).unwrap();
        for (name, text) in [
            ("b.jpg", ""),
            ("b.txt", "B"),
            ("film/2.png", ""),
            ("film/1.png", ""),
            ("film/x.md", ""),
            ("film.txt", "F"),
            ("no.png", ""),
            ("a.md", ""),
        ] {
            write(name, text);
        }
        let frames = ["film/1.png", "film/2.png"].map(PathBuf::from).to_vec();
        let expected = [
            pair("b.jpg", "B", Media::Either("b.jpg".into())),
            pair("film", "F", Media::Frames { paths: frames, per_second: 1 }),
            Err(PageReject::Empty),
        ];
        assert_eq!(pairs(folder.path()).unwrap().collect::<Vec<_>>(), expected);
    }
}
