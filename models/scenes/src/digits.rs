//! Handwritten digits: 1797 of 8 × 8 pixels (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0),
//! from the sheet that `assets/digits.py` makes of scikit-learn's package.

use crate::Split;

/// Side of a digit in pixels.
pub const SIDE: usize = 8;
/// How many digits stand in a row of the sheet.
const SHEET_WIDTH: usize = 32;
/// How many there are of each digit, in the sheet's order.
const COUNTS: [usize; 10] = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180];
/// The share of each digit that training sees, from the first on, in per cent.
const TRAIN_PERCENT: usize = 85;

/// Rows of grey pixels, after the header of a PGM file.
const SHEET: &[u8] = include_bytes!("../assets/digits.pgm");
/// Bytes of the header.
const HEADER: usize = "P5\n256 456\n255\n".len();

/// Which handwritten examples of a digit belong to a split.
pub fn examples(digit: usize, split: Split) -> std::ops::Range<usize> {
    let train = COUNTS[digit] * TRAIN_PERCENT / 100;
    match split {
        Split::Train => 0..train,
        Split::Test | Split::Unseen => train..COUNTS[digit],
    }
}

/// Coverage of one digit, `[SIDE, SIDE]` rows of 0 to 255.
pub fn pixels(digit: usize, example: usize) -> [u8; SIDE * SIDE] {
    assert!(example < COUNTS[digit], "digit {digit} has {} examples", COUNTS[digit]);
    let index = COUNTS[..digit].iter().sum::<usize>() + example;
    let (x, y) = (index % SHEET_WIDTH * SIDE, index / SHEET_WIDTH * SIDE);
    let stride = SHEET_WIDTH * SIDE;
    std::array::from_fn(|i| SHEET[HEADER + (y + i / SIDE) * stride + x + i % SIDE])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_share_nothing_and_leave_nothing() {
        for (digit, count) in COUNTS.into_iter().enumerate() {
            let (train, test) = (examples(digit, Split::Train), examples(digit, Split::Test));
            assert_eq!((train.start, train.end, test.end), (0, test.start, count));
            assert!(test.len() * 100 / count >= 14, "{digit}: {test:?}");
        }
    }

    #[test]
    fn the_sheet_is_whole() {
        assert!(SHEET.starts_with(b"P5\n256 456\n255\n"));
        assert_eq!(SHEET.len(), HEADER + 256 * 456);
        assert_eq!(COUNTS.iter().sum::<usize>(), 1797);
    }

    /// A zero has a hole, a one does not: the sheet is in the order that the counts say.
    #[test]
    fn zeros_are_hollow_and_ones_are_not() {
        let middle = |digit, example| {
            let pixels = pixels(digit, example);
            [27, 28, 35, 36].iter().map(|i| u32::from(pixels[*i])).sum::<u32>()
        };
        let mean = |digit: usize| {
            (0..COUNTS[digit]).map(|e| middle(digit, e)).sum::<u32>() / COUNTS[digit] as u32
        };
        assert!(mean(0) < 120, "{}", mean(0));
        assert!(mean(1) > 500, "{}", mean(1));
    }
}
