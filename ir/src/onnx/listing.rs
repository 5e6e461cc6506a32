//! What a file consists of, node by node, for tools that judge files without running them: any file of the messages
//! that this program writes, whatever its operators.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;

use super::proto::attribute_proto::AttributeType;
use super::proto::tensor_proto::DataLocation;
use super::proto::tensor_shape_proto::{Dimension, dimension};
use super::proto::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, type_proto};
use super::read::{malformed, shape_of};
use super::{OnnxError, ReadLimits, message, scan};

/// Most bytes of a symbolic dimension.
const MAX_DIM_BYTES: usize = 128;

/// Operators of constants that engines do not evaluate when they load a file: their results differ from run to run, or
/// they mark what is quantised.
const NOT_FOLDED: [&str; 7] = [
    "DequantizeLinear",
    "Multinomial",
    "QuantizeLinear",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
];

/// A file's main graph.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Listing {
    /// Version of each operator set, by domain; ONNX's own is `""`.
    pub opsets: BTreeMap<String, i64>,
    /// Inputs that the caller gives.
    pub inputs: Vec<ListedValue>,
    /// Outputs.
    pub outputs: Vec<ListedValue>,
    /// Values stored in the file or in its weight file.
    pub initializers: Vec<ListedValue>,
    /// In the order of the file: a value is computed before it is read.
    pub nodes: Vec<ListedNode>,
}

/// A value.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ListedValue {
    /// Its name.
    pub name: String,
    /// Element type: a name of [`DType`](crate::DType) or, for ONNX's others, `u16`, `i4`, `f8e4m3fn`, `string`, …
    pub dtype: Option<&'static str>,
    /// Sizes, numbers or expressions of symbols; a size that the file does not tell is `?`.
    pub dims: Option<Vec<String>>,
}

/// An input of a node.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ListedInput {
    /// The value; the name of an absent input is empty.
    pub value: ListedValue,
    /// An initializer, or computed of initializers only, so that engines know it when they load the file.
    pub is_constant: bool,
    /// Whether all its elements are 0, if the file itself has them.
    pub is_zero: Option<bool>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ListedNode {
    /// Its name.
    pub name: String,
    /// Domain of the operator; ONNX's own is `""`.
    pub domain: String,
    /// The operator.
    pub op_type: String,
    /// Version of the domain's operator set; none if the file does not import the domain.
    pub opset: Option<i64>,
    /// By position.
    pub inputs: Vec<ListedInput>,
    /// By position; the name of an absent output is empty.
    pub outputs: Vec<ListedValue>,
    /// Attributes that are integers.
    pub integers: BTreeMap<String, i64>,
    /// Names of all other attributes.
    pub attributes: BTreeSet<String>,
    /// Computed of initializers only: engines evaluate it when they load the file.
    pub is_constant: bool,
}

/// Lists the main graph of a file. Bytes from anywhere are safe to give: see [`read_onnx`](super::read_onnx). A call of
/// a local function is a node like any other.
///
/// # Errors
/// Bytes that are no ONNX model within `limits`, values with two definitions, inputs that nothing before computes.
pub fn list_nodes(bytes: &[u8], limits: &ReadLimits) -> Result<Listing, OnnxError> {
    scan::scan(bytes, limits)?;
    let model =
        ModelProto::decode(bytes).map_err(|error| malformed("file", "an ONNX model", error))?;
    let graph = model.graph.as_ref().ok_or_else(|| malformed("file", "a graph", "none"))?;
    let opset = |set: &super::proto::OperatorSetIdProto| (domain(set.domain()), set.version());
    let mut lister = Lister {
        limits,
        listing: Listing {
            opsets: model.opset_import.iter().map(opset).collect(),
            ..Listing::default()
        },
        declared: BTreeMap::new(),
        known: BTreeMap::new(),
    };
    lister.values(graph)?;
    for node in &graph.node {
        let listed = lister.node(node)?;
        lister.listing.nodes.push(listed);
    }
    lister.outputs(graph)?;
    Ok(lister.listing)
}

/// ONNX's own domain has two names.
fn domain(name: &str) -> String {
    if name == "ai.onnx" { String::new() } else { name.to_owned() }
}

struct Lister<'a> {
    limits: &'a ReadLimits,
    listing: Listing,
    /// What the file says of computed values.
    declared: BTreeMap<&'a str, ListedValue>,
    /// Values that a node may read.
    known: BTreeMap<&'a str, ListedInput>,
}

