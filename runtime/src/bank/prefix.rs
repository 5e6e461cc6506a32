//! Keys and values of a text that begins with all examples of a bank in order.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::file::{PrefixEntry, hash_of};
use super::{BankError, broken};
use crate::backend::{Sequence, TokenBlock};
use crate::prefix_cache::{PrefixCache, STEPS_OF_BLOCK, StepKey};

/// The file, and what its blocks are of.
#[derive(Debug)]
pub(crate) struct BankPrefix {
    path: PathBuf,
    steps: Vec<StepKey>,
    block_bytes: usize,
    /// BLAKE3 of each block.
    blocks: Vec<String>,
}

impl BankPrefix {
    /// Opens the file; its blocks are checked when they are read.
    pub(super) fn open(path: &Path, entry: &PrefixEntry) -> Result<BankPrefix, BankError> {
        let step = |hex: &String| blake3::Hash::from_hex(hex).ok().map(|hash| *hash.as_bytes());
        let steps: Option<Vec<StepKey>> = entry.steps.iter().map(step).collect();
        let steps = steps.ok_or_else(|| broken(path, "a step's key is not one"))?;
        if steps.len().div_ceil(STEPS_OF_BLOCK) != entry.blocks.len() {
            return Err(broken(path, "steps and blocks differ in number"));
        }
        let expected = entry.blocks.len().checked_mul(entry.block_bytes);
        let found = std::fs::metadata(path).map_err(|error| broken(path, error))?.len();
        if expected.and_then(|bytes| u64::try_from(bytes).ok()) != Some(found) {
            let expected = expected.unwrap_or(usize::MAX);
            return Err(broken(path, format!("expected {expected} bytes, found {found}")));
        }
        let blocks = entry.blocks.clone();
        Ok(BankPrefix { path: path.to_owned(), steps, block_bytes: entry.block_bytes, blocks })
    }

    /// Puts into the cache what a prompt with these steps begins with, for a sequence like this one.
    pub(crate) fn load(
        &self,
        keys: &[StepKey],
        cache: &mut PrefixCache,
        sequence: &dyn Sequence,
    ) -> Result<(), BankError> {
        let n_alike = keys.iter().zip(&self.steps).take_while(|(a, b)| a == b).count();
        let keys = &keys[..n_alike];
        if !cache.is_on() || cache.has(keys) {
            return Ok(());
        }
        let mut file = File::open(&self.path).map_err(|error| broken(&self.path, error))?;
        let mut blocks = Vec::new();
        for (block_idx, steps) in keys.chunks(STEPS_OF_BLOCK).enumerate() {
            if cache.has(steps) {
                continue;
            }
            let bytes = self.block(&mut file, block_idx)?;
            let block: Option<TokenBlock> = sequence.block_from_bytes(&bytes);
            let wrong = || broken(&self.path, "a block does not fit the model");
            blocks.push((block_idx, block.ok_or_else(wrong)?));
        }
        cache.insert(keys, &blocks);
        Ok(())
    }

    /// Checks every block.
    pub(super) fn verify(&self) -> Result<(), BankError> {
        let mut file = File::open(&self.path).map_err(|error| broken(&self.path, error))?;
        (0..self.blocks.len()).try_for_each(|block_idx| self.block(&mut file, block_idx).map(drop))
    }

    fn block(&self, file: &mut File, block_idx: usize) -> Result<Vec<u8>, BankError> {
        let wrong = |reason: String| broken(&self.path, reason);
        let start = block_idx.saturating_mul(self.block_bytes);
        let start = SeekFrom::Start(u64::try_from(start).unwrap_or(u64::MAX));
        let mut bytes = vec![0; self.block_bytes];
        let read = file.seek(start).and_then(|_| file.read_exact(&mut bytes));
        read.map_err(|error| wrong(error.to_string()))?;
        match self.blocks.get(block_idx) == Some(&hash_of(&bytes)) {
            true => Ok(bytes),
            false => Err(wrong(format!("block {block_idx}: its content differs from its hash"))),
        }
    }
}
