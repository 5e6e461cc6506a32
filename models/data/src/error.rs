//! What can stop the building or reading of a data set. Bad pages and pictures are not among it: they are
//! counted in the report.

use std::path::{Path, PathBuf};

/// Why data could not be built or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder that cannot be read or written.
    #[error("`{}`: {source}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An input that is neither HTML, WARC nor a folder.
    #[error("`{}`: not a page\n\nhint: pass .html, .htm, .warc, .warc.gz or a folder", path.display())]
    Input {
        /// The input.
        path: PathBuf,
    },
    /// An output folder that already holds shards.
    #[error("`{}`: holds shards already\n\nhint: choose another folder or remove them", path.display())]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// A tokenizer that cannot be read.
    #[error("tokenizer `{}`: {reason}", path.display())]
    Tokenizer {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tokenizer without a token that sequences need.
    #[error(
        "tokenizer: no token {expected}\n\nhint: add it to `added_tokens` of the tokenizer's file"
    )]
    NoToken {
        /// Names that would do.
        expected: String,
    },
    /// A tokenizer that does not keep a marker in one piece.
    #[error("tokenizer: {found} `{token}` tokens in a text that has {expected}")]
    Markers {
        /// The marker.
        token: String,
        /// How many the text has.
        expected: usize,
        /// How many came out.
        found: usize,
    },
    /// A text that the tokenizer refuses.
    #[error("tokenizer: {reason}")]
    Tokenise {
        /// What it said.
        reason: String,
    },
    /// A list of pairs that is none.
    #[error(
        "`{}`: {reason}\n\nhint: pass lines of JSON, captions of COCO, or a folder of media with texts",
        path.display()
    )]
    Pairs {
        /// The list.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Shards that hold nothing.
    #[error("no samples in {paths:?}\n\nhint: name a folder of .tar files, or the files")]
    NoSamples {
        /// Folders and files that were looked at.
        paths: Vec<PathBuf>,
    },
    /// A shard whose bytes are not what a writer of this crate leaves.
    #[error("shard `{}`, member `{member}`: {reason}", path.display())]
    Shard {
        /// The shard.
        path: PathBuf,
        /// The member of the archive.
        member: String,
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    /// For `map_err` on calls that touch `path`.
    pub(crate) fn file(path: &Path) -> impl Fn(std::io::Error) -> Self + '_ {
        move |source| Self::File { path: path.to_owned(), source }
    }
}
