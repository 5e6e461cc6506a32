//! Prompts that begin alike share keys and values: of every 16 tokens, by a hash of all that they depend on.
//!
//! A step is one panel of keys. The key of a step is a hash of the key of the step before, and of each of its tokens:
//! id, and the content of the medium that it sees. Keys and values of a token depend on nothing else, so equal keys mean
//! equal numbers. Entries hold blocks that sequences share and copy before they write, never numbers of their own.

use std::collections::BTreeMap;

use flamingo_kernels::{KV_BLOCK, KV_SLOTS};

use crate::backend::{Sequence, TokenBlock};
use crate::visual_cache::MediaKey;

/// Tokens of a step.
pub(crate) const STEP: usize = KV_SLOTS;

pub(crate) const STEPS_OF_BLOCK: usize = KV_BLOCK / STEP;

/// Hash of all that the keys and values of a step depend on.
pub(crate) type StepKey = [u8; 32];

/// Keys of the whole steps of a sequence; they end where a token sees a medium whose content is not known.
pub(crate) fn step_keys(
    ids: &[u32],
    media_time: &[u32],
    media_keys: &[Option<MediaKey>],
) -> Vec<StepKey> {
    let mut previous = StepKey::default();
    let key = |(ids, times): (&[u32], &[u32])| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&previous);
        for (id, time) in ids.iter().zip(times) {
            hasher.update(&id.to_le_bytes());
            let medium = usize::try_from(*time).ok()?.checked_sub(1);
            match medium {
                Some(medium) => hasher.update(&[1]).update((*media_keys.get(medium)?)?.as_bytes()),
                None => hasher.update(&[0]),
            };
        }
        previous = hasher.finalize().into();
        Some(previous)
    };
    ids.chunks_exact(STEP).zip(media_time.chunks_exact(STEP)).map_while(key).collect()
}

/// Blocks of prompts that were read, within a budget; those not used for longest go first.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    max_bytes: usize,
    entries: BTreeMap<StepKey, Entry>,
    now: u64,
}

#[derive(Debug)]
struct Entry {
    /// Holds the step, and the steps before it in the same block.
    block: TokenBlock,
    used: u64,
}

impl PrefixCache {
    /// An empty cache that holds up to `max_bytes` of keys and values.
    pub(crate) fn new(max_bytes: usize) -> PrefixCache {
        PrefixCache { max_bytes, entries: BTreeMap::new(), now: 0 }
    }

    /// Blocks of the longest known beginning of a prompt with these keys, and its tokens.
    pub(crate) fn find(&mut self, keys: &[StepKey]) -> (Vec<TokenBlock>, usize) {
        let n_known = keys.iter().take_while(|key| self.entries.contains_key(*key)).count();
        let known = &keys[..n_known];
        let last_of_block = known.chunks(STEPS_OF_BLOCK).filter_map(|steps| steps.last());
        let blocks = last_of_block.filter_map(|key| self.entries.get(key));
        let blocks = blocks.map(|entry| TokenBlock::clone(&entry.block)).collect();
        self.touch(known);
        (blocks, n_known * STEP)
    }

    /// Keeps what `sequence`, whose steps have these keys, holds of them.
    pub(crate) fn keep(&mut self, keys: &[StepKey], sequence: &dyn Sequence) {
        if self.max_bytes == 0 {
            return;
        }
        for (block_idx, steps) in keys.chunks(STEPS_OF_BLOCK).enumerate() {
            let is_kept = |key| self.entries.contains_key(key);
            if steps.iter().all(is_kept) {
                continue;
            }
            let Some(block) = sequence.share(block_idx) else { return };
            for key in steps {
                // Also where one is kept already: the newer block holds its steps too, and one block is less memory.
                let block = TokenBlock::clone(&block);
                self.entries.insert(*key, Entry { block, used: 0 });
            }
        }
        self.touch(keys);
        self.evict();
    }

    /// Whether it keeps anything.
    pub(crate) fn is_on(&self) -> bool {
        self.max_bytes > 0
    }

    /// Whether a prompt that begins with these steps would find them.
    pub(crate) fn has(&self, keys: &[StepKey]) -> bool {
        keys.iter().all(|key| self.entries.contains_key(key))
    }

