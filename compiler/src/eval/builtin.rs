//! Tasks that need no files: the world of the demo, and the handwritten digits that scikit-learn ships.
//!
//! Examples are of the pictures that training may see, questions of those that it never saw.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use flamingo_scenes::Split;
use flamingo_scenes::digits;
use flamingo_scenes::draw::{self, draw};
use flamingo_scenes::facts::{ATTRIBUTES, Attribute, Facts, Object};
use flamingo_scenes::random::stream;
use flamingo_scenes::words::{COLOURS, KINDS, NEW_WORDS};
use image::imageops::FilterType;
use image::{GrayImage, RgbImage};
use rand::Rng;

use super::data::{Dataset, Field, MediaSource, Row};
use super::metric::Metric;
use super::task::{BEAMS, Postprocess, SUPPORT_SIZE, TEXT_EXAMPLES, Task};
use super::template::Template;

/// Names of tasks, and what they ask.
pub const TASKS: [(&str, &str); 9] = [
    ("scenes-color", "which colour; examples say that it is asked"),
    ("scenes-shape", "which shape or digit"),
    ("scenes-size", "small or big"),
    ("scenes-place", "where in the picture"),
    ("scenes-bind", "two new words for two colours, candidates compared"),
    ("scenes-yes-no", "whether an object is there, area under the ROC curve"),
    ("scenes-caption", "a caption, CIDEr"),
    ("digits", "handwritten digits of scikit-learn, generated"),
    ("digits-closed", "the same, candidates compared"),
];

/// Rows of examples, and of questions, that are painted.
const N_ROWS: [usize; 2] = [512, 1000];

/// The task of this name; `seed` decides what is painted.
///
/// # Errors
/// A name that is none.
pub fn builtin(name: &str, seed: u64) -> Result<Task> {
    let painted = |of: &dyn Fn(Split, &mut Stream) -> Picture| datasets(name, seed, of);
    let kinds = KINDS.map(str::to_owned).to_vec();
    let attribute = |attribute: Attribute| {
        painted(&|split, rng| {
            let facts = Facts::single(Object::random(split, rng), rng);
            Picture { facts, answer: facts.attribute(attribute).to_owned(), question: None }
        })
    };
    let (metric, data, candidates) = match name {
        "scenes-color" => (Metric::Exact, attribute(ATTRIBUTES[0]), Vec::new()),
        "scenes-shape" => (Metric::Exact, attribute(ATTRIBUTES[1]), Vec::new()),
        "scenes-size" => (Metric::Exact, attribute(ATTRIBUTES[2]), Vec::new()),
        "scenes-place" => (Metric::Exact, attribute(ATTRIBUTES[3]), Vec::new()),
        "scenes-bind" => {
            let words = [NEW_WORDS[0], NEW_WORDS[1]];
            (Metric::Accuracy, painted(&bind), words.map(str::to_owned).to_vec())
        }
        "scenes-yes-no" => {
            (Metric::RocAuc, painted(&yes_no), ["yes", "no"].map(str::to_owned).to_vec())
        }
        "scenes-caption" => (Metric::Cider, painted(&caption), Vec::new()),
        "digits" => (Metric::Exact, [Split::Train, Split::Test].map(handwritten), Vec::new()),
        "digits-closed" => {
            let digits = kinds[kinds.len() - 10..].to_vec();
            (Metric::Accuracy, [Split::Train, Split::Test].map(handwritten), digits)
        }
        other => bail!(
            "no task `{other}`\n\nhint: a task file, or of {}",
            TASKS.map(|(name, _)| name).join(", ")
        ),
    };
    let [support, queries] = data.map(|rows| Dataset { rows, ..Dataset::default() });
    let is_closed = metric.is_closed();
    let query = match name {
        "scenes-yes-no" => "<image> {question}",
        _ => "<image>",
    };
    let mut task = Task {
        name: name.to_owned(),
        metric,
        template: Template {
            query: query.to_owned(),
            answer: " {answer}".to_owned(),
            ..Template::default()
        },
        support,
        queries,
        candidates,
        positive: (metric == Metric::RocAuc).then(|| "yes".to_owned()),
        per_token: true,
        max_new_tokens: if metric == Metric::Cider { 8 } else { 1 },
        beams: BEAMS,
        postprocess: Postprocess::None,
        text_examples: if is_closed { 0 } else { TEXT_EXAMPLES },
        support_size: SUPPORT_SIZE,
        identity: String::new(),
    };
    task.finish()?;
    Ok(task)
}

type Stream = rand_chacha::ChaCha8Rng;

/// What is painted, and what is asked about it.
struct Picture {
    facts: Facts,
    answer: String,
    question: Option<String>,
}

/// Rows of examples and of questions.
fn datasets(name: &str, seed: u64, of: &dyn Fn(Split, &mut Stream) -> Picture) -> [Vec<Row>; 2] {
    let rows = |(split, n): (Split, usize)| {
        let row = |number: usize| {
            let mut rng = stream(seed, &format!("in-context/{name}/{split:?}/{number}"));
            let picture = of(split, &mut rng);
            let fields = picture.question.map(|text| ("question".to_owned(), Field::Text(text)));
            Row {
                id: format!("{split:?}-{number}").to_lowercase(),
                media: vec![painted(picture.facts, split, &mut rng)],
                fields: fields.into_iter().collect(),
                answers: vec![picture.answer],
                candidates: None,
            }
        };
        (0..n).map(row).collect()
    };
    [(Split::Train, N_ROWS[0]), (Split::Test, N_ROWS[1])].map(rows)
}

