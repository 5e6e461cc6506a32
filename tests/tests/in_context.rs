//! In-context learning: shared questions score as PyTorch ranks and as each alone, scores rise with examples, runs that
//! were interrupted give the same figures, and what the reference suite gets wrong is not copied.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flamingo_runtime::{
    Limits, Medium, Model, OpenOptions, Question, VisualCache, VisualCacheOptions,
};
use flamingo_tests::{Golden, compiled, golden_folders, opening};
use flamingoc::eval::ask::{AskOptions, Asker, Sharing};
use flamingoc::eval::builtin::builtin;
use flamingoc::eval::features::Features;
use flamingoc::eval::journal::{Answer, Journal};
use flamingoc::eval::run::{Ended, Outcome, measure_sharing, outcome, run};
use flamingoc::eval::select::Select;
use flamingoc::eval::task::Task;

/// Nearer logits of PyTorch are a tie.
const TIE: f64 = 1e-3;

fn demo() -> (tempfile::TempDir, PathBuf) {
    compiled(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo"))
}

fn options(select: Select, n: usize) -> AskOptions {
    AskOptions { select, ensemble: 1, seed: 1, n, reference_bugs: false, sharing: Sharing::All }
}

fn scores(model: &Model, task: &Task, options: &AskOptions, shots: &[usize]) -> Vec<Outcome> {
    let mut asker = Asker::new(model, task, options).unwrap();
    let mut journal = Journal::in_memory();
    let ended = run(&mut asker, shots, &mut journal, usize::MAX, &mut |_| Ok(())).unwrap();
    assert_eq!(ended, Ended::Whole);
    shots.iter().map(|shots| outcome(&asker, *shots, &journal).unwrap().0).collect()
}

/// Every token of the vocabulary as a candidate, after every fourth token of each golden prompt: ranked as by PyTorch's
/// logits, and questions asked together have the bits of each asked alone.
#[test]
fn candidates_are_ranked_as_by_pytorch() {
    for folder in golden_folders() {
        let (_scratch, artifact) = compiled(&folder);
        let model = Model::open(&artifact, &opening("native")).unwrap();
        let golden = Golden::read(&folder);
        let mut n_ranked = 0;
        for case in golden.cases() {
            let (Some(ids), Some(logits)) =
                (golden.ids(&case, "input_ids"), golden.f32(&case, "logits"))
            else {
                continue;
            };
            let media: Vec<Medium> = match golden.get(&case, "pixel_values") {
                None => Vec::new(),
                Some(pixels) => {
                    let (values, shape) = (pixels.to_f32_vec().unwrap(), pixels.shape());
                    let media = model.encode_pixels(&values, shape[0], shape[1]).unwrap();
                    media.into_iter().map(Medium::from).collect()
                }
            };
            let n_vocabulary = logits.len() / ids.len();
            let candidates: Vec<Vec<u32>> = (0..n_vocabulary as u32).map(|id| vec![id]).collect();
            let ends: Vec<usize> = (1..=ids.len()).rev().step_by(4).collect();
            let question = |end: &usize| Question {
                ids: ids[..*end].to_vec(),
                media: media.clone(),
                continuations: candidates.clone(),
            };
            let questions: Vec<Question> = ends.iter().map(question).collect();
            let together =
                model.session().unwrap().score_each(&questions, &Limits::default()).unwrap();
            for ((end, question), scores) in ends.iter().zip(&questions).zip(&together) {
                let scores: Vec<f64> = scores.iter().map(|tokens| tokens[0]).collect();
                let expected = &logits[(end - 1) * n_vocabulary..][..n_vocabulary];
                n_ranked += assert_same_order(
                    &scores,
                    expected,
                    &format!("{} {case} {end}", folder.display()),
                );
                let mut alone = model.session().unwrap();
                alone.append_ids(&question.ids, &question.media, &Limits::default()).unwrap();
                let alone = alone.score(&candidates, &Limits::default()).unwrap();
                let alone: Vec<f64> = alone.iter().map(|tokens| tokens[0]).collect();
                assert_eq!(scores, alone, "{} {case} {end}", folder.display());
            }
        }
        assert!(n_ranked > 100, "{}: {n_ranked} candidates", folder.display());
    }
}

/// The order of candidates is the expected one, but for ties; how many were no tie.
fn assert_same_order(scores: &[f64], expected: &[f32], place: &str) -> usize {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| expected[*b].total_cmp(&expected[*a]));
    let mut n_ranked = 0;
    for pair in order.windows(2) {
        let gap = f64::from(expected[pair[0]]) - f64::from(expected[pair[1]]);
        if gap > TIE {
            n_ranked += 1;
            assert!(scores[pair[0]] > scores[pair[1]], "{place}: {pair:?}, gap {gap}");
        }
    }
    n_ranked
}