    /// Keeps blocks that no sequence here has read, of a prompt whose steps have these keys. The budget grows to hold them
    /// all.
    pub(crate) fn insert(&mut self, keys: &[StepKey], blocks: &[(usize, TokenBlock)]) {
        for (block_idx, block) in blocks {
            for key in keys.iter().skip(block_idx * STEPS_OF_BLOCK).take(STEPS_OF_BLOCK) {
                let block = TokenBlock::clone(block);
                self.entries.insert(*key, Entry { block, used: 0 });
            }
        }
        self.touch(keys);
        let known: BTreeMap<usize, usize> = keys
            .iter()
            .filter_map(|key| self.entries.get(key))
            .flat_map(|entry| entry.block.iter().map(|layer| (layer.id(), layer.bytes())))
            .collect();
        self.max_bytes = self.max_bytes.max(known.values().sum());
        self.evict();
    }

    /// Bytes of the blocks that entries hold, each block once.
    pub(crate) fn bytes(&self) -> usize {
        self.blocks().values().map(|(_, bytes)| bytes).sum()
    }

    /// Entries and bytes of each distinct block of a layer.
    fn blocks(&self) -> BTreeMap<usize, (usize, usize)> {
        let mut blocks = BTreeMap::new();
        for block in self.entries.values().flat_map(|entry| entry.block.iter()) {
            blocks.entry(block.id()).or_insert((0, block.bytes())).0 += 1;
        }
        blocks
    }

    /// Marks entries as used now: the first of a prompt last, because the others are found through it.
    fn touch(&mut self, keys: &[StepKey]) {
        for key in keys.iter().rev() {
            self.now += 1;
            if let Some(entry) = self.entries.get_mut(key) {
                entry.used = self.now;
            }
        }
    }

    fn evict(&mut self) {
        let mut blocks = self.blocks();
        let mut bytes: usize = blocks.values().map(|(_, bytes)| bytes).sum();
        let mut order: Vec<(u64, StepKey)> =
            self.entries.iter().map(|(key, entry)| (entry.used, *key)).collect();
        order.sort_unstable();
        for (_, key) in order {
            if bytes <= self.max_bytes {
                return;
            }
            let Some(entry) = self.entries.remove(&key) else { continue };
            for block in entry.block.iter() {
                let Some((n_entries, block_bytes)) = blocks.get_mut(&block.id()) else { continue };
                *n_entries -= 1;
                if *n_entries == 0 {
                    bytes -= *block_bytes;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::visual_cache::Fingerprint;

    #[test]
    fn blocks_that_are_put_in_are_found_and_the_budget_grows_to_hold_them() {
        let block = |n: f32| {
            let mut cache = flamingo_kernels::KvCache::new(1, 1, KV_BLOCK);
            cache.write_heads(1, &[n], &[n]);
            TokenBlock::new(vec![cache.share(0).unwrap()])
        };
        let key = |n: u8| [n; 32];
        let mut cache = PrefixCache::new(1);
        assert!(cache.is_on() && !PrefixCache::new(0).is_on());
        let keys: Vec<StepKey> = (0..6).map(key).collect();
        cache.insert(&keys, &[(0, block(0.0)), (1, block(1.0))]);
        assert!(cache.has(&keys) && cache.has(&[]) && !cache.has(&[key(6)]));
        let (blocks, len) = cache.find(&keys);
        assert_eq!((blocks.len(), len), (2, 6 * STEP));
        cache.insert(&[key(9)], &[(0, block(9.0))]);
        assert!(cache.has(&[key(9)]) && cache.find(&keys).1 < 6 * STEP, "the oldest leave");
    }

    #[test]
    fn keys_tell_text_media_and_what_came_before_apart() {
        let ids: Vec<u32> = (0..40).collect();
        let (none, sees) = (vec![0; 40], vec![1; 40]);
        let keys =
            |ids: &[u32], times: &[u32], media: &[Option<MediaKey>]| step_keys(ids, times, media);
        let plain = keys(&ids, &none, &[]);
        assert_eq!(plain.len(), 2, "whole steps only");
        let mut other = ids.clone();
        other[3] = 99;
        let changed = keys(&other, &none, &[]);
        assert!(plain[0] != changed[0] && plain[1] != changed[1], "later steps change too");
        let medium = |pixel| MediaKey::new(&Fingerprint::of(&["a model"]), &[pixel], 1);
        let [a, b] = [1.0, 2.0].map(|pixel| keys(&ids, &sees, &[Some(medium(pixel))]));
        assert!(a[0] != b[0] && a[0] != plain[0]);
        assert_eq!(a, keys(&ids, &[2; 40], &[None, Some(medium(1.0))]), "content, not number");
        let mixed: Vec<u32> = (0..40).map(|i| u32::from(i >= 20)).collect();
        assert_eq!(keys(&ids, &mixed, &[None]), plain[..1], "unknown content ends the keys");
    }
}
