//! Tokenizer files: ids of special tokens, and adding those that the reference adds in code.

use std::path::Path;

use tokenizers::{AddedToken, Tokenizer};

use crate::config::SpecialTokens;
use crate::source::SourceError;

/// Tokens that open_flamingo's `factory.py` adds to a language model's tokenizer, in its order.
const ADDED: [&str; 3] = ["<|endofchunk|>", "<image>", "<PAD>"];

/// The token that Otter adds beside them.
pub(crate) const ANSWER: &str = "<answer>";

/// Reads a `tokenizer.json`.
pub fn read_tokenizer(path: &Path) -> Result<Tokenizer, SourceError> {
    Tokenizer::from_file(path).map_err(|error| SourceError::Config {
        path: path.to_owned(),
        reason: format!("not a tokenizer of the Hugging Face form: {error}"),
    })
}

/// Ids of the tokens called `names`, where the tokenizer has them.
pub fn token_ids(path: &Path, names: &[&str]) -> Result<Vec<Option<u32>>, SourceError> {
    let tokenizer = read_tokenizer(path)?;
    Ok(names.iter().map(|name| tokenizer.token_to_id(name)).collect())
}

/// Ids of `<image>`, `<|endofchunk|>` and `<PAD>`: the tokenizer's, or those that they get when
/// they are added to it as the reference does.
pub(crate) fn flamingo_token_ids(path: &Path) -> Result<[Option<u32>; 3], SourceError> {
    let mut tokenizer = read_tokenizer(path)?;
    if tokenizer.token_to_id("<image>").is_none() {
        tokenizer.add_special_tokens(&ADDED.map(|name| AddedToken::from(name, true)));
    }
    let id = |name: &str| tokenizer.token_to_id(name);
    Ok([id("<image>"), id("<|endofchunk|>"), id("<PAD>")])
}

/// The `tokenizer.json` of an artifact: the file as it is where it has a token for each id of
/// `tokens`, else with those added that it lacks, if they get these ids.
pub fn tokenizer_json(path: &Path, tokens: &SpecialTokens) -> Result<Vec<u8>, SourceError> {
    let wrong = |reason: String| SourceError::Config { path: path.to_owned(), reason };
    let mut tokenizer = read_tokenizer(path)?;
    let wanted = [
        (tokens.end_of_chunk, ADDED[0]),
        (Some(tokens.image), ADDED[1]),
        (tokens.pad, ADDED[2]),
        (tokens.answer, ANSWER),
    ];
    let missing = |(id, name): (Option<u32>, &'static str)| {
        id.filter(|id| tokenizer.id_to_token(*id).is_none()).map(|id| (id, name))
    };
    let mut missing: Vec<(u32, &str)> = wanted.into_iter().filter_map(missing).collect();
    if missing.is_empty() {
        return std::fs::read(path)
            .map_err(|source| SourceError::Io { path: path.to_owned(), source });
    }
    missing.sort_unstable();
    for (id, name) in missing {
        tokenizer.add_special_tokens(&[AddedToken::from(name, true)]);
        let found = tokenizer.token_to_id(name);
        if found != Some(id) {
            return Err(wrong(format!(
                "token `{name}`: expected id {id}, the tokenizer gives it {found:?}\n\nhint: correct [tokens] in \
                 the recipe, or save the tokenizer with the tokens added"
            )));
        }
    }
    tokenizer.to_string(false).map(String::into_bytes).map_err(|error| wrong(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "?": 2}, "unk_token": "?"}}"#;

    #[test]
    fn tokens_that_the_reference_adds_are_added() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, PLAIN).unwrap();
        assert_eq!(flamingo_token_ids(&path).unwrap(), [Some(4), Some(3), Some(5)]);
        let tokens = SpecialTokens {
            image: 4,
            end_of_chunk: Some(3),
            pad: Some(5),
            ..SpecialTokens::default()
        };
        let bytes = tokenizer_json(&path, &tokens).unwrap();
        let tokenizer = Tokenizer::from_bytes(&bytes).unwrap();
        assert_eq!(tokenizer.encode("<image>a<|endofchunk|>", true).unwrap().get_ids(), [4, 0, 3]);
        let elsewhere = SpecialTokens { image: 7, ..tokens.clone() };
        assert!(tokenizer_json(&path, &elsewhere).unwrap_err().to_string().contains("expected id"));
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(tokenizer_json(&path, &tokens).unwrap(), bytes);
    }

    /// Otter's tokens come in the order of its ids: `<answer>` before `<PAD>`.
    #[test]
    fn otters_answer_token_is_added_and_is_one_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, PLAIN).unwrap();
        let tokens = SpecialTokens {
            image: 4,
            end_of_chunk: Some(3),
            answer: Some(5),
            pad: Some(6),
            ..SpecialTokens::default()
        };
        let tokenizer = Tokenizer::from_bytes(tokenizer_json(&path, &tokens).unwrap()).unwrap();
        let ids = tokenizer.encode("<image>a<answer>b", true).unwrap();
        assert_eq!(ids.get_ids(), [4, 0, 5, 1]);
    }
}
