//! An engine whose visual tokens are a function of the first pixel, and a folder to keep them in.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use flamingo_runtime::backend::{Backend, BackendError, Media, MediaKv, Sequence, TokenFormat};
use flamingo_runtime::visual_cache::{Fingerprint, Found, VisualCache, VisualCacheOptions};

/// Visual tokens of a medium: enough that writing them takes a while.
pub(crate) const N_TOKENS: usize = 20_000;

/// Bytes of an entry: header, f16 numbers, hash.
pub(crate) const ENTRY_BYTES: u64 = 56 + 2 * N_TOKENS as u64 + 32;

/// Counts what it encodes.
pub(crate) struct Toy {
    pub(crate) n_encoded: AtomicUsize,
    pub(crate) pause: Duration,
    pub(crate) format: Option<TokenFormat>,
}

impl Toy {
    pub(crate) fn new() -> Toy {
        Toy {
            n_encoded: AtomicUsize::new(0),
            pause: Duration::ZERO,
            format: Some(TokenFormat::F16),
        }
    }
}

impl Backend for Toy {
    fn name(&self) -> &'static str {
        "toy"
    }

    fn encode(&self, pixels: &[f32], _: usize, _: usize) -> Result<Vec<Media>, BackendError> {
        self.n_encoded.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(self.pause);
        let tokens = (0..N_TOKENS).map(|i| pixels[0] + (i % 100) as f32).collect();
        Ok(vec![self.media_from_tokens(tokens, 1)?])
    }

    fn token_format(&self) -> Option<TokenFormat> {
        self.format
    }

    fn media_from_tokens(&self, tokens: Vec<f32>, _: usize) -> Result<Media, BackendError> {
        let k: Vec<f32> = tokens[..4].to_vec();
        let v = k.iter().map(|k| -k).collect();
        let blocks = vec![MediaKv::Rows { k, v }];
        Ok(Media { visual_tokens: tokens, blocks, n_latents: 1, later: Vec::new() })
    }

    fn new_sequence(&self, _: usize) -> Result<Box<dyn Sequence>, BackendError> {
        unreachable!("no test of the cache has text")
    }
}

/// A cache in `dir` without memory.
pub(crate) fn disk_cache(dir: &Path, disk_bytes: u64) -> VisualCache {
    let dir = Some(dir.to_owned());
    VisualCache::new(&VisualCacheOptions { memory_bytes: 0, dir, disk_bytes })
}

/// Asks for picture `n`, checks what comes, and tells where it was found.
#[track_caller]
pub(crate) fn ask(cache: &VisualCache, toy: &Toy, n: usize) -> (Arc<Media>, Found) {
    ask_of(cache, toy, "a model", n)
}

#[track_caller]
pub(crate) fn ask_of(cache: &VisualCache, toy: &Toy, model: &str, n: usize) -> (Arc<Media>, Found) {
    let pixels = [n as f32; 3];
    let (media, found) = cache.medium(toy, &Fingerprint::of(&[model]), &pixels, 1).unwrap();
    let fresh = Toy::new().encode(&pixels, 1, 1).unwrap().remove(0);
    assert_eq!(*media, fresh, "picture {n} from {found:?}");
    (media, found)
}

/// Files of the folder by the end of their names, with their bytes.
pub(crate) fn files(dir: &Path, ending: &str) -> Vec<(PathBuf, u64)> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let ours = entries.filter(|path| path.to_str().unwrap().ends_with(ending));
    // Another program may remove a file while it is listed.
    ours.filter_map(|path| fs::metadata(&path).ok().map(|m| (path, m.len()))).collect()
}

pub(crate) fn bytes_in(dir: &Path) -> u64 {
    files(dir, "").iter().map(|(_, bytes)| bytes).sum()
}
