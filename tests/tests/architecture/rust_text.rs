//! Rust source as text: what of it is code, and which words the code has.

/// Rust source without comments and without what stands in literals.
pub(crate) fn code_of(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let (mut rest, mut previous) = (source, ' ');
    while let Some(next) = rest.chars().next() {
        let n_skipped = skipped_bytes(rest, previous);
        let step = if n_skipped > 0 { n_skipped } else { next.len_utf8() };
        previous = if n_skipped > 0 { ' ' } else { next };
        code.push(previous);
        rest = &rest[step..];
    }
    code
}

/// Bytes of the comment or literal that `rest` begins with; 0 if it begins with code.
fn skipped_bytes(rest: &str, previous: char) -> usize {
    match rest.as_bytes() {
        [b'/', b'/', ..] => rest.find('\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => block_comment_bytes(rest),
        [b'"', ..] => quoted_bytes(rest, '"'),
        [b'\'', b'\\', ..] => quoted_bytes(rest, '\''),
        [b'\'', ..] => {
            let bytes = rest.chars().nth(1).map_or(0, |character| 1 + character.len_utf8());
            if bytes > 0 && rest[bytes..].starts_with('\'') { bytes + 1 } else { 0 }
        }
        [b'r' | b'b' | b'c', ..] if !is_word(previous) => raw_string_bytes(rest),
        _ => 0,
    }
}

fn block_comment_bytes(rest: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < rest.len() {
        let tail = &rest.as_bytes()[at..];
        let (change, step) = match tail {
            [b'/', b'*', ..] => (1, 2),
            [b'*', b'/', ..] => (-1, 2),
            _ => (0, 1),
        };
        depth = depth.saturating_add_signed(change);
        at += step;
        if depth == 0 {
            break;
        }
    }
    at
}

fn quoted_bytes(rest: &str, end: char) -> usize {
    let mut escaped = false;
    for (at, character) in rest.char_indices().skip(1) {
        if character == end && !escaped {
            return at + 1;
        }
        escaped = character == '\\' && !escaped;
    }
    rest.len()
}

/// `r"…"`, `r#"…"#`, also as bytes or C string; 0 for a word that begins alike.
fn raw_string_bytes(rest: &str) -> usize {
    let prefix = if rest.starts_with('r') { 1 } else { 2 };
    if !rest[1..].starts_with('r') && prefix == 2 {
        return 0;
    }
    let n_marks = rest[prefix..].bytes().take_while(|byte| *byte == b'#').count();
    let begin = prefix + n_marks;
    if !rest[begin..].starts_with('"') {
        return 0;
    }
    let end = format!("\"{}", "#".repeat(n_marks));
    rest[begin + 1..].find(&end).map_or(rest.len(), |at| begin + 1 + at + end.len())
}

/// Whether a character is part of a word.
pub(crate) fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Whether the code has this word; lifetimes are words of their own.
pub(crate) fn has_word(code: &str, word: &str) -> bool {
    code.split(|c: char| !is_word(c) && c != '\'').any(|found| found == word)
}

/// The code without any white space.
pub(crate) fn without_space(code: &str) -> String {
    code.chars().filter(|character| !character.is_whitespace()).collect()
}

#[test]
fn code_is_told_from_comments_and_literals() {
    let source = "a /* b /* c */ d */ 'e' 'f: \"g\\\"h\" r#\"i\"j\"# br\"k\" b'\\'' // l\nrest m";
    let words: Vec<String> = code_of(source).split_whitespace().map(str::to_owned).collect();
    assert_eq!(words, ["a", "'f:", "b", "rest", "m"]);
}
