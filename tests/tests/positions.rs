//! Pictures of another side than a checkpoint's: its positions are resampled when it is compiled.

use std::fs;
use std::path::{Path, PathBuf};

use flamingo_ir::Tensor;
use flamingo_models::checkpoint::Checkpoint;
use flamingo_runtime::Model;
use flamingo_tests::{compiled, opening};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

const PATCH: usize = 14;

/// A golden with open_clip's or timm's vision encoder, which are resampled with antialiasing.
struct Encoder {
    golden: &'static str,
    file: &'static str,
    positions: &'static str,
    /// Positions before those of patches.
    n_class: usize,
    /// Side of the golden's pictures in pixels.
    side: usize,
    /// Side of the golden's pictures in patches, and of those here.
    grids: [usize; 2],
}

const CLIP: Encoder = Encoder {
    golden: "openflamingo-llama",
    file: "clip_visual.pt",
    positions: "positional_embedding",
    n_class: 1,
    side: 28,
    grids: [2, 3],
};

const SIGLIP: Encoder = Encoder {
    golden: "siglip-timm",
    file: "siglip.pt",
    positions: "visual.trunk.pos_embed",
    n_class: 0,
    side: 48,
    grids: [3, 2],
};

impl Encoder {
    fn golden(&self, file: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(self.golden).join(file)
    }

    /// Pillow's weights from the one grid to the other.
    fn pillows_weights(&self) -> Vec<f64> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/src/build/positions.json");
        let cases: Vec<Value> = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        let case = cases.iter().find(|case| {
            [&case["old"], &case["new"]] == self.grids.map(Value::from).each_ref()
                && case["antialias"] == true
        });
        let weights = case.unwrap()["weights"].as_array().unwrap();
        weights.iter().map(|weight| weight.as_f64().unwrap()).collect()
    }

    /// Positions of the new grid: each the sum over all old ones, both ways at once.
    fn resampled(&self, positions: &[f32], width: usize) -> Vec<f32> {
        let ([old, new], weights) = (self.grids, self.pillows_weights());
        let mut out = positions[..self.n_class * width].to_vec();
        for (y, x, channel) in
            (0..new * new * width).map(|i| (i / width / new, i / width % new, i % width))
        {
            let mut sum = 0.0;
            for (from_y, from_x) in (0..old * old).map(|i| (i / old, i % old)) {
                let value = positions[(self.n_class + from_y * old + from_x) * width + channel];
                sum += weights[y * old + from_y] * weights[x * old + from_x] * f64::from(value);
            }
            out.push(sum as f32);
        }
        out
    }

    /// The golden's files with another recipe, and with the positions as they are or resampled already.
    fn source(&self, folder: &Path, is_resampled: bool) {
        let lang_encoder = folder.join("lang_encoder");
        fs::create_dir_all(&lang_encoder).unwrap();
        for entry in fs::read_dir(self.golden("lang_encoder")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, lang_encoder.join(path.file_name().unwrap())).unwrap();
        }
        fs::copy(self.golden("checkpoint.pt"), folder.join("checkpoint.pt")).unwrap();
        let [old, new] =
            [self.side, self.grids[1] * PATCH].map(|side| format!("image_size = {side}"));
        let recipe = fs::read_to_string(self.golden("recipe.toml")).unwrap();
        assert!(recipe.contains(&old));
        let recipe = recipe.replace(&old, &new).replace(self.file, "vision.safetensors");
        fs::write(folder.join("recipe.toml"), recipe).unwrap();
        let file = Checkpoint::open(&self.golden(self.file)).unwrap();
        let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for info in file.infos() {
            let tensor =
                Tensor::from_le_bytes(info.dtype, &info.shape, &file.bytes(&info.name).unwrap());
            let mut values = tensor.unwrap().to_f32_vec().unwrap();
            let mut shape = info.shape.clone();
            if is_resampled && info.name == self.positions {
                let [rows, width] = shape.last_chunk_mut().unwrap();
                values = self.resampled(&values, *width);
                *rows = self.n_class + self.grids[1] * self.grids[1];
            }
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            tensors.push((info.name.clone(), shape, bytes));
        }
        let views = tensors.iter().map(|(name, shape, bytes)| {
            (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
        });
        let bytes = safetensors::serialize(views, None).unwrap();
        fs::write(folder.join("vision.safetensors"), bytes).unwrap();
    }

    fn visual_tokens(&self, is_resampled: bool) -> Vec<f32> {
        let folder = tempfile::tempdir().unwrap();
        self.source(folder.path(), is_resampled);
        let (_scratch, artifact) = compiled(folder.path());
        let model = Model::open(&artifact, &opening("native")).unwrap();
        let side = self.grids[1] * PATCH;
        assert_eq!(model.manifest().config.vision.image_size, side);
        assert_eq!(model.manifest().image.size, side);
        let pixels: Vec<f32> = (0..3 * side * side).map(|i| (i as f32 * 0.37).sin()).collect();
        let media = model.encode_pixels(&pixels, 1, 1).unwrap();
        media[0].visual_tokens.to_vec()
    }
}

/// The recipe's side gives the numbers of a checkpoint whose positions were resampled before.
#[test]
fn positions_are_resampled_to_the_recipes_side() {
    for encoder in [CLIP, SIGLIP] {
        let (found, expected) = (encoder.visual_tokens(false), encoder.visual_tokens(true));
        assert_eq!(found.len(), expected.len());
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-5, "{}: {worst}", encoder.golden);
    }
}
