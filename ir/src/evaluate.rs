//! The reference evaluator: runs a graph op by op, for tests and for folding constants.

use std::collections::BTreeMap;

use crate::graph::{Constant, Graph, GraphError, ValueId};
use crate::op::OpError;
use crate::{Fact, Tensor};

/// Where weights are read from, by name.
pub trait Weights {
    /// The tensor called `name`.
    fn tensor(&self, name: &str) -> Result<Tensor, String>;
}

/// No weights: for graphs that have none.
pub struct NoWeights;

impl Weights for NoWeights {
    fn tensor(&self, name: &str) -> Result<Tensor, String> {
        Err(format!("weight `{name}` has no source"))
    }
}

/// Runs a graph without weights on `inputs`, in the order of [`Graph::inputs`].
pub fn evaluate(graph: &Graph, inputs: &[Tensor]) -> Result<Vec<Tensor>, GraphError> {
    evaluate_with(graph, inputs, &NoWeights)
}

/// Runs a graph on `inputs`; weights are read from `weights` when first needed.
pub fn evaluate_with(
    graph: &Graph,
    inputs: &[Tensor],
    weights: &dyn Weights,
) -> Result<Vec<Tensor>, GraphError> {
    if inputs.len() != graph.inputs().len() {
        let reason = format!("takes {} inputs, got {}", graph.inputs().len(), inputs.len());
        return Err(graph.broken(reason));
    }
    let mut bindings = crate::Bindings::new();
    let mut known: BTreeMap<ValueId, Tensor> = BTreeMap::new();
    for ((name, id), tensor) in graph.inputs().iter().zip(inputs) {
        bind(graph.fact(*id), tensor, &mut bindings)
            .map_err(|reason| graph.broken(format!("input \"{name}\": {reason}")))?;
        known.insert(*id, tensor.clone());
    }
    run(graph, &mut known, weights, graph.nodes().iter().enumerate().map(|(i, _)| i), &bindings)?;
    let read = |id: &ValueId| constant_or_known(graph, *id, &known, weights);
    graph.outputs().iter().map(|(_, id)| read(id)).collect()
}

/// Computes one build-time value (see [`Graph::build_time_values`]) and nothing else.
pub fn fold(graph: &Graph, value: ValueId, weights: &dyn Weights) -> Result<Tensor, GraphError> {
    let producers = graph.producers();
    let mut needed = Vec::new();
    let mut stack = vec![value];
    while let Some(id) = stack.pop() {
        let Some(node) = producers.get(&id) else { continue };
        let index = graph.node_ids().position(|other| other == *node).unwrap_or(0);
        if !needed.contains(&index) {
            needed.push(index);
            stack.extend(&graph.node(*node).inputs);
        }
    }
    needed.sort_unstable();
    let mut known = BTreeMap::new();
    run(graph, &mut known, weights, needed.into_iter(), &crate::Bindings::new())?;
    constant_or_known(graph, value, &known, weights)
}

/// Runs the nodes at `indices`, in order; values are dropped after their last reader.
fn run(
    graph: &Graph,
    known: &mut BTreeMap<ValueId, Tensor>,
    weights: &dyn Weights,
    indices: impl Iterator<Item = usize>,
    bindings: &crate::Bindings,
) -> Result<(), GraphError> {
    let indices: Vec<usize> = indices.collect();
    let mut last_use: BTreeMap<ValueId, usize> = BTreeMap::new();
    for index in &indices {
        last_use.extend(graph.nodes()[*index].inputs.iter().map(|input| (*input, *index)));
    }
    for index in indices {
        let node = &graph.nodes()[index];
        let inputs: Result<Vec<Tensor>, GraphError> = node
            .inputs
            .iter()
            .map(|input| constant_or_known(graph, *input, known, weights))
            .collect();
        let in_node = |source: OpError| GraphError::Op {
            node: node.name.clone(),
            op: node.op.name(),
            source,
        };
        let bound = crate::op::bind_shapes(&node.op, bindings).map_err(in_node)?;
        let outputs = bound.evaluate(&inputs?).map_err(in_node)?;
        known.extend(node.outputs.iter().copied().zip(outputs));
        for input in &node.inputs {
            let is_output = graph.outputs().iter().any(|(_, output)| output == input);
            if last_use.get(input) == Some(&index) && !is_output {
                known.remove(input);
            }
        }
    }
    Ok(())
}

fn constant_or_known(
    graph: &Graph,
    id: ValueId,
    known: &BTreeMap<ValueId, Tensor>,
    weights: &dyn Weights,
) -> Result<Tensor, GraphError> {
    if let Some(tensor) = known.get(&id) {
        return Ok(tensor.clone());
    }
    match &graph.value(id).constant {
        Some(Constant::Literal(tensor)) => Ok(tensor.clone()),
        Some(Constant::Weight(name)) => {
            let tensor = weights.tensor(name).map_err(|reason| graph.broken(reason))?;
            match tensor.fact() == *graph.fact(id) {
                true => Ok(tensor),
                false => {
                    let (expected, found) = (graph.fact(id), tensor.fact());
                    let reason = format!("weight `{name}`: expected {expected}, got {found}");
                    Err(graph.broken(reason))
                }
            }
        }
        None => Err(graph.broken(format!("value {} is read before it is computed", id.index()))),
    }
}

/// Checks a tensor against a fact, and learns the symbols that stand bare in its shape.
fn bind(fact: &Fact, tensor: &Tensor, bindings: &mut crate::Bindings) -> Result<(), String> {
    let wrong = || format!("expected {fact}, got {}", tensor.fact());
    if fact.dtype != tensor.dtype() || fact.rank() != tensor.shape().len() {
        return Err(wrong());
    }
    for (dim, size) in fact.shape.iter().zip(tensor.shape()) {
        if let Some(symbol) = dim.as_symbol() {
            bindings.entry(symbol.to_owned()).or_insert(*size);
        }
    }
    for (dim, size) in fact.shape.iter().zip(tensor.shape()) {
        // Composite dimensions may come before the inputs that bind their symbols.
        let composite_unbound = dim.symbols().iter().any(|symbol| !bindings.contains_key(*symbol));
        if !composite_unbound && dim.evaluate(bindings) != Ok(*size) {
            return Err(wrong());
        }
    }
    Ok(())
}
