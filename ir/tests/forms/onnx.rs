//! ONNX form of graphs of every op.

use std::collections::BTreeSet;

use crate::cases::{all_bindings, all_cases, build};
use flamingo_ir::onnx::{Functions, WriteOptions, inline_functions, write_onnx};
use flamingo_ir::op::{Flavour, Op};
use flamingo_ir::{Tensor, evaluate_with, verify};

fn assert_close(name: &str, left: &[Tensor], right: &[Tensor]) {
    assert_eq!(left.len(), right.len(), "{name}");
    for (index, (a, b)) in left.iter().zip(right).enumerate() {
        assert_eq!(a.fact(), b.fact(), "{name} output {index}");
        let (Some(a), Some(b)) = (a.to_f32_vec(), b.to_f32_vec()) else {
            assert_eq!(a, b, "{name} output {index}");
            continue;
        };
        for (x, y) in a.iter().zip(b) {
            assert!((x - y).abs() <= 1e-5 + 1e-5 * x.abs(), "{name} output {index}: {x} {y}");
        }
    }
}

#[test]
fn the_cases_have_every_op() {
    let used: BTreeSet<&str> = all_cases().iter().map(|case| case.op.name()).collect();
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
            assert_close(flavour.name(), &expected, &found);
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
