//! Graphs: values, nodes that compute them, and the facts known of each.

use std::collections::{BTreeMap, BTreeSet};

use crate::op::{Op, OpError};
use crate::{Fact, Tensor};

/// A value of a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ValueId(usize);

/// A node of a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(usize);

impl ValueId {
    /// Position among the graph's values.
    pub fn index(self) -> usize {
        self.0
    }
}

/// Where a value that no node computes comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Constant {
    /// A literal in the graph.
    Literal(Tensor),
    /// A named tensor of the checkpoint or artifact, read when needed.
    Weight(String),
}

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Element type and shape.
    pub fact: Fact,
    /// Known before anything runs.
    pub constant: Option<Constant>,
}

/// One application of an op.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Name for people and files, unique in the graph: `decoder.3.attention.query`.
    pub name: String,
    /// Meaning.
    pub op: Op,
    /// Inputs in the op's order.
    pub inputs: Vec<ValueId>,
    /// Outputs in the op's order.
    pub outputs: Vec<ValueId>,
}

/// Why a graph cannot be built or used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GraphError {
    /// An op refused its inputs.
    #[error("node \"{node}\" ({op}): {source}")]
    Op {
        /// The node's name.
        node: String,
        /// The op's name.
        op: &'static str,
        /// The reason.
        source: OpError,
    },
    /// The structure is broken.
    #[error("graph \"{graph}\": {reason}")]
    Structure {
        /// The graph's name.
        graph: String,
        /// What is wrong.
        reason: String,
    },
}

/// A graph: named inputs and outputs, nodes in an order in which they can run.
///
/// ```
/// use flamingo_ir::{Fact, Graph, op::Add};
/// let mut graph = Graph::new("double");
/// let x = graph.input("x", Fact::f32([2]));
/// let y = graph.add("sum", Add, &[x, x])?;
/// graph.output("y", y);
/// # Ok::<(), flamingo_ir::GraphError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    /// Name of the stage or function.
    pub name: String,
    values: Vec<Value>,
    nodes: Vec<Node>,
    inputs: Vec<(String, ValueId)>,
    outputs: Vec<(String, ValueId)>,
    weights: BTreeMap<String, ValueId>,
    names: BTreeSet<String>,
}

impl Graph {
    /// An empty graph.
    pub fn new(name: &str) -> Graph {
        Graph {
            name: name.to_owned(),
            values: Vec::new(),
            nodes: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            weights: BTreeMap::new(),
            names: BTreeSet::new(),
        }
    }

    /// Declares an input.
    pub fn input(&mut self, name: &str, fact: Fact) -> ValueId {
        let id = self.push_value(Value { fact, constant: None });
        self.inputs.push((name.to_owned(), id));
        id
    }

    /// Declares an output.
    pub fn output(&mut self, name: &str, value: ValueId) {
        self.outputs.push((name.to_owned(), value));
    }

    /// The checkpoint's tensor `name`; the same value for the same name.
    pub fn weight(&mut self, name: &str, fact: Fact) -> ValueId {
        if let Some(id) = self.weights.get(name) {
            return *id;
        }
        let constant = Some(Constant::Weight(name.to_owned()));
        let id = self.push_value(Value { fact, constant });
        self.weights.insert(name.to_owned(), id);
        id
    }

    /// A literal.
    pub fn literal(&mut self, tensor: Tensor) -> ValueId {
        let fact = tensor.fact();
        self.push_value(Value { fact, constant: Some(Constant::Literal(tensor)) })
    }

    /// Appends a node with one output and returns that.
    pub fn add(
        &mut self,
        name: &str,
        op: impl Into<Op>,
        inputs: &[ValueId],
    ) -> Result<ValueId, GraphError> {
        let outputs = self.add_many(name, op, inputs)?;
        match outputs.as_slice() {
            [output] => Ok(*output),
            _ => Err(self.broken(format!("node \"{name}\" has {} outputs, not 1", outputs.len()))),
        }
    }

    /// Appends a node and returns its outputs.
    pub fn add_many(
        &mut self,
        name: &str,
        op: impl Into<Op>,
        inputs: &[ValueId],
    ) -> Result<Vec<ValueId>, GraphError> {
        let op = op.into();
        let mut facts = Vec::with_capacity(inputs.len());
        for input in inputs {
            let value = self.values.get(input.0);
            facts.push(
                value.ok_or_else(|| self.broken("input of another graph".into()))?.fact.clone(),
            );
        }
        let inferred = op.infer(&facts).map_err(|source| GraphError::Op {
            node: name.to_owned(),
            op: op.name(),
            source,
        })?;
        let outputs: Vec<ValueId> = inferred
            .into_iter()
            .map(|fact| self.push_value(Value { fact, constant: None }))
            .collect();
        let name = self.unique_name(name);
        self.nodes.push(Node { name, op, inputs: inputs.to_vec(), outputs: outputs.clone() });
        Ok(outputs)
    }

