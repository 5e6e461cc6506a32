//! Training over shards: it learns and goes on where it stopped; pages stream; what cannot be used is named.

use std::path::{Path, PathBuf};

use flamingo_data::pages;
use flamingo_data::phi::media_indices;
use flamingo_data::vocabulary::Vocabulary;
use flamingo_data::{Sample, ShardReader, ShardWriter};
use flamingo_scenes::words::{IMAGE, PAD};
use flamingo_train::checkpoint::load;
use flamingo_train::export::write_tokenizer;
use flamingo_train::recipe::{DataSet, Recipe};
use flamingo_train::run::{FirstStage, Options, train};
use flamingo_train::scenes::{self, Part, tasks};
use flamingo_train::shards::{ShardStream, Shown};
use flamingo_train::stage::Stage as _;
use flamingo_train::stage::contrastive::ContrastiveStage;
use flamingo_train::stage::flamingo::FlamingoStage;
use flamingo_train::stage::language::LanguageStage;
use flamingo_train::weights::Weights;
use serde_json::Value;

/// The tiny recipe with one data set of shards, as if it lay in `folder`.
fn recipe(folder: &Path, shards: &str, shift: Option<f64>, batch: usize) -> Recipe {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tiny.toml");
    let mut recipe = Recipe::read(&path).unwrap();
    let (shards, tasks) = (vec![PathBuf::from(shards)], Vec::new());
    let name = "shards".to_owned();
    recipe.flamingo.data = vec![DataSet { name, weight: 1.0, batch, shards, shift, tasks }];
    recipe.folder = folder.to_owned();
    recipe
}

/// Shards of generated scenes in `scenes` of a folder.
fn scenes(folder: &Path, list: &str, n_samples: usize, part: Part) -> Vec<Sample> {
    let options =
        scenes::Options { part, tasks: tasks(list).unwrap(), n_samples, seed: 4, shard_size: 17 };
    let out = folder.join("scenes");
    let report = scenes::build(&out, &options, &mut ()).unwrap();
    assert_eq!(report.samples, n_samples as u64);
    ShardReader::open(&out).unwrap().map(Result::unwrap).collect()
}

fn random_weights(recipe: &Recipe) -> Weights {
    let mut weights = ContrastiveStage::new(recipe, 1).start();
    weights.extend(LanguageStage::new(recipe, 1).start());
    weights.extend(FlamingoStage::start(recipe));
    weights
}

fn turn(recipe: &Recipe, turn: usize, threads: usize) -> Vec<Shown> {
    let mut stream = ShardStream::open(recipe, &recipe.flamingo.data[0]).unwrap();
    stream.turn(turn, threads).unwrap()
}

