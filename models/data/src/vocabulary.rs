//! A tokenizer and the ids of the tokens that sequences are marked with, found by name.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::Error;

/// A picture's place in the text form of a sequence.
pub const IMAGE: &str = "<image>";
/// End of a chunk in the text form of a sequence.
pub const EOC: &str = "<EOC>";

const EOC_NAMES: [&str; 3] = ["<|endofchunk|>", "<eoc>", "<EOC>"];
const BOS_NAMES: [&str; 4] = ["<BOS>", "<bos>", "<s>", "<|endoftext|>"];
const EOS_NAMES: [&str; 4] = ["<EOS>", "<eos>", "</s>", "<|endoftext|>"];
const PAD_NAMES: [&str; 3] = ["<PAD>", "<pad>", "<|pad|>"];

/// Text to ids, and the ids of the markers.
pub struct Vocabulary {
    tokenizer: Tokenizer,
    /// Id of `<image>`.
    pub image: u32,
    /// Id of `<EOC>`.
    pub eoc: u32,
    /// The name that the tokenizer has for `<EOC>`.
    eoc_name: &'static str,
    /// Id that opens a sequence, if there is one.
    pub bos: Option<u32>,
    /// Id that ends a sequence, if there is one.
    pub eos: Option<u32>,
    /// Id that fills a sequence up: a token for it, or the one that ends, or 0.
    pub pad: u32,
}

impl Vocabulary {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// It cannot be read, or has no `<image>` or no `<|endofchunk|>`, `<eoc>`, `<EOC>`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let fail = |error: tokenizers::Error| Error::Tokenizer {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        Self::new(Tokenizer::from_file(path).map_err(fail)?)
    }

    /// Finds the markers of a tokenizer.
    ///
    /// # Errors
    /// There is no `<image>`, or no `<|endofchunk|>`, `<eoc>`, `<EOC>`.
    pub fn new(mut tokenizer: Tokenizer) -> Result<Self, Error> {
        let no_limit = |_| Error::NoToken { expected: "limit".to_owned() };
        tokenizer.with_truncation(None).map_err(no_limit)?;
        tokenizer.with_padding(None);
        let find = |names: &[&'static str]| {
            names.iter().find_map(|name| Some((*name, tokenizer.token_to_id(name)?)))
        };
        let need = |names: &[&'static str]| {
            find(names).ok_or_else(|| Error::NoToken { expected: format!("{names:?}") })
        };
        let (_, image) = need(&[IMAGE])?;
        let (eoc_name, eoc) = need(&EOC_NAMES)?;
        let id = |names: &[&'static str]| find(names).map(|(_, id)| id);
        let (bos, eos) = (id(&BOS_NAMES), id(&EOS_NAMES));
        let pad = id(&PAD_NAMES).or(eos).unwrap_or(0);
        Ok(Self { tokenizer, image, eoc, eoc_name, bos, eos, pad })
    }

    /// Ids of a sequence in text form, with the tokens that open and end it where the tokenizer has them.
    ///
    /// # Errors
    /// The tokenizer fails, or does not keep the markers in one piece.
    pub fn ids_from_text(&self, sequence: &str) -> Result<Vec<u32>, Error> {
        let text = sequence.replace(EOC, self.eoc_name);
        let fail = |error: tokenizers::Error| Error::Tokenizer {
            path: "".into(),
            reason: error.to_string(),
        };
        let encoding = self.tokenizer.encode_fast(text, false).map_err(fail)?;
        self.check_markers(sequence, encoding.get_ids())?;
        let ids = encoding.get_ids().iter().copied();
        Ok(self.bos.into_iter().chain(ids).chain(self.eos).collect())
    }

    fn check_markers(&self, sequence: &str, ids: &[u32]) -> Result<(), Error> {
        for (token, id) in [(IMAGE, self.image), (EOC, self.eoc)] {
            let expected = sequence.matches(token).count();
            let found = ids.iter().filter(|&&found| found == id).count();
            if expected != found {
                return Err(Error::Markers { token: token.to_owned(), expected, found });
            }
        }
        Ok(())
    }
}

/// Text of the world without what would read as a marker or an end of the sequence.
pub fn without_markers(text: &str) -> String {
    let names = [IMAGE].iter().chain(&EOC_NAMES).chain(&BOS_NAMES).chain(&EOS_NAMES);
    let names: Vec<&str> = names.chain(&PAD_NAMES).copied().collect();
    let mut clean = text.to_owned();
    // Removing one can put another together: until nothing changes.
    while names.iter().any(|name| clean.contains(name)) {
        clean = names.iter().fold(clean, |text, name| text.replace(name, ""));
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::without_markers;

    #[test]
    fn no_marker_survives_in_text_of_the_world() {
        let text = without_markers("a <image> b <ima<EOC>ge> </s>c <|endofchunk|>d < image>");
        assert_eq!(text, "a  b  c d < image>");
    }
}
