//! What answers are worth: metrics from their definitions, as figures of single answers that add up to a score.
//!
//! Each is compared with another implementation on `tests/fixtures/metrics/metrics.json`.

mod bleu;
mod cider;
mod roc;
mod tokens;
mod vqa;

use serde::{Deserialize, Serialize};

pub use bleu::BleuCounts;
pub use tokens::caption_tokens;
pub use vqa::{normal_answer, vqa_accuracy};

/// A way to score answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The share of answers that equal one of the right ones, letter for letter, without white space around.
    Exact,
    /// VQA accuracy: how many of the people asked gave this answer, after the official normalisation.
    Vqa,
    /// CIDEr-D of captions; 1 is printed as 100.
    Cider,
    /// BLEU of captions, up to 4 words.
    Bleu,
    /// The share of questions whose right candidate is the most likely one.
    Accuracy,
    /// Area under the ROC curve of the share that the positive candidate has.
    RocAuc,
}

impl Metric {
    /// Its name in task files.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Exact => "exact",
            Metric::Vqa => "vqa",
            Metric::Cider => "cider",
            Metric::Bleu => "bleu",
            Metric::Accuracy => "accuracy",
            Metric::RocAuc => "roc_auc",
        }
    }

    /// Whether it compares candidates, not generated text.
    pub fn is_closed(self) -> bool {
        match self {
            Metric::Accuracy | Metric::RocAuc => true,
            Metric::Exact | Metric::Vqa | Metric::Cider | Metric::Bleu => false,
        }
    }
}

/// An answer and what it is held against.
#[derive(Clone, Copy, Debug)]
pub struct Judged<'a> {
    /// What the model said: its text, or the most likely candidate.
    pub given: &'a str,
    /// Right answers.
    pub references: &'a [String],
    /// What the positive candidate has of all candidates' probability; 0 for generated text.
    pub positive_share: f64,
    /// Whether the positive candidate is right.
    pub is_positive: bool,
}

/// What one answer contributes to a score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Figure {
    /// A value whose mean is the score.
    Value(f64),
    /// A class and a score, for the area under the ROC curve.
    Ranked {
        /// Whether the positive candidate is right.
        positive: bool,
        /// The positive candidate's share.
        score: f64,
    },
    /// What BLEU adds up.
    Counts(BleuCounts),
}

/// Figures of answers, in their order.
pub fn figures(metric: Metric, judged: &[Judged<'_>]) -> Vec<Figure> {
    let value = |of: fn(&Judged<'_>) -> f64| -> Vec<Figure> {
        judged.iter().map(|one| Figure::Value(of(one))).collect()
    };
    match metric {
        Metric::Exact | Metric::Accuracy => value(|one| f64::from(u8::from(is_exact(one)))),
        Metric::Vqa => value(|one| vqa_accuracy(one.given, one.references)),
        Metric::Cider => cider::cider(&tokens_of(judged)).into_iter().map(Figure::Value).collect(),
        Metric::Bleu => {
            let counts = |(given, references): &TokenisedCaption| BleuCounts::of(given, references);
            tokens_of(judged).iter().map(counts).map(Figure::Counts).collect()
        }
        Metric::RocAuc => {
            let ranked = |one: &Judged<'_>| Figure::Ranked {
                positive: one.is_positive,
                score: one.positive_share,
            };
            judged.iter().map(ranked).collect()
        }
    }
}

/// The score that figures of one metric add up to; 0 for none.
pub fn score<'a>(figures: impl Iterator<Item = &'a Figure>) -> f64 {
    let (mut sum, mut n) = (0.0, 0usize);
    let (mut counts, mut ranked) = (BleuCounts::default(), Vec::new());
    for figure in figures {
        n += 1;
        match figure {
            Figure::Value(value) => sum += value,
            Figure::Counts(own) => counts.add(own),
            Figure::Ranked { positive, score } => ranked.push((*score, *positive)),
        }
    }
    match (ranked.is_empty(), counts.is_empty()) {
        (false, _) => roc::area(ranked),
        (true, false) => counts.bleu(4),
        (true, true) => sum / n.max(1) as f64,
    }
}

/// Words of a caption, and of each reference.
type TokenisedCaption = (Vec<String>, Vec<Vec<String>>);

fn tokens_of(judged: &[Judged<'_>]) -> Vec<TokenisedCaption> {
    let of = |one: &Judged<'_>| {
        let references = one.references.iter().map(|text| caption_tokens(text)).collect();
        (caption_tokens(one.given), references)
    };
    judged.iter().map(of).collect()
}

