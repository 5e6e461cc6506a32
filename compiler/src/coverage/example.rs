//! Hand-made listings for tests.

use std::collections::BTreeMap;

use flamingo_ir::DType;
use flamingo_ir::onnx::{ListedInput, ListedNode, ListedValue, Listing};

/// A node: operator `domain:Op@opset`; values `name:dtype`, constants with `=` before, absent ones empty.
pub(super) fn node(op: &str, inputs: &str, outputs: &str) -> ListedNode {
    let (key, opset) = op.rsplit_once('@').unwrap();
    let (domain, op_type) = key.rsplit_once(':').unwrap_or(("", key));
    let inputs: Vec<ListedInput> = inputs.split(',').map(input).collect();
    let outputs: Vec<ListedValue> = outputs.split(',').map(value).collect();
    ListedNode {
        name: outputs[0].name.clone(),
        domain: domain.into(),
        op_type: op_type.into(),
        opset: opset.parse().ok(),
        is_constant: inputs.iter().all(|input| input.is_constant),
        inputs,
        outputs,
        ..ListedNode::default()
    }
}

fn input(text: &str) -> ListedInput {
    let is_constant = text.starts_with('=');
    ListedInput { value: value(text.trim_start_matches('=')), is_constant, is_zero: None }
}

/// A value without sizes.
pub(super) fn value(text: &str) -> ListedValue {
    let (name, dtype) = text.split_once(':').unwrap_or((text, ""));
    let others = ["u4", "u16"].into_iter().find(|other| *other == dtype);
    let dtype = DType::from_name(dtype).map(DType::name).or(others);
    ListedValue { name: name.into(), dtype, dims: None }
}

/// A graph of nodes, one a line: `op | inputs | outputs`. A value has the type it was first given; results of constants
/// are constants.
pub(super) fn graph(lines: &str) -> Listing {
    let mut listing = Listing::default();
    let mut known: BTreeMap<String, ListedInput> = BTreeMap::new();
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let parts: Vec<&str> = line.split('|').map(str::trim).collect();
        let mut node = node(parts[0], parts[1], parts[2]);
        for input in node.inputs.iter_mut().filter(|input| !input.value.name.is_empty()) {
            let name = input.value.name.clone();
            if !known.contains_key(&name) && !input.is_constant {
                listing.inputs.push(input.value.clone());
            }
            *input = known.entry(name).or_insert(input.clone()).clone();
        }
        node.is_constant = node.inputs.iter().all(|input| input.is_constant);
        for value in &node.outputs {
            let is_constant = node.is_constant;
            let known_value = ListedInput { value: value.clone(), is_constant, is_zero: None };
            known.insert(value.name.clone(), known_value);
        }
        listing.nodes.push(node);
    }
    listing
}
