//! The trainer's own forward pass and the artifact compiled of its files give the same numbers; a model whose
//! gates are 0 is its language model.

use std::path::Path;
use std::sync::Arc;

use flamingo_runtime::backend::Media;
use flamingo_runtime::{GenerateOptions, Model, PromptFile, Segment};
use flamingo_scenes::Split;
use flamingo_scenes::episode::{Episode, Style, Task};
use flamingo_scenes::random::stream;
use flamingo_scenes::words::Vocabulary;
use flamingo_tests::{compiled, opening, tiny_scenes};
use flamingo_train::batch::Batch;
use flamingo_train::export::export;
use flamingo_train::pictures::{Painting, Pictures};
use flamingo_train::recipe::Recipe;
use flamingo_train::stage::contrastive::ContrastiveStage;
use flamingo_train::stage::flamingo::{FlamingoStage, logits, media_options};
use flamingo_train::stage::language::LanguageStage;
use flamingo_train::weights::Weights;
use flamingoc::eval::{EvalOptions, Question, Score, eval, tasks, words};
use flamingoc::parity::compare;

/// OpenAI CLIP's mean and standard deviation.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const DEVIATION: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

fn recipe() -> Recipe {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    Recipe::read(&folder.join("../models/train/tests/tiny.toml")).unwrap()
}

/// Random weights with gates of a value.
fn weights(recipe: &Recipe, attention: f32, feed_forward: f32) -> Weights {
    let mut weights = ContrastiveStage::new(recipe, 1).start();
    weights.extend(LanguageStage::new(recipe, 1).start());
    weights.extend(FlamingoStage::start(recipe));
    for layer in 0..recipe.language.layers {
        let name = |part| format!("model.layers.{layer}.gated_cross_attn_layer.{part}");
        weights.insert(name("attn_gate"), &[1], vec![attention]);
        weights.insert(name("ff_gate"), &[1], vec![feed_forward]);
    }
    weights
}

fn episodes(tasks: &[Task]) -> Vec<Episode> {
    let style = Style { split: Split::Test, dense: true, described: false };
    let mut rng = stream(5, "episodes");
    let vocabulary = Vocabulary::default();
    tasks.iter().map(|task| Episode::random(*task, style, &vocabulary, &mut rng)).collect()
}

fn paintings(episode: &Episode, number: u64) -> Vec<Painting> {
    episode.media.iter().map(|facts| Painting { facts: *facts, number }).collect()
}

/// The trainer's logits of one prompt, and the ids that they belong to.
fn trainer(recipe: &Recipe, w: &Weights, episode: &Episode, number: u64) -> Vec<f32> {
    trainer_with(recipe, w, episode, number, false)
}

/// The same, or with visual tokens of zeros.
fn trainer_with(
    recipe: &Recipe,
    w: &Weights,
    episode: &Episode,
    number: u64,
    blind: bool,
) -> Vec<f32> {
    let mut pictures = Pictures::new(&recipe.vision, w, 1, Split::Test, 1);
    let features = pictures.features(&paintings(episode, number));
    let episodes = std::slice::from_ref(episode);
    let (batch, options) = (Batch::new(episodes, |weight| weight), media_options(recipe, blind));
    let tracked = w.tracked(|_| false);
    let logits = logits(recipe, &tracked, &batch, &features, &options);
    logits.into_data().try_into_vec().unwrap()
}

/// The trainer's logits without media and gated blocks.
fn language_alone(recipe: &Recipe, w: &Weights, episode: &Episode) -> Vec<f32> {
    let batch = Batch::new(std::slice::from_ref(episode), |weight| weight);
    let logits = recipe.language.forward(&w.tracked(|_| false), batch.ids(), None);
    logits.into_data().try_into_vec().unwrap()
}

fn ids(episode: &Episode) -> Vec<u32> {
    let all: Vec<u32> = episode.tokens.iter().map(|token| token.id).collect();
    all[..all.len() - 1].to_vec()
}

