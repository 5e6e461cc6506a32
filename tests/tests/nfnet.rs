//! NFNet encoders: what is left of the reference's arithmetic in an artifact, and what every precision does with it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use flamingo_ir::onnx::{ReadLimits, ReadModel, read_onnx};
use flamingo_ir::{Constant, Dim, Tensor, evaluate_with};
use flamingo_models::Source;
use flamingo_models::checkpoint::Checkpoint;
use flamingo_models::config::VisionEncoder;
use flamingo_models::image_spec::ResizeMode;
use flamingo_models::manifest::Manifest;
use flamingo_runtime::Model;
use flamingo_tests::{compile_options, compiled, compiled_as, opening};
use flamingoc::compile::{CalibrateOn, CompileOptions, Gate, compile};
use flamingoc::parity::{F32_BOUND, MIN_COSINE, compare};
use flamingoc::scheme::{Precision, Scheme};
use flamingoc::synth::outline;
use safetensors::SafeTensors;

/// GELU's factor.
const GAMMA: f64 = 1.701_504_349_708_557_1;

/// Of the golden: two, one, two and one in its stages.
const N_BLOCKS: usize = 6;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/nfnet-paper")
}

fn media_graph(artifact: &Path) -> ReadModel {
    let bytes = fs::read(artifact.join("graphs/media.portable.onnx")).unwrap();
    read_onnx(&bytes, &ReadLimits::default()).unwrap()
}

fn manifest(artifact: &Path) -> Manifest {
    serde_json::from_slice(&fs::read(artifact.join("manifest.json")).unwrap()).unwrap()
}

fn numbers(bytes: &[u8]) -> Vec<f64> {
    let number = |bytes: &[u8]| f64::from(f32::from_le_bytes(bytes.try_into().unwrap()));
    bytes.chunks_exact(4).map(number).collect()
}

/// Filters of `key` as timm's `ScaledStdConv2dSame` makes them from the file's, `[c_out][row, column, channel]`.
fn standardised(key: &str, factor: f64) -> Vec<f64> {
    let checkpoint = Checkpoint::open(&golden().join("nfnet.pt")).unwrap();
    let tensor = |part: &str| numbers(&checkpoint.bytes(&format!("{key}.{part}")).unwrap());
    let shape = checkpoint.get(&format!("{key}.weight")).unwrap().shape.clone();
    let (n_channels, n_pixels) = (shape[1], shape[2] * shape[3]);
    let n = n_channels * n_pixels;
    let mut out = Vec::new();
    for (filter, gain) in tensor("weight").chunks(n).zip(tensor("gain")) {
        let mean = filter.iter().sum::<f64>() / n as f64;
        let variance = filter.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n as f64;
        let scale = gain * factor / ((variance + 1e-5) * n as f64).sqrt();
        for pixel in 0..n_pixels {
            let of = |channel: usize| (filter[channel * n_pixels + pixel] - mean) * scale;
            out.extend((0..n_channels).map(of));
        }
    }
    out
}

