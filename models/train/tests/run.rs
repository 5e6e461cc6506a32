//! A whole run of a tiny recipe: it learns, it goes on where it stopped, threads do not change it.

use std::path::Path;

use flamingo_train::checkpoint::load;
use flamingo_train::recipe::Recipe;
use flamingo_train::run::{FirstStage, Options, train};
use flamingo_train::weights::Weights;
use serde_json::Value;

fn recipe() -> Recipe {
    Recipe::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tiny.toml")).unwrap()
}

#[test]
fn the_recipe_of_the_demo_can_be_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/training.toml");
    let recipe = Recipe::read(&path).unwrap();
    assert_eq!(recipe.flamingo.data.len(), 4);
}

fn options(folder: &Path, threads: usize, stop_after: Option<usize>) -> Options {
    Options { folder: folder.to_owned(), threads, measured: 8, frozen_from: None, stop_after }
}

/// Lines of metrics without the time that they took.
fn metrics(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().remove("seconds");
        line
    });
    lines.collect()
}

#[test]
fn a_run_that_stopped_gives_the_weights_of_one_that_did_not() {
    let recipe = recipe();
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let result = train(&recipe, &options(whole.path(), 2, None)).unwrap();
    assert!(result.is_some());
    // Within each stage, at its end, and with another number of threads.
    for (threads, steps) in [(1, 5), (2, 7), (2, 11), (1, 20)] {
        let stopped = train(&recipe, &options(parts.path(), threads, Some(steps))).unwrap();
        assert_eq!(stopped, None);
    }
    assert_eq!(train(&recipe, &options(parts.path(), 1, None)).unwrap(), result);
    let read = |folder: &Path| std::fs::read(folder.join("checkpoint.safetensors")).unwrap();
    assert_eq!(read(whole.path()), read(parts.path()));
    let (weights, _, position) = load(&parts.path().join("training.safetensors")).unwrap();
    assert_eq!((position.stage.as_str(), position.step), ("flamingo", 12));
    assert!(weights.contains("perceiver.latents"));
    assert_eq!(metrics(whole.path()).last(), metrics(parts.path()).last());

    let mut other = recipe;
    other.seed += 1;
    let error = train(&other, &options(parts.path(), 1, None)).unwrap_err().to_string();
    assert!(error.contains("another recipe"), "{error}");
}

#[test]
fn every_stage_learns_and_the_frozen_parts_stay() {
    let mut recipe = recipe();
    recipe.contrastive.schedule.steps = 60;
    recipe.language_training.schedule.steps = 120;
    recipe.flamingo.schedule.steps = 80;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let frozen_at = 180;
    assert_eq!(train(&recipe, &options(path, 2, Some(frozen_at))).unwrap(), None);
    let (before, ..) = load(&path.join("training.safetensors")).unwrap();
    train(&recipe, &options(path, 2, None)).unwrap().unwrap();
    let (after, ..) = load(&path.join("training.safetensors")).unwrap();

    let is_new = |name: &str| name.starts_with("perceiver.") || name.contains("gated_cross_attn");
    for (name, weight) in before.iter().filter(|(name, _)| !is_new(name)) {
        let (old, new) = (weight.value.clone(), after.get(name));
        let [old, new]: [Vec<f32>; 2] = [old, new].map(|v| v.into_data().try_into_vec().unwrap());
        let width = weight.shape.last().copied().unwrap_or(1);
        let changed: Vec<usize> =
            (0..old.len()).filter(|i| old[*i] != new[*i]).map(|i| i / width).collect();
        // `<eoc>`, the fourth word, has the only row of the frozen parts that learns.
        let eoc_only = name == "model.embed_tokens.weight" && changed.iter().all(|row| *row == 3);
        assert!(changed.is_empty() || eoc_only, "{name} changed in rows {changed:?}");
    }
    let lines = metrics(path);
    for (stage, factor) in [("contrastive", 0.9), ("language", 0.6), ("flamingo", 0.8)] {
        let losses: Vec<f64> = lines
            .iter()
            .filter(|line| line["stage"] == stage && line["losses"].is_object())
            .map(|line| line["losses"]["loss"].as_f64().unwrap())
            .collect();
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(last < factor * first, "{stage}: {losses:?}");
    }
    let gates = &lines.iter().rfind(|line| line["gates"].is_array()).unwrap()["gates"];
    let open = gates.as_array().unwrap().iter().filter(|gate| gate.as_f64().unwrap().abs() > 0.02);
    assert!(open.count() >= 2, "{gates}");

    // Another stage 3 over the same frozen parts.
    recipe.flamingo.schedule.steps = 2;
    recipe.flamingo.accumulate = false;
    recipe.gated.tanh_gate = false;
    let value = |w: &Weights, name: &str| w.get(name).into_data().try_into_vec::<f32>().unwrap();
    let checkpoint = path.join("training.safetensors");
    // First of the run, then of the model that it wrote, which has no checkpoint of the run. The language model is the
    // same whether it is taken over or trained again.
    for first in [FirstStage::Flamingo, FirstStage::Language] {
        let other = tempfile::tempdir().unwrap();
        let frozen_from = Some((path.to_owned(), first));
        let options = Options { frozen_from, ..options(other.path(), 2, None) };
        train(&recipe, &options).unwrap().unwrap();
        let (taken, ..) = load(&other.path().join("training.safetensors")).unwrap();
        for name in ["conv1.weight", "model.layers.1.mlp.up_proj.weight"] {
            assert_eq!(value(&taken, name), value(&after, name));
        }
        assert_ne!(value(&taken, "perceiver.latents"), value(&after, "perceiver.latents"));
        let _ = std::fs::remove_file(&checkpoint);
    }
}
