//! Parameters of operators by version: what a kernel's constraints speak of.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use flamingo_ir::onnx::ListedNode;
use serde::Deserialize;

const FILE: &str = include_str!("tables/signatures.json");

/// Signatures of the operators that ONNX Runtime knows, ONNX's own and its.
#[derive(Deserialize)]
pub struct Signatures {
    version: String,
    sources: Vec<String>,
    /// By `Op` or `domain:Op`, oldest first.
    ops: BTreeMap<String, Vec<Signature>>,
}

/// Since which version; inputs and outputs as `name:constraint`, the last of which may stand for several.
#[derive(Deserialize)]
pub(super) struct Signature(i64, Vec<String>, Vec<String>);

/// A side of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Input,
    Output,
}

impl Signatures {
    /// The signatures that this program has.
    ///
    /// # Errors
    /// Data that does not parse.
    pub fn load() -> Result<Signatures> {
        serde_json::from_str(FILE).context("kernel table `signatures`")
    }

    /// Where they come from.
    pub fn sources(&self) -> impl Iterator<Item = String> {
        self.sources.iter().map(|source| format!("{source} ({})", self.version))
    }

    /// The signature that `node` has at its version; none if nothing is known of it.
    pub(super) fn of(&self, node: &ListedNode) -> Option<&Signature> {
        let versions = self.ops.get(&key_of(node))?;
        versions.iter().rev().find(|signature| node.opset.is_some_and(|opset| signature.0 <= opset))
    }

    /// The first version of the operator; none if it is not known.
    pub(super) fn first_version(&self, node: &ListedNode) -> Option<i64> {
        self.ops.get(&key_of(node))?.first().map(|signature| signature.0)
    }
}

impl Signature {
    /// The version that the operator has been like this since.
    pub(super) fn since(&self) -> i64 {
        self.0
    }

    /// Name and constraint of the parameter at `index`.
    pub(super) fn parameter(&self, side: Side, index: usize) -> Option<(&str, &str)> {
        let parameters = match side {
            Side::Input => &self.1,
            Side::Output => &self.2,
        };
        parameters.get(index).or(parameters.last())?.rsplit_once(':')
    }
}

/// What tables call the operator of `node`.
pub(super) fn key_of(node: &ListedNode) -> String {
    match node.domain.as_str() {
        "" => node.op_type.clone(),
        domain => format!("{domain}:{}", node.op_type),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(op_type: &str, opset: i64) -> ListedNode {
        ListedNode { op_type: op_type.into(), opset: Some(opset), ..ListedNode::default() }
    }

    #[test]
    fn a_node_has_the_signature_of_its_version() {
        let signatures = Signatures::load().unwrap();
        let since = |op, opset| signatures.of(&node(op, opset)).map(Signature::since);
        assert_eq!([since("Softplus", 17), since("Softplus", 22)], [Some(1), Some(22)]);
        assert_eq!([since("Attention", 22), since("Attention", 23)], [None, Some(23)]);
        assert_eq!(signatures.first_version(&node("Attention", 22)), Some(23));
        let gather = signatures.of(&node("Gather", 17)).unwrap();
        assert_eq!(gather.parameter(Side::Input, 1), Some(("indices", "Tind")));
        let concat = signatures.of(&node("Concat", 17)).unwrap();
        assert_eq!(concat.parameter(Side::Input, 7), Some(("inputs", "T")));
    }
}
