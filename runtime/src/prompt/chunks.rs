//! Examples are tokenised once: token ids of a prompt, chunk by chunk, where that gives the ids of the whole text.
//!
//! A chunk ends with the end-of-chunk token. Tokenizers cut a text at such tokens before all else, so that a chunk's ids
//! depend on nothing but its text, and on whether a token stands before it.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokenizers::AddedToken;

use super::{PromptEncoder, PromptError, PromptFile, Segment};
use crate::lru::Lru;

/// Most bytes of ids that are kept.
const MAX_BYTES: usize = 4 << 20;

/// Bytes of a chunk beside its ids.
const OVERHEAD: usize = 128;

/// Token ids of chunks that were met before, for one tokenizer.
pub(crate) struct ChunkIds {
    /// The token that ends chunks, if the tokenizer cuts there.
    end: Option<End>,
    /// By hash of the text, and of whether the tokenizer adds tokens.
    known: Mutex<Lru<[u8; 32], Arc<[u32]>>>,
}

#[derive(Debug)]
struct End {
    id: u32,
    word: String,
}

impl fmt::Debug for ChunkIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkIds").field("end", &self.end).finish_non_exhaustive()
    }
}

impl ChunkIds {
    /// No chunk yet, for prompts of this encoder, if there is one.
    pub(crate) fn new(encoder: Option<&PromptEncoder<'_>>) -> ChunkIds {
        ChunkIds { end: encoder.and_then(End::of), known: Mutex::new(Lru::new(MAX_BYTES)) }
    }

    /// As [`PromptEncoder::encode_after`] of the same encoder.
    pub(crate) fn encode_after(
        &self,
        encoder: &PromptEncoder<'_>,
        last: Option<u32>,
        prompt: &PromptFile,
    ) -> Result<Vec<u32>, PromptError> {
        let is_end = |segment: &Segment| matches!(segment, Segment::EndOfChunk { .. });
        let mut chunks = prompt.segments.split_inclusive(is_end);
        let (Some(end), Some(first)) = (&self.end, chunks.next()) else {
            return encoder.encode_after(last, prompt);
        };
        let mut text = String::new();
        encoder.write_text(first, last, &mut text)?;
        let mut ids = self.ids(encoder, &text, last.is_none())?.to_vec();
        for chunk in chunks {
            text.clone_from(&end.word);
            encoder.write_text(chunk, Some(end.id), &mut text)?;
            let with_end = self.ids(encoder, &text, false)?;
            ids.extend_from_slice(with_end.get(1..).unwrap_or_default());
        }
        encoder.checked(ids, prompt)
    }

    /// The ids of a text, which are kept if it ends a chunk.
    fn ids(
        &self,
        encoder: &PromptEncoder<'_>,
        text: &str,
        adds_tokens: bool,
    ) -> Result<Arc<[u32]>, PromptError> {
        if !self.end.as_ref().is_some_and(|end| text.ends_with(&end.word)) {
            return Ok(encoder.ids(text, adds_tokens)?.into());
        }
        let lock = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut hasher = blake3::Hasher::new();
        let key = hasher.update(&[u8::from(adds_tokens)]).update(text.as_bytes()).finalize().into();
        let known = lock().get(&key);
        if let Some(known) = known {
            return Ok(known);
        }
        let ids: Arc<[u32]> = encoder.ids(text, adds_tokens)?.into();
        lock().insert(key, Arc::clone(&ids), size_of_val(&*ids) + OVERHEAD, false);
        Ok(ids)
    }
}

impl End {
    /// The encoder's end of a chunk, if texts are cut there before anything else is done to them, and the tokenizer adds
    /// nothing after them.
    fn of(encoder: &PromptEncoder<'_>) -> Option<End> {
        let (id, tokenizer) = (encoder.end()?, encoder.tokenizer);
        let word = tokenizer.id_to_token(id)?;
        let added = tokenizer.get_added_tokens_decoder();
        let is_cut = |token: &AddedToken| !token.normalized && !token.single_word;
        let holds_word = |token: &&AddedToken| token.content.contains(&word);
        let is_alone = added.values().filter(holds_word).count() == 1;
        let is_whole = tokenizer.get_truncation().is_none() && tokenizer.get_padding().is_none();
        let with_added = encoder.ids(&word, true).ok()?;
        let is_last = with_added.iter().position(|other| *other == id)? + 1 == with_added.len();
        let cuts = added.get(&id).is_some_and(is_cut) && is_alone && is_whole && is_last;
        cuts.then_some(End { id, word })
    }
}

#[cfg(test)]
mod tests {
    use flamingo_models::{Family, SpecialTokens};
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use tokenizers::Tokenizer;

    use super::*;

