//! Graphs for TensorRT with explicit quantisation, on ONNX Runtime's CPU provider: `QuantizeLinear` and
//! `DequantizeLinear` around 0 before both sides of each product of bytes, and answers that stay near f32's.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use flamingo_ir::onnx::{ReadLimits, read_onnx};
use flamingo_ir::op::{Flavour, Op};
use flamingo_ir::{Constant, DType, Graph, Tensor, ValueId};
use flamingo_runtime::{Artifact, Model, OpenOptions};
use flamingo_tests::{compile_options, opening};
use flamingoc::calibrate::bundled;
use flamingoc::compile::{CalibrateOn, CompileOptions, Report, compile};
use flamingoc::coverage::report::{stage_reports, targets_of};
use flamingoc::gate::judge;
use flamingoc::observer::Observer;
use flamingoc::scheme::{Precision, Scheme};

const FLAVOURS: [Flavour; 2] = [Flavour::Trt10_3, Flavour::Trt10_15];

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/recipe.toml")
}

/// The demo in int8 with ranges chosen by `observer`.
fn compiled(folder: &Path, observer: Option<Observer>) -> (PathBuf, Report) {
    let options = CompileOptions {
        flavours: FLAVOURS.to_vec(),
        calibrate: CalibrateOn::Bundled,
        observer,
        ..compile_options(&demo(), &folder.join("model.flamingo"), Precision::Int8.into())
    };
    let report = compile(&options, &mut |_| {}).unwrap().1;
    (options.output, report)
}

fn read(artifact: &Path, stage: &str, flavour: Flavour) -> Graph {
    let path = artifact.join(format!("graphs/{stage}.{}.onnx", flavour.name()));
    read_onnx(&fs::read(path).unwrap(), &ReadLimits::default()).unwrap().graph.into_inner()
}

/// Products whose operands both come from `DequantizeLinear`, by the scale of the left one.
fn products_of_bytes(graph: &Graph) -> BTreeMap<String, f32> {
    let producers = graph.producers();
    let made_by = |id: ValueId| producers.get(&id).map(|node| graph.node(*node));
    let mut found = BTreeMap::new();
    for node in graph.nodes().iter().filter(|node| node.op.name() == "MatMul") {
        let Some(x) = made_by(node.inputs[0]).filter(|x| matches!(x.op, Op::DequantizeLinear(_)))
        else {
            continue;
        };
        let level = made_by(x.inputs[0]).unwrap();
        assert!(matches!(level.op, Op::QuantizeLinear(_)), "{}", level.name);
        assert_eq!(level.inputs[1], x.inputs[1], "{}: two scales", node.name);
        let turned = made_by(node.inputs[1]).unwrap();
        assert!(matches!(turned.op, Op::Transpose(_)), "{}", turned.name);
        let weight = made_by(turned.inputs[0]).unwrap();
        assert!(matches!(weight.op, Op::DequantizeLinear(_)), "{}", weight.name);
        let scales = graph.fact(weight.inputs[1]);
        assert_eq!(scales.shape.first(), graph.fact(weight.inputs[0]).shape.first());
        assert_eq!(graph.fact(node.outputs[0]).dtype, DType::F32, "{}", node.name);
        let literal = |id: ValueId| match &graph.value(id).constant {
            Some(Constant::Literal(tensor)) => tensor.clone(),
            other => panic!("{}: {other:?}", node.name),
        };
        let zero = Tensor::from_stored_bytes(DType::I8, &[], &[0]).unwrap();
        assert_eq!(literal(level.inputs[2]), zero);
        let name = node.name.strip_suffix("/product").unwrap().to_owned();
        found.insert(name, literal(x.inputs[1]).to_f32_vec().unwrap()[0]);
    }
    found
}

/// On prompts that chose nothing. (On those that did, 99 % of the best tokens are kept.)
#[test]
fn the_demo_answers_from_products_of_bytes() {
    let scratch = tempfile::tempdir().unwrap();
    let exact = compile_options(&demo(), &scratch.path().join("f32.flamingo"), Scheme::default());
    compile(&exact, &mut |_| {}).unwrap();
    let exact = Model::open(&exact.output, &opening("native")).unwrap();
    let examples = bundled(&exact, 200, 60).unwrap();
    for observer in [Observer::Entropy, Observer::Mse] {
        let (artifact, report) = compiled(&scratch.path().join(observer.name()), Some(observer));
        let ranges = report.quantisation.static_ranges.unwrap();
        let n_static = ranges.linears.iter().filter(|linear| linear.is_static).count();
        assert!(ranges.mean_kl <= 0.01 && n_static > 0, "{ranges:?}");
        for flavour in FLAVOURS {
            let name = (observer.name(), flavour.name());
            let options =
                OpenOptions { flavour: Some(flavour.name().to_owned()), ..opening("ort") };
            let model = Model::open(&artifact, &options).unwrap();
            let verdict = judge(&model, &exact, &examples, &mut |_| {}).unwrap();
            assert!(verdict.n_tokens >= 400 && verdict.mean_kl <= 0.01, "{name:?}: {verdict:?}");
            assert!(verdict.top1_agreement >= 0.98, "{name:?}: {verdict:?}");
            for stage in ["media", "decoder"] {
                let found = products_of_bytes(&read(&artifact, stage, flavour));
                assert_eq!(found, ranges.x_scales(stage), "{name:?} {stage}");
            }
        }
        is_covered(&artifact);
        let page = fs::read_to_string(artifact.join("report.html")).unwrap();
        assert!(page.contains("Ranges of activations for TensorRT"));
    }
}

/// Each stage is one piece of TensorRT's, and every node has a kernel of its types.
fn is_covered(artifact: &Path) {
    let artifact = Artifact::open(artifact, false).unwrap();
    let (graphs, limits) = (&artifact.manifest.graphs, &artifact.manifest.limits);
    for flavour in FLAVOURS {
        for target in targets_of(flavour) {
            for report in stage_reports(&artifact.path, graphs, limits, target, flavour).unwrap() {
                let coverage = &report.coverage;
                assert!(coverage.is_full(), "{target}: {:?}", coverage.fallbacks);
                assert_eq!(coverage.partitions.len(), 1, "{target}");
            }
        }
    }
}

/// Without an observer the graphs are those of weights alone.
#[test]
fn nothing_is_quantised_that_was_not_asked_for() {
    let scratch = tempfile::tempdir().unwrap();
    let (artifact, report) = compiled(scratch.path(), None);
    assert!(report.quantisation.static_ranges.is_none());
    for stage in ["media", "decoder"] {
        let graph = read(&artifact, stage, Flavour::Trt10_3);
        assert!(graph.nodes().iter().all(|node| !node.op.name().contains("quantizeLinear")));
        assert!(products_of_bytes(&graph).is_empty());
    }
}