/// The artifact's logits of the same prompt.
fn artifact(recipe: &Recipe, model: &Model, w: &Weights, episode: &Episode) -> Vec<f32> {
    model.logits(&ids(episode), &media(recipe, model, w, episode)).unwrap()
}

fn media(recipe: &Recipe, model: &Model, w: &Weights, episode: &Episode) -> Vec<Arc<Media>> {
    let pictures = Pictures::new(&recipe.vision, w, 1, Split::Test, 1);
    let mut media: Vec<Arc<Media>> = Vec::new();
    for painting in paintings(episode, 0) {
        let frames = pictures.frames(&painting);
        let values: Vec<f32> = frames.iter().flat_map(|pixels| normalised(pixels)).collect();
        media.extend(model.encode_pixels(&values, 1, frames.len()).unwrap());
    }
    media
}

/// `[3, side, side]` of a picture of `[side, side, 3]` bytes.
fn normalised(pixels: &[u8]) -> Vec<f32> {
    let plane = |c: usize| {
        let values = pixels.iter().skip(c).step_by(3);
        values.map(move |v| (f32::from(*v) / 255.0 - MEAN[c]) / DEVIATION[c])
    };
    (0..3).flat_map(plane).collect()
}

#[test]
fn the_artifact_computes_what_the_trainer_computes() {
    let recipe = recipe();
    let w = weights(&recipe, 0.6, -0.4);
    let folder = tempfile::tempdir().unwrap();
    export(folder.path(), &recipe, &w).unwrap();
    let (_scratch, path) = compiled(&folder.path().join("recipe.toml"));
    let tasks = [Task::Attribute, Task::Pair, Task::Video, Task::Which(3), Task::FewShot(6)];
    for backend in ["native", "ort"] {
        let model = Model::open(&path, &opening(backend)).unwrap();
        let vocabulary = model.manifest().config.language.vocabulary;
        for episode in episodes(&tasks) {
            let found = artifact(&recipe, &model, &w, &episode);
            let expected = trainer(&recipe, &w, &episode, 0);
            let comparison = compare("logits", &found, &expected, vocabulary).unwrap();
            assert!(comparison.pass, "{backend} {:?}: {comparison:?}", episode.task);

            let media = media(&recipe, &model, &w, &episode);
            let blind: Vec<Arc<Media>> = media.iter().map(|m| Arc::new(m.blind())).collect();
            let found = model.logits(&ids(&episode), &blind).unwrap();
            let expected = trainer_with(&recipe, &w, &episode, 0, true);
            let comparison = compare("logits", &found, &expected, vocabulary).unwrap();
            assert!(comparison.pass, "{backend} {:?}, blind: {comparison:?}", episode.task);
        }
    }
}

#[test]
fn with_gates_of_zero_the_model_is_its_language_model() {
    let recipe = recipe();
    let w = weights(&recipe, 0.0, 0.0);
    let folder = tempfile::tempdir().unwrap();
    export(folder.path(), &recipe, &w).unwrap();
    let (_scratch, path) = compiled(&folder.path().join("recipe.toml"));
    let model = Model::open(&path, &opening("native")).unwrap();
    let vocabulary = model.manifest().config.language.vocabulary;
    for episode in episodes(&[Task::Which(2), Task::Video, Task::Repeat]) {
        let alone = language_alone(&recipe, &w, &episode);
        assert_eq!(trainer(&recipe, &w, &episode, 0), alone, "{:?}", episode.task);
        let found = artifact(&recipe, &model, &w, &episode);
        let comparison = compare("logits", &found, &alone, vocabulary).unwrap();
        assert!(comparison.pass, "{:?}: {comparison:?}", episode.task);
    }
}

