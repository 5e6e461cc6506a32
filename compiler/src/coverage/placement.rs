//! Which device values lie on: shape computations stay on the CPU, and values that cross are copied.

use std::collections::{BTreeMap, BTreeSet};

use flamingo_ir::onnx::{ListedInput, ListedNode, Listing};
use serde::Serialize;

use super::{Assigned, Provider, Role};

/// Inputs that CUDA kernels read on the CPU (`OrtMemTypeCPUInput`), by operator of ONNX's own domain.
const CPU_INPUTS: &[(&str, &[usize])] = &[
    ("ConstantOfShape", &[0]),
    ("CumSum", &[1]),
    ("Expand", &[1]),
    ("OneHot", &[1]),
    ("Pad", &[1, 3]),
    ("Range", &[0, 1, 2]),
    ("ReduceL1", &[1]),
    ("ReduceL2", &[1]),
    ("ReduceLogSum", &[1]),
    ("ReduceLogSumExp", &[1]),
    ("ReduceMax", &[1]),
    ("ReduceMean", &[1]),
    ("ReduceMin", &[1]),
    ("ReduceProd", &[1]),
    ("ReduceSum", &[1]),
    ("ReduceSumSquare", &[1]),
    ("Reshape", &[1]),
    ("Resize", &[1, 2, 3]),
    ("Slice", &[1, 2, 3, 4]),
    ("Split", &[1]),
    ("Squeeze", &[1]),
    ("Tile", &[1]),
    ("TopK", &[1]),
    ("Trilu", &[1]),
    ("Unsqueeze", &[1]),
];

/// The same of ONNX Runtime's own domain.
const CPU_INPUTS_MICROSOFT: &[(&str, &[usize])] = &[
    ("DecoderMaskedMultiHeadAttention", &[7, 8]),
    ("GroupQueryAttention", &[6]),
    ("MultiHeadAttention", &[8]),
];

/// Most elements of a constant that shapes are computed with.
const SMALL_ELEMENTS: usize = 100;

/// Where a value lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// Memory of the processor.
    Cpu,
    /// Memory of the GPU.
    Gpu,
}

/// A value that is copied between devices on every run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ValueCopy {
    /// The value.
    pub value: String,
    /// Where it was computed.
    pub from: Device,
    /// Where it is read.
    pub to: Device,
    /// The first node that reads it there.
    pub node: String,
}

/// Whether a node only tells the shape of a value, which needs no copy of it.
fn tells_shape(node: &ListedNode) -> bool {
    node.domain.is_empty() && matches!(node.op_type.as_str(), "Shape" | "Size")
}

/// Puts computations of shapes on the CPU, as ONNX Runtime does (`GetCpuPreferredNodes`): nodes that tell a shape, and
/// those that read only such values and small constants, unless CUDA's kernel reads them on the CPU anyway. A TensorRT
/// engine computes its own.
pub(super) fn place_shapes(listing: &Listing, nodes: &mut [Assigned]) {
    let mut shapes: BTreeSet<&str> = BTreeSet::new();
    for (node, assigned) in listing.nodes.iter().zip(nodes) {
        let may_move = matches!(assigned.provider, Some(Provider::Cuda | Provider::Cpu));
        if assigned.role != Role::Work || !may_move {
            continue;
        }
        if tells_shape(node) || (assigned.runs_on_cpu && is_of_shapes(node, assigned, &shapes)) {
            assigned.role = Role::Shape;
            assigned.provider = Some(Provider::Cpu);
            shapes.extend(node.outputs.iter().map(|value| value.name.as_str()));
        }
    }
}

fn is_of_shapes(node: &ListedNode, assigned: &Assigned, shapes: &BTreeSet<&str>) -> bool {
    let is_on_cuda = assigned.provider == Some(Provider::Cuda);
    let is_shape = |input: &ListedInput| shapes.contains(input.value.name.as_str());
    let is_read_there = |(index, input)| is_on_cuda && is_shape(input) && is_cpu_input(node, index);
    let may_be = |input: &ListedInput| {
        input.value.name.is_empty() || is_shape(input) || (input.is_constant && is_small(input))
    };
    node.inputs.iter().any(is_shape)
        && node.inputs.iter().all(may_be)
        && !node.inputs.iter().enumerate().any(is_read_there)
}

/// Whether a constant is one that a shape may be computed with; one whose size is not told is.
fn is_small(input: &ListedInput) -> bool {
    let dims = input.value.dims.iter().flatten();
    let sizes = dims.filter_map(|dim| dim.parse::<usize>().ok());
    sizes.fold(1, usize::saturating_mul) <= SMALL_ELEMENTS
}

/// Whether CUDA's kernel reads input `index` on the CPU.
fn is_cpu_input(node: &ListedNode, index: usize) -> bool {
    let table = match node.domain.as_str() {
        "" => CPU_INPUTS,
        "com.microsoft" => CPU_INPUTS_MICROSOFT,
        _ => &[],
    };
    table.iter().any(|(op, at)| *op == node.op_type && at.contains(&index))
}

/// The device that a node's outputs lie on; none if nobody runs it.
fn device(assigned: &Assigned) -> Option<Device> {
    assigned.provider.map(|provider| match provider {
        Provider::TensorRt | Provider::Cuda => Device::Gpu,
        Provider::Cpu => Device::Cpu,
    })
}

/// The device that a node reads input `index` on; none if it reads no element of it.
fn read_on(node: &ListedNode, assigned: &Assigned, index: usize) -> Option<Device> {
    match assigned.provider {
        _ if tells_shape(node) => None,
        Some(Provider::Cuda) if is_cpu_input(node, index) => Some(Device::Cpu),
        Some(Provider::Cuda | Provider::TensorRt | Provider::Cpu) | None => device(assigned),
    }
}

/// Values that cross between devices. Constants are stored where they are read. A graph's input, and what a node makes
/// that nobody runs, lies where the first node reads it: binding an input there is the caller's.
pub(super) fn copies(listing: &Listing, nodes: &[Assigned]) -> Vec<ValueCopy> {
    let mut lies: BTreeMap<&str, Device> = BTreeMap::new();
    let mut copied: BTreeSet<&str> = BTreeSet::new();
    let mut copies = Vec::new();
    let run = listing.nodes.iter().zip(nodes).filter(|(_, node)| node.role != Role::Folded);
    for (node, assigned) in run {
        for (index, input) in node.inputs.iter().enumerate() {
            let name = input.value.name.as_str();
            let Some(to) = read_on(node, assigned, index) else { continue };
            if input.is_constant || name.is_empty() {
                continue;
            }
            let from = *lies.entry(name).or_insert(to);
            if from != to && copied.insert(name) {
                let (value, node) = (name.to_owned(), node.name.clone());
                copies.push(ValueCopy { value, from, to, node });
            }
        }
        let outputs = node.outputs.iter().map(|value| value.name.as_str());
        lies.extend(outputs.filter_map(|name| Some((name, device(assigned)?))));
    }
    copies
}
