//! The vocabulary: every word is one token.

/// Fills rows of a batch.
pub const PAD: u32 = 0;
/// Begins a prompt.
pub const BEGIN: u32 = 1;
/// Stands for a picture or a video.
pub const IMAGE: u32 = 2;
/// Ends a chunk: a medium and the text about it.
pub const END_OF_CHUNK: u32 = 3;

/// Colours, with their red, green and blue.
pub const COLOURS: [(&str, [u8; 3]); 8] = [
    ("red", [230, 40, 40]),
    ("green", [40, 190, 60]),
    ("blue", [50, 80, 235]),
    ("yellow", [240, 220, 40]),
    ("purple", [160, 60, 200]),
    ("orange", [245, 140, 30]),
    ("cyan", [50, 210, 220]),
    ("white", [240, 240, 240]),
];
/// Kinds of object: six shapes, ten digits.
pub const KINDS: [&str; 16] = [
    "circle", "square", "triangle", "star", "cross", "ring", "0", "1", "2", "3", "4", "5", "6",
    "7", "8", "9",
];
/// How many of [`KINDS`] are shapes; the others are digits.
pub const SHAPES: usize = 6;
/// Numbers, from one.
pub const NUMBERS: [&str; 4] = ["one", "two", "three", "four"];
/// Ordinals, from the first.
pub const ORDINALS: [&str; 4] = ["first", "second", "third", "fourth"];
/// Places of a single object.
pub const PLACES: [&str; 4] = ["left", "right", "top", "bottom"];
/// Sizes of a single object.
pub const SIZES: [&str; 2] = ["small", "big"];
/// Directions of motion.
pub const DIRECTIONS: [&str; 4] = ["left", "right", "up", "down"];
/// Words that mean nothing until a prompt gives them a meaning.
pub const NEW_WORDS: [&str; 6] = ["dax", "wug", "blick", "fep", "zup", "toma"];

const MARKERS: [&str; 4] = ["<pad>", "<bos>", "<image>", "<eoc>"];
const PLAIN: [&str; 26] = [
    ".", "?", "a", "and", "on", "the", "what", "color", "shape", "size", "where", "how", "many",
    "is", "there", "which", "way", "times", "yes", "no", "moves", "up", "down", "flash", "of",
    "in",
];

/// All words in the order of their ids, from 0.
pub fn vocabulary() -> Vec<&'static str> {
    let colours = COLOURS.map(|(name, _)| name);
    let lists: [&[&'static str]; 9] =
        [&MARKERS, &PLAIN, &colours, &KINDS, &NUMBERS, &ORDINALS, &PLACES, &SIZES, &NEW_WORDS];
    lists.concat()
}

/// Ids of words.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    words: Vec<&'static str>,
}

impl Default for Vocabulary {
    fn default() -> Vocabulary {
        Vocabulary { words: vocabulary() }
    }
}

impl Vocabulary {
    /// Number of words.
    pub fn size(&self) -> usize {
        self.words.len()
    }

    /// The id of a word of the vocabulary.
    ///
    /// # Panics
    /// If the word is not in it: the generator uses words of the tables above only.
    pub fn id(&self, word: &str) -> u32 {
        let position = self.words.iter().position(|known| *known == word);
        position.unwrap_or_else(|| panic!("`{word}` is not in the vocabulary")) as u32
    }

    /// The word of an id, if there is one.
    pub fn word(&self, id: u32) -> Option<&'static str> {
        self.words.get(id as usize).copied()
    }

    /// Ids of the words after the markers.
    pub fn plain_ids(&self) -> std::ops::Range<u32> {
        MARKERS.len() as u32..self.words.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn words_are_unique_and_markers_have_their_ids() {
        let words = vocabulary();
        assert_eq!(words.iter().collect::<BTreeSet<_>>().len(), words.len());
        let ids = [("<pad>", PAD), ("<bos>", BEGIN), ("<image>", IMAGE), ("<eoc>", END_OF_CHUNK)];
        for (word, id) in ids {
            assert_eq!(Vocabulary::default().id(word), id);
            assert_eq!(Vocabulary::default().word(id), Some(word));
        }
    }

    #[test]
    fn directions_are_words() {
        for word in DIRECTIONS {
            assert!(vocabulary().contains(&word));
        }
    }
}
