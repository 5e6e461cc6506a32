//! Tokenizer files: ids of special tokens.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::source::SourceError;

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
