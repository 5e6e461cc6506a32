//! Random numbers that depend on a seed and a purpose only, so that training can stop and go on anywhere.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// A stream of random numbers for one purpose, such as `language/17`.
pub fn stream(seed: u64, purpose: &str) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(purpose.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}
