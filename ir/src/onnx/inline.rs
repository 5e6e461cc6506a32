//! Replaces function ops by their definitions.

use std::collections::BTreeMap;

use crate::graph::{Constant, Graph, GraphError, Node, ValueId};
use crate::op::Flavour;
use crate::verify::definition;

/// The same graph without function ops: each is replaced by its definition of `flavour`,
/// definitions of definitions included. Node names become `outer/inner`.
pub fn inline_functions(graph: &Graph, flavour: Flavour) -> Result<Graph, GraphError> {
    let mut inliner = Inliner { out: Graph::new(&graph.name), flavour, literals: BTreeMap::new() };
    let inputs: Vec<ValueId> = graph
        .inputs()
        .iter()
        .map(|(name, id)| inliner.out.input(name, graph.fact(*id).clone()))
        .collect();
    let outputs = inliner.nodes(graph, &inputs, "")?;
    for ((name, _), id) in graph.outputs().iter().zip(outputs) {
        inliner.out.output(name, id);
    }
    Ok(inliner.out)
}

struct Inliner {
    out: Graph,
    flavour: Flavour,
    /// Literals by fact and bytes: definitions repeat the same few.
    literals: BTreeMap<(String, Vec<u8>), ValueId>,
}

impl Inliner {
    /// Appends the nodes of `graph` applied to `inputs`; returns its outputs.
    fn nodes(
        &mut self,
        graph: &Graph,
        inputs: &[ValueId],
        prefix: &str,
    ) -> Result<Vec<ValueId>, GraphError> {
        let ends = graph.inputs().iter().map(|(_, id)| *id);
        let mut ids: BTreeMap<ValueId, ValueId> = ends.zip(inputs.iter().copied()).collect();
        for (id, value) in graph.values() {
            match &value.constant {
                Some(Constant::Weight(name)) => {
                    ids.insert(id, self.out.weight(name, value.fact.clone()));
                }
                Some(Constant::Literal(tensor)) => {
                    let key = (value.fact.to_string(), tensor.to_le_bytes());
                    let out = &mut self.out;
                    let literal =
                        self.literals.entry(key).or_insert_with(|| out.literal(tensor.clone()));
                    ids.insert(id, *literal);
                }
                None => {}
            }
        }
        let map = |ids: &BTreeMap<ValueId, ValueId>, id: &ValueId| {
            ids.get(id)
                .copied()
                .ok_or_else(|| graph.broken("a value is read before it is computed".into()))
        };
        for node in graph.nodes() {
            let inputs: Result<Vec<ValueId>, GraphError> =
                node.inputs.iter().map(|id| map(&ids, id)).collect();
            let outputs = self.node(node, &inputs?, prefix)?;
            ids.extend(node.outputs.iter().copied().zip(outputs));
        }
        graph.outputs().iter().map(|(_, id)| map(&ids, id)).collect()
    }

    fn node(
        &mut self,
        node: &Node,
        inputs: &[ValueId],
        prefix: &str,
    ) -> Result<Vec<ValueId>, GraphError> {
        let name = format!("{prefix}{}", node.name);
        if !node.op.is_function() {
            return self.out.add_many(&name, node.op.clone(), inputs);
        }
        let facts: Vec<_> = inputs.iter().map(|id| self.out.fact(*id).clone()).collect();
        let body = definition(&node.op, &facts, self.flavour)?;
        self.nodes(&body, inputs, &format!("{name}/"))
    }
}
