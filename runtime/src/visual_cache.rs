//! The visual-token cache: what is known of a picture after it was encoded, in memory and on disk.
//!
//! A medium is found by its [`MediaKey`]: the hash of its pixels and of everything else that its
//! numbers depend on. In memory lie whole [`Media`] within a budget of bytes; on disk lie visual
//! tokens, from which the backend makes keys and values again, bit for bit. Whoever asks for a
//! medium that another thread is encoding waits for that one.
//!
//! The cache never fails: a folder that cannot be used, a full disk or a broken entry cost a
//! warning and an encoding.

mod disk;
pub(crate) mod entry;
mod key;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::backend::{Backend, BackendError, Media, TokenFormat};
use crate::lru::Lru;
use disk::{DiskCache, Lookup, Stored};

pub use key::{Fingerprint, MediaKey};

/// Bytes of media kept in memory where nothing else is said.
pub const DEFAULT_MEMORY_BYTES: usize = 512 << 20;

/// Bytes of files in a cache folder where nothing else is said.
pub const DEFAULT_DISK_BYTES: u64 = 1_000_000_000;

/// How large a cache is, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VisualCacheOptions {
    /// Most bytes of media in memory; 0 keeps none.
    pub memory_bytes: usize,
    /// Folder for visual tokens; `None` keeps none on disk. It may be shared by any number of
    /// models and programs.
    pub dir: Option<PathBuf>,
    /// Most bytes of files in the folder.
    pub disk_bytes: u64,
}

impl Default for VisualCacheOptions {
    fn default() -> VisualCacheOptions {
        VisualCacheOptions {
            memory_bytes: DEFAULT_MEMORY_BYTES,
            dir: None,
            disk_bytes: DEFAULT_DISK_BYTES,
        }
    }
}

impl VisualCacheOptions {
    /// A cache that keeps nothing.
    pub fn off() -> VisualCacheOptions {
        VisualCacheOptions { memory_bytes: 0, dir: None, disk_bytes: 0 }
    }
}

/// Where a medium came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Memory, or another thread that was encoding it.
    Memory,
    /// Disk.
    Disk,
    /// Nowhere: it was encoded.
    Encoded,
}

/// What a cache did and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Media found in memory.
    pub memory_hits: u64,
    /// Media found on disk.
    pub disk_hits: u64,
    /// Media encoded.
    pub misses: u64,
    /// Media that left memory for others.
    pub memory_evictions: u64,
    /// Files that left the folder for others, by this cache.
    pub disk_evictions: u64,
    /// Media in memory.
    pub memory_entries: usize,
    /// Bytes of them.
    pub memory_bytes: usize,
}

/// Media by key; shared by all sessions of a model, and by models. See the [module](self).
pub struct VisualCache {
    state: Mutex<State>,
    landed: Condvar,
    disk: Option<DiskCache>,
    warnings: Mutex<Warnings>,
}

#[derive(Debug)]
struct State {
    media: Lru<MediaKey, Arc<Media>>,
    /// Media that a thread is fetching.
    flights: BTreeMap<MediaKey, Arc<Flight>>,
    stats: CacheStats,
}

/// A medium that is being fetched, and then the medium; stays empty after an error.
type Flight = Mutex<Option<Arc<Media>>>;

/// What a cache tells once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Trouble {
    Folder,
    Write,
    Broken,
    Engine,
}

#[derive(Debug, Default)]
struct Warnings {
    pending: Vec<String>,
    told: BTreeSet<Trouble>,
}

impl fmt::Debug for VisualCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VisualCache").field("disk", &self.disk).finish_non_exhaustive()
    }
}

impl Default for VisualCache {
    fn default() -> VisualCache {
        VisualCache::new(&VisualCacheOptions::default())
    }
}

impl VisualCache {
    /// A cache. A folder that cannot be used is a warning.
    pub fn new(options: &VisualCacheOptions) -> VisualCache {
        let state = State {
            media: Lru::new(options.memory_bytes),
            flights: BTreeMap::new(),
            stats: CacheStats::default(),
        };
        let mut cache = VisualCache {
            state: Mutex::new(state),
            landed: Condvar::new(),
            disk: None,
            warnings: Mutex::default(),
        };
        if let Some(dir) = &options.dir {
            match DiskCache::open(dir, options.disk_bytes) {
                Ok(disk) => cache.disk = Some(disk),
                Err(error) => cache.warn(Trouble::Folder, unusable(dir, &error.to_string())),
            }
        }
        cache
    }