    /// A tokenizer in Llama's form.
    fn tokenizer(change: impl Fn(&mut Value)) -> Tokenizer {
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        let mut value = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
            "added_tokens": [special(0, "<s>"), special(1, "<image>"), special(2, "<|endofchunk|>"), special(12, "<fake>")],
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
            },
            "model": {"type": "BPE", "unk_token": "?", "merges": [["▁", "a"], ["a", "b"], ["▁a", "b"]],
                      "vocab": {"<s>": 0, "<image>": 1, "<|endofchunk|>": 2, "?": 3, "▁": 4, "a": 5, "b": 6,
                                "▁a": 7, "ab": 8, "▁ab": 9, "<": 10, "|": 11, "<fake>": 12, "Ġ": 13}}
        });
        change(&mut value);
        Tokenizer::from_bytes(value.to_string()).unwrap()
    }

    fn tokens() -> SpecialTokens {
        SpecialTokens {
            image: 1,
            end_of_chunk: Some(2),
            end: Some(2),
            begin: Some(0),
            around_image: Some(12),
            ..SpecialTokens::default()
        }
    }

    fn segments() -> impl Strategy<Value = Vec<Segment>> {
        let texts = ["a", "ab", " ab", "a b ", " ", "<", "<|endofch", "|>a", "b<|endofchunk|> a"];
        let text = |text: &str| Segment::Text { text: text.into() };
        let segment = prop_oneof![
            proptest::sample::select(texts.to_vec()).prop_map(text),
            Just(Segment::Image { image: "a.png".into() }),
            Just(Segment::EndOfChunk { end_of_chunk: true }),
        ];
        proptest::collection::vec(segment, 0..10)
    }

    /// Normalisers and pre-tokenisers as models have them, all of which treat the beginning of a text apart.
    fn forms() -> Vec<[Value; 2]> {
        let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let prepend = json!({"type": "Prepend", "prepend": "▁"});
        let strip = json!({"type": "Strip", "strip_left": true, "strip_right": true});
        vec![
            [Value::Null, metaspace("first")],
            [Value::Null, metaspace("always")],
            [json!({"type": "NFC"}), byte_level],
            [json!({"type": "Sequence", "normalizers": [prepend, replace]}), Value::Null],
            [strip, json!({"type": "Whitespace"})],
        ]
    }

    proptest! {
        #[test]
        fn chunks_have_the_ids_of_the_whole(
            prompts in proptest::collection::vec(
                (segments(), proptest::sample::select(vec![None, Some(5), Some(2), Some(12)])), 1..5),
            [normalizer, pre_tokenizer] in proptest::sample::select(forms()),
            family in proptest::sample::select(vec![Family::OpenFlamingo, Family::Idefics]),
            [strips, has_template] in any::<[bool; 2]>(),
        ) {
            let tokenizer = tokenizer(|value| {
                for token in value["added_tokens"].as_array_mut().unwrap() {
                    (token["lstrip"], token["rstrip"]) = (strips.into(), strips.into());
                }
                value["normalizer"] = normalizer.clone();
                value["pre_tokenizer"] = pre_tokenizer.clone();
                if !has_template {
                    value["post_processor"] = Value::Null;
                }
            });
            let tokens = tokens();
            let encoder = PromptEncoder { tokenizer: &tokenizer, family, tokens: &tokens };
            let chunks = ChunkIds::new(Some(&encoder));
            prop_assert!(chunks.end.is_some());
            for (segments, last) in prompts {
                let prompt = PromptFile { segments, ..PromptFile::default() };
                let whole = encoder.encode_after(last, &prompt).map_err(|error| error.to_string());
                for _ in 0..2 {
                    let found = chunks.encode_after(&encoder, last, &prompt);
                    prop_assert_eq!(found.map_err(|error| error.to_string()), whole.clone());
                }
            }
        }
    }

    #[test]
    fn tokenizers_that_look_across_the_end_are_given_the_whole() {
        let cuts = |change: &dyn Fn(&mut Value)| {
            let (tokenizer, tokens) = (tokenizer(change), tokens());
            let family = Family::OpenFlamingo;
            let encoder = PromptEncoder { tokenizer: &tokenizer, family, tokens: &tokens };
            ChunkIds::new(Some(&encoder)).end.is_some()
        };
        assert!(cuts(&|_| {}));
        assert!(!cuts(&|value| value["added_tokens"][2]["normalized"] = true.into()));
        assert!(!cuts(&|value| value["added_tokens"][2]["single_word"] = true.into()));
        assert!(!cuts(&|value| {
            let mut longer = value["added_tokens"][2].clone();
            (longer["id"], longer["content"]) = (14.into(), "<|endofchunk|>a".into());
            value["added_tokens"].as_array_mut().unwrap().push(longer);
        }));
        assert!(!cuts(&|value| {
            let processor = &mut value["post_processor"];
            processor["single"].as_array_mut().unwrap().reverse();
        }));
        assert!(!cuts(&|value| {
            value["truncation"] = json!({"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0});
        }));
    }
}