impl<'a> Lister<'a> {
    fn define(&mut self, name: &'a str, value: ListedInput) -> Result<(), OnnxError> {
        match self.known.insert(name, value) {
            None => Ok(()),
            Some(_) => Err(malformed(format!("value \"{name}\""), "one definition", "two")),
        }
    }

    fn values(&mut self, graph: &'a GraphProto) -> Result<(), OnnxError> {
        for tensor in &graph.initializer {
            let value = value_of_tensor(tensor, self.limits)?;
            self.listing.initializers.push(value.clone());
            let is_zero = zero(tensor);
            self.define(tensor.name(), ListedInput { value, is_constant: true, is_zero })?;
        }
        let stored: BTreeSet<&str> = graph.initializer.iter().map(TensorProto::name).collect();
        // Files of before IR version 4 list initializers among the inputs.
        for info in graph.input.iter().filter(|info| !stored.contains(info.name())) {
            let value = value_of_info(info, self.limits)?;
            self.listing.inputs.push(value.clone());
            self.define(info.name(), ListedInput { value, ..ListedInput::default() })?;
        }
        for info in graph.value_info.iter().chain(&graph.output) {
            self.declared.insert(info.name(), value_of_info(info, self.limits)?);
        }
        Ok(())
    }

    fn node(&mut self, node: &'a NodeProto) -> Result<ListedNode, OnnxError> {
        let inputs = node.input.iter().map(|name| self.input(node, name));
        let inputs = inputs.collect::<Result<Vec<ListedInput>, OnnxError>>()?;
        let mut listed = ListedNode {
            name: node.name().to_owned(),
            domain: domain(node.domain()),
            op_type: node.op_type().to_owned(),
            opset: self.listing.opsets.get(&domain(node.domain())).copied(),
            is_constant: is_constant(node, &inputs),
            inputs,
            ..ListedNode::default()
        };
        for attribute in &node.attribute {
            let name = attribute.name().to_owned();
            match attribute.r#type() {
                AttributeType::Int => drop(listed.integers.insert(name, attribute.i())),
                _ => drop(listed.attributes.insert(name)),
            }
        }
        for name in &node.output {
            let declared = self.declared.get(name.as_str()).cloned();
            let mut value = declared
                .unwrap_or_else(|| ListedValue { name: name.clone(), ..ListedValue::default() });
            value.dtype = value.dtype.or_else(|| inferred_dtype(&listed));
            listed.outputs.push(value.clone());
            let is_constant = listed.is_constant;
            if !name.is_empty() {
                self.define(name, ListedInput { value, is_constant, is_zero: None })?;
            }
        }
        Ok(listed)
    }

    fn input(&self, node: &NodeProto, name: &str) -> Result<ListedInput, OnnxError> {
        if name.is_empty() {
            return Ok(ListedInput::default());
        }
        let place = || format!("node \"{}\"", node.name());
        let found = self.known.get(name).cloned();
        found.ok_or_else(|| malformed(place(), "inputs computed before", format!("`{name}`")))
    }

    fn outputs(&mut self, graph: &GraphProto) -> Result<(), OnnxError> {
        for info in &graph.output {
            let place = || format!("output \"{}\"", info.name());
            let found = self.known.get(info.name());
            let found = found.ok_or_else(|| malformed(place(), "a value", "none"))?;
            self.listing.outputs.push(found.value.clone());
        }
        Ok(())
    }
}

fn is_constant(node: &NodeProto, inputs: &[ListedInput]) -> bool {
    let has_inputs = node.input.iter().any(|name| !name.is_empty());
    let of_constants =
        || inputs.iter().all(|input| input.value.name.is_empty() || input.is_constant);
    match node.op_type() {
        "Constant" => true,
        op_type => has_inputs && !NOT_FOLDED.contains(&op_type) && of_constants(),
    }
}

/// The element type of a helper node's output, which files of our form do not declare.
fn inferred_dtype(node: &ListedNode) -> Option<&'static str> {
    match (node.domain.as_str(), node.op_type.as_str()) {
        ("", "Shape" | "Size") => Some("i64"),
        ("", "Concat" | "Identity") => node.inputs.first()?.value.dtype,
        _ => None,
    }
}

/// Whether the bytes in the file are all 0; none if they lie elsewhere.
fn zero(tensor: &TensorProto) -> Option<bool> {
    let raw = tensor.raw_data.as_ref().filter(|raw| !raw.is_empty())?;
    (tensor.data_location() == DataLocation::Default).then(|| raw.iter().all(|byte| *byte == 0))
}

fn value_of_tensor(tensor: &TensorProto, limits: &ReadLimits) -> Result<ListedValue, OnnxError> {
    let shape = shape_of(tensor, limits)?;
    Ok(ListedValue {
        name: tensor.name().to_owned(),
        dtype: element_type(tensor.data_type()),
        dims: Some(shape.iter().map(usize::to_string).collect()),
    })
}

