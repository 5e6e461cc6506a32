//! A stretch of a page's sequence: L tokens, with the first N pictures in it.

use std::ops::Range;

use rand::Rng;

/// Where a window lies in a sequence of ids, and which of the page's pictures are in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Tokens of the page.
    pub tokens: Range<usize>,
    /// Pictures of the page.
    pub pictures: Range<usize>,
}

/// Draws a window of at most `length` tokens among those that have a picture, each as likely as another.
/// It ends early, before its `max_pictures + 1`-th `<image>`, so that each `<image>` has its picture.
/// `None` if there is no picture.
pub fn draw(
    ids: &[u32],
    image_id: u32,
    length: usize,
    max_pictures: usize,
    rng: &mut impl Rng,
) -> Option<Window> {
    let places: Vec<usize> = (0..ids.len()).filter(|&place| ids[place] == image_id).collect();
    let last_start = ids.len().saturating_sub(length);
    let holds_picture = |start: usize| {
        let next = places.partition_point(|&place| place < start);
        places.get(next).is_some_and(|&place| place - start < length)
    };
    let starts: Vec<usize> = (0..=last_start).filter(|&start| holds_picture(start)).collect();
    let start = *starts.get(rng.random_range(0..starts.len().max(1)))?;
    let first = places.partition_point(|&place| place < start);
    let end = match places.get(first + max_pictures) {
        Some(&one_too_many) => one_too_many.min(start + length),
        None => ids.len().min(start + length),
    };
    let last = places.partition_point(|&place| place < end);
    Some(Window { tokens: start..end, pictures: first..last })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;

    use super::draw;

    proptest! {
        #[test]
        fn a_window_holds_its_pictures_and_no_more(
            is_image in prop::collection::vec(prop::bool::weighted(0.15), 0..80),
            length in 1..30_usize,
            max_pictures in 1..6_usize,
            seed: u64,
        ) {
            let ids: Vec<u32> = is_image.iter().map(|&image| if image { 9 } else { 1 }).collect();
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
            let Some(window) = draw(&ids, 9, length, max_pictures, &mut rng) else {
                prop_assert!(!ids.contains(&9));
                return Ok(());
            };
            let count = |ids: &[u32]| ids.iter().filter(|&&id| id == 9).count();
            let n_pictures = window.pictures.len();
            prop_assert!((1..=max_pictures).contains(&n_pictures));
            prop_assert_eq!(n_pictures, count(&ids[window.tokens.clone()]));
            prop_assert_eq!(window.pictures.start, count(&ids[..window.tokens.start]));
            let n_tokens = window.tokens.len();
            prop_assert!(n_tokens <= length);
            let is_cut = n_pictures == max_pictures && ids.get(window.tokens.end) == Some(&9);
            prop_assert!(n_tokens == length.min(ids.len()) || is_cut);
        }
    }

    #[test]
    fn all_windows_with_a_picture_are_drawn() {
        let ids = [1, 1, 1, 1, 9, 1, 1, 1];
        let starts = (0..200).map(|seed| {
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
            draw(&ids, 9, 3, 5, &mut rng).unwrap().tokens.start
        });
        let starts: std::collections::BTreeSet<usize> = starts.collect();
        assert_eq!(Vec::from_iter(starts), [2, 3, 4]);
    }
}
