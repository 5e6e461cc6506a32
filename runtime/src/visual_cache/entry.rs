//! The bytes of an entry on disk: visual tokens behind a header, and a hash over all of it.
//!
//! ```text
//! 8 bytes   magic
//! 32 bytes  key
//! 8 bytes   bytes of a number: 2 for f16, 4 for f32
//! 8 bytes   n numbers, little-endian like all
//! n numbers
//! 32 bytes  BLAKE3 of all before
//! ```

use half::f16;

use super::MediaKey;
use crate::backend::TokenFormat;

const MAGIC: &[u8; 8] = b"FLMVTOK1";
const HASH_LEN: usize = 32;

/// Largest entry that is read or written, in bytes.
pub(crate) const MAX_BYTES: u64 = 256 << 20;

/// The bytes of an entry.
pub(crate) fn encode(key: &MediaKey, format: TokenFormat, tokens: &[f32]) -> Vec<u8> {
    let size = number_size(format);
    let mut bytes =
        Vec::with_capacity(header(key, format, 0).len() + tokens.len() * size + HASH_LEN);
    bytes.extend(header(key, format, tokens.len()));
    match format {
        TokenFormat::F32 => bytes.extend(tokens.iter().flat_map(|v| v.to_le_bytes())),
        TokenFormat::F16 => {
            bytes.extend(tokens.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()));
        }
    }
    let hash = blake3::hash(&bytes);
    bytes.extend(hash.as_bytes());
    bytes
}

/// The numbers of an entry, or what is wrong with it.
pub(crate) fn decode(
    key: &MediaKey,
    format: TokenFormat,
    bytes: &[u8],
) -> Result<Vec<f32>, &'static str> {
    let Some((content, hash)) = bytes.split_last_chunk::<HASH_LEN>() else {
        return Err("it is too short");
    };
    if blake3::hash(content) != *hash {
        return Err("its content differs from its hash");
    }
    let header_len = header(key, format, 0).len();
    let numbers = content.get(header_len..).ok_or("it is too short")?;
    let (n, rest) = (numbers.len() / number_size(format), numbers.len() % number_size(format));
    if rest != 0 || content[..header_len] != header(key, format, n) {
        return Err("it is of another medium, version or format");
    }
    Ok(match format {
        TokenFormat::F32 => {
            numbers.as_chunks::<4>().0.iter().map(|v| f32::from_le_bytes(*v)).collect()
        }
        TokenFormat::F16 => {
            numbers.as_chunks::<2>().0.iter().map(|v| f16::from_le_bytes(*v).to_f32()).collect()
        }
    })
}

fn number_size(format: TokenFormat) -> usize {
    match format {
        TokenFormat::F32 => size_of::<f32>(),
        TokenFormat::F16 => size_of::<f16>(),
    }
}

fn header(key: &MediaKey, format: TokenFormat, n_numbers: usize) -> Vec<u8> {
    let sizes = [number_size(format), n_numbers].map(|size| (size as u64).to_le_bytes());
    [&MAGIC[..], key.as_bytes(), sizes.as_flattened()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::visual_cache::Fingerprint;

    fn key(name: &str) -> MediaKey {
        MediaKey::new(&Fingerprint::of(&[name]), &[], 0)
    }

    #[test]
    fn entries_keep_every_bit() {
        let values =
            [0.0, -0.0, 1.5, -65504.0, f32::INFINITY, f32::NAN, f16::from_f32(0.1).to_f32()];
        for tokens in [&values[..], &values[..1], &[]] {
            for format in [TokenFormat::F16, TokenFormat::F32] {
                let bytes = encode(&key("a"), format, tokens);
                let found = decode(&key("a"), format, &bytes).unwrap();
                let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&found), bits(tokens));
            }
        }
        let exact = [0.1, f32::MIN_POSITIVE, 1e-42];
        let bytes = encode(&key("a"), TokenFormat::F32, &exact);
        assert_eq!(decode(&key("a"), TokenFormat::F32, &bytes).unwrap(), exact);
    }

    #[test]
    fn no_damage_passes() {
        let (key, format) = (key("a"), TokenFormat::F16);
        let whole = encode(&key, format, &[1.0, 2.0, 3.0]);
        for place in 0..whole.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[place] ^= flip;
                assert!(decode(&key, format, &bytes).is_err(), "byte {place}");
            }
            assert!(decode(&key, format, &whole[..place]).is_err(), "{place} bytes");
        }
        assert!(decode(&key, format, &[&whole[..], &[0]].concat()).is_err());
    }

    #[test]
    fn entries_of_others_do_not_pass() {
        let bytes = encode(&key("a"), TokenFormat::F16, &[1.0, 2.0]);
        assert!(decode(&key("b"), TokenFormat::F16, &bytes).is_err());
        assert!(decode(&key("a"), TokenFormat::F32, &bytes).is_err());
    }
}
