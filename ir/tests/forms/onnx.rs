//! ONNX form of graphs of every op.

use std::collections::BTreeSet;

use crate::cases::{all_bindings, all_cases, build, build_time_cases};
use flamingo_ir::onnx::{
    Functions, OnnxError, ReadLimits, ReadModel, WeightEntry, WeightLayout, WriteOptions,
    graph_of_flavour, inline_functions, read_onnx, write_onnx,
};
use flamingo_ir::op::{Flavour, Op};
use flamingo_ir::{Constant, Fact, Graph, Tensor, evaluate_with, fold, verify};

use crate::cases::Built;

fn assert_close(flavour: Flavour, left: &[Tensor], right: &[Tensor]) {
    let name = flavour.name();
    assert_eq!(left.len(), right.len(), "{name}");
    for (index, (a, b)) in left.iter().zip(right).enumerate() {
        assert_eq!(a.fact(), b.fact(), "{name} output {index}");
        let (Some(a), Some(b)) = (a.to_f32_vec(), b.to_f32_vec()) else {
            assert_eq!(a, b, "{name} output {index}");
            continue;
        };
        let largest = a.iter().fold(1.0f32, |max, value| max.max(value.abs()));
        for (x, y) in a.iter().zip(b) {
            let bound = match flavour.half() {
                Some(_) => 1e-2 * largest,
                None => 1e-5 + 1e-5 * x.abs(),
            };
            assert!((x - y).abs() <= bound, "{name} output {index}: {x} {y}");
        }
    }
}

#[test]
fn the_cases_have_every_op() {
    let cases = || all_cases().into_iter().chain(build_time_cases());
    let used: BTreeSet<&str> = cases().map(|case| case.op.name()).collect();
    assert_eq!(used, Op::NAMES.iter().copied().collect());
}

#[test]
fn inlined_graphs_compute_the_same() {
    let built = build("all", &all_cases());
    for flavour in Flavour::ALL {
        let inlined = inline_functions(&built.graph, flavour).unwrap();
        let inlined = verify(inlined).unwrap();
        assert!(inlined.nodes().iter().all(|node| !node.op.is_function()));
        for bindings in all_bindings() {
            let inputs = built.inputs(&bindings);
            let expected = evaluate_with(&built.graph, &inputs, &built.weights).unwrap();
            let found = evaluate_with(&inlined, &inputs, &built.weights).unwrap();
            assert_close(flavour, &expected, &found);
        }
    }
}

#[test]
fn writing_is_deterministic() {
    let write = |functions| {
        let built = build("all", &all_cases());
        let options = WriteOptions { flavour: Flavour::Portable, functions };
        write_onnx(&verify(built.graph).unwrap(), options, &built.layout).unwrap()
    };
    for functions in [Functions::Keep, Functions::Inline] {
        assert_eq!(write(functions), write(functions));
    }
}

fn write(built: &Built, flavour: Flavour, functions: Functions) -> Vec<u8> {
    let verified = verify(built.graph.clone()).unwrap();
    write_onnx(&verified, WriteOptions { flavour, functions }, &built.layout).unwrap()
}

fn read(bytes: &[u8]) -> Result<ReadModel, OnnxError> {
    read_onnx(bytes, &ReadLimits::default())
}

