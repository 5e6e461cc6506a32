//! Small builders of ONNX messages.

use prost::Message;

use super::proto::attribute_proto::AttributeType;
use super::proto::tensor_proto::{DataLocation, DataType};
use super::proto::tensor_shape_proto::{Dimension, dimension};
use super::proto::{
    AttributeProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use crate::op::{Attribute, Attributes, Flavour};
use crate::{DType, Dim, Fact, Tensor};

/// ONNX's code of an element type.
pub(super) fn type_code(dtype: DType) -> i32 {
    let data_type = match dtype {
        DType::F64 => DataType::Double,
        DType::F32 => DataType::Float,
        DType::F16 => DataType::Float16,
        DType::BF16 => DataType::Bfloat16,
        DType::I64 => DataType::Int64,
        DType::I32 => DataType::Int32,
        DType::I16 => DataType::Int16,
        DType::I8 => DataType::Int8,
        DType::U8 => DataType::Uint8,
        DType::Bool => DataType::Bool,
    };
    data_type.into()
}

/// The element type with ONNX's code `code`.
pub(super) fn type_from_code(code: i32) -> Option<DType> {
    DType::ALL.into_iter().find(|dtype| type_code(*dtype) == code)
}

/// An i64 of a size of a graph.
pub(super) fn int(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// A named and typed value; symbolic dimensions are stored as their text.
pub(super) fn value_info(name: &str, fact: &Fact) -> ValueInfoProto {
    let dimension = |dim: &Dim| {
        let value = match dim.known() {
            Some(size) => dimension::Value::DimValue(int(size)),
            None => dimension::Value::DimParam(dim.to_string()),
        };
        Dimension { denotation: None, value: Some(value) }
    };
    let tensor = type_proto::Tensor {
        elem_type: Some(type_code(fact.dtype)),
        shape: Some(TensorShapeProto { dim: fact.shape.iter().map(dimension).collect() }),
    };
    let tensor = type_proto::Value::TensorType(tensor);
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto { denotation: None, value: Some(tensor) }),
        ..ValueInfoProto::default()
    }
}

/// A tensor whose data is in the file itself.
pub(super) fn inline_tensor(name: &str, tensor: &Tensor) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        dims: tensor.shape().iter().map(|size| int(*size)).collect(),
        data_type: Some(type_code(tensor.dtype())),
        raw_data: Some(tensor.to_le_bytes()),
        ..TensorProto::default()
    }
}

/// A tensor whose data is in the weight file.
pub(super) fn external_tensor(
    name: &str,
    dtype: DType,
    shape: &[usize],
    (location, offset, length): (&str, u64, u64),
) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        dims: shape.iter().map(|size| int(*size)).collect(),
        data_type: Some(type_code(dtype)),
        data_location: Some(DataLocation::External.into()),
        external_data: vec![
            entry("location", location),
            entry("offset", &offset.to_string()),
            entry("length", &length.to_string()),
        ],
        ..TensorProto::default()
    }
}

/// A key with a value.
pub(super) fn entry(key: &str, value: &str) -> StringStringEntryProto {
    StringStringEntryProto { key: Some(key.to_owned()), value: Some(value.to_owned()) }
}

/// A node.
pub(super) fn node(
    name: &str,
    (domain, op_type): (&str, &str),
    input: Vec<String>,
    output: Vec<String>,
    attributes: &Attributes,
) -> NodeProto {
    NodeProto {
        name: Some(name.to_owned()),
        op_type: Some(op_type.to_owned()),
        domain: (!domain.is_empty()).then(|| domain.to_owned()),
        input,
        output,
        attribute: attributes.0.iter().map(|(name, value)| attribute(name, value)).collect(),
        ..NodeProto::default()
    }
}

/// A node that gives a constant.
pub(super) fn constant(name: &str, tensor: &Tensor) -> NodeProto {
    let mut node =
        node(name, ("", "Constant"), Vec::new(), vec![name.to_owned()], &Attributes::none());
    let value = TensorProto { name: None, ..inline_tensor(name, tensor) };
    node.attribute.push(AttributeProto {
        name: Some("value".into()),
        r#type: Some(AttributeType::Tensor.into()),
        t: Some(value),
        ..AttributeProto::default()
    });
    node
}

/// An attribute; dimensions are stored as their text (they occur on no node that is written).
fn attribute(name: &str, value: &Attribute) -> AttributeProto {
    let mut proto = AttributeProto { name: Some(name.to_owned()), ..AttributeProto::default() };
    let kind = match value {
        Attribute::Int(value) => {
            proto.i = Some(*value);
            AttributeType::Int
        }
        Attribute::Float(value) => {
            proto.f = Some(*value);
            AttributeType::Float
        }
        Attribute::Text(text) => {
            proto.s = Some(text.clone().into_bytes());
            AttributeType::String
        }
        Attribute::Ints(values) => {
            proto.ints = values.clone();
            AttributeType::Ints
        }
        Attribute::Dims(_) => {
            proto.s = Some(value.to_string().into_bytes());
            AttributeType::String
        }
    };
    proto.r#type = Some(kind.into());
    proto
}

/// Versions of the operator sets `domains` in files of a flavour.
pub(super) fn opsets<'a>(
    flavour: Flavour,
    domains: impl IntoIterator<Item = &'a str>,
) -> Vec<OperatorSetIdProto> {
    let version = |domain: &str| if domain.is_empty() { flavour.opset() } else { 1 };
    let opset = |domain: &str| OperatorSetIdProto {
        domain: Some(domain.to_owned()),
        version: Some(version(domain)),
    };
    domains.into_iter().map(opset).collect()
}

/// Bytes of a message.
pub(super) fn bytes(message: &impl Message) -> Vec<u8> {
    message.encode_to_vec()
}
