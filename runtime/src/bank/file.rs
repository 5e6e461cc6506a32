//! `bank.json`: what a bank is of, its examples, and the hashes of its files.

use std::fs;
use std::path::Path;

use flamingo_models::manifest::FileEntry;
use serde::{Deserialize, Serialize};

use super::{BankError, Example, KeptMedium, broken, failed};
use crate::model::Model;
use crate::prompt::Segment;
use crate::visual_cache::{Fingerprint, MediaKey};

/// Schema of banks that this version writes and reads.
const SCHEMA_VERSION: u32 = 2;

const NAME: &str = "bank.json";

/// Largest `bank.json` that is read, in bytes.
const MAX_BYTES: u64 = 256 << 20;

/// The file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BankFile {
    pub(super) schema_version: u32,
    pub(super) identity: Identity,
    pub(super) examples: Vec<ExampleEntry>,
    pub(super) features: Option<FeaturesEntry>,
    pub(super) prefix: PrefixEntry,
    /// BLAKE3 of the file with nothing here.
    pub(super) blake3: String,
}

/// What decides the bits of a bank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    /// Hash of the artifact's graphs, weights and tokenizer.
    artifact: String,
    /// Format of keys and values.
    kv: String,
    /// Version of the runtime, engine and instruction set.
    engine: String,
}

/// One example.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExampleEntry {
    pub(super) segments: Vec<Segment>,
    pub(super) media: Vec<MediumEntry>,
}

/// A medium of an example.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MediumEntry {
    pub(super) key: String,
    pub(super) n_frames: usize,
}

/// The features' file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FeaturesEntry {
    pub(super) width: usize,
    pub(super) blake3: String,
}

/// The file of keys and values.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PrefixEntry {
    /// Examples at the beginning of the bank that it holds whole.
    pub(super) n_examples: usize,
    /// Bytes of a block.
    pub(super) block_bytes: usize,
    /// Keys of the steps.
    pub(super) steps: Vec<String>,
    /// BLAKE3 of the blocks.
    pub(super) blocks: Vec<String>,
}

impl Identity {
    /// What a bank of this model has.
    pub(super) fn of(model: &Model) -> Identity {
        let is_of_model = |entry: &&FileEntry| {
            [".onnx", ".safetensors", "tokenizer.json"].iter().any(|end| entry.path.ends_with(end))
        };
        let files = model.manifest().files.iter().filter(is_of_model);
        let facts: Vec<&str> =
            files.flat_map(|entry| [entry.path.as_str(), entry.blake3.as_str()]).collect();
        Identity {
            artifact: Fingerprint::of(&facts).to_hex(),
            kv: model.kv_format().name().to_owned(),
            engine: format!("{} {}", env!("CARGO_PKG_VERSION"), model.backend().arithmetic()),
        }
    }

    /// Checks that a bank with this identity is one of a model with the identity `expected`.
    pub(super) fn check(&self, path: &Path, expected: &Identity) -> Result<(), BankError> {
        let again =
            "make the bank again with `flamingoc bank build`, for this artifact and machine";
        let kv = "pass the `--kv` that the bank was made with, or make the bank again";
        let facts = [
            ("artifact", &expected.artifact, &self.artifact, again),
            ("keys and values", &expected.kv, &self.kv, kv),
            ("engine", &expected.engine, &self.engine, again),
        ];
        match facts.into_iter().find(|(_, expected, found, _)| expected != found) {
            None => Ok(()),
            Some((what, expected, found, hint)) => Err(BankError::Other {
                path: path.to_owned(),
                what,
                expected: expected.clone(),
                found: found.clone(),
                hint,
            }),
        }
    }
}

impl BankFile {
    /// A file of this version; [`BankFile::write`] adds the hash.
    pub(super) fn new(
        identity: Identity,
        examples: Vec<ExampleEntry>,
        features: Option<FeaturesEntry>,
        prefix: PrefixEntry,
    ) -> BankFile {
        let (schema_version, blake3) = (SCHEMA_VERSION, String::new());
        BankFile { schema_version, identity, examples, features, prefix, blake3 }
    }