/// Nodes, inputs and outputs in words, with values named by what they hold.
fn words(graph: &Graph) -> Vec<String> {
    let producers = graph.producers();
    let value = |id| {
        let fact = graph.fact(id);
        match (&graph.value(id).constant, producers.get(&id)) {
            (Some(Constant::Weight(name)), _) => format!("weight {name}: {fact}"),
            (Some(Constant::Literal(tensor)), _) => format!("{tensor:?}"),
            (None, Some(node)) => {
                let node = graph.node(*node);
                let index = node.outputs.iter().position(|output| *output == id);
                format!("{}.{index:?}: {fact}", node.name)
            }
            (None, None) => {
                let input = graph.inputs().iter().find(|(_, input)| *input == id);
                format!("input {:?}: {fact}", input.map(|(name, _)| name))
            }
        }
    };
    let node = |node: &flamingo_ir::Node| {
        let inputs: Vec<String> = node.inputs.iter().map(|id| value(*id)).collect();
        let outputs: Vec<String> = node.outputs.iter().map(|id| value(*id)).collect();
        format!("{} = {:?}({inputs:?}) -> {outputs:?}", node.name, node.op)
    };
    let inputs = graph.inputs().iter().map(|(name, id)| format!("{name} {}", value(*id)));
    let outputs = graph.outputs().iter().map(|(name, id)| format!("{name} {}", value(*id)));
    inputs.chain(graph.nodes().iter().map(node)).chain(outputs).collect()
}

#[test]
fn reading_gives_the_graph_that_was_written() {
    for flavour in Flavour::ALL.into_iter().filter(|flavour| flavour.half().is_none()) {
        let built = build("all", &all_cases());
        let model = read(&write(&built, flavour, Functions::Keep)).unwrap();
        assert_eq!(words(&model.graph), words(&built.graph));
        assert_eq!((model.flavour, model.location.as_str()), (flavour, "weights.bin"));
        let file = built.weight_bytes();
        for (name, tensor) in &built.weights.0 {
            let place = model.weights[name];
            let start = usize::try_from(place.offset).unwrap();
            let end = start + usize::try_from(place.length).unwrap();
            assert_eq!(file[start..end], tensor.to_le_bytes());
        }
        for bindings in all_bindings() {
            let inputs = built.inputs(&bindings);
            let expected = evaluate_with(&built.graph, &inputs, &built.weights).unwrap();
            assert_eq!(evaluate_with(&model.graph, &inputs, &built.weights).unwrap(), expected);
        }
    }
}

#[test]
fn inlined_files_read_back_inlined() {
    for flavour in Flavour::ALL {
        let built = build("all", &all_cases());
        let options = WriteOptions { flavour, functions: Functions::Inline };
        let model = read(&write(&built, flavour, Functions::Inline)).unwrap();
        let verified = verify(built.graph.clone()).unwrap();
        let inlined = graph_of_flavour(&verified, options, &built.layout).unwrap();
        assert!(inlined.nodes().iter().all(|node| !node.op.is_function()));
        assert_eq!(words(&model.graph), words(&inlined), "{}", flavour.name());
    }
}

/// A product of symbols that no input has, only a value computed before.
#[test]
fn target_shapes_use_values_computed_before() {
    use flamingo_ir::op::{ExpandBatch, Reshape};
    use flamingo_ir::{Dim, Fact};
    let [n, f] = ["n", "f"].map(Dim::symbol);
    let mut graph = Graph::new("products");
    let x = graph.input("x", Fact::f32([n.clone(), f.clone(), Dim::from(2)]));
    let class = graph.input("class", Fact::f32([1, 2]));
    let shape = vec![n * f, Dim::from(1), Dim::from(2)];
    let rows = graph.add("rows", Reshape { shape }, &[x]).unwrap();
    let y = graph.add("y", ExpandBatch, &[class, rows]).unwrap();
    graph.output("y", y);
    let verified = verify(graph).unwrap();
    for functions in [Functions::Keep, Functions::Inline] {
        let options = WriteOptions { flavour: Flavour::Portable, functions };
        let bytes = write_onnx(&verified, options, &WeightLayout::default()).unwrap();
        assert_eq!(read(&bytes).unwrap().graph.outputs()[0].0, "y");
    }
}

