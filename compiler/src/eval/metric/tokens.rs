//! Words of captions, as CIDEr and BLEU of COCO captions count them: the tokenizer of the Penn Treebank in small letters,
//! without punctuation.
//!
//! The rules that captions meet: contractions are cut, brackets become names, points stay in abbreviations and numbers,
//! hyphens and slashes inside words. CoreNLP's tokenizer has many more, for addresses, fractions and emoticons.

/// Words that end with a point wherever they stand.
const ABBREVIATIONS: [&str; 15] = [
    "mr.", "mrs.", "ms.", "dr.", "st.", "jr.", "sr.", "vs.", "etc.", "inc.", "co.", "ltd.",
    "prof.", "ave.", "blvd.",
];

/// What is cut off a word.
const CONTRACTIONS: [&str; 7] = ["n't", "'s", "'re", "'ve", "'ll", "'d", "'m"];

/// The words of a caption.
pub fn caption_tokens(caption: &str) -> Vec<String> {
    let text = caption.to_lowercase().replace(['’', '‘'], "'");
    let mut tokens = Vec::new();
    for piece in text.split_whitespace() {
        cut(&piece.chars().collect::<Vec<char>>(), &mut tokens);
    }
    tokens
}

/// Cuts what stands between spaces.
fn cut(letters: &[char], tokens: &mut Vec<String>) {
    let mut at = 0;
    while let Some(&letter) = letters.get(at) {
        let len = word_len(&letters[at..]);
        if len == 0 {
            tokens.extend(symbol(letter));
            at += 1;
            continue;
        }
        let word: String = letters[at..at + len].iter().collect();
        push_word(&word, tokens);
        at += len;
    }
}

/// Length of the word that letters begin with.
fn word_len(letters: &[char]) -> usize {
    if let Some(len) = abbreviation_len(letters) {
        return len;
    }
    let is_in_word = |at: usize| {
        let before = at.checked_sub(1).and_then(|at| letters.get(at)).copied().unwrap_or(' ');
        let after = letters.get(at + 1).copied().unwrap_or(' ');
        match letters[at] {
            letter if letter.is_alphanumeric() => true,
            '-' | '/' | '\'' | '_' => before.is_alphanumeric() && after.is_alphanumeric(),
            '.' | ',' | ':' => before.is_numeric() && after.is_numeric(),
            _ => false,
        }
    };
    (0..letters.len()).take_while(|at| is_in_word(*at)).count()
}

/// Length of an abbreviation: single letters with points, or a known one.
fn abbreviation_len(letters: &[char]) -> Option<usize> {
    let pairs = letters.chunks_exact(2).take_while(|two| two[0].is_alphabetic() && two[1] == '.');
    let n_pairs = pairs.count();
    if n_pairs >= 2 && !letters.get(2 * n_pairs).is_some_and(|letter| letter.is_alphanumeric()) {
        return Some(2 * n_pairs);
    }
    let with_point = letters.iter().position(|letter| *letter == '.')? + 1;
    let word: String = letters[..with_point].iter().collect();
    ABBREVIATIONS.contains(&word.as_str()).then_some(with_point)
}

/// A word, with its contraction as a word of its own.
fn push_word(word: &str, tokens: &mut Vec<String>) {
    if word == "cannot" {
        return tokens.extend(["can".to_owned(), "not".to_owned()]);
    }
    let cut = CONTRACTIONS.iter().find_map(|end| Some((word.strip_suffix(end)?, end)));
    match cut.filter(|(stem, _)| !stem.is_empty()) {
        Some((stem, end)) => tokens.extend([stem.to_owned(), (*end).to_owned()]),
        None => tokens.push(word.to_owned()),
    }
}

/// A sign as a word; punctuation is none.
fn symbol(letter: char) -> Option<String> {
    match letter {
        '.' | '?' | '!' | ',' | ':' | ';' | '-' | '\'' | '"' | '`' | '“' | '”' | '–' | '—'
        | '…' => None,
        '(' => Some("-lrb-".to_owned()),
        ')' => Some("-rrb-".to_owned()),
        '[' => Some("-lsb-".to_owned()),
        ']' => Some("-rsb-".to_owned()),
        '{' => Some("-lcb-".to_owned()),
        '}' => Some("-rcb-".to_owned()),
        other => Some(other.to_string()),
    }
}
