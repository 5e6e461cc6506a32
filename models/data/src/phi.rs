//! φ: which picture each token looks at, out of the places of `<image>` and the page's coin.

/// Index of the picture that each token looks at, `[L]` u32, 1 for the first; 0 is none.
///
/// `next` false: the last `<image>` at or before the token. `next` true: an `<image>` token still looks
/// at its own picture, every other token at the one that follows it; after the last picture none follows.
pub fn media_indices(tokens: &[u32], image_id: u32, next: bool) -> Vec<u32> {
    let n_images = tokens.iter().fold(0_u32, |n, &token| n + u32::from(token == image_id));
    let mut seen = 0;
    let index = |&token: &u32| {
        let is_image = token == image_id;
        seen += u32::from(is_image);
        match next && !is_image {
            false => seen,
            true if seen < n_images => seen + 1,
            true => 0,
        }
    };
    tokens.iter().map(index).collect()
}

#[cfg(test)]
mod tests {
    use super::media_indices;

    /// The definition, word by word, for each token on its own.
    fn by_search(tokens: &[u32], position: usize, next: bool) -> u32 {
        let images: Vec<usize> = (0..tokens.len()).filter(|&i| tokens[i] == 9).collect();
        let found = match next {
            false => images.iter().rposition(|&image| image <= position),
            true => images.iter().position(|&image| image >= position),
        };
        found.map_or(0, |index| u32::try_from(index).unwrap() + 1)
    }

    #[test]
    fn indices_follow_the_definition() {
        for bits in 0..1_u32 << 9 {
            let tokens: Vec<u32> = (0..9).map(|i| if bits >> i & 1 == 1 { 9 } else { i }).collect();
            for next in [false, true] {
                let expected: Vec<u32> = (0..9).map(|i| by_search(&tokens, i, next)).collect();
                assert_eq!(media_indices(&tokens, 9, next), expected, "{tokens:?} {next}");
            }
        }
        assert_eq!(media_indices(&[], 9, true), Vec::<u32>::new());
    }
}
