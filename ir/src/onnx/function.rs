//! Definitions of function ops as ONNX local functions.

use std::collections::{BTreeMap, BTreeSet};

use super::proto::FunctionProto;
use super::write::{Scope, nodes_from_graph};
use super::{FLAMINGO, OnnxError, message};
use crate::Fact;
use crate::op::{Flavour, Op};
use crate::verify::definition;

/// The functions of one file.
pub(super) struct FunctionTable {
    flavour: Flavour,
    /// Bytes that further functions may take.
    bytes_left: usize,
    /// Every function, after those it calls.
    pub(super) functions: Vec<FunctionProto>,
    /// By op name: bytes of the nameless function, and the name in the file.
    names: BTreeMap<&'static str, Vec<(Vec<u8>, String)>>,
    /// The name in the file, by op and facts of inputs: what layers have in common is defined once.
    asked: BTreeMap<String, String>,
}

impl FunctionTable {
    /// No functions.
    pub(super) fn new(flavour: Flavour, max_bytes: usize) -> FunctionTable {
        FunctionTable {
            flavour,
            bytes_left: max_bytes,
            functions: Vec::new(),
            names: BTreeMap::new(),
            asked: BTreeMap::new(),
        }
    }

    /// The file's name of the function that defines `op` for inputs of these facts: the op's
    /// name, then `_2`, `_3`, … for further definitions of the same op.
    pub(super) fn name_of(&mut self, op: &Op, inputs: &[Fact]) -> Result<String, OnnxError> {
        let key = format!("{op:?} {inputs:?}");
        if let Some(name) = self.asked.get(&key) {
            return Ok(name.clone());
        }
        let name = self.define(op, inputs)?;
        self.asked.insert(key, name.clone());
        Ok(name)
    }

    /// Adds the definition, unless another call needed the same one.
    fn define(&mut self, op: &Op, inputs: &[Fact]) -> Result<String, OnnxError> {
        let mut function = self.function(op, inputs)?;
        let bytes = message::bytes(&function);
        let known = self.names.entry(op.name()).or_default();
        if let Some((_, name)) = known.iter().find(|(other, _)| *other == bytes) {
            return Ok(name.clone());
        }
        let too_large = || OnnxError::Altered { place: format!("function \"{}\"", op.name()) };
        self.bytes_left = self.bytes_left.checked_sub(bytes.len()).ok_or_else(too_large)?;
        let name = match known.len() {
            0 => op.name().to_owned(),
            n => format!("{}_{}", op.name(), n + 1),
        };
        known.push((bytes, name.clone()));
        function.name = Some(name.clone());
        self.functions.push(function);
        Ok(name)
    }

    fn function(&mut self, op: &Op, inputs: &[Fact]) -> Result<FunctionProto, OnnxError> {
        let body = definition(op, inputs, self.flavour)?;
        let nodes = nodes_from_graph(&body, Scope::Function, self)?.nodes;
        let names = |ends: &[(String, _)]| ends.iter().map(|(name, _)| name.clone()).collect();
        let domains: BTreeSet<&str> = nodes.iter().map(|node| node.domain()).chain([""]).collect();
        Ok(FunctionProto {
            domain: Some(FLAMINGO.into()),
            input: names(body.inputs()),
            output: names(body.outputs()),
            attribute: op.operator().attributes().0.into_iter().map(|(name, _)| name).collect(),
            opset_import: message::opsets(self.flavour, domains),
            node: nodes,
            ..FunctionProto::default()
        })
    }
}
