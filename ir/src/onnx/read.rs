//! Reads ONNX files of our own form.
//!
//! The nodes are read into ops; then the graph is written again and compared with the file, so
//! that a function, constant or helper node that differs from what this version writes is an
//! error, not a silent change of meaning.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;

use super::node::{is_helper, op_from_node};
use super::proto::tensor_proto::DataLocation;
use super::proto::tensor_shape_proto::dimension;
use super::proto::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, type_proto};
use super::write::{is_inside, model_from_graph};
use super::{
    Functions, OnnxError, ReadLimits, ReadModel, WeightEntry, WeightLayout, WeightPlace,
    WriteOptions, message, scan, write_onnx,
};
use crate::graph::{Constant, Graph, ValueId};
use crate::op::Flavour;
use crate::{DType, Dim, Fact, Tensor, verify};

/// Reads a file that [`write_onnx`](super::write_onnx) wrote. Bytes from anywhere are safe to
/// give: nothing is executed, and sizes are checked before anything is allocated for them.
pub fn read_onnx(bytes: &[u8], limits: &ReadLimits) -> Result<ReadModel, OnnxError> {
    scan::scan(bytes, limits)?;
    let model =
        ModelProto::decode(bytes).map_err(|error| malformed("file", "an ONNX model", error))?;
    let flavour = flavour_of(&model)?;
    let empty = GraphProto::default();
    let proto = model.graph.as_ref().unwrap_or(&empty);
    let mut reader = Reader::new(proto, limits)?;
    reader.constants()?;
    reader.nodes()?;
    reader.outputs()?;
    let Reader { graph, places, location, .. } = reader;
    compare(&model, &graph, flavour, (&location, &places), bytes.len())?;
    let mut weights = BTreeMap::new();
    for (_, value) in graph.values() {
        let Some(Constant::Weight(name)) = &value.constant else { continue };
        let place = places.get(name.as_str()).copied();
        weights.extend(place.map(|(offset, length)| {
            (name.clone(), WeightPlace { dtype: value.fact.dtype, offset, length })
        }));
    }
    Ok(ReadModel { graph: verify(graph)?, flavour, location, weights })
}

/// A file that does not have the form of ours.
pub(super) fn malformed(
    place: impl std::fmt::Display,
    expected: impl std::fmt::Display,
    found: impl std::fmt::Display,
) -> OnnxError {
    OnnxError::Malformed {
        place: place.to_string(),
        expected: expected.to_string(),
        found: found.to_string(),
    }
}

impl ReadModel {
    /// The same graph as a file without functions, in another flavour if it is of f32.
    ///
    /// # Errors
    /// A graph that cannot be written so.
    pub fn inlined(&self, flavour: Flavour) -> Result<Vec<u8>, OnnxError> {
        let mut entries = BTreeMap::new();
        for (id, value) in self.graph.values() {
            let Some(Constant::Weight(name)) = &value.constant else { continue };
            let missing = || OnnxError::MissingWeights(vec![name.clone()]);
            let WeightPlace { offset, length, .. } = *self.weights.get(name).ok_or_else(missing)?;
            entries.insert(id, WeightEntry { name: name.clone(), offset, length });
        }
        let layout = WeightLayout { location: self.location.clone(), entries };
        write_onnx(&self.graph, WriteOptions { flavour, functions: Functions::Inline }, &layout)
    }
}

fn flavour_of(model: &ModelProto) -> Result<Flavour, OnnxError> {
    let entry = model.metadata_props.iter().find(|entry| entry.key() == "flavour");
    let name = entry.map_or("", |entry| entry.value());
    let expected = Flavour::ALL.map(Flavour::name).join(", ");
    Flavour::from_name(name)
        .ok_or_else(|| malformed("metadata `flavour`", expected, format!("`{name}`")))
}