/// What is packed at build time is stored; what unpacks it stays in the file.
#[test]
fn panels_are_stored_and_unpacked_on_the_device() {
    use flamingo_ir::op::{Linear, PackPanels, PanelFormat, UnpackPanels};
    let format = PanelFormat::Int4 { block: 32 };
    let mut graph = Graph::new("panels");
    let x = graph.input("x", Fact::f32([3, 40]));
    let weight = graph.weight("w", Fact::f32([17, 40]));
    let packed = graph.add_many("packed", PackPanels { format }, &[weight]).unwrap();
    let unpacked = graph.add("w", UnpackPanels { format, n: 17, k: 40 }, &packed).unwrap();
    let y =
        graph.add("y", Linear { rounding: format.rounding(), ..Linear::default() }, &[x, unpacked]);
    graph.output("y", y.unwrap());
    let tensor =
        Tensor::f32(&[17, 40], (0..680).map(|i| (i % 97) as f32 - 40.0).collect()).unwrap();
    let weights = crate::cases::CaseWeights([("w".to_owned(), tensor)].into());
    let (mut layout, mut stored) = (WeightLayout::default(), crate::cases::CaseWeights::default());
    layout.location = "weights.bin".into();
    for (name, id) in ["data", "row_scales", "block_scales"].into_iter().zip(&packed) {
        let tensor = fold(&graph, *id, &weights).unwrap();
        let length = u64::try_from(tensor.to_le_bytes().len()).unwrap();
        layout.entries.insert(*id, WeightEntry { name: name.into(), offset: 0, length });
        stored.0.insert(name.into(), tensor);
    }
    let bytes = write_onnx(&verify(graph.clone()).unwrap(), Flavour::Portable, &layout).unwrap();
    let model = read(&bytes).unwrap();
    let names: Vec<&str> = model.graph.nodes().iter().map(|node| node.op.name()).collect();
    assert_eq!(names, ["UnpackPanels", "Linear"]);
    assert_eq!(model.weights["block_scales"].dtype, flamingo_ir::DType::U8);
    let x = Tensor::f32(&[3, 40], (0..120).map(|i| i as f32 / 50.0 - 1.0).collect()).unwrap();
    let expected = evaluate_with(&graph, std::slice::from_ref(&x), &weights).unwrap();
    assert_eq!(evaluate_with(&model.graph, &[x], &stored).unwrap(), expected);
}

