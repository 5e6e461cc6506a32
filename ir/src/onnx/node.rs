//! Ops from the nodes of a file.

use std::collections::BTreeMap;

use super::proto::NodeProto;
use super::proto::attribute_proto::AttributeType;
use super::{FLAMINGO, message};
use crate::Fact;
use crate::op::{Attribute, Attributes, OnnxForm, Op};

/// Whether a node was added by the writer for a target shape or a second name.
pub(super) fn is_helper(node: &NodeProto) -> bool {
    node.domain().is_empty()
        && node.name().contains('#')
        && matches!(node.op_type(), "Shape" | "Concat" | "Identity")
}

/// The op of a node, and how many of the node's inputs are the op's; else what is not known.
/// `integers`: constant i64 vectors; `declared`: facts of computed values.
pub(super) fn op_from_node(
    node: &NodeProto,
    integers: &BTreeMap<&str, Vec<i64>>,
    declared: &BTreeMap<&str, Fact>,
) -> Result<(Op, usize), String> {
    let given = attributes_of(node)?;
    let kind = (node.domain(), node.op_type());
    let unknown = || match kind.0 {
        "" => format!("unknown operator `{}`", kind.1),
        domain => format!("unknown operator `{}` of domain `{domain}`", kind.1),
    };
    if kind.0 == FLAMINGO {
        let op = Op::from_attributes(function_name(kind.1), &given).map_err(|e| e.to_string())?;
        return if op.is_function() { Ok((op, node.input.len())) } else { Err(unknown()) };
    }
    let get = |name: &str| {
        let found = given.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        found.ok_or_else(|| format!("attribute `{name}` is missing"))
    };
    let input = |index: usize| {
        let list = node.input.get(index).and_then(|name| integers.get(name.as_str()));
        list.cloned().ok_or_else(|| format!("input {index} is no constant list of integers"))
    };
    let single = |index: usize| match input(index)?.as_slice() {
        [value] => Ok(Attribute::Int(*value)),
        other => Err(format!("input {index}: expected 1 integer, got {}", other.len())),
    };
    let own = Attributes::none();
    let own = match kind.1 {
        "Cast" => own.with("to", cast_type(&get("to")?)?),
        "Reshape" | "Expand" => {
            let fact = node.output.first().and_then(|name| declared.get(name.as_str()));
            let fact = fact.ok_or("its output has no type")?;
            own.with("shape", fact.shape.as_slice())
        }
        "Transpose" => own.with("permutation", get("perm")?),
        "Concat" => own.with("axis", get("axis")?),
        "Slice" => own.with("axis", single(3)?).with("start", single(1)?).with("end", single(2)?),
        "Split" => own.with("axis", get("axis")?).with("sizes", Attribute::Ints(input(1)?)),
        "LayerNormalization" => own.with("epsilon", get("epsilon")?),
        "QuickGelu" => own.with("alpha", get("alpha")?),
        "MatMulNBits" => own
            .with("bits", get("bits")?)
            .with("block", get("block_size")?)
            .with("n", get("N")?)
            .with("k", get("K")?),
        "RMSNormalization" => own.with("epsilon", get("epsilon")?),
        "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" => own
            .with("epsilon", get("epsilon")?)
            .with("simplified", kind.1 == "SkipSimplifiedLayerNormalization"),
        "RotaryEmbedding" if kind.0.is_empty() => own.with("n_dims", get("rotary_embedding_dim")?),
        "RotaryEmbedding" => {
            own.with("n_heads", get("num_heads")?).with("n_dims", get("rotary_embedding_dim")?)
        }
        "Conv" => own
            .with("strides", get("strides")?)
            .with("pads", get("pads")?)
            .with("group", get("group")?),
        "AveragePool" => {
            let (window, pads) = (get("kernel_shape")?, get("pads")?);
            let (Attribute::Ints(window), Attribute::Ints(pads)) = (window, pads) else {
                return Err("`kernel_shape` and `pads`: expected integers".into());
            };
            let ([window, ..], [_, _, missing @ ..]) = (&window[..], &pads[..]) else {
                return Err("`kernel_shape` and `pads`: expected 2 and 4 integers".into());
            };
            own.with("window", Attribute::Int(*window))
                .with("missing", Attribute::Ints(missing.to_vec()))
        }
        "Attention" => own.with("scale", get("scale")?),
        "MultiHeadAttention" => own.with("n_heads", get("num_heads")?).with("scale", get("scale")?),
        _ => own,
    };
    let name = match kind.1 {
        "Attention" => "ScaledDotProductAttention",
        "RMSNormalization" => "RmsNormalization",
        "RotaryEmbedding" if !kind.0.is_empty() => "RotaryEmbeddingOfRows",
        "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" => "SkipNormalization",
        "MultiHeadAttention" if node.input.len() > 3 => "BiasedAttention",
        name => name,
    };
    if !Op::NAMES.contains(&name) {
        return Err(unknown());
    }
    let op = Op::from_attributes(name, &own).map_err(|error| error.to_string())?;
    match op.operator().onnx_form() {
        OnnxForm::Node { domain, op_type, attributes, extra_inputs, .. }
            if (domain, op_type) == kind =>
        {
            if attributes != given {
                return Err(format!("attributes: expected {attributes:?}, got {given:?}"));
            }
            let n_inputs = node.input.len().checked_sub(extra_inputs.len());
            n_inputs.map(|n_inputs| (op, n_inputs)).ok_or_else(|| "too few inputs".into())
        }
        OnnxForm::Node { .. } | OnnxForm::Function | OnnxForm::BuildTime => Err(unknown()),
    }
}

/// The op's name: `Linear` of `Linear_3`.
fn function_name(op_type: &str) -> &str {
    match op_type.rsplit_once('_') {
        Some((name, number)) if number.parse::<u32>().is_ok() => name,
        _ => op_type,
    }
}

fn cast_type(code: &Attribute) -> Result<&'static str, String> {
    let Attribute::Int(code) = code else { return Err("attribute `to` is no integer".into()) };
    let dtype = i32::try_from(*code).ok().and_then(message::type_from_code);
    dtype.map(|dtype| dtype.name()).ok_or_else(|| format!("attribute `to`: unknown type {code}"))
}

fn attributes_of(node: &NodeProto) -> Result<Attributes, String> {
    let mut attributes = Attributes::none();
    for proto in &node.attribute {
        let value = match proto.r#type() {
            AttributeType::Int => Attribute::Int(proto.i()),
            AttributeType::Float => Attribute::Float(proto.f()),
            AttributeType::Ints => Attribute::Ints(proto.ints.clone()),
            AttributeType::String => match str::from_utf8(proto.s()) {
                Ok(text) => Attribute::Text(text.to_owned()),
                Err(_) => return Err(format!("attribute `{}` is no text", proto.name())),
            },
            other => return Err(format!("attribute `{}` of kind {other:?}", proto.name())),
        };
        attributes = attributes.with(proto.name(), value);
    }
    Ok(attributes)
}
