//! Which texts are kept: English prose that was not seen before.
//!
//! Prose is what MassiveText's rules for quality take it to be (Rae et al. 2021, table A1), without those
//! that need a long document: at least `min_words` words (50 there), 3 to 10 letters a word in the mean,
//! four words in five with a letter in them, two or more of the eight commonest English words, and not
//! more than 30 % of the lines a repetition.

use std::collections::HashSet;

use crate::report::PageReject;

const COMMON: [&str; 8] = ["the", "be", "to", "of", "and", "that", "have", "with"];

/// The texts seen so far, and how many words a page must have.
pub struct TextFilter {
    min_words: usize,
    seen: HashSet<blake3::Hash>,
}

impl TextFilter {
    /// Nothing seen.
    pub fn new(min_words: usize) -> Self {
        Self { min_words, seen: HashSet::new() }
    }

    /// The identity of a text that may be kept: a hash of its letters and digits in lower case, words apart.
    ///
    /// # Errors
    /// It is refused.
    pub fn check(&self, text: &str) -> Result<blake3::Hash, PageReject> {
        if text.is_empty() {
            return Err(PageReject::Empty);
        }
        if whatlang::detect_lang(text) != Some(whatlang::Lang::Eng) {
            return Err(PageReject::NotEnglish);
        }
        if !is_prose(text, self.min_words) {
            return Err(PageReject::LowQuality);
        }
        let hash = identity(text);
        match self.seen.contains(&hash) {
            true => Err(PageReject::Duplicate),
            false => Ok(hash),
        }
    }

    /// The page of a text is kept: refuse the text from now on.
    pub fn keep(&mut self, identity: blake3::Hash) {
        self.seen.insert(identity);
    }
}

fn is_prose(text: &str, min_words: usize) -> bool {
    let words: Vec<&str> = text.split_whitespace().collect();
    let n_words = words.len();
    let n_chars: usize = words.iter().map(|word| word.chars().count()).sum();
    let with_letter = words.iter().filter(|word| word.contains(char::is_alphabetic)).count();
    let is_common = |common: &&&str| words.iter().any(|word| word.eq_ignore_ascii_case(common));
    n_words >= min_words.max(1)
        && (3 * n_words..=10 * n_words).contains(&n_chars)
        && with_letter * 5 >= n_words * 4
        && COMMON.iter().filter(is_common).count() >= 2
        && !repeats(text)
}

fn repeats(text: &str) -> bool {
    let mut lines = HashSet::new();
    let n_repeated = text.lines().filter(|line| !lines.insert(*line)).count();
    n_repeated * 10 > text.lines().count() * 3
}

fn identity(text: &str) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for word in text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        hasher.update(word.to_lowercase().as_bytes()).update(b" ");
    }
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::{TextFilter, identity};
    use crate::report::PageReject;

    const PROSE: &str = "The harbour was quiet when we arrived, and the boats that had been out all night \
        were tied to the wall with old ropes.";

    fn check(text: &str) -> Result<(), PageReject> {
        TextFilter::new(10).check(text).map(|_| ())
    }

    #[test]
    fn each_rule_refuses() {
        assert_eq!(check(PROSE), Ok(()));
        assert_eq!(check(""), Err(PageReject::Empty));
        let german =
            "Der Hafen war ruhig, als wir ankamen, und die Boote lagen an der Mauer vertäut.";
        assert_eq!(check(german), Err(PageReject::NotEnglish));
        let short = "The boats that we saw were tied.";
        assert_eq!(check(short), Err(PageReject::LowQuality), "few words");
        let numbers = format!("{PROSE} {}", "12.50 ".repeat(20));
        assert_eq!(check(&numbers), Err(PageReject::LowQuality), "words without letters");
        let stuttering = "the boats of the harbour\n".repeat(5);
        assert_eq!(check(&stuttering), Err(PageReject::LowQuality), "lines again and again");
        let glued = PROSE
            .replace(", ", "")
            .replace(" had been out all ", "hadbeenoutallthewhilelong")
            .replace(" were tied ", "weretiedtothethickest");
        let glued = glued.replace(" was quiet when we ", "wasquietwhenweallcame");
        assert_eq!(check(&glued), Err(PageReject::LowQuality), "long words");
    }

    #[test]
    fn a_text_is_kept_once() {
        let mut filter = TextFilter::new(10);
        let identity = filter.check(PROSE).unwrap();
        assert_eq!(filter.check(PROSE), Ok(identity));
        filter.keep(identity);
        let again = PROSE.to_uppercase().replace(' ', "\n");
        assert_eq!(filter.check(&again), Err(PageReject::Duplicate));
    }

    #[test]
    fn words_stay_apart() {
        assert_ne!(identity("a bc"), identity("ab c"));
        assert_eq!(identity("A, bc!"), identity("a bc"));
    }
}