fn painted(facts: Facts, split: Split, rng: &mut Stream) -> MediaSource {
    MediaSource::Painted { side: draw::SIDE, frames: draw(facts, split, rng).frames }
}

/// The first new word is the first colour, the second the second one.
fn bind(split: Split, rng: &mut Stream) -> Picture {
    let colour = rng.random_range(0..2);
    let object = Object::random_where(split, rng, |object| object.colour == colour);
    Picture {
        facts: Facts::single(object, rng),
        answer: NEW_WORDS[colour].to_owned(),
        question: None,
    }
}

/// Half of the objects asked for are there; the others differ in colour or in kind.
fn yes_no(split: Split, rng: &mut Stream) -> Picture {
    let facts = Facts::pair(split, rng);
    let shown = facts.objects();
    let mut asked = shown[rng.random_range(0..2)];
    let is_there = rng.random_bool(0.5);
    while !is_there && shown.contains(&asked) {
        match rng.random_bool(0.5) {
            true => asked.colour = rng.random_range(0..COLOURS.len()),
            false => asked.kind = rng.random_range(0..KINDS.len()),
        }
    }
    let question = format!("is there a {} {} ?", asked.colour(), asked.kind());
    let answer = if is_there { "yes" } else { "no" }.to_owned();
    Picture { facts, answer, question: Some(question) }
}

fn caption(split: Split, rng: &mut Stream) -> Picture {
    let facts = Facts::picture(split, rng);
    Picture { facts, answer: facts.caption().join(" "), question: None }
}

/// Every handwritten digit of a split, white on dark grey.
fn handwritten(split: Split) -> Vec<Row> {
    let examples =
        (0..10).flat_map(|digit| digits::examples(digit, split).map(move |i| (digit, i)));
    let row = |(digit, example): (usize, usize)| Row {
        id: format!("{digit}-{example}"),
        media: vec![MediaSource::Painted {
            side: draw::SIDE,
            frames: vec![enlarged(digit, example)],
        }],
        fields: BTreeMap::new(),
        answers: vec![digit.to_string()],
        candidates: None,
    };
    examples.map(row).collect()
}

/// A digit of 8 × 8 at 24 × 24 in the middle of a picture.
fn enlarged(digit: usize, example: usize) -> Vec<u8> {
    const SIDE: u32 = 24;
    const GREY: u8 = 30;
    let (small, whole) = (digits::SIDE as u32, draw::SIDE as u32);
    let pixels = digits::pixels(digit, example).to_vec();
    let digit = GrayImage::from_raw(small, small, pixels).unwrap_or_default();
    let digit = image::imageops::resize(&digit, SIDE, SIDE, FilterType::Triangle);
    let start = (whole - SIDE) / 2;
    let mut picture = RgbImage::from_pixel(whole, whole, image::Rgb([GREY; 3]));
    for (x, y, pixel) in digit.enumerate_pixels() {
        let value = GREY + (u32::from(pixel.0[0]) * u32::from(235 - GREY) / 255) as u8;
        picture.put_pixel(start + x, start + y, image::Rgb([value; 3]));
    }
    picture.into_raw()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use flamingo_scenes::words::{PLACES, SIZES};

    use super::*;

    #[test]
    fn tasks_are_what_they_are_called() {
        for (name, _) in TASKS {
            let task = builtin(name, 0).unwrap();
            assert_eq!(task.name, name);
            assert!(task.support.bad.is_empty() && task.queries.bad.is_empty(), "{name}");
            let answers: BTreeSet<&String> =
                task.queries.rows.iter().flat_map(|row| &row.answers).collect();
            assert!(answers.len() >= 2, "{name}: {answers:?}");
            assert_eq!(task.identity, builtin(name, 0).unwrap().identity, "{name}");
        }
        assert_ne!(
            builtin("scenes-color", 0).unwrap().identity,
            builtin("scenes-color", 1).unwrap().identity
        );
        assert!(builtin("sing", 0).unwrap_err().to_string().contains("scenes-bind"));
    }

    #[test]
    fn digits_are_each_there_once() {
        let task = builtin("digits", 0).unwrap();
        assert_eq!(task.support.rows.len() + task.queries.rows.len(), 1797);
        let pictures: BTreeSet<Vec<u8>> = task
            .queries
            .rows
            .iter()
            .flat_map(|row| match &row.media[0] {
                MediaSource::Painted { frames, .. } => frames.clone(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(pictures.len(), task.queries.rows.len());
    }

    #[test]
    fn questions_are_as_often_yes_as_no_and_right() {
        let task = builtin("scenes-yes-no", 3).unwrap();
        let yes = task.queries.rows.iter().filter(|row| row.answers == ["yes"]).count();
        assert!((400..600).contains(&yes), "{yes}");
    }

    #[test]
    fn words_of_sizes_and_places_are_answers() {
        for (name, words) in [("scenes-size", SIZES.to_vec()), ("scenes-place", PLACES.to_vec())] {
            let task = builtin(name, 0).unwrap();
            assert!(task.queries.rows.iter().all(|row| words.contains(&row.answers[0].as_str())));
        }
    }
}