/// For ONNX Runtime a linear and its weight of integers become one op; whatever else reads the weight still can.
#[test]
fn linears_of_integer_panels_are_one_op_for_onnx_runtime() {
    use flamingo_ir::op::{Activation, FeedForward, Gather, Linear, PanelFormat, UnpackPanels};
    let mut graph = Graph::new("panels");
    let mut stored = crate::cases::CaseWeights::default();
    let mut layout = WeightLayout { location: "weights.bin".into(), ..WeightLayout::default() };
    let x = graph.input("x", Fact::f32([3, 32]));
    let ids = graph.input("ids", Fact::new(flamingo_ir::DType::I64, [2]));
    let mut weight = |graph: &mut Graph, name: &str, format: PanelFormat, n: usize, k: usize| {
        let value = |i: usize| ((i * 37 + n) % 61) as f32 / 30.0 - 1.0;
        let weight = Tensor::f32(&[n, k], (0..n * k).map(value).collect()).unwrap();
        let packed = flamingo_ir::op::PackPanels { format };
        let parts = flamingo_ir::op::Operator::evaluate(&packed, &[weight]).unwrap();
        let mut ids = Vec::new();
        for (index, part) in parts.into_iter().enumerate() {
            let name = format!("{name}.{index}");
            let id = graph.weight(&name, part.fact());
            let length = u64::try_from(part.to_le_bytes().len()).unwrap();
            layout.entries.insert(id, WeightEntry { name: name.clone(), offset: 0, length });
            stored.0.insert(name, part);
            ids.push(id);
        }
        graph.add(name, UnpackPanels { format, n, k }, &ids).unwrap()
    };
    let (int8, int4) = (PanelFormat::Int8, PanelFormat::Int4 { block: 32 });
    let up = weight(&mut graph, "up", int4, 32, 32);
    let down = weight(&mut graph, "down", int4, 32, 16);
    let table = weight(&mut graph, "table", int8, 20, 32);
    let half = weight(&mut graph, "half", PanelFormat::F16, 20, 32);
    let op = FeedForward {
        activation: Activation::Silu,
        gated: true,
        up_bias: false,
        down_bias: false,
        residual: true,
        rounding: int4.rounding(),
    };
    let hidden = graph.add("mlp", op, &[x, up, down, x]).unwrap();
    let head = Linear { rounding: int8.rounding(), ..Linear::default() };
    let logits = graph.add("head", head, &[hidden, table]).unwrap();
    let other = graph.add("other", Linear::default(), &[hidden, half]).unwrap();
    let rows = graph.add("rows", Gather, &[table, ids]).unwrap();
    for (name, id) in [("logits", logits), ("other_logits", other), ("embedded", rows)] {
        graph.output(name, id);
    }
    let graph = verify(graph).unwrap();
    let bytes = write_onnx(&graph, Flavour::OrtCpu, &layout).unwrap();
    let model = read(&bytes).unwrap();
    let ops = |name: &str| model.graph.nodes().iter().filter(|n| n.op.name() == name).count();
    assert_eq!(
        (ops("PanelLinear"), ops("Linear"), ops("UnpackPanels"), ops("FeedForward")),
        (3, 1, 2, 0)
    );
    let x = Tensor::f32(&[3, 32], (0..96).map(|i| i as f32 / 50.0 - 1.0).collect()).unwrap();
    let inputs = [x, Tensor::i64(&[2], vec![3, 19]).unwrap()];
    let expected = evaluate_with(&graph, &inputs, &stored).unwrap();
    assert_close(
        Flavour::OrtCpu,
        &expected,
        &evaluate_with(&model.graph, &inputs, &stored).unwrap(),
    );
    let inlined = inline_functions(&model.graph, Flavour::OrtCpu).unwrap();
    for (expected, found) in expected.iter().zip(evaluate_with(&inlined, &inputs, &stored).unwrap())
    {
        let pairs = expected.to_f32_vec().unwrap().into_iter().zip(found.to_f32_vec().unwrap());
        assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-3), "{expected:?} {found:?}");
    }
}

/// An op of build time that reads an input of the graph cannot be written.
#[test]
fn packing_on_the_device_is_refused() {
    let format = flamingo_ir::op::PanelFormat::Int8;
    let mut graph = Graph::new("late");
    let x = graph.input("x", Fact::f32([16, 16]));
    let packed = graph.add_many("packed", flamingo_ir::op::PackPanels { format }, &[x]).unwrap();
    graph.output("y", packed[1]);
    let refused = write_onnx(&verify(graph).unwrap(), Flavour::Portable, &WeightLayout::default());
    assert!(matches!(refused, Err(OnnxError::BuildTime { .. })), "{refused:?}");
}

/// Constants, folded values and inputs as outputs, and one value under two names.
fn odd_graph() -> (Graph, WeightLayout) {
    use flamingo_ir::op::{Add, Tanh};
    let mut graph = Graph::new("odd");
    let x = graph.input("x", Fact::f32([2]));
    let weight = graph.weight("w", Fact::f32([2]));
    let folded = graph.add("folded", Tanh, &[weight]).unwrap();
    let small = graph.literal(Tensor::vector(vec![0.5, -1.5]));
    let y = graph.add("y", Add, &[x, folded]).unwrap();
    let z = graph.add("z", Add, &[y, small]).unwrap();
    for (name, id) in
        [("sum", y), ("again", y), ("same", x), ("constant", folded), ("small", small), ("z", z)]
    {
        graph.output(name, id);
    }
    let entry = WeightEntry { name: "folded".into(), offset: 64, length: 8 };
    let entries = [(folded, entry)].into_iter().collect();
    (graph, WeightLayout { location: "w/weights.safetensors".into(), entries })
}

