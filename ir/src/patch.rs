//! Patches: how a pass changes a graph. New nodes are appended, then readers of old values are
//! moved to new ones; nothing is changed in place.

use std::collections::{BTreeMap, BTreeSet};

use crate::graph::{Graph, GraphError, Node, NodeId, ValueId};
use crate::op::Op;
use crate::{Fact, Tensor};

/// A change of a graph under construction.
///
/// Questions about the graph (`producer`, `only_reader`, …) are answered for the graph as it was
/// when the patch began.
pub struct Patch<'g> {
    graph: &'g mut Graph,
    producers: BTreeMap<ValueId, NodeId>,
    consumers: BTreeMap<ValueId, Vec<NodeId>>,
    outputs: BTreeSet<ValueId>,
    build_time: BTreeSet<ValueId>,
    replacements: BTreeMap<ValueId, ValueId>,
    n_replaced: usize,
}

impl<'g> Patch<'g> {
    /// Begins a change of `graph`.
    pub fn new(graph: &'g mut Graph) -> Patch<'g> {
        Patch {
            producers: graph.producers(),
            consumers: graph.consumers(),
            outputs: graph.outputs().iter().map(|(_, id)| *id).collect(),
            build_time: graph.build_time_values(),
            replacements: BTreeMap::new(),
            n_replaced: 0,
            graph,
        }
    }

    /// The graph with what was appended so far.
    pub fn graph(&self) -> &Graph {
        self.graph
    }

    /// The nodes there were when the patch began.
    pub fn nodes(&self) -> Vec<Node> {
        self.graph.nodes().to_vec()
    }

    /// Element type and shape of a value.
    pub fn fact(&self, value: ValueId) -> &Fact {
        self.graph.fact(value)
    }

    /// The node that computes `value`.
    pub fn producer(&self, value: ValueId) -> Option<Node> {
        self.producers.get(&value).map(|id| self.graph.node(*id).clone())
    }

    /// The nodes that read `value`, once for each input that does.
    pub fn readers(&self, value: ValueId) -> Vec<Node> {
        let readers = self.consumers.get(&value).map_or(&[][..], Vec::as_slice);
        readers.iter().map(|id| self.graph.node(*id).clone()).collect()
    }

    /// Whether exactly one input reads `value`, and no graph output does.
    pub fn is_read_once(&self, value: ValueId) -> bool {
        !self.outputs.contains(&value) && self.consumers.get(&value).is_some_and(|c| c.len() == 1)
    }

    /// Whether `value` is an output of the graph.
    pub fn is_output(&self, value: ValueId) -> bool {
        self.outputs.contains(&value)
    }

    /// Whether `value` was known at build time when the patch began.
    pub fn is_build_time(&self, value: ValueId) -> bool {
        self.build_time.contains(&value)
    }

    /// Appends a node with one output.
    pub fn add(
        &mut self,
        name: &str,
        op: impl Into<Op>,
        inputs: &[ValueId],
    ) -> Result<ValueId, GraphError> {
        self.graph.add(name, op, inputs)
    }

    /// Appends a node.
    pub fn add_many(
        &mut self,
        name: &str,
        op: impl Into<Op>,
        inputs: &[ValueId],
    ) -> Result<Vec<ValueId>, GraphError> {
        self.graph.add_many(name, op, inputs)
    }

    /// A literal.
    pub fn literal(&mut self, tensor: Tensor) -> ValueId {
        self.graph.literal(tensor)
    }

    /// Moves every reader of `old` to `new`, which must have the same element type and shape.
    pub fn replace(&mut self, old: ValueId, new: ValueId) -> Result<(), GraphError> {
        let (expected, found) = (self.graph.fact(old), self.graph.fact(new));
        if expected != found {
            let reason = format!("a patch replaces a value of {expected} by one of {found}");
            return Err(self.graph.broken(reason));
        }
        self.replacements.insert(old, new);
        self.n_replaced += 1;
        Ok(())
    }

    /// Applies the replacements, drops what nothing reads any more, and returns how many values
    /// were replaced.
    pub fn apply(self) -> Result<usize, GraphError> {
        self.graph.substitute(&self.replacements)?;
        Ok(self.n_replaced)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Add, Mul, Neg};

    #[test]
    fn readers_move_and_dead_nodes_go() {
        let mut graph = Graph::new("g");
        let x = graph.input("x", Fact::f32([2]));
        let a = graph.add("a", Neg, &[x]).unwrap();
        let b = graph.add("b", Add, &[a, x]).unwrap();
        graph.output("y", b);
        let mut patch = Patch::new(&mut graph);
        assert!(patch.is_read_once(a) && !patch.is_read_once(x));
        let new = patch.add("c", Mul, &[x, x]).unwrap();
        patch.replace(a, new).unwrap();
        assert_eq!(patch.apply().unwrap(), 1);
        let names: Vec<&str> = graph.nodes().iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["c", "b"]);
    }

    #[test]
    fn shapes_must_agree() {
        let mut graph = Graph::new("g");
        let x = graph.input("x", Fact::f32([2]));
        let y = graph.input("y", Fact::f32([3]));
        assert!(Patch::new(&mut graph).replace(x, y).is_err());
    }
}
