//! Sizes as people write them.

/// Powers of ten and of two, as everywhere; letters of any case.
const UNITS: [(&str, u64); 11] = [
    ("", 1),
    ("b", 1),
    ("k", 1_000),
    ("kb", 1_000),
    ("m", 1_000_000),
    ("mb", 1_000_000),
    ("g", 1_000_000_000),
    ("gb", 1_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
];

/// Bytes from a whole number with or without a unit: `1GB`, `512 MiB`, `1000`.
///
/// ```
/// assert_eq!(flamingo_runtime::bytes_from_text("2GB"), Ok(2_000_000_000));
/// assert_eq!(flamingo_runtime::bytes_from_text("1 MiB"), Ok(1 << 20));
/// assert!(flamingo_runtime::bytes_from_text("1.5GB").is_err());
/// ```
///
/// # Errors
/// Says what was expected and got.
pub fn bytes_from_text(text: &str) -> Result<u64, String> {
    let wrong = || format!("expected a size such as 1GB, 500MB or 512MiB, got `{text}`");
    let trimmed = text.trim();
    let end = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(end);
    let unit = unit.trim().to_ascii_lowercase();
    let size = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?.1;
    number.parse::<u64>().ok().and_then(|n| n.checked_mul(size)).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::bytes_from_text;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in
            [("0", 0), ("17b", 17), ("3 kB", 3000), ("3KiB", 3072), ("1G", 1_000_000_000)]
        {
            assert_eq!(bytes_from_text(text), Ok(bytes), "{text}");
        }
        for text in ["", "GB", "-1", "1e3", "1TBB", "1 0", "99999999999GB"] {
            assert!(bytes_from_text(text).unwrap_err().contains("such as 1GB"), "{text}");
        }
    }
}
