//! Keys of media: hashes of everything that decides their numbers.

use std::fmt;
use std::time::SystemTime;

use flamingo_models::manifest::{FileEntry, Manifest};

/// Raised when the meaning of keys or the arithmetic behind them changes within a version.
const GENERATION: &str = "flamingo visual tokens 1";

/// What decides the numbers of media beside their pixels: media graph, weights, engine and formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

/// The identity of a medium: of its pixels, and of the [`Fingerprint`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MediaKey([u8; 32]);

impl Fingerprint {
    /// The fingerprint of an artifact run by an engine with this `arithmetic`. It takes the hashes
    /// of the manifest, so no file is read.
    pub fn new(manifest: &Manifest, arithmetic: &str) -> Fingerprint {
        let is_graph = |entry: &&FileEntry| {
            manifest.graphs.iter().any(|graph| graph.stage == "media" && graph.path == entry.path)
        };
        let is_weights = |entry: &&FileEntry| entry.path.ends_with(".safetensors");
        let files = manifest.files.iter();
        let graphs: Vec<&FileEntry> = files.clone().filter(is_graph).collect();
        let weights: Vec<&FileEntry> = files.filter(is_weights).collect();
        let mut parts = vec![GENERATION, env!("CARGO_PKG_VERSION"), arithmetic];
        // A manifest that does not list them says nothing of the model: such a one is like no other.
        let own = (graphs.is_empty() || weights.is_empty())
            .then(|| format!("{} {:?}", std::process::id(), SystemTime::now()));
        parts.extend(own.as_deref());
        for entry in graphs.into_iter().chain(weights) {
            parts.extend([entry.path.as_str(), entry.blake3.as_str()]);
        }
        Fingerprint::of(&parts)
    }

    /// Hexadecimal digits.
    pub(crate) fn to_hex(self) -> String {
        MediaKey(self.0).to_string()
    }

    /// The fingerprint of a list of facts.
    pub fn of(parts: &[&str]) -> Fingerprint {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        Fingerprint(*hasher.finalize().as_bytes())
    }
}

impl MediaKey {
    /// The key of pixel values [n_frames, 3, size, size].
    pub fn new(fingerprint: &Fingerprint, pixel_values: &[f32], n_frames: usize) -> MediaKey {
        let mut hasher = blake3::Hasher::new_keyed(&fingerprint.0);
        hasher.update(&(n_frames as u64).to_le_bytes());
        hasher.update(&(pixel_values.len() as u64).to_le_bytes());
        hasher.update(bytemuck::cast_slice(pixel_values));
        MediaKey(*hasher.finalize().as_bytes())
    }

    /// The key that these hexadecimal digits are.
    pub(crate) fn from_hex(text: &str) -> Option<MediaKey> {
        blake3::Hash::from_hex(text).ok().map(|hash| MediaKey(*hash.as_bytes()))
    }

    /// The bytes of the key.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Hexadecimal digits, as in file names.
impl fmt::Display for MediaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MediaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MediaKey({self})")
    }
}
