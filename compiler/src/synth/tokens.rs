//! A byte-level tokenizer for any vocabulary size, and the ids of its special tokens.

use serde_json::{Map, Value, json};

/// Special tokens of a model. The 256 bytes follow the leading ones; ids between the bytes and
/// the added ones have a row in the embedding and no text.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    kind: Kind,
    /// Name and id of the tokens that the Flamingo added, ascending without a gap.
    pub(super) added: Vec<(&'static str, u32)>,
}

/// Which special tokens the language model's tokenizer begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// GPT-NeoX-20B, also of MPT: one token begins and ends texts, and is not put in front.
    GptNeox,
    /// LLaMA: `<s>` stands in front of a text.
    Llama,
    /// OPT: `</s>` stands in front of a text.
    Opt,
}

impl Kind {
    fn leading(self) -> &'static [&'static str] {
        match self {
            Kind::GptNeox => &["<|endoftext|>", "<|padding|>"],
            Kind::Llama => &["<unk>", "<s>", "</s>"],
            Kind::Opt => &["<s>", "<pad>", "</s>", "<unk>"],
        }
    }

    /// Smallest vocabulary that holds the leading tokens and all bytes.
    pub(super) fn n_base_tokens(self) -> u32 {
        self.leading().len() as u32 + 256
    }
}

impl Tokens {
    /// The tokens that OpenFlamingo adds, from `first_id` on.
    pub(super) fn openflamingo(kind: Kind, first_id: u32) -> Tokens {
        let names = ["<|endofchunk|>", "<image>", "<PAD>"];
        Tokens { kind, added: names.into_iter().zip(first_id..).collect() }
    }

    /// The tokens that IDEFICS adds, from `first_id` on.
    pub(super) fn idefics(first_id: u32) -> Tokens {
        let names = ["<fake_token_around_image>", "<image>"];
        Tokens { kind: Kind::Llama, added: names.into_iter().zip(first_id..).collect() }
    }

    /// Rows of an embedding that was resized to end with the added tokens.
    pub(super) fn n_rows(&self) -> usize {
        self.added.last().map_or(0, |(_, id)| *id as usize + 1)
    }

    /// Id of the token that begins a text.
    pub(super) fn begin(&self) -> u32 {
        match self.kind {
            Kind::GptNeox => 0,
            Kind::Llama => 1,
            Kind::Opt => 2,
        }
    }

    /// Id of the token that ends a text.
    pub(super) fn end(&self) -> u32 {
        match self.kind {
            Kind::GptNeox => 0,
            Kind::Llama | Kind::Opt => 2,
        }
    }

    /// `tokenizer.json`: byte-level BPE without merges. Special tokens stand in the vocabulary
    /// too, as readers number added tokens by themselves where it does not know them.
    pub(super) fn tokenizer(&self) -> Value {
        let leading = self.kind.leading().iter().copied().zip(0u32..);
        let specials: Vec<(&str, u32)> = leading.chain(self.added.iter().copied()).collect();
        let bytes = byte_characters().zip(self.kind.leading().len() as u32..);
        let mut vocabulary: Vec<(String, u32)> = bytes.map(|(c, id)| (c.to_string(), id)).collect();
        vocabulary.extend(specials.iter().map(|(name, id)| ((*name).to_owned(), *id)));
        vocabulary.sort_by_key(|(_, id)| *id);
        let vocabulary: Map<String, Value> =
            vocabulary.into_iter().map(|(token, id)| (token, id.into())).collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": specials.iter().map(|(name, id)| added_token(name, *id)).collect::<Vec<_>>(),
            "normalizer": null,
            "pre_tokenizer": byte_level(),
            "post_processor": self.post_processor(),
            "decoder": byte_level(),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                "byte_fallback": false, "ignore_merges": false, "vocab": vocabulary, "merges": []
            }
        })
    }

    fn post_processor(&self) -> Value {
        if self.kind == Kind::GptNeox {
            return byte_level();
        }
        let id = self.begin();
        let name = self.kind.leading()[id as usize];
        let begin = json!({"SpecialToken": {"id": name, "type_id": 0}});
        let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
        json!({
            "type": "TemplateProcessing",
            "single": [begin, text("A")],
            "pair": [begin, text("A"), text("B")],
            "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]}}
        })
    }
}

fn byte_level() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true})
}

fn added_token(name: &str, id: u32) -> Value {
    json!({
        "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true
    })
}

/// The character that stands for each byte in GPT-2's byte-level alphabet: itself if it is
/// printable Latin-1, else the next free one from U+0100 on.
fn byte_characters() -> impl Iterator<Item = char> {
    let mut beyond = (0x100u32..).filter_map(char::from_u32);
    (0..=255u8).map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => beyond.next().unwrap_or(char::REPLACEMENT_CHARACTER),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_map_to_the_characters_of_gpt2() {
        let characters: Vec<char> = byte_characters().collect();
        for (byte, character) in [(b' ', 'Ġ'), (b'\n', 'Ċ'), (b'a', 'a'), (0xad, 'Ń'), (0, 'Ā')]
        {
            assert_eq!(characters[usize::from(byte)], character, "byte {byte}");
        }
        let distinct: std::collections::BTreeSet<char> = characters.iter().copied().collect();
        assert_eq!(distinct.len(), 256);
    }

    #[test]
    fn special_tokens_have_their_ids_and_bytes_follow_the_leading_ones() {
        let tokens = Tokens::openflamingo(Kind::GptNeox, 50277);
        assert_eq!(tokens.n_rows(), 50280);
        let json = tokens.tokenizer();
        let vocabulary = &json["model"]["vocab"];
        assert_eq!(vocabulary["<|endofchunk|>"], 50277);
        assert_eq!(vocabulary["<image>"], 50278);
        assert_eq!(vocabulary["<PAD>"], 50279);
        assert_eq!(vocabulary["a"], 2 + u32::from(b'a'));
        assert_eq!(vocabulary.as_object().unwrap().len(), 256 + 5);
    }
}
