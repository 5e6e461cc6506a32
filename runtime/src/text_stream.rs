//! From token ids to text as it comes, cut at stop strings.

use tokenizers::{Tokenizer, step_decode_stream};

use crate::prompt::PromptError;

/// Decodes a growing sequence of tokens. Text that may be the beginning of a stop string is held back until it is known
/// not to be one.
#[derive(Debug, Default)]
pub(crate) struct TextStream {
    stop_strings: Vec<String>,
    ids: Vec<u32>,
    prefix: String,
    prefix_index: usize,
    held: String,
}

impl TextStream {
    /// Before the first token; empty stop strings are none.
    pub(crate) fn new(mut stop_strings: Vec<String>) -> TextStream {
        stop_strings.retain(|stop| !stop.is_empty());
        TextStream { stop_strings, ..TextStream::default() }
    }

    /// The text that is certain after the next token, and the stop string that ended it.
    ///
    /// # Errors
    /// If the tokenizer cannot decode the token.
    pub(crate) fn push(
        &mut self,
        tokenizer: &Tokenizer,
        id: u32,
    ) -> Result<(String, Option<String>), PromptError> {
        let (ids, prefix) = (&mut self.ids, &mut self.prefix);
        let piece =
            step_decode_stream(tokenizer, vec![id], true, ids, prefix, &mut self.prefix_index);
        let piece = piece.map_err(|error| PromptError::Tokenizer(error.to_string()))?;
        Ok(self.push_text(&piece.unwrap_or_default()))
    }

    fn push_text(&mut self, piece: &str) -> (String, Option<String>) {
        self.held.push_str(piece);
        let found = self.stop_strings.iter().filter_map(|stop| Some((self.held.find(stop)?, stop)));
        if let Some((at, stop)) = found.min_by_key(|(at, stop)| (*at, stop.len())) {
            let stop = stop.clone();
            let text = self.held[..at].to_owned();
            self.held.clear();
            return (text, Some(stop));
        }
        let rest = self.held.split_off(self.held.len() - self.n_uncertain());
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// Bytes at the end of the held text that a stop string begins with.
    fn n_uncertain(&self) -> usize {
        let begins = |stop: &String| {
            let most = stop.len().min(self.held.len());
            let fits = |n: &usize| {
                stop.is_char_boundary(*n) && self.held.as_bytes().ends_with(&stop.as_bytes()[..*n])
            };
            (0..=most).rev().find(fits)
        };
        self.stop_strings.iter().filter_map(begins).max().unwrap_or(0)
    }

    /// The text held back, now that nothing follows.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let mut stream = TextStream::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut out = Vec::new();
        for piece in pieces {
            let (text, stop) = stream.push_text(piece);
            out.push(text);
            if stop.is_some() {
                return (out, stop);
            }
        }
        out.push(stream.finish());
        (out, None)
    }

    #[test]
    fn text_is_cut_at_the_first_stop_string_wherever_tokens_end() {
        for (stops, pieces, text, stop) in [
            (&[][..], &["a", "b"][..], "ab", None),
            (&[""], &["a"], "a", None),
            (&["\n"], &["a\nb"], "a", Some("\n")),
            (&["Question", "Quest"], &["x Qu", "est", "ion"], "x ", Some("Quest")),
            (&["abc"], &["a", "b", "d", "ab"], "abdab", None),
            (&["aab"], &["a", "a", "a", "b", "c"], "a", Some("aab")),
            (&["éa"], &["xé", "b"], "xéb", None),
        ] {
            let (out, found) = stream(stops, pieces);
            assert_eq!((out.concat().as_str(), found.as_deref()), (text, stop), "{stops:?}");
        }
    }

    #[test]
    fn only_what_may_be_a_stop_string_is_held_back() {
        let (out, _) = stream(&["stop"], &["go st", "ill ", "sto"]);
        assert_eq!(out, ["go ", "still ", "", "sto"]);
    }
}
