//! Banks: few-shot examples that were read once, kept in a folder, and put before any number of prompts.
//!
//! A prompt with examples of a bank is the prompt that begins with their segments, bit for bit. The bank only spares
//! work: it has the visual tokens of each picture, keys and values of a text that begins with all examples in order, and
//! what the frozen vision encoder sees, to find examples like a question.
//!
//! ```text
//! bank/
//!   bank.json              what it is of, and the examples; hashes of all that follows
//!   media/KEY.tokens       visual tokens, as in the folder of the visual-token cache
//!   features.f32           [n_examples, width], zeros for an example without picture
//!   prefix.kv              keys and values, block after block
//! ```

mod build;
mod examples;
mod file;
mod prefix;
mod select;

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::backend::TokenFormat;
use crate::model::{Model, RunError};
use crate::prompt::{PromptFile, Segment};
use crate::visual_cache::MediaKey;
use crate::visual_cache::entry;

use file::BankFile;
pub(crate) use prefix::BankPrefix;

pub use build::BankReport;
pub use select::Selection;

const MEDIA: &str = "media";
const FEATURES: &str = "features.f32";
const PREFIX: &str = "prefix.kv";

/// Why a bank cannot be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BankError {
    /// Examples that cannot be used, all of them.
    #[error(
        "{path}: {} examples cannot be used:\n  {}\n\nhint: mend these lines, or pass `--skip-bad` to leave them out",
        problems.len(), problems.join("\n  ")
    )]
    Examples {
        /// The file.
        path: PathBuf,
        /// Line and reason of each.
        problems: Vec<String>,
    },
    /// A bank made for something else.
    #[error("{path}: {what}: expected {expected}, found {found}\n\nhint: {hint}")]
    Other {
        /// The bank.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What the model is.
        expected: String,
        /// What the bank is of.
        found: String,
        /// What to do.
        hint: &'static str,
    },
    /// A bank that is damaged.
    #[error(
        "{path}: {reason}\n\nhint: the bank is damaged; make it again with `flamingoc bank build`"
    )]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// Examples that the bank cannot give.
    #[error("bank: {reason}\n\nhint: {hint}")]
    Choice {
        /// What is wrong.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// An engine that cannot use banks.
    #[error("bank: backend `{0}` cannot go on from visual tokens\n\nhint: use `--backend native`")]
    Engine(&'static str),
}

/// Examples of a model, ready to stand before prompts.
pub struct Bank {
    dir: PathBuf,
    model: Model,
    examples: Vec<Example>,
    /// Place of the features' file, and their width; `None` if the engine has none.
    features: Option<file::FeaturesEntry>,
    prefix: Arc<BankPrefix>,
}

/// One example.
#[derive(Clone, Debug)]
struct Example {
    segments: Vec<Segment>,
    /// One for each picture or video of the segments.
    media: Vec<KeptMedium>,
}

/// A medium whose visual tokens lie in a bank.
#[derive(Clone, Debug)]
pub(crate) struct KeptMedium {
    pub(crate) key: MediaKey,
    pub(crate) n_frames: usize,
    file: PathBuf,
}

impl KeptMedium {
    /// The medium in a bank's folder.
    fn new(dir: &Path, key: MediaKey, n_frames: usize) -> KeptMedium {
        KeptMedium { key, n_frames, file: dir.join(MEDIA).join(format!("{key}.tokens")) }
    }

    /// Checks that its file is there, and of a size that can be read.
    fn check(&self) -> Result<(), BankError> {
        let wrong = |reason: String| Err(broken(&self.file, reason));
        match fs::symlink_metadata(&self.file) {
            Err(error) => wrong(error.to_string()),
            Ok(metadata) if !metadata.is_file() => wrong("it is no file".into()),
            Ok(metadata) if metadata.len() > entry::MAX_BYTES => {
                wrong(format!("it has {} bytes", metadata.len()))
            }
            Ok(_) => Ok(()),
        }
    }

    /// Its visual tokens `[n_latents, dim]`.
    pub(crate) fn tokens(&self, format: Option<TokenFormat>) -> Result<Vec<f32>, BankError> {
        let format = format.ok_or(BankError::Engine("other"))?;
        self.check()?;
        let bytes = fs::read(&self.file).map_err(|error| broken(&self.file, error))?;
        entry::decode(&self.key, format, &bytes).map_err(|reason| broken(&self.file, reason))
    }
}

/// Examples chosen from a bank, in the order in which they stand before a prompt.
#[derive(Clone, Debug, Default)]
pub struct Shots {
    numbers: Vec<usize>,
    segments: Vec<Segment>,
    media: Vec<KeptMedium>,
    prefix: Option<Arc<BankPrefix>>,
    /// What the bank is of.
    identity: Option<file::Identity>,
}

impl Shots {
    /// Numbers of the examples, counted from 1 in the order of the bank.
    pub fn numbers(&self) -> &[usize] {
        &self.numbers
    }

    /// The examples' segments, and the prompt's after them: what is asked, as a prompt of its own.
    pub fn before<'a>(&self, prompt: &'a PromptFile) -> Cow<'a, PromptFile> {
        if self.segments.is_empty() {
            return Cow::Borrowed(prompt);
        }
        let segments = [self.segments.as_slice(), &prompt.segments].concat();
        Cow::Owned(PromptFile { segments, ..prompt.clone() })
    }

    pub(crate) fn media(&self) -> &[KeptMedium] {
        &self.media
    }

    pub(crate) fn prefix(&self) -> Option<&BankPrefix> {
        self.prefix.as_deref()
    }

    /// Checks that they are of this model's bank.
    pub(crate) fn check(&self, model: &Model) -> Result<(), BankError> {
        match &self.identity {
            Some(identity) => identity.check(Path::new("bank"), &file::Identity::of(model)),
            None => Ok(()),
        }
    }
}