#[test]
fn an_artifact_has_standardised_filters_with_all_factors_in_them() {
    let (_scratch, artifact) = compiled(&golden());
    let bytes = fs::read(artifact.join("graphs/weights.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&bytes).unwrap();
    // The variance of a block's input is 1 and 0.04 for each block before it in the stage, the first of the next included.
    let (second, third) = (GAMMA / 1.04f64.sqrt(), GAMMA / 1.08f64.sqrt());
    for (node, key, factor) in [
        ("vision.stem.conv1", "stem.conv1", 1.0),
        ("vision.stem.conv4", "stem.conv4", GAMMA),
        ("vision.0.0.reduce", "stages.0.0.conv1", GAMMA),
        ("vision.0.0.shortcut", "stages.0.0.downsample.conv", GAMMA),
        ("vision.0.1.reduce", "stages.0.1.conv1", second),
        ("vision.1.0.reduce", "stages.1.0.conv1", third),
        ("vision.1.0.shortcut", "stages.1.0.downsample.conv", third),
        ("vision.2.0.reduce", "stages.2.0.conv1", second),
        ("vision.2.1.conv2", "stages.2.1.conv2", GAMMA),
        ("vision.2.1.expand", "stages.2.1.conv3", GAMMA),
    ] {
        let found = weights.tensor(&format!("{node}.weight")).unwrap();
        let (found, expected) = (numbers(found.data()), standardised(key, factor));
        assert_eq!(found.len(), expected.len(), "{node}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= 2e-6, "{node}: {found}, expected {expected}");
        }
    }
}

/// No standardisation and no factor is left but those after the last activation, and the gates'.
#[test]
fn an_artifact_has_the_ops_of_the_encoder_alone() {
    let (_scratch, artifact) = compiled(&golden());
    let model = media_graph(&artifact);
    let mut ops: BTreeMap<&str, usize> = BTreeMap::new();
    for node in model.graph.nodes().iter().filter(|node| node.name.starts_with("vision.")) {
        *ops.entry(node.op.name()).or_default() += 1;
    }
    let expected = [
        // A block begins with one; the first is the last convolution's of the stem.
        ("Activate", N_BLOCKS - 1),
        ("ChannelGate", N_BLOCKS),
        ("Convolution", 4 + 2 * N_BLOCKS),
        ("FeedForward", N_BLOCKS),
        ("Linear", 2 * N_BLOCKS + 4 + 1),
        ("MeanPool", 3),
        ("Mul", 1),
        ("Patches", 1),
        ("PictureMean", N_BLOCKS),
        ("Reshape", 3),
    ];
    assert_eq!(ops, BTreeMap::from(expected));
    let weights = model.graph.values().filter_map(|(_, value)| match &value.constant {
        Some(Constant::Weight(name)) => Some(name.as_str()),
        _ => None,
    });
    let raw: Vec<&str> = weights.filter(|name| name.starts_with("vision_encoder.")).collect();
    let others: Vec<&&str> = raw.iter().filter(|name| !name.ends_with(".bias")).collect();
    assert!(others.is_empty() && !raw.is_empty(), "weights as they are in the file: {others:?}");
}

#[test]
fn the_manifest_says_what_the_files_told() {
    let (_scratch, artifact) = compiled(&golden());
    let manifest = manifest(&artifact);
    let vision = &manifest.config.vision;
    assert_eq!((vision.image_size, vision.grid(), vision.n_tokens(), vision.width), (36, 2, 4, 24));
    let VisionEncoder::Nfnet(nfnet) = &vision.encoder else { panic!("{vision:?}") };
    assert_eq!(nfnet.stem, [4, 8, 16, 32]);
    let stages: Vec<[usize; 5]> = nfnet
        .stages
        .iter()
        .map(|s| [s.n_blocks, s.width, s.inner_width, s.group_width, s.squeezed_width])
        .collect();
    let expected = [[2, 48, 24, 8, 24], [1, 32, 16, 8, 16], [2, 48, 24, 8, 24], [1, 48, 24, 8, 24]];
    assert_eq!(stages, expected);
    assert_eq!(manifest.image.resize, ResizeMode::PadToMean);
    assert_eq!(manifest.image.mean, [0.485, 0.456, 0.406]);
}

/// The paper's encoder, in shapes alone: no test has time for its 435 million numbers.
#[test]
fn f6_gives_ten_by_ten_tokens_of_a_picture_of_320_pixels() {
    let folder = tempfile::tempdir().unwrap();
    outline("nfnet-f6", folder.path()).unwrap();
    let source = Source::open(folder.path()).unwrap();
    let vision = &source.config.vision;
    let VisionEncoder::Nfnet(nfnet) = &vision.encoder else { panic!("{vision:?}") };
    assert_eq!((nfnet.variant().as_deref(), vision.image_size), (Some("f6"), 320));
    assert_eq!((vision.grid(), vision.n_tokens()), (10, 100));
    let media = source.graphs().unwrap().media;
    let last = media.nodes().iter().rfind(|node| node.name.starts_with("vision.")).unwrap();
    let pictures = Dim::symbol("n_frames") * Dim::symbol("n_media");
    let expected = [pictures, Dim::from(100), Dim::from(3072)];
    assert_eq!(media.fact(last.outputs[0]).shape, expected);
}

/// The files do not know the side of the pictures. Odd sides at every depth, on every engine and as built.
#[test]
fn pictures_of_any_side() {
    let scratch = tempfile::tempdir().unwrap();
    for side in [1, 17, 31, 37, 45] {
        let folder = scratch.path().join(side.to_string());
        fs::create_dir_all(folder.join("lang_encoder")).unwrap();
        for name in [
            "checkpoint.pt",
            "nfnet.pt",
            "lang_encoder/config.json",
            "lang_encoder/model.safetensors",
        ] {
            fs::copy(golden().join(name), folder.join(name)).unwrap();
        }
        let recipe = fs::read_to_string(golden().join("recipe.toml")).unwrap();
        let recipe = recipe.replace("image_size = 36", &format!("image_size = {side}"));
        fs::write(folder.join("recipe.toml"), recipe).unwrap();
        let (_scratch, artifact) = compiled(&folder);
        let (n_media, n_frames) = (2, 3);
        let n_values = n_media * n_frames * 3 * side * side;
        let pixels: Vec<f32> =
            (0..n_values).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect();
        let expected = as_built(&folder, &pixels, [n_media, n_frames, side]);
        for backend in ["native", "ort", "tract"] {
            let model = Model::open(&artifact, &opening(backend)).unwrap();
            let media = model.encode_pixels(&pixels, n_media, n_frames).unwrap();
            let found: Vec<f32> =
                media.iter().flat_map(|media| media.visual_tokens.iter().copied()).collect();
            let comparison = compare("visual tokens", &found, &expected, 24).unwrap();
            let fits = comparison.relative_error <= F32_BOUND && comparison.cosine >= MIN_COSINE;
            assert!(fits, "{side} pixels on {backend}: {comparison:?}");
        }
    }
}

/// Visual tokens of the graph before any pass, by the reference evaluator.
fn as_built(folder: &Path, pixels: &[f32], [n_media, n_frames, side]: [usize; 3]) -> Vec<f32> {
    let source = Source::open(folder).unwrap();
    let media = source.graphs().unwrap().media;
    let pixels = Tensor::f32(&[n_media, n_frames, 3, side, side], pixels.to_vec()).unwrap();
    let one_hot = (0..n_frames * 4).map(|i| if i / 4 == i % 4 { 1.0 } else { 0.0 }).collect();
    let weights = Tensor::f32(&[n_frames, 4], one_hot).unwrap();
    let inputs = media.inputs().iter().map(|(name, _)| match name.as_str() {
        "pixel_values" => pixels.clone(),
        _ => weights.clone(),
    });
    let outputs = evaluate_with(&media, &inputs.collect::<Vec<_>>(), &source.parts).unwrap();
    outputs[0].to_f32_vec().unwrap()
}

/// 1 × 1 convolutions and squeeze-excite are stored as asked for; 3 × 3 convolutions are not matrices and stay f32.
#[test]
fn every_precision_rounds_the_linears_and_says_so() {
    for (precision, formats) in [
        (Precision::F16, "f16+f32"),
        (Precision::Bf16, "bf16+f32"),
        (Precision::Int8, "f32+int8"),
        (Precision::Int4, "f32+int8"),
    ] {
        let (_scratch, artifact) = compiled_as(&golden(), Scheme::from(precision));
        assert_eq!(manifest(&artifact).precision["vision"], formats);
        let model = media_graph(&artifact);
        let is_rounded = |name: &str, op: &str| name.starts_with("vision.") && op == "UnpackPanels";
        let nodes = model.graph.nodes().iter();
        let n_rounded = nodes.filter(|node| is_rounded(&node.name, node.op.name())).count();
        // Reduce, expand, squeeze and excite of each block, four shortcuts, and the last.
        assert_eq!(n_rounded, 4 * N_BLOCKS + 4 + 1, "{formats}");
    }
}

/// Of a language model this small int4 loses too much, and its worst layers are stored finer; none of the encoder's.
#[test]
fn the_gate_passes_int8_and_mixed_int4() {
    let scratch = tempfile::tempdir().unwrap();
    for (precision, auto_mixed) in [(Precision::Int8, false), (Precision::Int4, true)] {
        let output = scratch.path().join(precision.name());
        let options = CompileOptions {
            calibrate: CalibrateOn::Bundled,
            gate: Some(Gate { auto_mixed, ..Gate::default() }),
            ..compile_options(&golden(), &output, precision.into())
        };
        let (_, report) = compile(&options, &mut |_| {}).unwrap();
        let quantisation = report.quantisation;
        assert!(quantisation.mean_kl.unwrap() > 0.0, "{}", precision.name());
        let raised = quantisation.raised.iter().map(|raised| raised.layer.as_str());
        let of_vision: Vec<&str> = raised.filter(|name| name.starts_with("vision.")).collect();
        assert!(of_vision.is_empty(), "{of_vision:?}");
    }
}
