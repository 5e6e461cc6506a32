//! How the families write what is said to them and what they answer.

use std::path::PathBuf;

use flamingo_models::Family;
use flamingo_runtime::{PromptFile, Segment};

/// How turns are written.
pub(super) struct Template {
    pub(super) name: &'static str,
    /// Before the first turn.
    pub(super) opening: &'static str,
    before_user: &'static str,
    after_user: &'static str,
    pub(super) after_answer: &'static str,
    /// Whether a turn's pictures stand before [`Template::before_user`].
    pictures_first: bool,
    /// Texts that end an answer.
    pub(super) stops: &'static [&'static str],
}

/// Those of the families, and none.
pub(super) const TEMPLATES: [Template; 4] = [
    Template {
        name: "flamingo",
        opening: "This is a conversation between a human, User, and an intelligent visual AI, \
                  Flamingo. User sends images, and Flamingo describes them.",
        before_user: " User: ",
        after_user: " Flamingo:",
        after_answer: "",
        pictures_first: false,
        stops: &["User:", "Flamingo:"],
    },
    Template {
        name: "idefics",
        opening: "",
        before_user: "User: ",
        after_user: "<end_of_utterance>\nAssistant:",
        after_answer: "<end_of_utterance>\n",
        pictures_first: false,
        stops: &["<end_of_utterance>", "User:"],
    },
    Template {
        name: "otter",
        opening: "",
        before_user: "User: ",
        after_user: " GPT:<answer>",
        after_answer: "<|endofchunk|>",
        pictures_first: true,
        stops: &[],
    },
    Template {
        name: "plain",
        opening: "",
        before_user: "",
        after_user: "",
        after_answer: " ",
        pictures_first: true,
        stops: &[],
    },
];

impl Template {
    /// The one of this name; without, that of a family.
    pub(super) fn named(name: Option<&str>, family: Family) -> &'static Template {
        let of_family = match family {
            Family::OpenFlamingo | Family::FlamingoPytorch => "flamingo",
            Family::Idefics => "idefics",
            Family::Otter => "otter",
        };
        let is_it = |template: &&Template| template.name == name.unwrap_or(of_family);
        let all: &'static [Template] = &TEMPLATES;
        all.iter().find(is_it).unwrap_or(&all[0])
    }

    /// The segments of a turn: what the model gets to read.
    pub(super) fn turn(&self, before: &str, pictures: &[PathBuf], text: &str) -> PromptFile {
        let mut segments = Vec::new();
        let mut written = before.to_owned();
        if !self.pictures_first {
            written.push_str(self.before_user);
        }
        push_text(&mut segments, written);
        segments.extend(pictures.iter().map(|image| Segment::Image { image: image.clone() }));
        let before_user = if self.pictures_first { self.before_user } else { "" };
        push_text(&mut segments, format!("{before_user}{text}{}", self.after_user));
        PromptFile { segments, ..PromptFile::default() }
    }
}

fn push_text(segments: &mut Vec<Segment>, text: String) {
    if !text.is_empty() {
        segments.push(Segment::Text { text });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: Option<&str>, family: Family, expected: &str) {
        let template = Template::named(name, family);
        let turn = template.turn("", &["a.png".into()], "what is it?");
        let piece = |segment: &Segment| match segment {
            Segment::Text { text } => text.clone(),
            _ => "<image>".to_owned(),
        };
        assert_eq!(turn.segments.iter().map(piece).collect::<String>(), expected);
    }

    #[test]
    fn each_family_has_its_form() {
        check(None, Family::Otter, "<image>User: what is it? GPT:<answer>");
        let idefics = "User: <image>what is it?<end_of_utterance>\nAssistant:";
        check(None, Family::Idefics, idefics);
        check(None, Family::OpenFlamingo, " User: <image>what is it? Flamingo:");
        check(Some("plain"), Family::Otter, "<image>what is it?");
    }
}