    /// Named inputs in order.
    pub fn inputs(&self) -> &[(String, ValueId)] {
        &self.inputs
    }

    /// Named outputs in order.
    pub fn outputs(&self) -> &[(String, ValueId)] {
        &self.outputs
    }

    /// Nodes in an order in which they can run.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// All values with their ids.
    pub fn values(&self) -> impl Iterator<Item = (ValueId, &Value)> {
        self.values.iter().enumerate().map(|(index, value)| (ValueId(index), value))
    }

    /// One value.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0]
    }

    /// Element type and shape of a value.
    pub fn fact(&self, id: ValueId) -> &Fact {
        &self.values[id.0].fact
    }

    /// The node that computes each value, by value.
    pub fn producers(&self) -> BTreeMap<ValueId, NodeId> {
        let mut producers = BTreeMap::new();
        for (index, node) in self.nodes.iter().enumerate() {
            producers.extend(node.outputs.iter().map(|output| (*output, NodeId(index))));
        }
        producers
    }

    /// The nodes that read each value, by value; graph outputs do not count.
    pub fn consumers(&self) -> BTreeMap<ValueId, Vec<NodeId>> {
        let mut consumers: BTreeMap<ValueId, Vec<NodeId>> = BTreeMap::new();
        for (index, node) in self.nodes.iter().enumerate() {
            for input in &node.inputs {
                consumers.entry(*input).or_default().push(NodeId(index));
            }
        }
        consumers
    }

    /// One node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// All nodes with their ids.
    pub fn node_ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.nodes.len()).map(NodeId)
    }

    /// Values known at build time: constants, and whatever is computed from them alone by ops
    /// that are not left to the device ([`Operator::is_for_run_time`]).
    ///
    /// [`Operator::is_for_run_time`]: crate::op::Operator::is_for_run_time
    pub fn build_time_values(&self) -> BTreeSet<ValueId> {
        let constants = self.values().filter(|(_, value)| value.constant.is_some());
        let mut known: BTreeSet<ValueId> = constants.map(|(id, _)| id).collect();
        for node in &self.nodes {
            let is_for_run_time = node.op.operator().is_for_run_time();
            if !is_for_run_time && node.inputs.iter().all(|input| known.contains(input)) {
                known.extend(node.outputs.iter().copied());
            }
        }
        known
    }

    /// The part of the graph that computes `outputs` from `inputs`: these values become its inputs,
    /// whatever computes them here. Values keep their ids and nodes their order.
    ///
    /// # Errors
    /// If an output needs a value that is neither an input, nor constant, nor computed from them.
    pub fn part(
        &self,
        inputs: Vec<(String, ValueId)>,
        outputs: Vec<(String, ValueId)>,
    ) -> Result<Graph, GraphError> {
        let mut known: BTreeSet<ValueId> = inputs.iter().map(|(_, id)| *id).collect();
        let mut needed: BTreeSet<ValueId> = outputs.iter().map(|(_, id)| *id).collect();
        needed.retain(|id| !known.contains(id));
        let mut nodes = Vec::new();
        for node in self.nodes.iter().rev() {
            if node.outputs.iter().any(|output| needed.contains(output)) {
                needed.extend(node.inputs.iter().filter(|input| !known.contains(input)));
                nodes.push(node.clone());
            }
        }
        nodes.reverse();
        known.extend(self.values().filter(|(_, v)| v.constant.is_some()).map(|(id, _)| id));
        let computed: Vec<ValueId> = nodes.iter().flat_map(|node| node.outputs.clone()).collect();
        if let Some(twice) = computed.iter().find(|output| !known.insert(**output)) {
            return Err(self.broken(format!("value {} is an input and computed", twice.0)));
        }
        match needed.iter().find(|id| !known.contains(id)) {
            None => Ok(Graph { nodes, inputs, outputs, ..self.clone() }),
            Some(id) => {
                let fact = self.fact(*id);
                Err(self.broken(format!("value {} ({fact}) is needed and not given", id.0)))
            }
        }
    }

    /// Makes every reader of a value (nodes and outputs) read another one, drops nodes that
    /// nothing reads any more, and restores a runnable order.
    pub(crate) fn substitute(
        &mut self,
        replacements: &BTreeMap<ValueId, ValueId>,
    ) -> Result<(), GraphError> {
        let resolve = |mut id: ValueId| {
            while let Some(next) = replacements.get(&id) {
                id = *next;
            }
            id
        };
        for node in &mut self.nodes {
            for input in &mut node.inputs {
                *input = resolve(*input);
            }
        }
        for (_, output) in &mut self.outputs {
            *output = resolve(*output);
        }
        self.sweep()
    }

    /// Puts the nodes in the order of `place`, which must be one in which they can run.
    pub(crate) fn sort_nodes(&mut self, place: impl FnMut(&Node) -> usize) {
        self.nodes.sort_by_key(place);
    }

    /// Drops unread nodes and sorts the rest so that each runs after what it reads.
    pub(crate) fn sweep(&mut self) -> Result<(), GraphError> {
        let producers = self.producers();
        let mut order = Vec::with_capacity(self.nodes.len());
        let mut state = vec![Visit::New; self.nodes.len()];
        let mut roots: Vec<ValueId> = self.outputs.iter().map(|(_, id)| *id).collect();
        roots.reverse();
        let mut stack: Vec<(NodeId, usize)> = Vec::new();
        while let Some(root) = roots.pop() {
            stack
                .extend(producers.get(&root).filter(|n| state[n.0] == Visit::New).map(|n| (*n, 0)));
            while let Some((node, next_input)) = stack.pop() {
                if next_input == 0 {
                    match state[node.0] {
                        Visit::New => state[node.0] = Visit::Open,
                        Visit::Open => return Err(self.broken("cycle".into())),
                        Visit::Done => continue,
                    }
                }
                match self.nodes[node.0].inputs.get(next_input) {
                    Some(input) => {
                        stack.push((node, next_input + 1));
                        if let Some(producer) = producers.get(input) {
                            match state[producer.0] {
                                Visit::New => stack.push((*producer, 0)),
                                Visit::Open => return Err(self.broken("cycle".into())),
                                Visit::Done => {}
                            }
                        }
                    }
                    None => {
                        state[node.0] = Visit::Done;
                        order.push(node);
                    }
                }
            }
        }
        self.nodes = order.iter().map(|id| self.nodes[id.0].clone()).collect();
        self.restore_names();
        Ok(())
    }

    /// Gives nodes back the name that they could not have while a node they replace was there.
    fn restore_names(&mut self) {
        self.names = self.nodes.iter().map(|node| node.name.clone()).collect();
        for node in &mut self.nodes {
            let Some((base, suffix)) = node.name.rsplit_once('.') else { continue };
            if suffix.parse::<u32>().is_ok() && self.names.insert(base.to_owned()) {
                let base = base.to_owned();
                self.names.remove(&node.name);
                node.name = base;
            }
        }
    }

    fn push_value(&mut self, value: Value) -> ValueId {
        self.values.push(value);
        ValueId(self.values.len() - 1)
    }

    fn unique_name(&mut self, name: &str) -> String {
        let mut unique = name.to_owned();
        let mut n = 1;
        while !self.names.insert(unique.clone()) {
            n += 1;
            unique = format!("{name}.{n}");
        }
        unique
    }

    pub(crate) fn broken(&self, reason: String) -> GraphError {
        GraphError::Structure { graph: self.name.clone(), reason }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Visit {
    New,
    Open,
    Done,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Add, Mul};
    use crate::verify;

    fn named(values: &[(&str, ValueId)]) -> Vec<(String, ValueId)> {
        values.iter().map(|(name, id)| ((*name).to_owned(), *id)).collect()
    }

    #[test]
    fn parts_meet_where_the_graph_is_cut() {
        let mut graph = Graph::new("whole");
        let x = graph.input("x", Fact::f32([2]));
        let w = graph.weight("w", Fact::f32([2]));
        let scaled = graph.add("scaled", Mul, &[w, w]).unwrap();
        let sum = graph.add("sum", Add, &[x, scaled]).unwrap();
        let product = graph.add("product", Mul, &[sum, scaled]).unwrap();
        graph.output("product", product);

        let names =
            |graph: &Graph| graph.nodes().iter().map(|n| n.name.clone()).collect::<Vec<_>>();
        let first = graph.part(named(&[("x", x)]), named(&[("sum", sum)])).unwrap();
        assert_eq!(names(&first), ["scaled", "sum"]);
        let second = graph.part(named(&[("sum", sum)]), named(&[("product", product)])).unwrap();
        assert_eq!(names(&second), ["scaled", "product"]);
        for part in [first, second] {
            verify(part).unwrap();
        }
        let error = graph.part(vec![], named(&[("product", product)])).unwrap_err();
        assert!(error.to_string().contains("(f32[2]) is needed and not given"), "{error}");
    }
}