fn value_of_info(info: &ValueInfoProto, limits: &ReadLimits) -> Result<ListedValue, OnnxError> {
    let mut listed = ListedValue { name: info.name().to_owned(), ..ListedValue::default() };
    let value = info.r#type.as_ref().and_then(|kind| kind.value.as_ref());
    let Some(type_proto::Value::TensorType(tensor)) = value else { return Ok(listed) };
    listed.dtype = element_type(tensor.elem_type());
    let Some(shape) = &tensor.shape else { return Ok(listed) };
    let place = || format!("value \"{}\"", info.name());
    if shape.dim.len() > limits.max_rank {
        return Err(malformed(place(), format!("rank up to {}", limits.max_rank), shape.dim.len()));
    }
    let dims = shape.dim.iter().map(|dim| dim_text(dim, limits, place));
    listed.dims = Some(dims.collect::<Result<Vec<String>, OnnxError>>()?);
    Ok(listed)
}

fn dim_text(
    dim: &Dimension,
    limits: &ReadLimits,
    place: impl Fn() -> String,
) -> Result<String, OnnxError> {
    match &dim.value {
        Some(dimension::Value::DimValue(size)) => {
            let known = usize::try_from(*size).ok().filter(|size| *size <= limits.max_dim);
            let known = known.map(|size| size.to_string());
            known.ok_or_else(|| malformed(place(), format!("sizes up to {}", limits.max_dim), size))
        }
        Some(dimension::Value::DimParam(text)) if text.len() > MAX_DIM_BYTES => {
            Err(malformed(place(), format!("at most {MAX_DIM_BYTES} bytes"), text.len()))
        }
        Some(dimension::Value::DimParam(text)) => Ok(text.clone()),
        None => Ok("?".into()),
    }
}

