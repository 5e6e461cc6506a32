//! How rows become prompts: the forms of the families, and those of task files.

use anyhow::{Result, bail};
use flamingo_models::Family;
use flamingo_runtime::Segment;
use serde::{Deserialize, Serialize};

use super::data::{Field, Row};

/// Texts of a prompt. `<image>` stands for the next medium of a row, `{name}` for its field of that name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Template {
    /// What begins the prompt.
    pub preamble: String,
    /// A row up to its answer; `{turns}` are the turns of a dialogue before it.
    pub query: String,
    /// A turn of a dialogue, with `{user}` and `{model}`.
    pub turn: String,
    /// An answer, with `{answer}`: of examples, and of candidates.
    pub answer: String,
    /// What stands between examples, after the token that ends a chunk.
    pub joiner: String,
}

/// A template by its name, in the family's form or the paper's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// A caption.
    Caption,
    /// A question with a short answer, field `question`.
    Vqa,
    /// A class of a picture.
    Classify,
    /// Whether a meme is hateful, with its text in the field `text`.
    HatefulMemes,
    /// A dialogue, with `turns` so far and the `question` now.
    Dialogue,
}

/// The conversation of the Flamingo paper, appendix D.
const PAPER_DIALOGUE: &str = "This is a conversation between a human, User, and an intelligent visual AI, Flamingo. User sends images, and Flamingo describes them. ";

impl Form {
    /// Its texts for a family: what the family's own evaluation uses, or the paper's.
    pub fn template(self, family: Family, is_papers: bool) -> Template {
        let plain = |query: &str, joiner: &str| of(query, "{answer}", joiner);
        let spaced = |query: &str| of(query, " {answer}", "");
        match (self, family) {
            (Form::Dialogue, _) if is_papers => Template {
                preamble: PAPER_DIALOGUE.to_owned(),
                turn: "User: {user} Flamingo: {model} ".to_owned(),
                ..spaced("<image>{turns}User: {question} Flamingo:")
            },
            (Form::Caption | Form::Classify, _) if is_papers => spaced("<image>Output:"),
            (Form::Vqa, _) if is_papers => spaced("<image>Question: {question} Answer:"),
            (Form::HatefulMemes, _) if is_papers => {
                spaced("<image>is an image with written: \"{text}\" on it. Is it hateful? Answer:")
            }
            (Form::Caption, Family::OpenFlamingo) => plain("<image>Output:", "\n"),
            (Form::Classify, Family::OpenFlamingo) => plain("<image>Output:", ""),
            (Form::Vqa, Family::OpenFlamingo) => {
                plain("<image>Question:{question} Short answer:", "\n")
            }
            (Form::HatefulMemes, Family::OpenFlamingo) => {
                plain("<image>is an image with: '{text}' written on it. Is it hateful? Answer:", "")
            }
            (Form::Dialogue, Family::OpenFlamingo | Family::Idefics) => Template {
                turn: "Question: {user} Answer: {model} ".to_owned(),
                ..spaced("<image>{turns}Question: {question} Answer:")
            },
            (Form::Caption, Family::Idefics) => spaced("<image>Caption:"),
            (Form::Classify, Family::Idefics) => spaced("<image>Output:"),
            (Form::Vqa, Family::Idefics) => spaced("<image>Question: {question} Answer:"),
            (Form::HatefulMemes, Family::Idefics) => {
                spaced("<image>is an image with written: \"{text}\" on it. Is it hateful? Answer:")
            }
            // The package has no evaluation of its own.
            (form, Family::FlamingoPytorch) => form.template(Family::OpenFlamingo, is_papers),
            (form, Family::Otter) => Template {
                turn: "User: {user} GPT:<answer> {model} ".to_owned(),
                ..spaced(&format!("<image>{{turns}}User: {} GPT:<answer>", form.otter_question()))
            },
        }
    }

    fn otter_question(self) -> &'static str {
        match self {
            Form::Caption => "What does the image describe?",
            Form::Classify => "What is in the image?",
            Form::HatefulMemes => "\"{text}\" is written on it. Is it hateful?",
            Form::Vqa | Form::Dialogue => "{question}",
        }
    }
}

fn of(query: &str, answer: &str, joiner: &str) -> Template {
    Template {
        query: query.to_owned(),
        answer: answer.to_owned(),
        joiner: joiner.to_owned(),
        ..Template::default()
    }
}

impl Template {
    /// What begins a prompt.
    pub fn beginning(&self) -> Vec<Segment> {
        let mut segments = Vec::new();
        push_text(&mut segments, &self.preamble);
        segments
    }

    /// A row up to its answer; of an example that is shown as text alone without its media.
    ///
    /// # Errors
    /// A field that the row lacks; more or fewer media than the text has.
    pub fn query(&self, row: &Row, has_media: bool) -> Result<Vec<Segment>, String> {
        let text = self.filled(&self.query, row)?;
        let pieces: Vec<&str> = text.split("<image>").collect();
        let (in_text, given) = (pieces.len() - 1, row.media.len());
        if in_text != given {
            return Err(format!("{given} media where the template has {in_text}"));
        }
        let mut segments = Vec::new();
        for (index, piece) in pieces.into_iter().enumerate() {
            if index > 0 && has_media {
                // The file is never read: media are given beside the tokens.
                segments.push(Segment::Image { image: "image".into() });
            }
            push_text(&mut segments, piece);
        }
        Ok(segments)
    }