    /// The medium of `n_frames` frames with these pixel values, found or encoded, and where.
    ///
    /// # Errors
    /// As [`Backend::encode`].
    pub fn medium(
        &self,
        backend: &dyn Backend,
        fingerprint: &Fingerprint,
        pixel_values: &[f32],
        n_frames: usize,
    ) -> Result<(Arc<Media>, Found), BackendError> {
        self.medium_with_key(
            backend,
            MediaKey::new(fingerprint, pixel_values, n_frames),
            pixel_values,
            n_frames,
        )
    }

    /// As [`VisualCache::medium`], of pixel values whose key is known.
    pub(crate) fn medium_with_key(
        &self,
        backend: &dyn Backend,
        key: MediaKey,
        pixel_values: &[f32],
        n_frames: usize,
    ) -> Result<(Arc<Media>, Found), BackendError> {
        let leader = match self.find_or_lead(key) {
            Ok(media) => return Ok((media, Found::Memory)),
            Err(leader) => leader,
        };
        if let Some(media) = self.read(&key, backend, n_frames) {
            return Ok((leader.land(media, Found::Disk), Found::Disk));
        }
        let encoded = backend.encode(pixel_values, 1, n_frames)?;
        let media = leader.land(encoded.into_iter().next().unwrap_or_default(), Found::Encoded);
        self.write(&key, backend, &media);
        Ok((media, Found::Encoded))
    }

    /// Pictures, of one frame each, in the order of their keys: those that lie neither in memory nor on disk are encoded in
    /// one call. Another thread that encodes one of them meanwhile is not waited for.
    ///
    /// # Errors
    /// As [`Backend::encode`].
    pub(crate) fn pictures_with_keys(
        &self,
        backend: &dyn Backend,
        keys: &[MediaKey],
        pictures: &[Vec<f32>],
    ) -> Result<Vec<Arc<Media>>, BackendError> {
        let known: Vec<_> = keys.iter().map(|key| self.known_picture(key, backend)).collect();
        let is_new = |(_, known): &(&Vec<f32>, &Option<Arc<Media>>)| known.is_none();
        let new: Vec<&[f32]> =
            pictures.iter().zip(&known).filter(is_new).map(|(new, _)| new.as_slice()).collect();
        let encoded = match new.len() {
            0 => Vec::new(),
            n => backend.encode(&new.concat(), n, 1)?,
        };
        let mut encoded = encoded.into_iter();
        let picture = |(known, key): (Option<Arc<Media>>, &MediaKey)| {
            known.unwrap_or_else(|| {
                let media = Arc::new(encoded.next().unwrap_or_default());
                self.keep(*key, &media, Found::Encoded);
                self.write(key, backend, &media);
                media
            })
        };
        Ok(known.into_iter().zip(keys).map(picture).collect())
    }

    fn known_picture(&self, key: &MediaKey, backend: &dyn Backend) -> Option<Arc<Media>> {
        let (media, found) = match self.get(key) {
            Some(media) => (media, Found::Memory),
            None => (Arc::new(self.read(key, backend, 1)?), Found::Disk),
        };
        self.keep(*key, &media, found);
        Some(media)
    }

    /// Counts a medium, and keeps it in memory as far as the budget allows.
    fn keep(&self, key: MediaKey, media: &Arc<Media>, found: Found) {
        let mut state = self.lock();
        match found {
            Found::Memory => state.stats.memory_hits += 1,
            Found::Disk => state.stats.disk_hits += 1,
            Found::Encoded => state.stats.misses += 1,
        }
        state.media.insert(key, Arc::clone(media), media.bytes(), false);
    }

    /// The medium with this key, found in memory or made of the visual tokens that `tokens` gives.
    ///
    /// # Errors
    /// As [`Backend::media_from_tokens`]; whatever `tokens` fails with.
    pub(crate) fn medium_from_tokens<E: From<BackendError>>(
        &self,
        backend: &dyn Backend,
        (key, n_frames): (MediaKey, usize),
        tokens: impl FnOnce() -> Result<Vec<f32>, E>,
    ) -> Result<(Arc<Media>, Found), E> {
        let leader = match self.find_or_lead(key) {
            Ok(media) => return Ok((media, Found::Memory)),
            Err(leader) => leader,
        };
        let media = backend.media_from_tokens(tokens()?, n_frames)?;
        Ok((leader.land(media, Found::Disk), Found::Disk))
    }

    /// A medium, if it lies in memory.
    pub fn get(&self, key: &MediaKey) -> Option<Arc<Media>> {
        self.lock().media.get(key)
    }

    /// Keeps a medium in memory, whatever the budget, until [`VisualCache::unpin`] was called as
    /// often.
    pub fn pin(&self, key: MediaKey, media: &Arc<Media>) {
        let mut state = self.lock();
        state.media.insert(key, Arc::clone(media), media.bytes(), true);
    }