/// Before the first picture no medium changes anything, yet the gated feed-forward part runs.
#[test]
fn before_the_first_picture_only_the_feed_forward_part_adds() {
    let recipe = recipe();
    let mut episode = episodes(&[Task::Attribute]).remove(0);
    let before = episode.tokens[1..].iter().filter(|t| t.weight > 0.0).copied();
    let before: Vec<_> = before.collect();
    let n_before = 1 + before.len();
    episode.tokens.splice(1..1, before);
    let vocabulary = Vocabulary::default().size();
    let rows = |logits: Vec<f32>| logits[..n_before * vocabulary].to_vec();

    let (open, shut) = (weights(&recipe, 0.9, 0.7), weights(&recipe, 0.9, 0.0));
    let seen = |w: &Weights, number| rows(trainer(&recipe, w, &episode, number));
    assert_eq!(seen(&open, 0), seen(&open, 1), "another painting");
    assert_ne!(
        trainer(&recipe, &open, &episode, 0),
        trainer(&recipe, &open, &episode, 1),
        "the picture matters after it"
    );
    let alone = rows(language_alone(&recipe, &open, &episode));
    assert_eq!(seen(&shut, 0), alone, "cross-attention adds exactly 0");
    assert_ne!(seen(&open, 0), alone, "the feed-forward part runs");
}

/// Scores lie in their intervals, and a seed gives one score; a model of other words is refused.
#[test]
fn eval_counts_answers_of_the_demo_tasks() {
    let recipe = recipe();
    let w = weights(&recipe, 0.6, -0.4);
    let folder = tempfile::tempdir().unwrap();
    export(folder.path(), &recipe, &w).unwrap();
    let (_scratch, path) = compiled(&folder.path().join("recipe.toml"));
    let model = Model::open(&path, &opening("native")).unwrap();
    let tasks = tasks(&[], &[2]).unwrap();
    let options = EvalOptions { tasks, split: Split::Test, n: 10, seed: 1, blind: false };
    let mut asked = 0;
    let scores = eval(&model, &options, &mut |_, _| {
        asked += 1;
        Ok(())
    })
    .unwrap();
    assert_eq!((asked, scores.len()), (10 * options.tasks.len(), options.tasks.len()));
    let fits = |s: &Score| s.low <= s.score && s.score <= s.high && s.n == 10;
    assert!(scores.iter().all(fits), "{scores:?}");
    assert_eq!(eval(&model, &options, &mut |_, _| Ok(())).unwrap(), scores);

    let (_scratch, other) = compiled(&tiny_scenes());
    let other = Model::open(&other, &opening("native")).unwrap();
    let error = eval(&other, &options, &mut |_, _| Ok(())).unwrap_err().to_string();
    assert!(error.contains("flamingo-train"), "{error}");
}

/// A prompt that was saved, read from its files, gives the tokens that were asked, and the answer that was given.
#[test]
fn saved_prompts_are_those_that_were_asked() {
    let recipe = recipe();
    let folder = tempfile::tempdir().unwrap();
    export(folder.path(), &recipe, &weights(&recipe, 0.6, -0.4)).unwrap();
    let (_scratch, path) = compiled(&folder.path().join("recipe.toml"));
    let model = Model::open(&path, &opening("native")).unwrap();
    let names = ["caption", "video", "which_2", "few_shot"].map(str::to_owned);
    let tasks = tasks(&names, &[2]).unwrap();
    let options = EvalOptions { tasks, split: Split::Test, n: 2, seed: 5, blind: false };
    let mut n_saved = 0;
    let mut check = |question: &Question, given: &[u32]| {
        n_saved += 1;
        let saved = tempfile::tempdir()?;
        let line = question.save(saved.path())?;
        assert_eq!(line["answer"], words(&question.answer));
        let segments: Vec<Segment> = serde_json::from_value(line["segments"].clone())?;
        let mut prompt = PromptFile { segments, ..PromptFile::default() };
        prompt.resolve(saved.path());
        assert_eq!(model.encode_prompt(&prompt)?, question.prompt, "{line}");
        let options = GenerateOptions {
            max_new_tokens: given.len(),
            ignore_stops: true,
            ..GenerateOptions::default()
        };
        let answer = model.generate(&prompt, &options, &mut |_| {})?;
        assert_eq!(answer.tokens, given, "{line}");
        Ok(())
    };
    eval(&model, &options, &mut check).unwrap();
    assert_eq!(n_saved, 8);
}
