//! Models with values that f16 cannot hold: graphs for GPUs give infinities where nothing was measured, and f32's answers
//! where it was. ONNX Runtime's CPU provider runs them. Operators that it has in f32 alone lie between casts there, of which it
//! drops pairs and with them what f16 would do; so the reference evaluator, which rounds after each operator, runs them, too.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use flamingo_ir::onnx::{ReadLimits, WeightPlace, read_onnx};
use flamingo_ir::op::Flavour;
use flamingo_ir::{Constant, DType, Dim, Graph, Tensor, Value, ValueId, Weights, evaluate_with};
use flamingo_runtime::{Artifact, Model, OpenOptions};
use flamingo_tests::{compile_options, opening};
use flamingoc::calibrate::bundled;
use flamingoc::compile::{CalibrateOn, CompileOptions, Report, compile};
use flamingoc::coverage::report::{stage_reports, targets_of};
use flamingoc::gate::{Verdict, judge};
use flamingoc::parity::divergence;
use flamingoc::scheme::{Precision, Scheme};
use flamingoc::synth::synthesize;
use safetensors::tensor::{SafeTensors, TensorView};

const FLAVOURS: [Flavour; 3] = [Flavour::Cuda, Flavour::Trt10_3, Flavour::Trt10_15];

/// Rows of a tensor of the language model, all or the first few, times a factor.
type Change = (&'static str, usize, f32);

/// Three channels of the residual stream reach beyond f16 from layer 1 on; what later layers add does not.
const STREAM: [Change; 1] = [("transformer.blocks.1.ffn.down_proj.weight", 3, 2e5)];
/// The hidden layer of a feed-forward does; what it gives does not.
const HIDDEN: [Change; 2] = [
    ("transformer.blocks.2.ffn.up_proj.weight", usize::MAX, 1e5),
    ("transformer.blocks.2.ffn.down_proj.weight", usize::MAX, 1e-5),
];

/// A seeded model with changed weights.
fn source(folder: &Path, changes: &[Change]) -> PathBuf {
    let source = folder.join("source");
    synthesize("tiny-openflamingo-mpt", &source, 11, false, &mut |_, _| ()).unwrap();
    let path = source.join("lang_encoder/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for (name, view) in file.tensors() {
        let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let mut values: Vec<f32> = view.data().chunks_exact(4).map(value).collect();
        for (_, n_rows, factor) in changes.iter().filter(|(changed, ..)| *changed == name) {
            let n = n_rows.saturating_mul(view.shape()[1]).min(values.len());
            values[..n].iter_mut().for_each(|value| *value *= factor);
        }
        tensors.push((name, view.shape().to_vec(), values));
    }
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(.., v)| v.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        let dtype = safetensors::tensor::Dtype::F32;
        (name.clone(), TensorView::new(dtype, shape.clone(), bytes).unwrap())
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let views: Vec<(String, TensorView<'_>)> = views.collect();
    safetensors::serialize_to_file(views, Some(metadata), &path).unwrap();
    source
}

fn options(source: &Path, name: &str, precision: Precision) -> CompileOptions {
    let output = source.parent().unwrap().join(name);
    CompileOptions {
        flavours: FLAVOURS.to_vec(),
        ..compile_options(source, &output, precision.into())
    }
}

fn run(options: &CompileOptions) -> Report {
    compile(options, &mut |_| {}).unwrap().1
}

fn verdict(artifact: &Path, flavour: Flavour, exact: &Model) -> Verdict {
    let flavour = Some(flavour.name().to_owned());
    let model = Model::open(artifact, &OpenOptions { flavour, ..opening("ort") }).unwrap();
    judge(&model, exact, &bundled(exact, 100, 12).unwrap(), &mut |_| {}).unwrap()
}

/// Mean KL of next tokens of a text, with every operator's result rounded to the type that the file says.
fn kl_in_f16(artifact: &Path, flavour: Flavour, exact: &Model) -> f64 {
    let path = artifact.join(format!("graphs/decoder.{}.onnx", flavour.name()));
    let model = read_onnx(&fs::read(path).unwrap(), &ReadLimits::default()).unwrap();
    let weights = Stored {
        bytes: fs::read(artifact.join("graphs/weights.safetensors")).unwrap(),
        shapes: facts_of_weights(&model.graph),
        places: model.weights,
    };
    let ids: Vec<u32> = (0..40).map(|i| 40 + i * 7 % 150).collect();
    let n = ids.len();
    let count = |n: usize| Tensor::i64(&[n], (0..i64::try_from(n).unwrap()).collect()).unwrap();
    let input = |(name, id): &(String, ValueId)| match name.as_str() {
        "input_ids" => Tensor::i64(&[n], ids.iter().map(|id| i64::from(*id)).collect()).unwrap(),
        "media_time" => Tensor::i64(&[n], vec![0; n]).unwrap(),
        "media_index" => Tensor::i64(&[1], vec![1]).unwrap(),
        "positions" | "key_positions" | "logit_rows" => count(n),
        _ => {
            // Keys and values: nothing in the past, or room for all tokens, and zeros of one medium.
            let fact = model.graph.fact(*id);
            let unknown = match (name.starts_with("past_"), fact.rank()) {
                (true, 3) => 0,
                (true, _) => n,
                (false, _) => 1,
            };
            let size = |dim: &Dim| dim.known().unwrap_or(unknown);
            let shape: Vec<usize> = fact.shape.iter().map(size).collect();
            let bytes = vec![0; 2 * shape.iter().product::<usize>()];
            Tensor::from_stored_bytes(fact.dtype, &shape, &bytes).unwrap()
        }
    };
    let inputs: Vec<Tensor> = model.graph.inputs().iter().map(input).collect();
    let outputs = evaluate_with(&model.graph, &inputs, &weights).unwrap();
    let place = model.graph.outputs().iter().position(|(name, _)| name == "logits").unwrap();
    let found = outputs[place].to_f32_vec().unwrap();
    let expected = exact.logits(&ids, &[]).unwrap();
    let vocabulary = exact.manifest().config.language.vocabulary;
    divergence(&found, &expected, vocabulary).unwrap().mean_kl
}

fn facts_of_weights(graph: &Graph) -> BTreeMap<String, Vec<usize>> {
    let shape = |(_, value): (ValueId, &Value)| match &value.constant {
        Some(Constant::Weight(name)) => Some((name.clone(), value.fact.known_shape()?)),
        _ => None,
    };
    graph.values().filter_map(shape).collect()
}

/// Weights of a file.
struct Stored {
    bytes: Vec<u8>,
    shapes: BTreeMap<String, Vec<usize>>,
    places: BTreeMap<String, WeightPlace>,
}

impl Weights for Stored {
    fn tensor(&self, name: &str) -> Result<Tensor, String> {
        let WeightPlace { dtype, offset, length } = self.places[name];
        let start = usize::try_from(offset).unwrap();
        let bytes = &self.bytes[start..start + usize::try_from(length).unwrap()];
        Ok(Tensor::from_stored_bytes(dtype, &self.shapes[name], bytes).unwrap())
    }
}

/// What of an op is in f32, by a report.
fn in_f32<'a>(report: &'a Report, op: &str) -> Option<&'a str> {
    let ops = &report.f16.as_ref().unwrap().ops;
    ops.iter().find(|range| range.op == op).unwrap_or_else(|| panic!("no {op}")).in_f32.as_deref()
}

