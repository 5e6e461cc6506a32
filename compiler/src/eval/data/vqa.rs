//! Questions and answers of VQAv2: <https://visualqa.org/download.html>.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::coco::read;
use super::{Field, MediaSource, Row, inside};

#[derive(Deserialize)]
struct Questions {
    questions: Vec<Question>,
}

#[derive(Deserialize)]
struct Question {
    question_id: u64,
    image_id: u64,
    question: String,
}

#[derive(Deserialize)]
struct Annotations {
    annotations: Vec<Annotation>,
}

#[derive(Deserialize)]
struct Annotation {
    question_id: u64,
    multiple_choice_answer: Option<String>,
    answers: Vec<Answer>,
}

#[derive(Deserialize)]
struct Answer {
    answer: String,
}

/// A row for each question, with the answers of all people; first the one that most of them gave.
pub(super) fn rows(
    path: &Path,
    annotations: &Path,
    images: &Path,
    image_name: &str,
) -> Result<Vec<Result<Row, String>>> {
    let name = ImageName::new(image_name)?;
    let questions: Questions = read(path, "questions of VQAv2")?;
    let annotations: Annotations = read(annotations, "annotations of VQAv2")?;
    let mut answers: BTreeMap<u64, Annotation> = annotations
        .annotations
        .into_iter()
        .map(|annotation| (annotation.question_id, annotation))
        .collect();
    let row = |question: Question| {
        let annotation =
            answers.remove(&question.question_id).ok_or("a question without answers")?;
        let file = name.of(question.image_id);
        Ok(Row {
            id: question.question_id.to_string(),
            media: vec![MediaSource::File(inside(images, Path::new(&file))?)],
            fields: BTreeMap::from([("question".to_owned(), Field::Text(question.question))]),
            answers: sorted(annotation),
            candidates: None,
        })
    };
    Ok(questions.questions.into_iter().map(row).collect())
}

fn sorted(annotation: Annotation) -> Vec<String> {
    let mut answers: Vec<String> =
        annotation.answers.into_iter().map(|answer| answer.answer).collect();
    let most = annotation.multiple_choice_answer;
    if let Some(at) = most.and_then(|most| answers.iter().position(|answer| *answer == most)) {
        answers[..=at].rotate_right(1);
    }
    answers
}

/// A name with a number in it.
struct ImageName<'a> {
    before: &'a str,
    width: usize,
    after: &'a str,
}

impl<'a> ImageName<'a> {
    fn new(pattern: &'a str) -> Result<ImageName<'a>> {
        let parts = pattern.split_once('{').and_then(|(before, rest)| {
            let (format, after) = rest.split_once('}')?;
            let width = match format {
                "" => 0,
                format => format.strip_prefix(":0")?.parse().ok().filter(|width| *width <= 64)?,
            };
            Some(ImageName { before, width, after })
        });
        parts.with_context(|| {
            format!("`image_name`: expected a name with `{{}}` or `{{:012}}`, found `{pattern}`")
        })
    }

    fn of(&self, number: u64) -> String {
        format!("{}{number:0width$}{}", self.before, self.after, width = self.width)
    }
}