    /// Reads the file of a bank.
    pub(super) fn read(dir: &Path) -> Result<BankFile, BankError> {
        let path = dir.join(NAME);
        let n_bytes = fs::metadata(&path).map_err(|error| failed(&path, error))?.len();
        if n_bytes > MAX_BYTES {
            let reason = format!("expected at most {MAX_BYTES} bytes, found {n_bytes}");
            return Err(broken(&path, reason));
        }
        let bytes = fs::read(&path).map_err(|error| failed(&path, error))?;
        let value: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|error| broken(&path, error))?;
        let found = value.get("schema_version").and_then(serde_json::Value::as_u64);
        if found.is_some_and(|found| found != u64::from(SCHEMA_VERSION)) {
            return Err(BankError::Other {
                path,
                what: "schema version",
                expected: SCHEMA_VERSION.to_string(),
                found: found.unwrap_or_default().to_string(),
                hint: "make the bank again with this version of `flamingoc bank build`",
            });
        }
        let mut file: BankFile =
            serde_json::from_value(value).map_err(|error| broken(&path, error))?;
        let blake3 = std::mem::take(&mut file.blake3);
        match file.hash().as_ref() == Ok(&blake3) {
            true => Ok(file),
            false => Err(broken(&path, "its content differs from its hash")),
        }
    }

    /// Writes the file into a bank's folder.
    pub(super) fn write(mut self, dir: &Path) -> Result<(), BankError> {
        let path = dir.join(NAME);
        self.blake3 = self.hash().map_err(|reason| failed(&path, reason))?;
        let text = serde_json::to_vec_pretty(&self).map_err(|error| failed(&path, error))?;
        fs::write(&path, text).map_err(|error| failed(&path, error))
    }

    fn hash(&self) -> Result<String, String> {
        let bytes = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        Ok(hash_of(&bytes))
    }
}

impl ExampleEntry {
    /// The entry of an example.
    pub(super) fn of(example: &Example) -> ExampleEntry {
        let medium =
            |kept: &KeptMedium| MediumEntry { key: kept.key.to_string(), n_frames: kept.n_frames };
        ExampleEntry {
            segments: example.segments.clone(),
            media: example.media.iter().map(medium).collect(),
        }
    }

    /// The example in a bank's folder.
    pub(super) fn open(self, dir: &Path) -> Result<Example, BankError> {
        let wrong = || broken(&dir.join(NAME), "a medium's key is not one");
        let medium = |entry: &MediumEntry| {
            let key = MediaKey::from_hex(&entry.key).ok_or_else(wrong)?;
            let kept = KeptMedium::new(dir, key, entry.n_frames);
            kept.check()?;
            Ok(kept)
        };
        let media = self.media.iter().map(medium).collect::<Result<_, BankError>>()?;
        Ok(Example { segments: self.segments, media })
    }
}

impl FeaturesEntry {
    /// The rows of the file, `[n_examples, width]`.
    pub(super) fn read(&self, path: &Path, n_examples: usize) -> Result<Vec<f32>, BankError> {
        let expected = n_examples.checked_mul(self.width).and_then(|n| n.checked_mul(4));
        let found = fs::metadata(path).map_err(|error| broken(path, error))?.len();
        if expected.and_then(|bytes| u64::try_from(bytes).ok()) != Some(found) {
            let expected = expected.unwrap_or(usize::MAX);
            return Err(broken(path, format!("expected {expected} bytes, found {found}")));
        }
        let bytes = fs::read(path).map_err(|error| broken(path, error))?;
        if expected != Some(bytes.len()) || hash_of(&bytes) != self.blake3 {
            return Err(broken(path, "its content differs from its hash"));
        }
        Ok(bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect())
    }
}

/// BLAKE3 in hexadecimal digits.
pub(super) fn hash_of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}