/// Compiles with and without a look at the ranges; the one gives f32's next tokens, the other none.
fn check(changes: &[Change], precision: Precision, bound: f64) -> Report {
    let scratch = tempfile::tempdir().unwrap();
    let source = source(scratch.path(), changes);
    let blind = options(&source, "blind.flamingo", precision);
    assert!(run(&blind).f16.is_none());
    let seeing = CompileOptions {
        calibrate: CalibrateOn::Bundled,
        ..options(&source, "seeing.flamingo", precision)
    };
    let report = run(&seeing);
    let exact = compile_options(&source, &scratch.path().join("f32.flamingo"), Scheme::default());
    run(&exact);
    let exact = Model::open(&exact.output, &opening("native")).unwrap();
    for flavour in FLAVOURS {
        let name = flavour.name();
        let without = kl_in_f16(&blind.output, flavour, &exact);
        assert!(without.is_nan(), "{name}: {without}");
        let with = kl_in_f16(&seeing.output, flavour, &exact);
        assert!(with <= bound, "{name}: {with}");
        let with = verdict(&seeing.output, flavour, &exact);
        assert!(with.n_tokens > 100 && with.mean_kl <= bound, "{name}: {with:?}");
        if flavour == Flavour::Cuda && changes == STREAM {
            let without = verdict(&blind.output, flavour, &exact);
            assert!(without.mean_kl.is_nan(), "{without:?}");
        }
        is_covered(&seeing.output, flavour);
    }
    is_typed_as_reported(&seeing.output, &report);
    let page = fs::read_to_string(seeing.output.join("report.html")).unwrap();
    assert!(page.contains("What GPUs keep in f16"), "{page}");
    report
}