/// Continuations of several tokens after a beginning in common have the numbers of each alone.
#[test]
fn questions_with_a_common_beginning_score_as_each_alone() {
    let (_scratch, artifact) = demo();
    let model = Model::open(&artifact, &OpenOptions { prefix_bytes: Some(0), ..opening("native") })
        .unwrap();
    let task = builtin("scenes-yes-no", 2).unwrap();
    let medium = |at: usize| -> Medium {
        let (values, n_frames) = task.queries.rows[at].media[0].pixel_values(&model).unwrap();
        model.encode_medium(&values, n_frames).unwrap()
    };
    let ids = |words: &str| {
        model.tokenizer().unwrap().encode_fast(words, false).unwrap().get_ids().to_vec()
    };
    let beginning = ids("<image> is there a red star ? no <eoc>");
    let mut base = model.session().unwrap();
    base.append_ids(&beginning, &[medium(0)], &Limits::default()).unwrap();
    let question = |at: usize| Question {
        ids: ids(["<image> what", "<image>", "is there"][at % 3]),
        media: if at % 3 == 2 { Vec::new() } else { vec![medium(at)] },
        continuations: vec![ids("red star"), ids("blue"), ids("how many red circle")],
    };
    let questions: Vec<Question> = (1..80).map(question).collect();
    let together = base.score_each(&questions, &Limits::default()).unwrap();
    for (question, scores) in questions.iter().zip(together) {
        let mut alone = model.session().unwrap();
        let all = [beginning.as_slice(), &question.ids].concat();
        let media = [vec![medium(0)], question.media.clone()].concat();
        alone.append_ids(&all, &media, &Limits::default()).unwrap();
        assert_eq!(scores, alone.score(&question.continuations, &Limits::default()).unwrap());
    }
    assert!(base.score_each(&[], &Limits::default()).unwrap().is_empty());
    let empty = Question { ids: Vec::new(), media: Vec::new(), continuations: Vec::new() };
    assert!(base.score_each(&[empty], &Limits::default()).is_err());
}

/// Without examples the model begins a caption, with the size; with four the wanted property is known, and 32 run though
/// training saw five pictures.
#[test]
fn scores_rise_with_examples() {
    let (_scratch, artifact) = demo();
    let model = Model::open(&artifact, &opening("native")).unwrap();
    let none = |name: &str| Task { text_examples: 0, ..builtin(name, 1).unwrap() };
    for (name, least) in [("scenes-color", 0.85), ("scenes-place", 0.85)] {
        let found = scores(&model, &none(name), &options(Select::Random, 80), &[0, 4, 32]);
        assert!(found[0].score < 0.3, "{name}: {}", found[0].score);
        let found: Vec<f64> = found.iter().map(|found| found.score).collect();
        assert!(found[1] > least && found[2] > least, "{name}: {found:?}");
    }
    let bind = builtin("scenes-bind", 1).unwrap();
    let ask = |options: &AskOptions, shots: &[usize]| -> Vec<f64> {
        scores(&model, &bind, options, shots).iter().map(|found| found.score).collect()
    };
    let random = ask(&options(Select::Random, 150), &[0, 2, 8]);
    assert!(random[0] < 0.7 && random[2] > 0.85, "{random:?}");
    let rices = ask(&options(Select::Rices, 150), &[2, 8]);
    assert!(rices[0] >= random[1] && rices[1] > 0.85, "{rices:?} {random:?}");
    let many = AskOptions { ensemble: 4, ..options(Select::Random, 60) };
    let ensemble = ask(&many, &[8]);
    assert!(ensemble[0] > 0.85, "{ensemble:?}");
}

