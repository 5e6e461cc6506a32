//! Pictures of another side than a checkpoint's: its positions are resampled when it is compiled.

use std::fs;
use std::path::{Path, PathBuf};

use flamingo_ir::Tensor;
use flamingo_models::checkpoint::Checkpoint;
use flamingo_runtime::Model;
use flamingo_tests::{compiled, opening};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

/// Side of the golden's pictures in patches, and of those here.
const GRIDS: [usize; 2] = [2, 3];
const PATCH: usize = 14;
const POSITIONS: &str = "positional_embedding";

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/openflamingo-llama").join(file)
}

/// Pillow's weights from the one grid to the other.
fn pillows_weights() -> Vec<f64> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/src/build/positions.json");
    let cases: Vec<Value> = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let case = cases.iter().find(|case| {
        [&case["old"], &case["new"]] == GRIDS.map(Value::from).each_ref()
            && case["antialias"] == true
    });
    let weights = case.unwrap()["weights"].as_array().unwrap();
    weights.iter().map(|weight| weight.as_f64().unwrap()).collect()
}

/// Positions of the class token and of the new grid: each the sum over all old ones, both ways at once.
fn resampled(positions: &[f32], width: usize) -> Vec<f32> {
    let ([old, new], weights) = (GRIDS, pillows_weights());
    let mut out = positions[..width].to_vec();
    for (y, x, channel) in
        (0..new * new * width).map(|i| (i / width / new, i / width % new, i % width))
    {
        let mut sum = 0.0;
        for (from_y, from_x) in (0..old * old).map(|i| (i / old, i % old)) {
            let value = positions[(1 + from_y * old + from_x) * width + channel];
            sum += weights[y * old + from_y] * weights[x * old + from_x] * f64::from(value);
        }
        out.push(sum as f32);
    }
    out
}

/// The golden's files with another recipe, and with the vision encoder's positions as they are or resampled already.
fn source(folder: &Path, is_resampled: bool) {
    let lang_encoder = folder.join("lang_encoder");
    fs::create_dir_all(&lang_encoder).unwrap();
    for entry in fs::read_dir(golden("lang_encoder")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, lang_encoder.join(path.file_name().unwrap())).unwrap();
    }
    fs::copy(golden("checkpoint.pt"), folder.join("checkpoint.pt")).unwrap();
    let side = format!("image_size = {}", GRIDS[1] * PATCH);
    let recipe = fs::read_to_string(golden("recipe.toml")).unwrap();
    let recipe =
        recipe.replace("image_size = 28", &side).replace("clip_visual.pt", "clip.safetensors");
    fs::write(folder.join("recipe.toml"), recipe).unwrap();
    let file = Checkpoint::open(&golden("clip_visual.pt")).unwrap();
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for info in file.infos() {
        let tensor =
            Tensor::from_le_bytes(info.dtype, &info.shape, &file.bytes(&info.name).unwrap());
        let (mut values, mut shape) = (tensor.unwrap().to_f32_vec().unwrap(), info.shape.clone());
        if is_resampled && info.name == POSITIONS {
            values = resampled(&values, shape[1]);
            shape[0] = 1 + GRIDS[1] * GRIDS[1];
        }
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensors.push((info.name.clone(), shape, bytes));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(folder.join("clip.safetensors"), bytes).unwrap();
}

fn visual_tokens(is_resampled: bool) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    source(folder.path(), is_resampled);
    let (_scratch, artifact) = compiled(folder.path());
    let model = Model::open(&artifact, &opening("native")).unwrap();
    let side = GRIDS[1] * PATCH;
    assert_eq!(model.manifest().config.vision.image_size, side);
    assert_eq!(model.manifest().image.size, side);
    let pixels: Vec<f32> = (0..3 * side * side).map(|i| (i as f32 * 0.37).sin()).collect();
    let media = model.encode_pixels(&pixels, 1, 1).unwrap();
    media[0].visual_tokens.to_vec()
}

/// The recipe's side gives the numbers of a checkpoint whose positions were resampled before.
#[test]
fn positions_are_resampled_to_the_recipes_side() {
    let (found, expected) = (visual_tokens(false), visual_tokens(true));
    assert_eq!(found.len(), expected.len());
    let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "{worst}");
}
