//! Makes a bank: examples → visual tokens, features, keys and values of their text → a folder that appears whole.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::file::{BankFile, ExampleEntry, FeaturesEntry, Identity, PrefixEntry, hash_of};
use super::{Bank, BankError, Example, FEATURES, KeptMedium, MEDIA, PREFIX, examples, failed};
use crate::answer::Limits;
use crate::backend::block_bytes;
use crate::bank::examples::Line;
use crate::model::{Model, RunError};
use crate::prefix_cache::{STEP, STEPS_OF_BLOCK};
use crate::prompt::PromptFile;
use crate::session::Given;
use crate::visual_cache::{MediaKey, entry};

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BankReport {
    /// Examples in the bank.
    pub n_examples: usize,
    /// Line and reason of each that was left out.
    pub skipped: Vec<String>,
    /// Different pictures and videos.
    pub n_media: usize,
    /// Examples, from the first on, whose keys and values are kept: as many as the model's limits let stand in a prompt.
    pub n_prefix_examples: usize,
    /// Tokens whose keys and values are kept.
    pub n_prefix_tokens: usize,
    /// Bytes of all files.
    pub bytes: u64,
}

impl Bank {
    /// Makes a bank of the examples of a file of JSON lines and writes it to the folder `output`, which must not exist.
    /// `on_progress` is given how many of how many examples are done.
    ///
    /// # Errors
    /// Examples that cannot be used, all at once, unless `skip_bad`; a folder that cannot be written.
    pub fn build(
        model: &Model,
        path: &Path,
        output: &Path,
        skip_bad: bool,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<BankReport, RunError> {
        let staging = Staging::new(output)?;
        if model.backend().token_format().is_none() {
            return Err(BankError::Engine(model.backend().name()).into());
        }
        let (lines, skipped) = examples::read(path, model)?;
        examples::check(path, &lines, &skipped, skip_bad)?;
        let mut writer =
            Writer { model, dir: &staging.dir, media: BTreeSet::new(), features: None };
        let mut written = Vec::with_capacity(lines.len());
        for (index, line) in lines.iter().enumerate() {
            on_progress(index, lines.len());
            written.push(writer.example(line)?);
        }
        let n_media = writer.media.len();
        let features = writer.finish_features()?;
        let prefix = write_prefix(model, &written, &staging.dir)?;
        on_progress(lines.len(), lines.len());
        let report = BankReport {
            n_examples: written.len(),
            skipped,
            n_media,
            n_prefix_examples: prefix.n_examples,
            n_prefix_tokens: prefix.steps.len() * STEP,
            bytes: 0,
        };
        let entries = written.iter().map(ExampleEntry::of).collect();
        BankFile::new(Identity::of(model), entries, features, prefix).write(&staging.dir)?;
        let bytes = staging.finish()?;
        Ok(BankReport { bytes, ..report })
    }
}

/// Writes examples one by one.
struct Writer<'a> {
    model: &'a Model,
    dir: &'a Path,
    /// Media that are written.
    media: BTreeSet<MediaKey>,
    /// Rows so far and their width; `None` before the first picture.
    features: Option<Features>,
}

struct Features {
    width: usize,
    /// Row of each example that has a picture.
    rows: Vec<Option<Vec<f32>>>,
}

impl Writer<'_> {
    fn example(&mut self, line: &Line) -> Result<Example, RunError> {
        let (backend, mut media, mut row) = (self.model.backend(), Vec::new(), None);
        for segment in line.resolved.media() {
            let pixels = self.model.pixels(segment)?;
            let (medium, _) = self.model.medium(&pixels)?;
            let Some((key, format)) = medium.key.zip(backend.token_format()) else {
                return Err(BankError::Engine(backend.name()).into());
            };
            let kept = KeptMedium::new(self.dir, key, pixels.n_frames);
            if self.media.insert(key) {
                write(&kept.file, &entry::encode(&key, format, &medium.media.visual_tokens))?;
            }
            if media.is_empty() {
                row = backend.vision_features(&pixels.values, pixels.n_frames)?;
            }
            media.push(kept);
        }
        let width = row.as_ref().map_or(0, Vec::len);
        let features = self.features.get_or_insert_with(|| Features { width, rows: Vec::new() });
        features.width = features.width.max(width);
        features.rows.push(row);
        Ok(Example { segments: line.written.segments.clone(), media })
    }

    fn finish_features(self) -> Result<Option<FeaturesEntry>, BankError> {
        let Some(Features { width, rows }) = self.features else { return Ok(None) };
        let zeros = vec![0.0; width];
        let values = rows.iter().flat_map(|row| row.as_ref().unwrap_or(&zeros));
        let bytes: Vec<u8> = values.flat_map(|value| value.to_le_bytes()).collect();
        write(&self.dir.join(FEATURES), &bytes)?;
        Ok(Some(FeaturesEntry { width, blake3: hash_of(&bytes) }))
    }
}