/// A second run with the file of features encodes no picture to choose examples, and chooses the same.
#[test]
fn features_that_were_kept_are_not_computed_again() {
    let (_scratch, artifact) = demo();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rices");
    let task = Task { support_size: 40, ..builtin("scenes-bind", 1).unwrap() };
    let options = options(Select::Rices, 6);
    let run_once = |features: Features| {
        let model = Model::open(&artifact, &opening("native")).unwrap();
        let n_encoded = || {
            let records = model.backend().take_profile();
            let is_first = |node: &str| node == "vision.patch_embedding";
            records.iter().filter(|record| is_first(&record.node)).count()
        };
        assert!(model.backend().set_profiling(true));
        let mut asker = Asker::with_features(&model, &task, &options, features).unwrap();
        let n_support = n_encoded();
        let mut chosen = Vec::new();
        let numbers: Vec<usize> = (0..options.n).collect();
        asker
            .ask(4, &numbers, &mut |answer| {
                chosen.push((answer.query, answer.examples, answer.likelihoods));
                Ok(())
            })
            .unwrap();
        (n_support, chosen)
    };
    let (n_encoded, without) = run_once(Features::in_memory());
    assert_eq!(n_encoded, 40);
    let (n_encoded, first) = run_once(Features::open(&path).unwrap());
    assert_eq!(n_encoded, 40);
    let n_lines = fs::read_to_string(&path).unwrap().lines().count();
    let (n_encoded, second) = run_once(Features::open(&path).unwrap());
    assert_eq!(n_encoded, 0);
    assert!(first == without && second == first, "{first:?} {second:?}");
    // A header, the examples and the questions; the second run added nothing.
    assert_eq!((n_lines, fs::read_to_string(&path).unwrap().lines().count()), (1 + 40 + 6, 47));
}