struct Reader<'a> {
    proto: &'a GraphProto,
    limits: &'a ReadLimits,
    graph: Graph,
    /// Values read so far.
    ids: BTreeMap<&'a str, ValueId>,
    /// What the file says of computed values.
    declared: BTreeMap<&'a str, Fact>,
    /// Offset and length of weights.
    places: BTreeMap<&'a str, (u64, u64)>,
    location: String,
}

impl<'a> Reader<'a> {
    fn new(proto: &'a GraphProto, limits: &'a ReadLimits) -> Result<Reader<'a>, OnnxError> {
        let mut reader = Reader {
            proto,
            limits,
            graph: Graph::new(proto.name()),
            ids: BTreeMap::new(),
            declared: BTreeMap::new(),
            places: BTreeMap::new(),
            location: String::new(),
        };
        for info in &proto.input {
            let fact = fact_from_info(info, limits)?;
            let id = reader.graph.input(info.name(), fact);
            reader.define(info.name(), id)?;
        }
        for info in proto.value_info.iter().chain(&proto.output) {
            reader.declared.insert(info.name(), fact_from_info(info, limits)?);
        }
        Ok(reader)
    }

    fn define(&mut self, name: &'a str, id: ValueId) -> Result<(), OnnxError> {
        match self.ids.insert(name, id) {
            None => Ok(()),
            Some(_) => Err(malformed(format!("value \"{name}\""), "one definition", "two")),
        }
    }

    fn constants(&mut self) -> Result<(), OnnxError> {
        for tensor in &self.proto.initializer {
            let shape = shape_of(tensor, self.limits)?;
            let dtype = message::type_from_code(tensor.data_type());
            let place = || format!("initializer \"{}\"", tensor.name());
            let dtype =
                dtype.ok_or_else(|| malformed(place(), "a known type", tensor.data_type()))?;
            if tensor.data_location() == DataLocation::External {
                let id = self.graph.weight(tensor.name(), Fact::new(dtype, shape.clone()));
                self.external(tensor, n_bytes(dtype, &shape))?;
                self.define(tensor.name(), id)?;
            } else if tensor.name().starts_with("literal#") {
                let literal = Tensor::from_stored_bytes(dtype, &shape, tensor.raw_data());
                let literal = literal
                    .ok_or_else(|| malformed(place(), "whole data of its type", "other data"))?;
                let id = self.graph.literal(literal);
                self.define(tensor.name(), id)?;
            }
        }
        Ok(())
    }

    /// Notes where a weight is stored.
    fn external(&mut self, tensor: &'a TensorProto, n_bytes: Option<u64>) -> Result<(), OnnxError> {
        let text = |key: &str| {
            let entry = tensor.external_data.iter().find(|entry| entry.key() == key);
            entry.map_or("", |entry| entry.value())
        };
        let place = || format!("initializer \"{}\"", tensor.name());
        let number = |key: &str| {
            let number = text(key).parse::<u64>();
            number.map_err(|_| malformed(place(), format!("a number as {key}"), text(key)))
        };
        let (location, offset, length) = (text("location"), number("offset")?, number("length")?);
        if !is_inside(location) {
            return Err(OnnxError::Location(location.to_owned()));
        }
        if !self.places.is_empty() && location != self.location {
            return Err(malformed(place(), &self.location, location));
        }
        if n_bytes != Some(length) || offset.checked_add(length).is_none() {
            let expected = n_bytes.map_or("a size".into(), |n| format!("{n} bytes"));
            return Err(malformed(place(), expected, format!("{length} bytes at {offset}")));
        }
        self.location = location.to_owned();
        self.places.insert(tensor.name(), (offset, length));
        Ok(())
    }

    fn nodes(&mut self) -> Result<(), OnnxError> {
        let integers = integer_constants(self.proto);
        let nodes = || self.proto.node.iter().filter(|node| !is_helper(node));
        let mut names = BTreeSet::new();
        let mut ops = Vec::new();
        let mut unknown = Vec::new();
        for node in nodes() {
            if !names.insert(node.name()) {
                return Err(malformed(format!("node \"{}\"", node.name()), "one", "two"));
            }
            match op_from_node(node, &integers, &self.declared) {
                Ok(op) => ops.push(op),
                Err(problem) => unknown.push(format!("node \"{}\": {problem}", node.name())),
            }
        }
        if !unknown.is_empty() {
            return Err(OnnxError::Unknown(unknown));
        }
        for (node, (op, n_inputs)) in nodes().zip(ops) {
            let inputs = self.inputs(node, n_inputs)?;
            let outputs = self.graph.add_many(node.name(), op, &inputs)?;
            self.node_outputs(node, outputs)?;
        }
        Ok(())
    }

    fn inputs(&self, node: &NodeProto, n_inputs: usize) -> Result<Vec<ValueId>, OnnxError> {
        let find = |name: &String| {
            let place = || format!("node \"{}\"", node.name());
            let id = self.ids.get(name.as_str()).copied();
            id.ok_or_else(|| malformed(place(), "inputs computed before", format!("`{name}`")))
        };
        let given = node.input.iter().take(n_inputs).filter(|name| !name.is_empty());
        given.map(find).collect()
    }

    /// Names the outputs, and compares what is inferred with what the file says.
    fn node_outputs(&mut self, node: &'a NodeProto, ids: Vec<ValueId>) -> Result<(), OnnxError> {
        let place = || format!("node \"{}\"", node.name());
        let outputs = || node.output.iter().filter(|name| !name.is_empty());
        if outputs().count() != ids.len() {
            return Err(malformed(place(), format!("{} outputs", ids.len()), outputs().count()));
        }
        for (name, id) in outputs().zip(ids) {
            let fact = self.graph.fact(id);
            match self.declared.get(name.as_str()) {
                Some(declared) if declared == fact => self.define(name, id)?,
                Some(declared) => return Err(malformed(place(), declared, fact)),
                None => return Err(malformed(place(), "a type of each output", "none")),
            }
        }
        Ok(())
    }

    fn outputs(&mut self) -> Result<(), OnnxError> {
        for node in self.proto.node.iter().filter(|node| node.op_type() == "Identity") {
            if let ([input], [output]) = (node.input.as_slice(), node.output.as_slice()) {
                let id = self.ids.get(input.as_str()).copied();
                let unknown = || malformed(format!("output \"{output}\""), "a value", input);
                self.define(output, id.ok_or_else(unknown)?)?;
            }
        }
        for info in &self.proto.output {
            let name = info.name();
            let id = self.ids.get(name).copied();
            let unknown = || malformed(format!("output \"{name}\""), "a value", "none");
            self.graph.output(name, id.ok_or_else(unknown)?);
        }
        Ok(())
    }
}