/// Reads as many examples as fit a prompt, and writes their keys and values.
fn write_prefix(model: &Model, examples: &[Example], dir: &Path) -> Result<PrefixEntry, RunError> {
    let (n_examples, ids) = longest(model, examples)?;
    let mut session = model.session()?;
    if !ids.is_empty() {
        let media = examples[..n_examples].iter().flat_map(|example| example.media.iter().cloned());
        session.append_given(&ids, media.map(Given::Kept).collect(), None, &Limits::default())?;
    }
    let steps = session.step_keys();
    let (mut bytes, mut blocks, mut n_block_bytes) = (Vec::new(), Vec::new(), 0);
    for block_idx in 0..steps.len().div_ceil(STEPS_OF_BLOCK) {
        let wrong = || BankError::Engine(model.backend().name());
        let block = block_bytes(&session.share(block_idx).ok_or_else(wrong)?);
        n_block_bytes = block.len();
        blocks.push(hash_of(&block));
        bytes.extend(block);
    }
    write(&dir.join(PREFIX), &bytes)?;
    let steps = steps.iter().map(|key| blake3::Hash::from(*key).to_hex().to_string()).collect();
    Ok(PrefixEntry { n_examples, block_bytes: n_block_bytes, steps, blocks })
}

/// The most examples that stand in a prompt within the model's limits, and their tokens.
fn longest(model: &Model, examples: &[Example]) -> Result<(usize, Vec<u32>), RunError> {
    let limits = &model.manifest().limits;
    let encode = |n: usize| {
        let segments = examples[..n].iter().flat_map(|example| example.segments.iter().cloned());
        let prompt = PromptFile { segments: segments.collect(), ..PromptFile::default() };
        let fits = prompt.media().count() <= limits.max_images;
        let ids = fits.then(|| model.encode_prompt(&prompt)).transpose();
        // The only limit left is that of tokens.
        ids.ok().flatten()
    };
    let (mut fitting, mut too_many) = ((0, Vec::new()), examples.len() + 1);
    while fitting.0 + 1 < too_many {
        let middle = fitting.0 + (too_many - fitting.0) / 2;
        match encode(middle) {
            Some(ids) => fitting = (middle, ids),
            None => too_many = middle,
        }
    }
    Ok(fitting)
}

/// A folder beside the output that becomes it; removed if it does not.
struct Staging {
    dir: PathBuf,
    output: PathBuf,
}

impl Staging {
    fn new(output: &Path) -> Result<Staging, BankError> {
        let name =
            output.file_name().ok_or_else(|| failed(output, "expected a name of a folder"))?;
        if output.symlink_metadata().is_ok() {
            let reason = "it exists already\n\nhint: remove it, or name another folder with `-o`";
            return Err(failed(output, reason));
        }
        let name = format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id());
        let dir = output.with_file_name(name);
        fs::create_dir_all(dir.join(MEDIA)).map_err(|error| failed(&dir, error))?;
        Ok(Staging { dir, output: output.to_owned() })
    }

    /// Gives the folder its name; bytes of its files.
    fn finish(self) -> Result<u64, BankError> {
        fs::rename(&self.dir, &self.output).map_err(|error| failed(&self.output, error))?;
        Ok(folder_bytes(&self.output) + folder_bytes(&self.output.join(MEDIA)))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After the rename there is no such folder.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn folder_bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| entry.metadata().ok()).filter(fs::Metadata::is_file);
    files.map(|metadata| metadata.len()).sum()
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), BankError> {
    fs::write(path, bytes).map_err(|error| failed(path, error))
}
