//! Prompts: text with pictures and videos in between, and their token ids.

mod chunks;

use std::path::{Path, PathBuf};

use flamingo_models::{Family, SpecialTokens};
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

pub(crate) use chunks::ChunkIds;

/// One piece of a prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Segment {
    /// A picture file.
    Image {
        /// The file.
        image: PathBuf,
    },
    /// A video: one file with frames (GIF, WebP, APNG; with ffmpeg MP4, MOV, WebM, MKV, AVI), or its
    /// frames as picture files.
    Video {
        /// The file or files.
        video: VideoFiles,
        /// Frames a second to take from a file.
        #[serde(default)]
        fps: Option<f32>,
        /// Most frames to take.
        #[serde(default)]
        frames: Option<usize>,
    },
    /// Text.
    Text {
        /// The text.
        text: String,
    },
    /// The end of an example.
    EndOfChunk {
        /// Always true.
        end_of_chunk: bool,
    },
}

/// Where the frames of a video are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum VideoFiles {
    /// One file with several frames.
    File(PathBuf),
    /// One picture file a frame.
    Frames(Vec<PathBuf>),
}

/// A prompt file, and what to do with it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptFile {
    /// The pieces in order.
    pub segments: Vec<Segment>,
    /// Most tokens to generate.
    #[serde(default)]
    pub max_new_tokens: Option<usize>,
    /// Sampling temperature; 0 is greedy.
    #[serde(default)]
    pub temperature: Option<f32>,
}

/// [`PromptFile`] before its segments are read.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PromptFileForm {
    segments: Vec<serde_json::Value>,
    #[serde(default)]
    max_new_tokens: Option<usize>,
    #[serde(default)]
    temperature: Option<f32>,
}

/// The keys that a segment may have.
const SEGMENT_FORMS: &str =
    "one of `image`, `video` (with `fps`, `frames`), `text` or `end_of_chunk`";

/// Why a prompt cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PromptError {
    /// A prompt file cannot be read.
    #[error(
        "{path}: {reason}\n\nhint: expected {{\"segments\": [{{\"image\": \"a.jpg\"}}, {{\"text\": \"…\"}}]}}"
    )]
    File {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// The text has more or fewer pictures than were given.
    #[error(
        "prompt: the text has {in_text} `<image>` and {given} pictures or videos were given\n\n\
         hint: give one `--image` (or image segment) for each `<image>`"
    )]
    MediaCount {
        /// Image tokens in the text.
        in_text: usize,
        /// Pictures and videos.
        given: usize,
    },
    /// More pictures than the artifact was compiled for.
    #[error(
        "prompt: {given} pictures and videos, the artifact is limited to {limit}\n\nhint: compile with `--max-images {given}`"
    )]
    TooManyMedia {
        /// Pictures and videos.
        given: usize,
        /// The artifact's limit.
        limit: usize,
    },
    /// More pictures than the checkpoint has embeddings of places for.
    #[error(
        "prompt: {given} pictures and videos, the checkpoint has embeddings for {limit} places in a prompt\n\n\
         hint: ask about fewer at once"
    )]
    NoPlace {
        /// Pictures and videos.
        given: usize,
        /// Places.
        limit: usize,
    },
    /// A prompt without pictures, which the reference treats as another model.
    #[error(
        "prompt: no pictures; flamingo-pytorch leaves its gated blocks out where a prompt has none, and the artifact has \
         them\n\nhint: give at least one `--image`"
    )]
    NoMedia,
    /// The prompt does not fit the context.
    #[error(
        "prompt: {tokens} tokens do not fit the context of {limit}\n\n\
         hint: shorten the prompt, or compile with a larger `--max-context` where the model allows it"
    )]
    TooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens that fit.
        limit: usize,
    },
    /// A place in a conversation that it does not have.
    #[error(
        "session: a mark at {mark} tokens, it has {tokens}\n\nhint: rewind to the later mark first, or fork before rewinding"
    )]
    NoMark {
        /// Tokens at the mark.
        mark: usize,
        /// Tokens now.
        tokens: usize,
    },
    /// A continuation that cannot be scored.
    #[error("continuation {}: {flaw}\n\nhint: give texts that could follow the prompt", index + 1)]
    Continuation {
        /// Which, from 0.
        index: usize,
        /// What is wrong with it.
        flaw: &'static str,
    },
    /// A context that cannot slide.
    #[error(
        "session: its context cannot slide, {reason}\n\nhint: models with linear position biases (MPT) can, on the native backend"
    )]
    NoSliding {
        /// Why not.
        reason: &'static str,
    },
    /// There is nothing to continue.
    #[error("prompt: no text and no picture\n\nhint: pass `--prompt` or `--prompt-file`")]
    Empty,
    /// The model has no such token.
    #[error(
        "prompt: the model has no {0} token\n\nhint: leave it out, or name its id in the recipe's [tokens]"
    )]
    NoToken(&'static str),
    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
}

