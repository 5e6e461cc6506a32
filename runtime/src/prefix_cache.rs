//! Prompts that begin alike share keys and values: of every 4 tokens, by a hash of all that they depend on.
//!
//! The key of a step is a hash of the key of the step before, and of each of its tokens:
//! id, and the content of the medium that it sees. Keys and values of a token depend on nothing else, so equal keys mean
//! equal numbers. Entries hold blocks that sequences share and copy before they write, never numbers of their own.

use std::collections::BTreeMap;

use flamingo_kernels::KV_BLOCK;

use crate::backend::{Sequence, TokenBlock};
use crate::visual_cache::MediaKey;

/// Tokens of a step: what lies between the last whole one and where prompts part is read again, and each costs a hash.
pub(crate) const STEP: usize = 4;

/// Steps of a block, a whole number.
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
    /// Keys of all entries by their last use.
    uses: BTreeMap<u64, StepKey>,
    /// Entries and bytes of each distinct block of a layer, by its id.
    blocks: BTreeMap<usize, (usize, usize)>,
    /// Bytes of the blocks, each once.
    bytes: usize,
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
        PrefixCache {
            max_bytes,
            entries: BTreeMap::new(),
            uses: BTreeMap::new(),
            blocks: BTreeMap::new(),
            bytes: 0,
            now: 0,
        }
    }

    /// Blocks of the longest known beginning of a prompt with these keys, and its tokens; [`PrefixCache::keep`] of the same
    /// keys marks them as used.
    pub(crate) fn find(&self, keys: &[StepKey]) -> (Vec<TokenBlock>, usize) {
        let n_known = keys.iter().take_while(|key| self.entries.contains_key(*key)).count();
        let known = &keys[..n_known];
        let last_of_block = known.chunks(STEPS_OF_BLOCK).filter_map(|steps| steps.last());
        let blocks = last_of_block.filter_map(|key| self.entries.get(key));
        (blocks.map(|entry| TokenBlock::clone(&entry.block)).collect(), n_known * STEP)
    }

    /// Keeps what `sequence`, whose steps have these keys, holds of them.
    pub(crate) fn keep(&mut self, keys: &[StepKey], sequence: &dyn Sequence) {
        if self.max_bytes == 0 {
            return;
        }
        for (block_idx, steps) in keys.chunks(STEPS_OF_BLOCK).enumerate() {
            if self.has(steps) {
                continue;
            }
            let Some(block) = sequence.share(block_idx) else { break };
            // Also where one is kept already: the newer block holds its steps too, and one block is less memory.
            steps.iter().for_each(|key| self.put(*key, &block));
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
                self.put(*key, block);
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
        self.bytes
    }

    /// Marks entries as used now: the first of a prompt last, because the others are found through it.
    fn touch(&mut self, keys: &[StepKey]) {
        for key in keys.iter().rev() {
            let Some(entry) = self.entries.get_mut(key) else { continue };
            self.now += 1;
            self.uses.remove(&entry.used);
            self.uses.insert(self.now, *key);
            entry.used = self.now;
        }
    }

    fn put(&mut self, key: StepKey, block: &TokenBlock) {
        // Before the old block goes, so that layers of both are not counted anew.
        for layer in block.iter() {
            let (n_entries, bytes) = self.blocks.entry(layer.id()).or_insert((0, layer.bytes()));
            *n_entries += 1;
            if *n_entries == 1 {
                self.bytes += *bytes;
            }
        }
        self.take(&key);
        self.now += 1;
        self.uses.insert(self.now, key);
        self.entries.insert(key, Entry { block: TokenBlock::clone(block), used: self.now });
    }

    fn take(&mut self, key: &StepKey) {
        let Some(entry) = self.entries.remove(key) else { return };
        self.uses.remove(&entry.used);
        for layer in entry.block.iter() {
            let Some((n_entries, bytes)) = self.blocks.get_mut(&layer.id()) else { continue };
            *n_entries -= 1;
            if *n_entries == 0 {
                self.bytes -= *bytes;
                self.blocks.remove(&layer.id());
            }
        }
    }

    fn evict(&mut self) {
        while self.bytes > self.max_bytes {
            let Some((_, oldest)) = self.uses.first_key_value() else { return };
            let oldest = *oldest;
            self.take(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::visual_cache::Fingerprint;

    fn block(n: f32) -> TokenBlock {
        let mut cache = flamingo_kernels::KvCache::new(1, 1, KV_BLOCK);
        cache.write_heads(1, &[n], &[n]);
        TokenBlock::new(vec![cache.share(0).unwrap()])
    }

    fn key(n: u8) -> StepKey {
        [n; 32]
    }

    proptest! {
        #[test]
        fn bytes_are_those_of_the_blocks_that_entries_hold(
            prompts in proptest::collection::vec((0u8..20, 1usize..40, any::<bool>()), 1..30),
        ) {
            let n_bytes = block(0.0)[0].bytes();
            let mut cache = PrefixCache::new(5 * n_bytes);
            for (first, n_steps, is_known) in prompts {
                let keys: Vec<StepKey> = (first..).map(key).take(n_steps).collect();
                if is_known {
                    cache.touch(&keys);
                    continue;
                }
                let n_blocks = n_steps.div_ceil(STEPS_OF_BLOCK);
                let blocks: Vec<_> = (0..n_blocks).map(|block_idx| (block_idx, block(0.0))).collect();
                cache.insert(&keys, &blocks);
                let all: BTreeMap<usize, usize> = cache
                    .entries
                    .values()
                    .flat_map(|entry| entry.block.iter().map(|layer| (layer.id(), layer.bytes())))
                    .collect();
                prop_assert_eq!(cache.bytes(), all.values().sum::<usize>());
                prop_assert!(cache.bytes() <= 5 * n_bytes);
                prop_assert!(cache.has(&keys), "the newest stay");
                let uses: Vec<StepKey> = cache.uses.values().copied().collect();
                let mut entries: Vec<(u64, StepKey)> =
                    cache.entries.iter().map(|(key, entry)| (entry.used, *key)).collect();
                entries.sort_unstable();
                prop_assert_eq!(uses, entries.into_iter().map(|(_, key)| key).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn blocks_that_are_put_in_are_found_and_the_budget_grows_to_hold_them() {
        let mut cache = PrefixCache::new(1);
        assert!(cache.is_on() && !PrefixCache::new(0).is_on());
        let n_steps = STEPS_OF_BLOCK + 2;
        let keys: Vec<StepKey> = (0..).map(key).take(n_steps).collect();
        cache.insert(&keys, &[(0, block(0.0)), (1, block(1.0))]);
        assert!(cache.has(&keys) && cache.has(&[]) && !cache.has(&[key(99)]));
        let (blocks, len) = cache.find(&keys);
        assert_eq!((blocks.len(), len), (2, n_steps * STEP));
        cache.insert(&[key(99)], &[(0, block(9.0))]);
        assert!(cache.has(&[key(99)]) && cache.find(&keys).1 < n_steps * STEP, "the oldest leave");
    }

    #[test]
    fn keys_tell_text_media_and_what_came_before_apart() {
        let len = 2 * STEP + STEP / 2;
        let ids: Vec<u32> = (0..).take(len).collect();
        let (none, sees) = (vec![0; len], vec![1; len]);
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
        assert_eq!(a, keys(&ids, &vec![2; len], &[None, Some(medium(1.0))]), "content, not number");
        let mixed: Vec<u32> = (0..len).map(|i| u32::from(i > STEP)).collect();
        assert_eq!(keys(&ids, &mixed, &[None]), plain[..1], "unknown content ends the keys");
    }
}
