//! Writes a graph as an ONNX file.

use std::collections::{BTreeMap, BTreeSet};

use super::function::FunctionTable;
use super::name::{Names, name_values};
use super::proto::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
use super::target::{Piece, pieces};
use super::{
    FLAMINGO, Functions, OnnxError, Typing, WeightLayout, WriteOptions, inline_typed,
    linears_of_panels, lower, message,
};
use crate::graph::{Constant, Graph, Node, ValueId};
use crate::op::{Attribute, Attributes, OnnxForm, OnnxInput};
use crate::verify::Verified;
use crate::{Dim, Fact, Tensor};

/// The runtime part of `graph` as a file of a flavour has it: of half precision and without functions, or in f32 as it
/// is but for linears with integer weights that the engine multiplies as such.
pub fn graph_of_flavour(
    graph: &Verified,
    options: impl Into<WriteOptions>,
    weights: &WeightLayout,
) -> Result<Graph, OnnxError> {
    typed_graph(graph, options, &Typing::default(), weights)
}

/// As [`graph_of_flavour`], typed so where the flavour is of half precision.
pub fn typed_graph(
    graph: &Verified,
    options: impl Into<WriteOptions>,
    typing: &Typing,
    weights: &WeightLayout,
) -> Result<Graph, OnnxError> {
    let options = options.into();
    let runtime = lower::runtime_graph(graph, weights)?;
    match options.functions == Functions::Keep && options.flavour.half().is_none() {
        true if options.flavour.has_contrib() => Ok(linears_of_panels(&runtime)?),
        true => Ok(runtime),
        false => Ok(inline_typed(&runtime, options.flavour, typing)?),
    }
}

/// The bytes of an ONNX file (a `ModelProto`) with the runtime part of `graph`. The same graph and options give the same
/// bytes.
pub fn write_onnx(
    graph: &Verified,
    options: impl Into<WriteOptions>,
    weights: &WeightLayout,
) -> Result<Vec<u8>, OnnxError> {
    let options = options.into();
    write_graph(&graph_of_flavour(graph, options, weights)?, options, weights)
}

/// The same of what [`graph_of_flavour`] gave.
pub fn write_graph(
    runtime: &Graph,
    options: impl Into<WriteOptions>,
    weights: &WeightLayout,
) -> Result<Vec<u8>, OnnxError> {
    let places = weights.entries.values().map(|e| (e.name.as_str(), (e.offset, e.length)));
    let weights = (weights.location.as_str(), &places.collect());
    let model = model_from_graph(runtime, options.into(), weights, usize::MAX)?;
    Ok(message::bytes(&model))
}

/// The model of a runtime graph. `places`: offset and length of each weight in `location`.
/// Errors where the functions take more than `max_function_bytes`.
pub(super) fn model_from_graph(
    graph: &Graph,
    options: WriteOptions,
    (location, places): (&str, &BTreeMap<&str, (u64, u64)>),
    max_function_bytes: usize,
) -> Result<ModelProto, OnnxError> {
    let mut functions = FunctionTable::new(options.flavour, max_function_bytes);
    let written = nodes_from_graph(graph, Scope::Main, &mut functions)?;
    let mut initializers = external_initializers(graph, location, places)?;
    initializers.extend(written.constants);
    let imported = functions.functions.iter().flat_map(|f| &f.opset_import).map(|o| o.domain());
    let own = written.nodes.iter().map(|node| node.domain());
    let domains: BTreeSet<&str> = own.chain(imported).chain([""]).collect();
    let opset_import = message::opsets(options.flavour, domains);
    let value_info = intermediate_values(graph, &written.names);
    let ends = |ends: &[(String, ValueId)]| -> Vec<ValueInfoProto> {
        ends.iter().map(|(name, id)| message::value_info(name, graph.fact(*id))).collect()
    };
    Ok(ModelProto {
        ir_version: Some(options.flavour.ir_version()),
        opset_import,
        producer_name: Some("flamingoc".into()),
        producer_version: Some(env!("CARGO_PKG_VERSION").into()),
        metadata_props: vec![message::entry("flavour", options.flavour.name())],
        graph: Some(GraphProto {
            name: Some(graph.name.clone()),
            input: ends(graph.inputs()),
            output: ends(graph.outputs()),
            node: written.nodes,
            initializer: initializers,
            value_info,
            ..GraphProto::default()
        }),
        functions: functions.functions,
        ..ModelProto::default()
    })
}