impl PromptFile {
    /// Reads a prompt file; picture paths are relative to it.
    ///
    /// # Errors
    /// A file that is missing or not of this form.
    pub fn read(path: &Path) -> Result<PromptFile, PromptError> {
        let wrong = |reason: String| PromptError::File { path: path.to_owned(), reason };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let mut file = PromptFile::from_json(&text).map_err(wrong)?;
        file.resolve(path.parent().unwrap_or(Path::new(".")));
        Ok(file)
    }

    /// Reads the text of a prompt file; picture paths stay as they are. The error says which segment is wrong.
    ///
    /// # Errors
    /// A text that is not of this form.
    pub fn from_json(text: &str) -> Result<PromptFile, String> {
        let file: PromptFileForm = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let segment = |(index, value): (usize, serde_json::Value)| {
            let found: String = value.to_string().chars().take(100).collect();
            serde_json::from_value(value).map_err(|_| {
                format!("segment {}: expected {SEGMENT_FORMS}, got {found}", index + 1)
            })
        };
        Ok(PromptFile {
            segments: file
                .segments
                .into_iter()
                .enumerate()
                .map(segment)
                .collect::<Result<_, _>>()?,
            max_new_tokens: file.max_new_tokens,
            temperature: file.temperature,
        })
    }

    /// Makes relative picture paths relative to `folder`.
    pub fn resolve(&mut self, folder: &Path) {
        for segment in &mut self.segments {
            match segment {
                Segment::Image { image } => *image = folder.join(&image),
                Segment::Video { video: VideoFiles::File(file), .. } => *file = folder.join(&file),
                Segment::Video { video: VideoFiles::Frames(files), .. } => {
                    files.iter_mut().for_each(|file| *file = folder.join(&file));
                }
                Segment::Text { .. } | Segment::EndOfChunk { .. } => {}
            }
        }
    }

    /// A prompt from a text with `<image>` where the pictures stand.
    ///
    /// # Errors
    /// If the text and the pictures differ in number.
    pub fn from_text(text: &str, images: &[PathBuf]) -> Result<PromptFile, PromptError> {
        let pieces: Vec<&str> = text.split("<image>").collect();
        let in_text = pieces.len() - 1;
        if in_text != images.len() {
            return Err(PromptError::MediaCount { in_text, given: images.len() });
        }
        let mut segments = Vec::new();
        for (index, piece) in pieces.iter().enumerate() {
            if index > 0 {
                segments.push(Segment::Image { image: images[index - 1].clone() });
            }
            if !piece.is_empty() {
                segments.push(Segment::Text { text: (*piece).to_owned() });
            }
        }
        Ok(PromptFile { segments, ..PromptFile::default() })
    }

    /// The pictures and videos, in order.
    pub fn media(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|s| matches!(s, Segment::Image { .. } | Segment::Video { .. }))
    }
}

/// Turns prompts into token ids in a family's form (OpenFlamingo: plain
/// concatenation; IDEFICS' markers around each picture, shared by neighbours, and stripped text).
pub struct PromptEncoder<'a> {
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The model's family.
    pub family: Family,
    /// Ids of the special tokens.
    pub tokens: &'a SpecialTokens,
}

