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
    /// What text of the world may not say.
    markers: Vec<String>,
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
        let added = tokenizer.get_added_tokens_decoder().into_values();
        let mut markers: Vec<String> =
            added.filter(|token| token.special).map(|token| token.content).collect();
        markers.extend([IMAGE, EOC, eoc_name].map(str::to_owned));
        markers.retain(|marker| !marker.is_empty());
        // The longest first: one can be a part of another.
        markers.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        let vocabulary = Self { tokenizer, image, eoc, eoc_name, markers, bos, eos, pad };
        vocabulary.ids_from_text(&format!("a{EOC}{IMAGE}{IMAGE}a{EOC}"))?;
        Ok(vocabulary)
    }

    /// Ids of a sequence in text form, with the tokens that open and end it where the tokenizer has them.
    ///
    /// # Errors
    /// The tokenizer fails, or does not keep the markers in one piece.
    pub fn ids_from_text(&self, sequence: &str) -> Result<Vec<u32>, Error> {
        let text = sequence.replace(EOC, self.eoc_name);
        let fail = |error: tokenizers::Error| Error::Tokenise { reason: error.to_string() };
        let encoding = self.tokenizer.encode_fast(text, false).map_err(fail)?;
        self.check_markers(sequence, encoding.get_ids())?;
        let ids = encoding.get_ids().iter().copied();
        Ok(self.bos.into_iter().chain(ids).chain(self.eos).collect())
    }

    /// Text of the world with a space for what would read as a marker or as another special token.
    pub fn clean(&self, text: &str) -> String {
        // No marker has a space in it, so a space puts no new one together.
        self.markers.iter().fold(text.to_owned(), |text, marker| text.replace(marker.as_str(), " "))
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

#[cfg(test)]
mod tests {
    use super::Vocabulary;
    use crate::Error;

    /// Words `a`, `b`, with these added tokens.
    fn vocabulary(added: &[&str]) -> Result<Vocabulary, Error> {
        let tokens = added.iter().zip(2..).map(|(content, id)| {
            serde_json::json!({"id": id, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        });
        let json = serde_json::json!({
            "version": "1.0", "added_tokens": tokens.collect::<Vec<_>>(),
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "b"},
        });
        Vocabulary::new(serde_json::from_value(json).unwrap())
    }

    #[test]
    fn markers_are_found_by_name() {
        for eoc in ["<|endofchunk|>", "<eoc>", "<EOC>"] {
            let vocabulary = vocabulary(&["<image>", eoc, "<s>", "</s>"]).unwrap();
            assert_eq!(
                vocabulary.ids_from_text("a<EOC><image> b<EOC>").unwrap(),
                [4, 0, 3, 2, 1, 3, 5]
            );
            assert_eq!(vocabulary.pad, 5);
        }
        let bare = vocabulary(&["<image>", "<eoc>"]).unwrap();
        assert_eq!(bare.ids_from_text("a<EOC>").unwrap(), [0, 3]);
        assert!(matches!(vocabulary(&["<image>"]), Err(Error::NoToken { .. })));
    }

    #[test]
    fn no_marker_survives_in_text_of_the_world() {
        let vocabulary = vocabulary(&["<image>", "<eoc>", "</s>"]).unwrap();
        let text = vocabulary.clean("a <image>b <ima<image>ge> </s>a <EOC><eoc> < image>");
        assert_eq!(text, "a  b <ima ge>  a    < image>");
    }
}