/// The name of ONNX's element type `code`.
fn element_type(code: i32) -> Option<&'static str> {
    if let Some(dtype) = message::type_from_code(code) {
        return Some(dtype.name());
    }
    Some(match code {
        4 => "u16",
        8 => "string",
        12 => "u32",
        13 => "u64",
        14 => "c64",
        15 => "c128",
        17 => "f8e4m3fn",
        18 => "f8e4m3fnuz",
        19 => "f8e5m2",
        20 => "f8e5m2fnuz",
        21 => "u4",
        22 => "i4",
        23 => "f4e2m1",
        24 => "f8e8m0",
        25 => "u2",
        26 => "i2",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Add, Attributes, Flavour, Reshape};
    use crate::{DType, Dim, Fact, Graph, Tensor, verify};

    fn node(kind: (&str, &str), input: &[&str], output: &[&str]) -> NodeProto {
        let texts = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        message::node(output[0], kind, texts(input), texts(output), &Attributes::none())
    }

    fn model(nodes: Vec<NodeProto>, output: &str) -> ModelProto {
        let fact = Fact::f32([Dim::symbol("rows"), Dim::from(2)]);
        let zeros = Tensor::f32(&[2], vec![0.0, 0.0]).unwrap();
        let external = message::external_tensor("w", DType::F32, &[2], ("weights.bin", 0, 8));
        ModelProto {
            opset_import: message::opsets(Flavour::Portable, ["", "com.microsoft"]),
            graph: Some(GraphProto {
                input: vec![message::value_info("x", &fact)],
                output: vec![message::value_info(output, &fact)],
                initializer: vec![message::inline_tensor("zeros", &zeros), external],
                node: nodes,
                ..GraphProto::default()
            }),
            ..ModelProto::default()
        }
    }

    fn list(model: &ModelProto) -> Result<Listing, OnnxError> {
        list_nodes(&message::bytes(model), &ReadLimits::default())
    }

    #[test]
    fn nodes_are_listed_with_types_and_what_is_constant() {
        let mut sum = node(("", "Add"), &["zeros", "w"], &["sum"]);
        sum.attribute = node_attributes();
        let nodes = vec![
            sum,
            node(("com.microsoft", "QuickGelu"), &["x", "", "sum"], &["y"]),
            node(("flamingo", "Linear_3"), &["y"], &["z"]),
        ];
        let listing = list(&model(nodes, "z")).unwrap();
        assert_eq!(listing.opsets, [("".into(), 17), ("com.microsoft".into(), 1)].into());
        let dims = |name: &str| vec![name.to_owned(), "2".to_owned()];
        assert_eq!(listing.inputs[0].dims, Some(dims("rows")));
        assert_eq!(listing.initializers[1].dims, Some(vec!["2".into()]));
        let [sum, gelu, call] = listing.nodes.as_slice() else { panic!("{listing:?}") };
        assert!(sum.is_constant && !gelu.is_constant);
        assert_eq!((sum.inputs[0].is_zero, sum.inputs[1].is_zero), (Some(true), None));
        assert_eq!(sum.integers, [("axis".to_owned(), -1)].into());
        assert_eq!(sum.attributes, ["scale".to_owned()].into());
        assert_eq!((gelu.opset, gelu.inputs[0].value.dtype), (Some(1), Some("f32")));
        assert_eq!(gelu.inputs[1], ListedInput::default());
        assert!(gelu.inputs[2].is_constant && gelu.inputs[2].value.dtype.is_none());
        assert_eq!((call.opset, call.outputs[0].dtype), (None, Some("f32")));
    }

    fn node_attributes() -> Vec<super::super::proto::AttributeProto> {
        let attributes = Attributes::none()
            .with("axis", crate::op::Attribute::Int(-1))
            .with("scale", crate::op::Attribute::Float(0.5));
        message::node("", ("", ""), vec![], vec![], &attributes).attribute
    }

    #[test]
    fn helpers_without_a_type_get_one() {
        let nodes = vec![
            node(("", "Shape"), &["x"], &["shape"]),
            node(("", "Concat"), &["shape", "shape"], &["twice"]),
            node(("", "Identity"), &["x"], &["y"]),
        ];
        let listing = list(&model(nodes, "y")).unwrap();
        let dtype = |index: usize| listing.nodes[index].outputs[0].dtype;
        assert_eq!([dtype(0), dtype(1), dtype(2)], [Some("i64"), Some("i64"), Some("f32")]);
        assert!(!listing.nodes[0].is_constant);
    }

    #[test]
    fn quantised_and_random_values_are_not_folded() {
        let nodes = vec![
            node(("", "DequantizeLinear"), &["zeros", "zeros"], &["a"]),
            node(("", "RandomNormal"), &[], &["b"]),
            node(("", "Add"), &["a", "b"], &["y"]),
        ];
        let listing = list(&model(nodes, "y")).unwrap();
        assert!(listing.nodes.iter().all(|node| !node.is_constant));
    }

    #[test]
    fn files_of_our_writer_are_listed() {
        let mut graph = Graph::new("g");
        let rows = Dim::symbol("rows");
        let x = graph.input("x", Fact::f32([rows.clone(), Dim::from(4)]));
        let one = graph.literal(Tensor::f32(&[1], vec![1.0]).unwrap());
        let sum = graph.add("sum", Add, &[x, one]).unwrap();
        let shape = vec![rows, Dim::from(2), Dim::from(2)];
        let y = graph.add("y", Reshape { shape }, &[sum]).unwrap();
        graph.output("y", y);
        let graph = verify(graph).unwrap();
        let bytes = super::super::write_onnx(&graph, Flavour::Portable, &Default::default());
        let listing = list_nodes(&bytes.unwrap(), &ReadLimits::default()).unwrap();
        let last = listing.nodes.last().unwrap();
        assert_eq!((last.op_type.as_str(), last.opset), ("Reshape", Some(17)));
        assert_eq!(last.inputs[1].value.dtype, Some("i64"));
        assert_eq!(listing.outputs[0].dtype, Some("f32"));
    }

    #[test]
    fn what_is_no_listing_is_refused() {
        let limits = ReadLimits::default();
        for bytes in [&b"not ONNX"[..], &[0xff; 40], b"", &[0x3a, 2, 0x12]] {
            assert!(list_nodes(bytes, &limits).is_err(), "{bytes:?}");
        }
        let unknown = model(vec![node(("", "Relu"), &["nothing"], &["y"])], "y");
        assert!(list(&unknown).unwrap_err().to_string().contains("`nothing`"));
        let twice = vec![node(("", "Relu"), &["x"], &["y"]), node(("", "Relu"), &["x"], &["y"])];
        assert!(list(&model(twice, "y")).unwrap_err().to_string().contains("two"));
        let missing = model(vec![node(("", "Relu"), &["x"], &["y"])], "z");
        assert!(list(&missing).is_err());
        let good = message::bytes(&model(vec![node(("", "Relu"), &["x"], &["y"])], "y"));
        for end in 1..good.len() {
            let _ = list_nodes(&good[..end], &limits);
        }
        assert!(list_nodes(&good, &ReadLimits { max_bytes: 9, ..limits }).is_err());
    }
}