#[test]
fn a_run_over_shards_learns_and_goes_on_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    scenes(folder.path(), "caption,which:2,video", 50, Part::Train);
    let mut recipe = recipe(folder.path(), "scenes", Some(0.0), 8);
    recipe.contrastive.schedule.steps = 60;
    recipe.language_training.schedule.steps = 80;
    recipe.flamingo.schedule.steps = 60;
    let frozen = folder.path().join("frozen");
    let run = |name: &str, threads, stop_after, frozen_from| {
        let folder = folder.path().join(name);
        let options = Options { folder, threads, measured: 1, frozen_from, stop_after };
        train(&recipe, &options).unwrap()
    };
    assert_eq!(run("frozen", 2, Some(140), None), None);
    let from = || Some((frozen.clone(), FirstStage::Flamingo));
    let result = run("whole", 2, None, from());
    assert!(result.is_some());
    // 7 steps are 56 samples: more than there are.
    assert_eq!(run("parts", 1, Some(7), from()), None);
    assert_eq!(run("parts", 2, Some(20), from()), None);
    assert_eq!(run("parts", 1, None, from()), result);
    let path = |name: &str, file: &str| folder.path().join(name).join(file);
    let read = |name: &str| std::fs::read(path(name, "checkpoint.safetensors")).unwrap();
    assert!(read("whole") == read("parts"), "other weights");
    let (_, _, position) = load(&path("parts", "training.safetensors")).unwrap();
    assert_eq!((position.stage.as_str(), position.step), ("flamingo", 60));

    let metrics = std::fs::read_to_string(path("whole", "metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let losses: Vec<f64> = lines.filter_map(|line| line["losses"]["shards"].as_f64()).collect();
    assert!(losses[losses.len() - 1] < 0.8 * losses[0], "{losses:?}");
}

#[test]
fn scenes_give_the_same_bytes_and_weigh_their_answers() {
    let [one, two] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let samples = scenes(one.path(), "demo", 40, Part::Train);
    assert_eq!(scenes(two.path(), "demo", 40, Part::Train), samples);
    for file in ["000000.tar", "000002.tar", "stats.json", "tokenizer.json"] {
        let [one, two] = [&one, &two].map(|f| std::fs::read(f.path().join("scenes").join(file)));
        assert!(one.unwrap() == two.unwrap(), "{file}");
    }
    let tokenizer = Vocabulary::open(&one.path().join("scenes/tokenizer.json")).unwrap();
    assert_eq!((tokenizer.image, tokenizer.pad), (IMAGE, PAD));

    let three = tempfile::tempdir().unwrap();
    let unseen = scenes(three.path(), "attribute,few_shot:2", 10, Part::Unseen);
    // Three captions of up to eight words, else at most eight answers.
    let in_training = |s: &Sample| if s.source.contains("/captions:") { 1..25 } else { 1..9 };
    let samples_of_training = samples.iter().map(|s| (s, in_training(s)));
    for (sample, answers) in samples_of_training.chain(unseen.iter().map(|s| (s, 1..2))) {
        let weights = sample.weights.as_ref().unwrap();
        let full = weights.iter().filter(|weight| **weight >= 0.5).count();
        assert!(answers.contains(&full), "{}: {weights:?}", sample.source);
        let n_media = sample.text.iter().filter(|id| **id == IMAGE).count();
        assert_eq!(sample.pictures.len(), n_media * sample.n_frames);
        assert_eq!(sample.phi, media_indices(&sample.text, IMAGE, false));
        sample.pixels(n_media, 48).unwrap();
    }
    let is_video = |sample: &Sample| sample.source.contains("/video/");
    assert!(samples.iter().filter(|s| is_video(s)).all(|sample| sample.n_frames == 4));

    // As prompts: the samples of a turn in order, round after the last, with their own weights.
    let recipe = recipe(one.path(), "scenes", Some(0.0), 12);
    let shown = turn(&recipe, 3, 2);
    assert_eq!(shown, turn(&recipe, 3, 1));
    for (index, shown) in shown.iter().enumerate() {
        let sample = &samples[(36 + index) % 40];
        let (ids, weights): (Vec<u32>, Vec<f32>) =
            shown.prompt.tokens.iter().map(|token| (token.id, token.weight)).unzip();
        assert_eq!((&ids, Some(&weights)), (&sample.text, sample.weights.as_ref()));
        assert_eq!(shown.prompt.phi, sample.phi);
        let frames = shown.frames.concat();
        assert_eq!(frames, sample.pixels(shown.prompt.n_frames.len(), 48).unwrap());
    }
}

#[test]
fn pages_stream_into_training_and_the_coin_moves_their_words() {
    let folder = tempfile::tempdir().unwrap();
    write_tokenizer(folder.path()).unwrap();
    let vocabulary = Vocabulary::open(&folder.path().join("tokenizer.json")).unwrap();
    let pages = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/tests/pages");
    let options = pages::Options {
        image_size: 64,
        min_words: 30,
        shard_size: 3,
        window: 96,
        next: 0.0,
        ..pages::Options::default()
    };
    let out = folder.path().join("pages");
    let report = pages::build(&[pages], &out, &vocabulary, &options, None, &mut ()).unwrap();
    assert!(report.samples >= 6, "{}", report.samples);

    // Every word sees the next picture, the last one, or either, a page at a time.
    let count_next = |shift: f64| {
        let recipe = recipe(folder.path(), "pages", Some(shift), 32);
        let shown = turn(&recipe, 0, 2);
        let is_next = |shown: &&Shown| {
            let tokens = &shown.prompt.tokens;
            let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
            let (last, next) =
                (media_indices(&ids, IMAGE, false), media_indices(&ids, IMAGE, true));
            assert!([&last, &next].contains(&&shown.prompt.phi));
            assert!(shown.frames.iter().all(|frame| frame.len() == 48 * 48 * 3));
            let unknown = tokens.iter().filter(|token| token.id == PAD);
            assert!(unknown.clone().count() > 0 && unknown.clone().all(|t| t.weight == 0.0));
            shown.prompt.phi == next
        };
        shown.iter().filter(is_next).count()
    };
    assert_eq!((count_next(0.0), count_next(1.0)), (0, 32));
    assert!((6..=26).contains(&count_next(0.5)), "{}", count_next(0.5));

    // The default coin; a step is the same however it is come to.
    let recipe = recipe(folder.path(), "pages", None, 4);
    let weights = random_weights(&recipe);
    let stage = |threads| {
        let streams = ShardStream::open_all(&recipe).unwrap();
        FlamingoStage::new(&recipe, &weights, streams, threads)
    };
    let (mut one, mut two) = (stage(1), stage(2));
    for step in 0..3 {
        let (losses, gradients) = one.step(step, &weights).unwrap();
        assert!(losses[0].1.is_finite() && losses[0].1 > 1.0, "{losses:?}");
        assert!(gradients.contains_key("perceiver.latents"));
        if step != 1 {
            assert_eq!(two.step(step, &weights).unwrap().0, losses, "step {step}");
        }
    }
}

#[test]
fn samples_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = scenes(folder.path(), "caption", 1, Part::Train).remove(0);
    let text = |change: fn(&mut Vec<u32>)| {
        let mut sample = good.clone();
        change(&mut sample.text);
        sample
    };
    let silent = Sample { weights: Some(vec![0.0; good.text.len()]), ..good.clone() };
    let broken =
        Sample { pictures: vec![b"no picture".to_vec(); good.pictures.len()], ..good.clone() };
    let frames =
        Sample { pictures: vec![good.pictures[0].clone(); 5], n_frames: 5, ..good.clone() };
    let empty = Sample {
        text: Vec::new(),
        phi: Vec::new(),
        text_len: 0,
        weights: None,
        pictures: Vec::new(),
        n_frames: 1,
        ..good.clone()
    };
    let cases = [
        ("token", text(|ids| ids[2] = 4711), "token 4711"),
        ("image", text(|ids| ids[2] = IMAGE), "2 `<image>` in the text, and 1 media"),
        ("silent", silent, "no text that counts"),
        ("empty", empty, "no text that counts"),
        ("broken", broken, "picture 0: not a picture"),
        ("frames", frames, "media of 5 frames"),
    ];
    for (name, sample, expected) in cases {
        let mut shards = ShardWriter::create(&folder.path().join(name), 10).unwrap();
        [&good, &sample].into_iter().for_each(|sample| shards.push(sample).unwrap());
        shards.finish().unwrap();
        let recipe = recipe(folder.path(), &format!("{name}/000000.tar"), Some(0.0), 2);
        let mut stream = ShardStream::open(&recipe, &recipe.flamingo.data[0]).unwrap();
        let error = format!("{:#}", stream.turn(0, 2).unwrap_err());
        for part in [&format!("{name}/000000.tar`"), "sample `000000001`", expected] {
            assert!(error.contains(part), "{name}: {error}");
        }
    }
    let recipe = recipe(folder.path(), "nowhere.tar", None, 2);
    let error = format!("{:#}", ShardStream::open_all(&recipe).err().unwrap());
    assert!(error.contains("data set `shards`") && error.contains("nowhere.tar"), "{error}");
}