impl Bank {
    /// Opens a bank. What is large is checked when it is read, or at once with [`Bank::verify`].
    ///
    /// # Errors
    /// A bank of another artifact, engine or format of keys and values; one that is damaged.
    pub fn open(dir: &Path, model: &Model) -> Result<Bank, RunError> {
        if model.backend().token_format().is_none() {
            return Err(BankError::Engine(model.backend().name()).into());
        }
        let file = BankFile::read(dir)?;
        file.identity.check(dir, &file::Identity::of(model))?;
        let examples = file.examples.into_iter().map(|entry| entry.open(dir));
        let examples = examples.collect::<Result<_, BankError>>()?;
        let prefix = Arc::new(BankPrefix::open(&dir.join(PREFIX), &file.prefix)?);
        let (dir, model) = (dir.to_owned(), model.clone());
        Ok(Bank { dir, model, examples, features: file.features, prefix })
    }

    /// Checks every file against its hash.
    ///
    /// # Errors
    /// The first that is damaged.
    pub fn verify(&self) -> Result<(), RunError> {
        let format = self.model.backend().token_format();
        for medium in self.examples.iter().flat_map(|example| &example.media) {
            medium.tokens(format)?;
        }
        if let Some(entry) = &self.features {
            entry.read(&self.dir.join(FEATURES), self.examples.len())?;
        }
        Ok(self.prefix.verify()?)
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Whether it has no example.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// The examples with these places, counted from 0, in this order.
    ///
    /// # Errors
    /// If there is no such example.
    pub fn shots(&self, places: &[usize]) -> Result<Shots, RunError> {
        let mut shots = Shots {
            prefix: Some(Arc::clone(&self.prefix)),
            identity: Some(file::Identity::of(&self.model)),
            ..Shots::default()
        };
        for place in places {
            let example = self.examples.get(*place).ok_or_else(|| self.too_few(place + 1))?;
            shots.numbers.push(place + 1);
            shots.segments.extend(example.segments.iter().cloned());
            shots.media.extend(example.media.iter().cloned());
        }
        Ok(shots)
    }

    fn too_few(&self, n: usize) -> BankError {
        let reason = format!("expected at least {n} examples, found {}", self.len());
        BankError::Choice { reason, hint: "ask for fewer `--shots`" }
    }
}

impl Shots {
    /// The same examples without their pictures: what the model is shown for zero-shot answers in the form asked for.
    #[must_use]
    pub fn text_only(mut self) -> Shots {
        self.segments.retain(|segment| match segment {
            Segment::Image { .. } | Segment::Video { .. } => false,
            Segment::Text { .. } | Segment::EndOfChunk { .. } => true,
        });
        self.media.clear();
        self
    }
}

fn broken(path: &Path, reason: impl ToString) -> BankError {
    BankError::Broken { path: path.to_owned(), reason: reason.to_string() }
}

fn failed(path: &Path, reason: impl ToString) -> BankError {
    BankError::File { path: path.to_owned(), reason: reason.to_string() }
}