fn is_exact(one: &Judged<'_>) -> bool {
    one.references.iter().any(|right| right.trim() == one.given.trim())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Fixture {
        captions: Vec<Captions>,
        vqa: Vec<Vqa>,
        roc: Vec<Roc>,
    }

    #[derive(Deserialize)]
    struct Captions {
        rows: Vec<Row>,
        tokens: Vec<Vec<String>>,
        cider: f64,
        cider_each: Vec<f64>,
        bleu: Vec<f64>,
    }

    #[derive(Deserialize)]
    struct Row {
        answer: String,
        references: Vec<String>,
    }

    #[derive(Deserialize)]
    struct Vqa {
        answer: String,
        references: Vec<String>,
        normal: String,
        accuracy: f64,
    }

    #[derive(Deserialize)]
    struct Roc {
        labels: Vec<bool>,
        scores: Vec<f64>,
        auc: f64,
    }

    fn fixture() -> Fixture {
        serde_json::from_str(include_str!("../../tests/fixtures/metrics/metrics.json")).unwrap()
    }

    fn judged<'a>(given: &'a str, references: &'a [String]) -> Judged<'a> {
        Judged { given, references, positive_share: 0.0, is_positive: false }
    }

    fn near(what: &str, found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-6, "{what}: {found}, expected {expected}");
    }

    #[test]
    fn captions_have_the_words_that_corenlp_finds() {
        for captions in fixture().captions {
            for (row, expected) in captions.rows.iter().zip(&captions.tokens) {
                let texts = std::iter::once(&row.answer).chain(&row.references);
                let found: Vec<String> = texts.map(|text| caption_tokens(text).join(" ")).collect();
                assert_eq!(&found, expected);
            }
        }
    }

    #[test]
    fn cider_is_that_of_pycocoevalcap() {
        for captions in fixture().captions {
            let all: Vec<Judged<'_>> =
                captions.rows.iter().map(|row| judged(&row.answer, &row.references)).collect();
            let found = figures(Metric::Cider, &all);
            near("CIDEr", score(found.iter()), captions.cider);
            for (index, (found, expected)) in found.iter().zip(&captions.cider_each).enumerate() {
                let Figure::Value(found) = found else { panic!("CIDEr is a mean") };
                near(&format!("caption {index}"), *found, *expected);
            }
        }
    }

    #[test]
    fn bleu_is_that_of_pycocoevalcap() {
        for captions in fixture().captions {
            let all: Vec<Judged<'_>> =
                captions.rows.iter().map(|row| judged(&row.answer, &row.references)).collect();
            let found = figures(Metric::Bleu, &all);
            near("BLEU-4", score(found.iter()), captions.bleu[3]);
            let mut counts = BleuCounts::default();
            for figure in &found {
                let Figure::Counts(own) = figure else { panic!("BLEU adds counts") };
                counts.add(own);
            }
            for (n, expected) in (1..).zip(&captions.bleu) {
                near(&format!("BLEU-{n}"), counts.bleu(n), *expected);
            }
        }
    }

    #[test]
    fn vqa_accuracy_is_the_official_suites() {
        let cases = fixture().vqa;
        for case in &cases {
            assert_eq!(normal_answer(&case.answer), case.normal, "{:?}", case.answer);
            near(&case.answer, vqa_accuracy(&case.answer, &case.references), case.accuracy);
        }
        let all: Vec<Judged<'_>> =
            cases.iter().map(|case| judged(&case.answer, &case.references)).collect();
        let mean = cases.iter().map(|case| case.accuracy).sum::<f64>() / cases.len() as f64;
        near("mean", score(figures(Metric::Vqa, &all).iter()), mean);
    }

    #[test]
    fn areas_are_those_of_scikit_learn() {
        for case in fixture().roc {
            let figure = |(positive, score): (&bool, &f64)| Figure::Ranked {
                positive: *positive,
                score: *score,
            };
            let figures: Vec<Figure> = case.labels.iter().zip(&case.scores).map(figure).collect();
            near("area", score(figures.iter()), case.auc);
        }
    }

    #[test]
    fn figures_are_read_as_written() {
        let counts = BleuCounts::of(&["a".to_owned()], &[vec!["a".to_owned(), "b".to_owned()]]);
        let figures = [
            Figure::Value(0.5),
            Figure::Ranked { positive: true, score: 0.25 },
            Figure::Counts(counts),
        ];
        let text = serde_json::to_string(&figures).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Figure>>(&text).unwrap(), figures);
    }
}