fn external_initializers(
    graph: &Graph,
    location: &str,
    places: &BTreeMap<&str, (u64, u64)>,
) -> Result<Vec<TensorProto>, OnnxError> {
    let mut initializers = Vec::new();
    for (_, value) in graph.values() {
        let Some(Constant::Weight(name)) = &value.constant else { continue };
        let missing = || OnnxError::MissingWeights(vec![name.clone()]);
        let (offset, length) = *places.get(name.as_str()).ok_or_else(missing)?;
        let shape = value.fact.known_shape().ok_or_else(missing)?;
        let place = (location, offset, length);
        initializers.push(message::external_tensor(name, value.fact.dtype, &shape, place));
    }
    match initializers.is_empty() || is_inside(location) {
        true => Ok(initializers),
        false => Err(OnnxError::Location(location.to_owned())),
    }
}

/// Whether `location` is a relative path that stays in its folder, on every system.
pub(super) fn is_inside(location: &str) -> bool {
    let is_plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    location.split('/').all(is_plain)
        && !location.contains(|c: char| c == '\\' || c == ':' || c.is_control())
}

fn intermediate_values(graph: &Graph, names: &Names) -> Vec<ValueInfoProto> {
    let outputs: BTreeSet<&str> = graph.outputs().iter().map(|(name, _)| name.as_str()).collect();
    let computed = graph.nodes().iter().flat_map(|node| &node.outputs);
    computed
        .map(|id| (names.of(*id), graph.fact(*id)))
        .filter(|(name, _)| !outputs.contains(name.as_str()))
        .map(|(name, fact)| message::value_info(&name, fact))
        .collect()
}

/// Where nodes are written: constants are initializers or nodes.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Scope {
    /// The model's graph.
    Main,
    /// A function.
    Function,
}

/// Nodes of a graph or function.
pub(super) struct Written {
    /// In the order in which they run.
    pub(super) nodes: Vec<NodeProto>,
    /// Initializers stored in the file; none in functions.
    constants: Vec<TensorProto>,
    names: Names,
}

/// Writes the nodes of `graph`; definitions that they need are added to `functions`.
pub(super) fn nodes_from_graph(
    graph: &Graph,
    scope: Scope,
    functions: &mut FunctionTable,
) -> Result<Written, OnnxError> {
    let names = name_values(graph)?;
    let written = Written { nodes: Vec::new(), constants: Vec::new(), names };
    let mut writer = Writer { graph, scope, written, sizes: BTreeSet::new() };
    for (id, value) in graph.values() {
        if let Some(Constant::Literal(tensor)) = &value.constant {
            let name = writer.written.names.of(id);
            writer.constant(&name, tensor);
        }
    }
    for node in graph.nodes() {
        writer.node(node, functions)?;
    }
    for (value, output) in writer.written.names.copies.clone() {
        let copy = message::node(
            &format!("{output}#copy"),
            ("", "Identity"),
            vec![value],
            vec![output],
            &Attributes::none(),
        );
        writer.written.nodes.push(copy);
    }
    Ok(writer.written)
}

struct Writer<'a> {
    graph: &'a Graph,
    scope: Scope,
    written: Written,
    /// Names of sizes that are read from a shape already.
    sizes: BTreeSet<String>,
}