    /// An example: a row with its first answer, and what stands before the next one.
    ///
    /// # Errors
    /// As [`Template::query`]; a row without an answer.
    pub fn example(&self, row: &Row, has_media: bool) -> Result<Vec<Segment>, String> {
        let answer = row.answers.first().ok_or("a row without an answer")?;
        let mut segments = self.query(row, has_media)?;
        push_text(&mut segments, &self.answer_text(answer));
        segments.push(Segment::EndOfChunk { end_of_chunk: true });
        push_text(&mut segments, &self.joiner);
        Ok(segments)
    }

    /// An answer as it stands after a query.
    pub fn answer_text(&self, answer: &str) -> String {
        self.answer.replace("{answer}", answer)
    }

    /// Checks the texts on their own.
    ///
    /// # Errors
    /// A query without text, an answer without its place.
    pub fn check(&self) -> Result<()> {
        if !self.answer.contains("{answer}") || self.query.is_empty() {
            bail!(
                "[prompt]: expected `query`, and `answer` with `{{answer}}`, found {:?} and {:?}\n\nhint: or \
                 `form = \"vqa\"`, `caption`, `classify`, `hateful_memes`, `dialogue`",
                self.query,
                self.answer
            )
        }
        Ok(())
    }

    /// A text with the row's fields. A field's own `<image>` is no medium, and its braces are text.
    fn filled(&self, text: &str, row: &Row) -> Result<String, String> {
        let mut filled = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            filled.push_str(before);
            let Some((name, tail)) = after.split_once('}') else {
                return Err(format!("a template with an open brace: {text:?}"));
            };
            match row.fields.get(name) {
                Some(Field::Text(value)) => filled.push_str(&value.replace("<image>", "")),
                Some(Field::Turns(turns)) => {
                    for [user, model] in turns {
                        let turn = self.turn.replace("{user}", user).replace("{model}", model);
                        filled.push_str(&turn.replace("<image>", ""));
                    }
                }
                None if name == "turns" => {}
                None => return Err(format!("a row without the field `{name}`")),
            }
            rest = tail;
        }
        filled.push_str(rest);
        Ok(filled)
    }
}

/// Appends text, to the text before it if there is one.
fn push_text(segments: &mut Vec<Segment>, text: &str) {
    match segments.last_mut() {
        _ if text.is_empty() => {}
        Some(Segment::Text { text: last }) => last.push_str(text),
        _ => segments.push(Segment::Text { text: text.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::eval::data::MediaSource;

    fn row() -> Row {
        let fields = [
            ("question", Field::Text("what <image> {x}?".to_owned())),
            ("text", Field::Text("hi".to_owned())),
            ("turns", Field::Turns(vec![["who?".to_owned(), "me".to_owned()]])),
        ];
        Row {
            id: "1".to_owned(),
            media: vec![MediaSource::Painted { side: 1, frames: vec![vec![0; 3]] }],
            fields: fields.map(|(name, field)| (name.to_owned(), field)).into(),
            answers: vec!["a cat".to_owned(), "cat".to_owned()],
            candidates: None,
        }
    }

    fn shown(segments: &[Segment]) -> String {
        let piece = |segment: &Segment| match segment {
            Segment::Image { .. } | Segment::Video { .. } => "<image>".to_owned(),
            Segment::Text { text } => text.clone(),
            Segment::EndOfChunk { .. } => "<|endofchunk|>".to_owned(),
        };
        segments.iter().map(piece).collect()
    }

    fn check(form: Form, family: Family, is_papers: bool, expected: &str) {
        let template = form.template(family, is_papers);
        template.check().unwrap();
        let text = [template.beginning(), template.example(&row(), true).unwrap()].concat();
        assert_eq!(shown(&text), expected);
    }

    #[test]
    fn forms_are_those_of_the_families_and_of_the_paper() {
        use Family::{Idefics, OpenFlamingo, Otter};
        check(Form::Caption, OpenFlamingo, false, "<image>Output:a cat<|endofchunk|>\n");
        check(Form::Classify, OpenFlamingo, false, "<image>Output:a cat<|endofchunk|>");
        let vqa = "<image>Question:what  {x}? Short answer:a cat<|endofchunk|>\n";
        check(Form::Vqa, OpenFlamingo, false, vqa);
        let meme = "<image>is an image with: 'hi' written on it. Is it hateful? Answer:a cat<|endofchunk|>";
        check(Form::HatefulMemes, OpenFlamingo, false, meme);
        let vqa = "<image>Question: what  {x}? Answer: a cat<|endofchunk|>";
        check(Form::Vqa, OpenFlamingo, true, vqa);
        check(Form::Vqa, Idefics, false, vqa);
        let otter =
            "<image>User: who? GPT:<answer> me User: what  {x}? GPT:<answer> a cat<|endofchunk|>";
        check(Form::Dialogue, Otter, false, otter);
        let paper = format!(
            "{PAPER_DIALOGUE}<image>User: who? Flamingo: me User: what  {{x}}? Flamingo: a cat<|endofchunk|>"
        );
        check(Form::Dialogue, OpenFlamingo, true, &paper);
    }

    #[test]
    fn text_examples_have_no_pictures() {
        let template = Form::Caption.template(Family::OpenFlamingo, false);
        let text = shown(&template.example(&row(), false).unwrap());
        assert_eq!(text, "Output:a cat<|endofchunk|>\n");
    }

    #[test]
    fn what_a_row_lacks_is_said() {
        let template = of("<image><image>{question}", "{answer}", "");
        assert!(template.query(&row(), true).unwrap_err().contains("1 media"));
        let template = of("<image>{nothing}", "{answer}", "");
        assert!(template.query(&row(), true).unwrap_err().contains("`nothing`"));
        let without = Row { answers: Vec::new(), fields: BTreeMap::new(), ..row() };
        assert!(of("<image>", "{answer}", "").example(&without, true).is_err());
        assert!(of("<image>", "answer", "").check().is_err());
    }
}