/// Inline i64 vectors, by name: what ONNX takes as inputs where ops have attributes.
fn integer_constants(proto: &GraphProto) -> BTreeMap<&str, Vec<i64>> {
    let is_list = |tensor: &&TensorProto| {
        tensor.data_type() == message::type_code(DType::I64)
            && tensor.data_location() == DataLocation::Default
            && tensor.dims.len() == 1
    };
    let values = |tensor: &TensorProto| {
        tensor
            .raw_data()
            .as_chunks::<8>()
            .0
            .iter()
            .map(|bytes| i64::from_le_bytes(*bytes))
            .collect()
    };
    proto.initializer.iter().filter(is_list).map(|t| (t.name(), values(t))).collect()
}

fn n_bytes(dtype: DType, shape: &[usize]) -> Option<u64> {
    let n = shape.iter().try_fold(dtype.size(), |product, size| product.checked_mul(*size))?;
    u64::try_from(n).ok()
}

/// The shape of an initializer, within `limits`.
pub(super) fn shape_of(tensor: &TensorProto, limits: &ReadLimits) -> Result<Vec<usize>, OnnxError> {
    let place = || format!("initializer \"{}\"", tensor.name());
    if tensor.dims.len() > limits.max_rank {
        return Err(malformed(
            place(),
            format!("rank up to {}", limits.max_rank),
            tensor.dims.len(),
        ));
    }
    let size = |dim: &i64| {
        let size = usize::try_from(*dim).ok().filter(|size| *size <= limits.max_dim);
        size.ok_or_else(|| malformed(place(), format!("sizes up to {}", limits.max_dim), dim))
    };
    tensor.dims.iter().map(size).collect()
}