    /// Takes back one [`VisualCache::pin`].
    pub fn unpin(&self, key: &MediaKey) {
        self.lock().media.unpin(key);
    }

    /// What the cache did and holds.
    pub fn stats(&self) -> CacheStats {
        let state = self.lock();
        CacheStats {
            memory_evictions: state.media.n_evicted(),
            disk_evictions: self.disk.as_ref().map_or(0, DiskCache::n_evicted),
            memory_entries: state.media.len(),
            memory_bytes: state.media.bytes(),
            ..state.stats
        }
    }

    /// What a user should know, each trouble once, since the last call.
    pub fn take_warnings(&self) -> Vec<String> {
        let mut warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut warnings.pending)
    }

    fn warn(&self, trouble: Trouble, text: String) {
        let mut warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        if warnings.told.insert(trouble) {
            warnings.pending.push(text);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The medium from memory or from the thread that fetches it; or the right to fetch it.
    fn find_or_lead(&self, key: MediaKey) -> Result<Arc<Media>, Leader<'_>> {
        let mut state = self.lock();
        loop {
            if let Some(media) = state.media.get(&key) {
                state.stats.memory_hits += 1;
                return Ok(media);
            }
            let Some(flight) = state.flights.get(&key).cloned() else {
                let flight = Arc::default();
                state.flights.insert(key, Arc::clone(&flight));
                return Err(Leader { cache: self, key, flight });
            };
            let is_on = |state: &mut State| {
                state.flights.get(&key).is_some_and(|on| Arc::ptr_eq(on, &flight))
            };
            let waited = self.landed.wait_while(state, is_on);
            state = waited.unwrap_or_else(PoisonError::into_inner);
            let media = flight.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(media) = media {
                state.stats.memory_hits += 1;
                return Ok(media);
            }
        }
    }

    /// The folder, if the engine can use what lies there.
    fn disk_for(&self, backend: &dyn Backend) -> Option<(&DiskCache, TokenFormat)> {
        let disk = self.disk.as_ref()?;
        let format = backend.token_format();
        if format.is_none() {
            let name = backend.name();
            let text = format!(
                "`--cache-dir` is not used: backend `{name}` cannot go on from visual tokens"
            );
            self.warn(Trouble::Engine, text);
        }
        Some((disk, format?))
    }

    fn read(&self, key: &MediaKey, backend: &dyn Backend, n_frames: usize) -> Option<Media> {
        let (disk, format) = self.disk_for(backend)?;
        let reason = match disk.read(key, format) {
            Lookup::Absent => return None,
            Lookup::Found(tokens) => match backend.media_from_tokens(tokens, n_frames) {
                Ok(media) => return Some(media),
                Err(error) => error.to_string(),
            },
            Lookup::Broken(reason) => reason,
        };
        let path = disk.remove(key);
        let text = format!("{}: a broken cache entry, removed: {reason}", path.display());
        self.warn(Trouble::Broken, text);
        None
    }

    fn write(&self, key: &MediaKey, backend: &dyn Backend, media: &Media) {
        let Some((disk, format)) = self.disk_for(backend) else { return };
        match disk.write(key, format, &media.visual_tokens) {
            Stored::Yes | Stored::Stopped => {}
            Stored::TooLarge { bytes, limit } => self.warn(
                Trouble::Write,
                format!(
                    "{}: an entry of {bytes} bytes is not kept, the limit is {limit} bytes\n\n\
                     hint: pass a larger `--cache-limit`",
                    disk.dir().display()
                ),
            ),
            Stored::Failed(error) => {
                self.warn(Trouble::Write, unusable(disk.dir(), &error.to_string()));
            }
        }
    }
}

fn unusable(dir: &Path, reason: &str) -> String {
    format!(
        "{}: nothing more is kept in this cache folder: {reason}\n\n\
         hint: make room, or name a folder that can be written to with `--cache-dir`",
        dir.display()
    )
}

/// The right and the duty to fetch a medium. Dropped, it lets the others try.
struct Leader<'a> {
    cache: &'a VisualCache,
    key: MediaKey,
    flight: Arc<Flight>,
}

impl Leader<'_> {
    /// Gives the medium to all who wait for it and to memory.
    fn land(self, media: Media, found: Found) -> Arc<Media> {
        let media = Arc::new(media);
        *self.flight.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&media));
        self.cache.keep(self.key, &media, found);
        media
    }
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        self.cache.lock().flights.remove(&self.key);
        self.cache.landed.notify_all();
    }
}
