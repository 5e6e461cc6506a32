//! The verifier: every emitter and backend takes a [`Verified`] graph.

use std::collections::BTreeSet;
use std::ops::Deref;

use crate::Fact;
use crate::graph::{Graph, GraphError, Node, ValueId};
use crate::op::{Flavour, Op};

/// A graph that [`verify`] accepted.
#[derive(Clone, Debug, PartialEq)]
pub struct Verified(Graph);

impl Verified {
    /// The graph, free to be changed again.
    pub fn into_inner(self) -> Graph {
        self.0
    }
}

impl Deref for Verified {
    type Target = Graph;

    fn deref(&self) -> &Graph {
        &self.0
    }
}

/// Checks names, that each value is computed once and before it is read, that facts are what
/// the ops infer, and that every function's definition of every flavour builds and has the
/// outputs that the function's own rule says.
pub fn verify(graph: Graph) -> Result<Verified, GraphError> {
    Verifier::default().verify(graph)
}

/// [`verify`] for one graph after another: each definition is checked once.
#[derive(Debug, Default)]
pub struct Verifier {
    /// Functions and the facts of their inputs, whose definitions are right.
    bodies: BTreeSet<String>,
}

impl Verifier {
    /// The same as the function [`verify`].
    pub fn verify(&mut self, graph: Graph) -> Result<Verified, GraphError> {
        check_names(&graph)?;
        let n_values = graph.values().count();
        let mut known = check_sources(&graph, n_values)?;
        for node in graph.nodes() {
            check_node(&graph, node, &known)?;
            for output in &node.outputs {
                if output.index() >= n_values || !known.insert(*output) {
                    return Err(wrong(&graph, node, "an output is computed twice or is foreign"));
                }
            }
            check_facts(&graph, node)?;
            check_bodies(&node.op, &facts(&graph, &node.inputs), &mut self.bodies)?;
        }
        match graph.outputs().iter().find(|(_, id)| !known.contains(id)) {
            None => Ok(Verified(graph)),
            Some((name, _)) => {
                let reason = format!("output \"{name}\" is computed by no node");
                Err(graph.broken(reason))
            }
        }
    }
}

fn wrong(graph: &Graph, node: &Node, reason: &str) -> GraphError {
    graph.broken(format!("node \"{}\" ({}): {reason}", node.name, node.op.name()))
}

/// Whether `name` can stand in the text form and in files; `#` marks what writers add.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 512
        && !name.contains(|c: char| c.is_control() || c.is_whitespace() || "#\"\\%,()".contains(c))
}

fn check_names(graph: &Graph) -> Result<(), GraphError> {
    let ends = graph.inputs().iter().chain(graph.outputs()).map(|(name, _)| name);
    let mut seen = BTreeSet::new();
    for name in ends {
        if !seen.insert(name) {
            return Err(graph.broken(format!("two inputs or outputs are called \"{name}\"")));
        }
    }
    let mut node_names = BTreeSet::new();
    for node in graph.nodes() {
        if !node_names.insert(&node.name) {
            return Err(graph.broken(format!("two nodes are called \"{}\"", node.name)));
        }
    }
    let all = seen.into_iter().chain(node_names).chain([&graph.name]);
    match all.into_iter().find(|name| !is_name(name)) {
        None => Ok(()),
        Some(name) => {
            let rule = "names have 1 to 512 bytes, no space and none of # \" \\ % , ( )";
            Err(graph.broken(format!("{name:?} is no name: {rule}")))
        }
    }
}

/// Inputs and constants: the values known before the first node.
fn check_sources(graph: &Graph, n_values: usize) -> Result<BTreeSet<ValueId>, GraphError> {
    let mut known = BTreeSet::new();
    for (name, id) in graph.inputs() {
        if id.index() >= n_values || graph.value(*id).constant.is_some() || !known.insert(*id) {
            return Err(graph.broken(format!("input \"{name}\" is no value of its own")));
        }
    }
    known.extend(graph.values().filter(|(_, value)| value.constant.is_some()).map(|(id, _)| id));
    Ok(known)
}