/// The fact of a typed value. Symbolic sizes are kept small, so that products of them are too.
fn fact_from_info(info: &ValueInfoProto, limits: &ReadLimits) -> Result<Fact, OnnxError> {
    let place = || format!("value \"{}\"", info.name());
    let value = info.r#type.as_ref().and_then(|kind| kind.value.as_ref());
    let Some(type_proto::Value::TensorType(tensor)) = value else {
        return Err(malformed(place(), "a tensor type", "none"));
    };
    let dtype = message::type_from_code(tensor.elem_type())
        .ok_or_else(|| malformed(place(), "a known element type", tensor.elem_type()))?;
    let dims = tensor.shape.as_ref().map_or(&[][..], |shape| &shape.dim);
    if dims.len() > limits.max_rank {
        return Err(malformed(place(), format!("rank up to {}", limits.max_rank), dims.len()));
    }
    let mut n_terms = 1usize;
    let mut shape = Vec::with_capacity(dims.len());
    for dim in dims {
        shape.push(match &dim.value {
            Some(dimension::Value::DimValue(size)) => {
                let size = usize::try_from(*size).ok().filter(|size| *size <= limits.max_dim);
                size.map(Dim::from).ok_or_else(|| malformed(place(), "a size", "another"))?
            }
            Some(dimension::Value::DimParam(text)) => {
                n_terms = n_terms.saturating_mul(1 + text.matches('+').count());
                if text.len() > 128 || n_terms > 64 {
                    return Err(malformed(place(), "a short dimension", format!("`{text}`")));
                }
                text.parse().map_err(|error| malformed(place(), "a dimension", error))?
            }
            None => return Err(malformed(place(), "a size or symbol", "neither")),
        });
    }
    Ok(Fact { dtype, shape })
}

/// Errors where the file differs from what this version writes for `graph`.
fn compare(
    model: &ModelProto,
    graph: &Graph,
    flavour: Flavour,
    (location, places): (&str, &BTreeMap<&str, (u64, u64)>),
    max_function_bytes: usize,
) -> Result<(), OnnxError> {
    let mut ours = model_from_graph(graph, flavour.into(), (location, places), max_function_bytes)?;
    let altered = |place: String| Err(OnnxError::Altered { place });
    if let Some(ours) = ours.functions.iter().find(|function| !model.functions.contains(function)) {
        return altered(format!("function \"{}\"", ours.name()));
    }
    if let Some(theirs) = model.functions.iter().find(|theirs| !ours.functions.contains(theirs)) {
        return altered(format!("function \"{}\"", theirs.name()));
    }
    if let (Some(ours), Some(theirs)) = (&ours.graph, &model.graph) {
        let mut pairs = ours.node.iter().zip(&theirs.node);
        if let Some((_, theirs)) = pairs.find(|(ours, theirs)| ours != theirs) {
            return altered(format!("node \"{}\"", theirs.name()));
        }
        let mut pairs = ours.initializer.iter().zip(&theirs.initializer);
        if let Some((_, theirs)) = pairs.find(|(ours, theirs)| ours != theirs) {
            return altered(format!("initializer \"{}\"", theirs.name()));
        }
    }
    ours.producer_version.clone_from(&model.producer_version);
    match ours == *model {
        true => Ok(()),
        false => altered("model".into()),
    }
}
