//! Replaces function ops by their definitions, all or some.

use std::collections::BTreeMap;

use crate::graph::{Constant, Graph, GraphError, Node, ValueId};
use crate::op::{Flavour, Linear, Op, PanelLinear, UnpackPanels};
use crate::verify::definition;

/// The same graph without function ops: each is replaced by its definition of `flavour`,
/// definitions of definitions included. Node names become `outer/inner`.
///
/// Layers compute the same masks and angles: a node that repeats an earlier one is that one.
/// (Readers merge such nodes too, but tract-core 0.23.9 may merge each into the other and then
/// has neither: where the inputs of two equal nodes list them in different order.)
pub fn inline_functions(graph: &Graph, flavour: Flavour) -> Result<Graph, GraphError> {
    inline(graph, flavour, Which::All)
}

/// The same graph with each linear that reads a weight in panels of integers as one op with it, where engines multiply
/// integers. Ops of several such linears are replaced by their definitions.
pub(super) fn panel_linears(graph: Graph, flavour: Flavour) -> Result<Graph, GraphError> {
    let is_of_panels = |node: &Node| matches!(node.op, Op::UnpackPanels(_));
    if !graph.nodes().iter().any(is_of_panels) {
        return Ok(graph);
    }
    let mut out = inline(&graph, flavour, Which::OfPanels)?;
    out.sweep()?;
    Ok(out)
}

/// Which function ops are replaced by their definitions.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    All,
    /// Those with linears that read weights in panels of integers, down to these linears.
    OfPanels,
}

fn inline(graph: &Graph, flavour: Flavour, which: Which) -> Result<Graph, GraphError> {
    let mut inliner = Inliner {
        out: Graph::new(&graph.name),
        flavour,
        which,
        literals: BTreeMap::new(),
        results: BTreeMap::new(),
        panels: BTreeMap::new(),
    };
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
    which: Which,
    /// Literals by fact and bytes: definitions repeat the same few.
    literals: BTreeMap<(String, Vec<u8>), ValueId>,
    /// Outputs by op, as it prints, and inputs.
    results: BTreeMap<(String, Vec<ValueId>), Vec<ValueId>>,
    /// Weights in panels of integers: how they are stored, and their parts.
    panels: BTreeMap<ValueId, (UnpackPanels, Vec<ValueId>)>,
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
        let reads_panels = inputs.iter().any(|id| self.panels.contains_key(id));
        let is_replaced = match (self.which, &node.op) {
            (Which::All, op) => op.is_function(),
            (Which::OfPanels, Op::Linear(linear)) if reads_panels => {
                return self.panel_linear(&name, linear, inputs);
            }
            (Which::OfPanels, op) => op.is_function() && reads_panels,
        };
        if is_replaced {
            let facts: Vec<_> = inputs.iter().map(|id| self.out.fact(*id).clone()).collect();
            let body = definition(&node.op, &facts, self.flavour)?;
            return self.nodes(&body, inputs, &format!("{name}/"));
        }
        let outputs = self.once(&name, node.op.clone(), inputs)?;
        if let (Which::OfPanels, Op::UnpackPanels(op)) = (self.which, &node.op)
            && PanelLinear::takes(op.format, op.format.rounding())
        {
            self.panels.insert(outputs[0], (op.clone(), inputs.to_vec()));
        }
        Ok(outputs)
    }

    /// Appends a node, or finds the one that is equal.
    fn once(&mut self, name: &str, op: Op, inputs: &[ValueId]) -> Result<Vec<ValueId>, GraphError> {
        let key = (format!("{op:?}"), inputs.to_vec());
        if let Some(outputs) = self.results.get(&key) {
            return Ok(outputs.clone());
        }
        let outputs = self.out.add_many(name, op, inputs)?;
        self.results.insert(key, outputs.clone());
        Ok(outputs)
    }

    fn panel_linear(
        &mut self,
        name: &str,
        linear: &Linear,
        inputs: &[ValueId],
    ) -> Result<Vec<ValueId>, GraphError> {
        let weight = inputs.get(1).and_then(|weight| self.panels.get(weight)).cloned();
        match weight {
            Some((weight, parts)) if PanelLinear::takes(weight.format, linear.rounding) => {
                let op = PanelLinear { linear: linear.clone(), weight };
                let inputs = [&inputs[..1], &parts, &inputs[2..]].concat();
                self.once(name, op.into(), &inputs)
            }
            _ => self.once(name, linear.clone().into(), inputs),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Activate, Activation, Add, Mul};
    use crate::{Fact, Tensor, evaluate};

    #[test]
    fn chains_of_equal_nodes_become_one() {
        let mut graph = Graph::new("thrice");
        let [x, y] = ["x", "y"].map(|name| graph.input(name, Fact::f32([2])));
        let mut ends = Vec::new();
        for layer in 0..3 {
            let sum = graph.add(&format!("{layer}.sum"), Add, &[x, y]).unwrap();
            let op = Activate { activation: Activation::Silu };
            let active = graph.add(&format!("{layer}.active"), op, &[sum]).unwrap();
            ends.push(graph.add(&format!("{layer}.product"), Mul, &[active, x]).unwrap());
        }
        let other = graph.add("other", Add, &[y, x]).unwrap();
        for (i, value) in [ends[0], ends[2], other].into_iter().enumerate() {
            graph.output(&format!("y{i}"), value);
        }
        let inlined = inline_functions(&graph, Flavour::Portable).unwrap();
        let n_named =
            |prefix: &str| inlined.nodes().iter().filter(|n| n.name.starts_with(prefix)).count();
        assert_eq!((n_named("1."), n_named("2."), n_named("other")), (0, 0, 1));
        assert_eq!(n_named("0.sum"), 1);
        let inputs = [Tensor::vector(vec![1.0, 2.0]), Tensor::vector(vec![0.5, -1.0])];
        assert_eq!(evaluate(&inlined, &inputs).unwrap(), evaluate(&graph, &inputs).unwrap());
    }
}