impl Writer<'_> {
    fn constant(&mut self, name: &str, tensor: &Tensor) {
        match self.scope {
            Scope::Main => self.written.constants.push(message::inline_tensor(name, tensor)),
            Scope::Function => self.written.nodes.push(message::constant(name, tensor)),
        }
    }

    fn integers(&mut self, name: &str, values: &[i64]) {
        let tensor = ndarray::Array::from_vec(values.to_vec()).into_dyn().into_shared();
        self.constant(name, &Tensor::I64(tensor));
    }

    fn node(&mut self, node: &Node, functions: &mut FunctionTable) -> Result<(), OnnxError> {
        let names = |ids: &[ValueId]| ids.iter().map(|id| self.written.names.of(*id)).collect();
        let (mut inputs, mut outputs): (Vec<String>, Vec<String>) =
            (names(&node.inputs), names(&node.outputs));
        let facts: Vec<Fact> = node.inputs.iter().map(|id| self.graph.fact(*id).clone()).collect();
        let function;
        let (kind, attributes) = match node.op.operator().onnx_form() {
            OnnxForm::Node { domain, op_type, attributes, extra_inputs, absent } => {
                for place in absent {
                    inputs.insert((*place).min(inputs.len()), String::new());
                }
                for extra in extra_inputs {
                    let name = format!("{}#input{}", node.name, inputs.len());
                    inputs.push(self.extra_input(node, name, &extra)?);
                }
                ((domain, op_type), attributes)
            }
            OnnxForm::BuildTime => {
                let (node, op) = (node.name.clone(), node.op.name());
                return Err(OnnxError::BuildTime { node, op });
            }
            OnnxForm::Function => {
                function = functions.name_of(&node.op, &facts)?;
                ((FLAMINGO, function.as_str()), node.op.operator().attributes())
            }
        };
        for place in node.op.operator().absent_outputs() {
            outputs.insert((*place).min(outputs.len()), String::new());
        }
        self.written.nodes.push(message::node(&node.name, kind, inputs, outputs, &attributes));
        Ok(())
    }

    /// Writes an input that ONNX wants where the op has an attribute; returns its name.
    fn extra_input(
        &mut self,
        node: &Node,
        name: String,
        input: &OnnxInput,
    ) -> Result<String, OnnxError> {
        match input {
            OnnxInput::I64(values) => self.integers(&name, values),
            OnnxInput::Shape(target) => return self.target(node, name, target),
        }
        Ok(name)
    }

    fn target(&mut self, node: &Node, name: String, target: &[Dim]) -> Result<String, OnnxError> {
        let inputs = self.graph.inputs().iter().map(|(_, id)| *id);
        let mut ids: Vec<ValueId> = node.inputs.iter().take(1).copied().chain(inputs).collect();
        let resolve = |ids: &[ValueId]| {
            let facts: Vec<&Fact> = ids.iter().map(|id| self.graph.fact(*id)).collect();
            pieces(&node.op, target, &facts)
        };
        let pieces = resolve(&ids).or_else(|_| {
            let before = self.graph.nodes().iter().take_while(|other| other.name != node.name);
            ids.extend(before.flat_map(|other| &other.outputs));
            resolve(&ids)
        });
        let pieces = pieces
            .map_err(|dim| OnnxError::Dim { node: node.name.clone(), dim: dim.to_string() })?;
        let mut parts = Vec::new();
        let mut numbers = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Number(number) => numbers.push(number),
                Piece::Axis { source, axis } => {
                    self.part(&name, &mut parts, &mut numbers);
                    parts.push(self.size(ids[source], axis));
                }
            }
        }
        if parts.is_empty() {
            self.integers(&name, &numbers);
            return Ok(name);
        }
        self.part(&name, &mut parts, &mut numbers);
        if let [only] = parts.as_slice() {
            return Ok(only.clone());
        }
        let axis = Attributes::none().with("axis", Attribute::Int(0));
        let concat = message::node(&name, ("", "Concat"), parts, vec![name.clone()], &axis);
        self.written.nodes.push(concat);
        Ok(name)
    }

    /// Writes the numbers collected so far as one part of a target shape.
    fn part(&mut self, name: &str, parts: &mut Vec<String>, numbers: &mut Vec<i64>) {
        if !numbers.is_empty() {
            let part = format!("{name}.{}", parts.len());
            self.integers(&part, numbers);
            parts.push(part);
            numbers.clear();
        }
    }

    /// The name of an i64 [1] with the size of an axis of a value.
    fn size(&mut self, value: ValueId, axis: usize) -> String {
        let source = self.written.names.of(value);
        let name = format!("{source}#size{axis}");
        if self.sizes.insert(name.clone()) {
            let bounds = Attributes::none().with("start", axis).with("end", axis + 1);
            let shape =
                message::node(&name, ("", "Shape"), vec![source], vec![name.clone()], &bounds);
            self.written.nodes.push(shape);
        }
        name
    }
}