impl PromptEncoder<'_> {
    /// Token ids of a prompt, with the beginning token where the tokenizer adds one.
    ///
    /// # Errors
    /// No segments, special tokens that the model lacks, or text that itself holds image tokens.
    pub fn encode(&self, prompt: &PromptFile) -> Result<Vec<u32>, PromptError> {
        self.encode_after(None, prompt)
    }

    /// Token ids of what follows the token `last`: a further turn has no beginning token.
    ///
    /// # Errors
    /// As [`PromptEncoder::encode`].
    pub fn encode_after(
        &self,
        last: Option<u32>,
        prompt: &PromptFile,
    ) -> Result<Vec<u32>, PromptError> {
        if prompt.segments.is_empty() {
            return Err(PromptError::Empty);
        }
        let mut text = String::new();
        self.write_text(&prompt.segments, last, &mut text)?;
        self.checked(self.ids(&text, last.is_none())?, prompt)
    }

    /// Appends the text of segments that stand after the token `last`.
    fn write_text(
        &self,
        segments: &[Segment],
        last: Option<u32>,
        text: &mut String,
    ) -> Result<(), PromptError> {
        match self.family {
            Family::Idefics => {
                let after_image = last.is_some() && last == self.tokens.around_image;
                self.write_idefics_text(segments, after_image, text)
            }
            Family::OpenFlamingo | Family::Otter | Family::FlamingoPytorch => {
                self.write_plain_text(segments, text)
            }
        }
    }

    /// Token ids of a text, with those that the tokenizer adds if `adds_tokens`.
    fn ids(&self, text: &str, adds_tokens: bool) -> Result<Vec<u32>, PromptError> {
        let encoding = self.tokenizer.encode_fast(text, adds_tokens);
        let encoding = encoding.map_err(|error| PromptError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token that ends a chunk.
    fn end(&self) -> Option<u32> {
        match self.family {
            Family::Idefics => self.tokens.end,
            Family::OpenFlamingo | Family::Otter | Family::FlamingoPytorch => {
                self.tokens.end_of_chunk
            }
        }
    }

    /// The ids of a prompt, if its text has no image tokens of its own.
    fn checked(&self, ids: Vec<u32>, prompt: &PromptFile) -> Result<Vec<u32>, PromptError> {
        let in_text = ids.iter().filter(|id| **id == self.tokens.image).count();
        let given = prompt.media().count();
        match in_text == given {
            true => Ok(ids),
            false => Err(PromptError::MediaCount { in_text, given }),
        }
    }

    fn word(&self, id: Option<u32>, what: &'static str) -> Result<String, PromptError> {
        id.and_then(|id| self.tokenizer.id_to_token(id)).ok_or(PromptError::NoToken(what))
    }

    fn write_plain_text(&self, segments: &[Segment], text: &mut String) -> Result<(), PromptError> {
        let image = self.word(Some(self.tokens.image), "image")?;
        for segment in segments {
            match segment {
                Segment::Image { .. } | Segment::Video { .. } => text.push_str(&image),
                Segment::Text { text: piece } => text.push_str(piece),
                Segment::EndOfChunk { .. } => {
                    text.push_str(&self.word(self.end(), "end-of-chunk")?);
                }
            }
        }
        Ok(())
    }

    fn write_idefics_text(
        &self,
        segments: &[Segment],
        mut after_image: bool,
        text: &mut String,
    ) -> Result<(), PromptError> {
        let image = self.word(Some(self.tokens.image), "image")?;
        let around = self.word(self.tokens.around_image, "around-image")?;
        for segment in segments {
            match segment {
                Segment::Image { .. } | Segment::Video { .. } => {
                    if !after_image {
                        text.push_str(&around);
                    }
                    text.push_str(&image);
                    text.push_str(&around);
                    after_image = true;
                }
                Segment::Text { text: piece } => {
                    text.push_str(piece.trim_matches(' '));
                    after_image = false;
                }
                Segment::EndOfChunk { .. } => {
                    text.push_str(&self.word(self.end(), "end-of-text")?);
                    after_image = false;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_files_have_the_documented_form() {
        let text = r#"{"segments": [{"image": "a.jpg"}, {"text": "Output: a cat."}, {"end_of_chunk": true},
            {"video": "b.gif", "fps": 1, "frames": 8}, {"video": ["c.png", "d.png"]}, {"text": "Output:"}],
            "max_new_tokens": 20, "temperature": 0}"#;
        let mut file: PromptFile = serde_json::from_str(text).unwrap();
        file.resolve(Path::new("folder"));
        assert_eq!(file.segments[0], Segment::Image { image: "folder/a.jpg".into() });
        assert_eq!(file.media().count(), 3);
        assert!(
            serde_json::from_str::<PromptFile>(r#"{"segments": [{"picture": "a.jpg"}]}"#).is_err()
        );
    }

    #[test]
    fn a_wrong_segment_is_named() {
        let text = r#"{"segments": [{"text": "a"}, {"picture": "a.jpg"}]}"#;
        let error = PromptFile::from_json(text).unwrap_err();
        assert!(error.starts_with("segment 2: expected one of `image`"), "{error}");
        assert!(error.ends_with(r#"got {"picture":"a.jpg"}"#), "{error}");
    }

    #[test]
    fn texts_need_one_picture_for_each_marker() {
        let one = [PathBuf::from("a.png")];
        let prompt = PromptFile::from_text("<image>What?", &one).unwrap();
        assert_eq!(prompt.segments.len(), 2);
        let error = PromptFile::from_text("<image><image>", &one).unwrap_err();
        assert!(error.to_string().contains("2 `<image>` and 1 pictures"), "{error}");
    }
}