#[test]
fn build_time_nodes_become_weights() {
    let (graph, layout) = odd_graph();
    let verified = verify(graph).unwrap();
    let model = read(&write_onnx(&verified, Flavour::Portable, &layout).unwrap()).unwrap();
    let names: Vec<&str> = model.graph.nodes().iter().map(|node| node.name.as_str()).collect();
    assert_eq!(names, ["y", "z"]);
    assert_eq!(model.weights.keys().collect::<Vec<_>>(), ["folded"]);
    let outputs = model.graph.outputs();
    assert_eq!(outputs[0].1, outputs[1].1);
    assert_eq!(outputs[2].1, model.graph.inputs()[0].1);
    let nowhere = WeightLayout { entries: Default::default(), ..layout.clone() };
    let missing = write_onnx(&verified, Flavour::Portable, &nowhere).unwrap_err();
    let message =
        "build-time values without a place in the weight file: result of \"folded\" (f32[2])";
    assert_eq!(missing.to_string(), message);
    for location in ["", "../w", "/w", "a//b", "a/..", "C:w", "a\\b", "./w"] {
        let outside = WeightLayout { location: location.into(), ..layout.clone() };
        let refused = write_onnx(&verified, Flavour::Portable, &outside);
        assert_eq!(refused, Err(OnnxError::Location(location.into())));
    }
}

/// Replaces `from` by as many bytes of `to`, so that the message stays whole.
fn forged(bytes: &[u8], from: &str, to: &str) -> Result<ReadModel, OnnxError> {
    assert_eq!(from.len(), to.len());
    let mut forged = bytes.to_vec();
    let mut start = 0;
    let mut n = 0;
    while let Some(at) = forged[start..].windows(from.len()).position(|w| w == from.as_bytes()) {
        forged[start + at..start + at + from.len()].copy_from_slice(to.as_bytes());
        start += at + from.len();
        n += 1;
    }
    assert!(n > 0, "{from} does not occur");
    read(&forged)
}

#[test]
fn altered_files_are_errors() {
    let bytes = write(&build("all", &all_cases()), Flavour::Portable, Functions::Keep);
    let message = |from, to| forged(&bytes, from, to).unwrap_err().to_string();
    assert!(message("Sigmoid", "Softmax").contains("attributes"));
    assert!(message("weights.bin", "../ghts.bin").contains("`../ghts.bin`"));
    assert!(message("portable", "portables".get(1..).unwrap()).contains("flavour"));
    assert!(message("com.microsoft", "com.macrosoft").contains("domain `com.macrosoft`"));
    let unknown = message("Tanh", "Tonh");
    assert!(unknown.contains("unknown operator `Tonh`"), "{unknown}");
    let swapped = message("product", "prodact");
    assert!(swapped.contains("written by another version or altered"), "{swapped}");
    assert!(message("text_len", "text-len").contains("text-len"));
}

/// Cut and flipped files give errors or graphs, never panics.
#[test]
fn forged_bytes_never_panic() {
    let (graph, layout) = odd_graph();
    let small = write_onnx(&verify(graph).unwrap(), Flavour::Portable, &layout).unwrap();
    for len in 0..small.len() {
        assert!(read(&small[..len]).is_err(), "{len}");
    }
    let large = write(&build("all", &all_cases()), Flavour::Portable, Functions::Keep);
    let mut state = 1u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(state >> 33).unwrap() % n
    };
    let mut n_same = 0;
    for round in 0..3000 {
        let file = if round % 10 == 0 { &large } else { &small };
        let mut bytes = file.clone();
        let at = random(bytes.len());
        bytes[at] = u8::try_from(random(256)).unwrap();
        n_same += usize::from(read(&bytes).is_ok());
    }
    assert!(n_same < 600, "{n_same} of 3000 changes went unnoticed");
}