/// Every node has a kernel of its types.
fn is_covered(artifact: &Path, flavour: Flavour) {
    let artifact = Artifact::open(artifact, false).unwrap();
    let (graphs, limits) = (&artifact.manifest.graphs, &artifact.manifest.limits);
    for target in targets_of(flavour) {
        for report in stage_reports(&artifact.path, graphs, limits, target, flavour).unwrap() {
            assert!(report.coverage.is_full(), "{target}: {:?}", report.coverage.fallbacks);
        }
    }
}

/// Types of the nodes of ops that are in f32, in a file with all nodes.
fn is_typed_as_reported(artifact: &Path, report: &Report) {
    let bytes = fs::read(artifact.join("graphs/decoder.trt-10.3.onnx")).unwrap();
    let graph = read_onnx(&bytes, &ReadLimits::default()).unwrap().graph;
    let floats = |op: &str| {
        let prefix = format!("{op}/");
        let own = graph.nodes().iter().filter(move |node| node.name.starts_with(&prefix));
        own.map(|node| graph.fact(node.outputs[0]).dtype).collect::<Vec<DType>>()
    };
    let ops = &report.f16.as_ref().unwrap().ops;
    for range in ops.iter().filter(|range| range.op.ends_with(".mlp") && range.stage == "decoder") {
        let found = floats(&range.op);
        let has_half = found.contains(&DType::F16);
        assert!(found.contains(&DType::F32), "{}", range.op);
        assert_eq!(has_half, range.in_f32.as_deref() != Some("whole"), "{}: {found:?}", range.op);
    }
}

#[test]
fn a_residual_stream_beyond_f16_is_summed_in_f32() {
    let report = check(&STREAM, Precision::F32, 1e-4);
    assert_eq!(in_f32(&report, "decoder.0.mlp"), None);
    assert_eq!(in_f32(&report, "decoder.1.mlp"), Some("whole"));
    assert_eq!(in_f32(&report, "decoder.2.mlp"), Some("output"));
    assert_eq!(in_f32(&report, "decoder.3.mlp"), Some("output"));
    let largest = report.f16.as_ref().unwrap().largest().unwrap();
    assert!(largest.largest > 65504.0 && largest.largest.is_finite(), "{largest:?}");
}

#[test]
fn a_hidden_layer_beyond_f16_is_in_f32_alone() {
    let report = check(&HIDDEN, Precision::F32, 1e-4);
    let wide: Vec<&str> =
        report.f16.as_ref().unwrap().in_f32().map(|range| range.op.as_str()).collect();
    assert_eq!(wide, ["decoder.2.mlp"]);
    assert_eq!(in_f32(&report, "decoder.2.mlp"), Some("whole"));
}

#[test]
fn weights_of_bytes_have_the_same_islands() {
    let report = check(&STREAM, Precision::Int8, 0.01);
    assert_eq!(in_f32(&report, "decoder.3.mlp"), Some("output"));
}

/// Of an ordinary model nothing is in f32 that was not before, and files are the same.
#[test]
fn a_model_within_f16_has_no_islands() {
    let scratch = tempfile::tempdir().unwrap();
    let source = source(scratch.path(), &[]);
    let blind = options(&source, "blind.flamingo", Precision::F32);
    let output = scratch.path().join("seeing.flamingo");
    let seeing = CompileOptions { calibrate: CalibrateOn::Bundled, output, ..blind.clone() };
    run(&blind);
    let report = run(&seeing);
    assert_eq!(report.f16.unwrap().in_f32().count(), 0);
    for flavour in FLAVOURS {
        for stage in ["media", "decoder"] {
            let file = format!("graphs/{stage}.{}.onnx", flavour.name());
            let read = |folder: &Path| fs::read(folder.join(&file)).unwrap();
            assert!(read(&blind.output) == read(&seeing.output), "{file}");
        }
    }
}