fn check_node(graph: &Graph, node: &Node, known: &BTreeSet<ValueId>) -> Result<(), GraphError> {
    match node.inputs.iter().position(|input| !known.contains(input)) {
        None => Ok(()),
        Some(index) => {
            Err(wrong(graph, node, &format!("input {index} is read before it is computed")))
        }
    }
}

fn facts(graph: &Graph, ids: &[ValueId]) -> Vec<Fact> {
    ids.iter().map(|id| graph.fact(*id).clone()).collect()
}

fn check_facts(graph: &Graph, node: &Node) -> Result<(), GraphError> {
    let refused = |source| GraphError::Op { node: node.name.clone(), op: node.op.name(), source };
    let inferred = node.op.infer(&facts(graph, &node.inputs)).map_err(refused)?;
    let stored = facts(graph, &node.outputs);
    match inferred == stored {
        true => Ok(()),
        false => {
            let join = |facts: &[Fact]| {
                facts.iter().map(Fact::to_string).collect::<Vec<String>>().join(", ")
            };
            let (expected, found) = (join(&inferred), join(&stored));
            Err(wrong(graph, node, &format!("outputs: expected {expected}, got {found}")))
        }
    }
}

/// Checks the definitions of `op` for these inputs, and of the functions they use.
fn check_bodies(op: &Op, inputs: &[Fact], done: &mut BTreeSet<String>) -> Result<(), GraphError> {
    if !op.is_function() {
        return Ok(());
    }
    let key = format!("{op:?} {inputs:?}");
    if done.contains(&key) {
        return Ok(());
    }
    let in_op = |source| GraphError::Op { node: op.name().into(), op: op.name(), source };
    let expected = op.infer(inputs).map_err(in_op)?;
    for flavour in Flavour::ALL {
        let body = definition(op, inputs, flavour)?;
        let ends = |ends: &[(String, ValueId)]| -> Vec<Fact> {
            ends.iter().map(|(_, id)| body.fact(*id).clone()).collect()
        };
        if ends(body.inputs()) != inputs || ends(body.outputs()) != expected {
            let reason = format!("its {} definition has other inputs or outputs", flavour.name());
            return Err(body.broken(reason));
        }
        check_names(&body)?;
        for node in body.nodes() {
            check_bodies(&node.op, &facts(&body, &node.inputs), done)?;
        }
    }
    done.insert(key);
    Ok(())
}

/// The definition of a function for inputs of these facts.
pub(crate) fn definition(op: &Op, inputs: &[Fact], flavour: Flavour) -> Result<Graph, GraphError> {
    op.operator().body(inputs, flavour).unwrap_or_else(|| {
        Err(Graph::new(op.name()).broken("a function without a definition".into()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Neg, Tanh};

    fn check(graph: Graph, expected: &str) {
        let error = verify(graph).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn names_are_unique_and_plain() {
        let mut graph = Graph::new("twice");
        graph.input("x", Fact::f32([1]));
        graph.input("x", Fact::f32([1]));
        check(graph, "two inputs or outputs are called \"x\"");
        let mut graph = Graph::new("marked");
        let x = graph.input("x", Fact::f32([1]));
        graph.add("a#b", Neg, &[x]).unwrap();
        check(graph, "\"a#b\" is no name");
        check(Graph::new(""), "is no name");
    }

    #[test]
    fn values_come_from_this_graph_and_earlier_nodes() {
        let mut graph = Graph::new("foreign");
        let x = graph.input("x", Fact::f32([1]));
        let y = graph.add("y", Neg, &[x]).unwrap();
        graph.output("y", y);
        assert!(verify(graph).is_ok());
        let mut other = Graph::new("other");
        other.input("x", Fact::f32([1]));
        other.output("y", y);
        check(other, "output \"y\" is computed by no node");
    }

    #[test]
    fn values_of_dropped_nodes_are_not_read() {
        let mut graph = Graph::new("dropped");
        let x = graph.input("x", Fact::f32([1]));
        let unread = graph.add("unread", Neg, &[x]).unwrap();
        let y = graph.add("y", Tanh, &[x]).unwrap();
        graph.output("y", y);
        graph.sweep().unwrap();
        assert!(verify(graph.clone()).is_ok());
        graph.add("late", Neg, &[unread]).unwrap();
        check(graph, "node \"late\" (Neg): input 0 is read before it is computed");
    }
}