/// A run that stops after any number of answers, and one whose last line was cut, give the figures of one that did not.
#[test]
fn interrupted_runs_give_the_same_figures() {
    let (_scratch, artifact) = demo();
    let model = Model::open(&artifact, &opening("native")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (name, select) in [("scenes-yes-no", Select::Fixed), ("scenes-caption", Select::Random)] {
        let task = builtin(name, 1).unwrap();
        let options = options(select, 40);
        let whole = scores(&model, &task, &options, &[0, 4]);
        let path = folder.path().join(name);
        let (mut ended, mut n_runs) = (Ended::Stopped, 0);
        while ended == Ended::Stopped {
            let mut journal = Journal::open(&path, "run").unwrap();
            let mut asker = Asker::new(&model, &task, &options).unwrap();
            ended = run(&mut asker, &[0, 4], &mut journal, 13, &mut |_| Ok(())).unwrap();
            let bytes = fs::read(&path).unwrap();
            if ended == Ended::Stopped {
                fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
            }
            n_runs += 1;
        }
        assert!(n_runs > 5, "{n_runs}");
        let journal = Journal::open(&path, "run").unwrap();
        let asker = Asker::new(&model, &task, &options).unwrap();
        for expected in whole {
            assert_eq!(outcome(&asker, expected.shots, &journal).unwrap().0, expected);
        }
    }
}

/// What is shared changes no likelihood by a bit.
#[test]
fn sharing_changes_no_number() {
    let (_scratch, artifact) = demo();
    let model = Model::open(&artifact, &opening("native")).unwrap();
    let visual_cache = Some(Arc::new(VisualCache::new(&VisualCacheOptions::off())));
    let alone = OpenOptions { prefix_bytes: Some(0), visual_cache, ..opening("native") };
    let alone = Model::open(&artifact, &alone).unwrap();
    for (name, ensemble) in [("scenes-bind", 3), ("digits-closed", 1)] {
        let task = builtin(name, 1).unwrap();
        let options = AskOptions { ensemble, ..options(Select::Fixed, 40) };
        let report = measure_sharing(&model, &alone, &task, &options, 8).unwrap();
        assert_eq!((report.n, report.largest_difference), (40, 0.0), "{report:?}");
    }
    let open = builtin("digits", 1).unwrap();
    assert!(measure_sharing(&model, &alone, &open, &options(Select::Fixed, 4), 8).is_err());
}

/// Generated in common passes, by one beam or several, an answer is that of its question alone.
#[test]
fn texts_are_those_of_each_question_alone() {
    let (_scratch, artifact) = demo();
    let model = Model::open(&artifact, &OpenOptions { prefix_bytes: Some(0), ..opening("native") })
        .unwrap();
    for (select, beams) in [(Select::Fixed, 3), (Select::Fixed, 1), (Select::Random, 3)] {
        let task = Task { beams, ..builtin("scenes-caption", 1).unwrap() };
        let together = options(select, 40);
        let alone = AskOptions { sharing: Sharing::Pictures, ..together.clone() };
        for shots in [0, 3] {
            let texts = |options: &AskOptions| -> Vec<(Vec<usize>, String)> {
                let found = answers(&model, &task, options, shots);
                assert!(found.values().all(|answer| answer.bad.is_none()));
                found.into_values().map(|answer| (answer.examples, answer.given)).collect()
            };
            let (together, alone) = (texts(&together), texts(&alone));
            assert_eq!(together, alone, "{select:?}, {beams} beams, {shots} shots");
            let different: BTreeSet<&String> = alone.iter().map(|(_, text)| text).collect();
            assert!(different.len() > 20, "{different:?}");
        }
    }
}

fn answers(
    model: &Model,
    task: &Task,
    options: &AskOptions,
    shots: usize,
) -> BTreeMap<usize, Answer> {
    let mut asker = Asker::new(model, task, options).unwrap();
    let numbers: Vec<usize> = (0..asker.queries().len()).collect();
    let mut answers = BTreeMap::new();
    let mut keep = |answer: Answer| {
        answers.insert(answer.query, answer);
        Ok(())
    };
    asker.ask(shots, &numbers, &mut keep).unwrap();
    answers
}

/// In the reference suite a zero-shot question sees the first example's picture: with one candidate for all pictures of the
/// examples, its answers do not depend on the question's own picture.
#[test]
fn the_references_bug_is_copied_only_if_asked_for() {
    let (_scratch, artifact) = demo();
    let model = Model::open(&artifact, &opening("native")).unwrap();
    let task = builtin("digits-closed", 1).unwrap();
    let right = options(Select::Fixed, 20);
    let bug = AskOptions { reference_bugs: true, ..right.clone() };
    let distinct = |options: &AskOptions| {
        let found = answers(&model, &task, options, 0);
        let mut all: Vec<Vec<u64>> = found
            .values()
            .map(|answer| answer.likelihoods.iter().map(|value| value.to_bits()).collect())
            .collect();
        all.sort();
        all.dedup();
        all.len()
    };
    assert_eq!(distinct(&bug), 1, "all see the same picture");
    assert_eq!(distinct(&right), 20);
}

/// Pictures that cannot be read are counted, as examples replaced, and never stop a run.
#[test]
fn bad_pictures_are_counted() {
    let (_scratch, artifact) = demo();
    let model = Model::open(&artifact, &opening("native")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/images");
    let picture = fs::read(images.join("caption-0-0-0.png")).unwrap();
    fs::write(folder.path().join("good.png"), &picture).unwrap();
    fs::write(folder.path().join("cut.png"), &picture[..picture.len() / 2]).unwrap();
    let row = |name: &str, n: usize| {
        format!("{{\"image\": \"{name}.png\", \"answer\": \"red\", \"n\": {n}}}\n")
    };
    let rows: String = (0..12).map(|n| row(if n % 3 == 0 { "cut" } else { "good" }, n)).collect();
    fs::write(folder.path().join("rows.jsonl"), rows + "nothing\n").unwrap();
    let text = r#"
        metric = "accuracy"
        candidates = ["red", "blue"]
        prompt = { query = "<image>", answer = " {answer}" }
        support = { file = "rows.jsonl" }
        queries = { file = "rows.jsonl" }
    "#;
    fs::write(folder.path().join("task.toml"), text).unwrap();
    let task =
        Task::read(&folder.path().join("task.toml"), model.manifest().config.family).unwrap();
    assert_eq!(task.bad().map(|bad| bad.values().sum::<usize>()), [1, 1]);
    for select in [Select::Fixed, Select::Random, Select::Rices] {
        let found = scores(&model, &task, &options(select, 100), &[0, 3]);
        let counts: Vec<(usize, usize)> = found.iter().map(|found| (found.n, found.bad)).collect();
        assert_eq!(counts, [(8, 4); 2], "{select:?}");
        let shown = answers(&model, &task, &options(select, 100), 3);
        for answer in shown.values().filter(|answer| answer.bad.is_none()) {
            assert_eq!(answer.examples.len(), 3, "{select:?}");
            assert!(
                !answer.examples.contains(&answer.query),
                "{select:?}: a question shows itself"
            );
            assert!(answer.examples.iter().all(|place| place % 3 != 0), "{select:?}: {answer:?}");
        }
    }
    let many = options(Select::Fixed, 100);
    let mut asker = Asker::new(&model, &task, &many).unwrap();
    let mut journal = Journal::in_memory();
    run(&mut asker, &[30], &mut journal, usize::MAX, &mut |_| Ok(())).unwrap();
    let error = outcome(&asker, 30, &journal).unwrap_err().to_string();
    assert!(error.contains("30 examples where the data has"), "{error}");
}

#[test]
fn task_files_say_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("task.toml");
    fs::write(folder.path().join("rows.jsonl"), "{\"answer\": \"red\"}\n").unwrap();
    let data = "support = { file = \"rows.jsonl\" }\nqueries = { file = \"rows.jsonl\" }\n";
    for (text, expected) in [
        (
            "metric = \"accuracy\"\nprompt = { query = \"a\", answer = \"{answer}\" }\n",
            "candidates",
        ),
        ("metric = \"vqa\"\nprompt = { form = \"vqa\" }\n", "a row without the field `question`"),
        (
            "metric = \"cider\"\nprompt = { form = \"caption\" }\n",
            "0 media where the template has 1",
        ),
        ("metric = \"exact\"\nprompt = { query = \"a\", answer = \"b\" }\n", "`answer` with"),
        ("metric = \"exact\"\nprompt = { paper = true }\n", "`form`"),
        ("metric = \"best\"\nprompt = { form = \"vqa\" }\n", "unknown variant `best`"),
        ("metric = \"exact\"\ncolor = 1\nprompt = { form = \"vqa\" }\n", "unknown field `color`"),
        (
            "metric = \"roc_auc\"\ncandidates = [\"red\"]\npositive = \"blue\"\nprompt = { query = \"a\", answer = \"{answer}\" }\n",
            "`positive`",
        ),
    ] {
        fs::write(&path, format!("{text}{data}")).unwrap();
        let error =
            format!("{:#}", Task::read(&path, flamingo_models::Family::OpenFlamingo).unwrap_err());
        assert!(error.contains(expected) && error.contains("task.toml"), "{error}");
    }
}
