//! The reference evaluator: runs a graph op by op, for tests and for folding constants.

use std::collections::BTreeMap;

use crate::graph::{Constant, Graph, GraphError, Node, ValueId};
use crate::op::{Cast, Op, OpError};
use crate::{Bindings, DType, Fact, Tensor};

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
    Runner { graph, weights, is_wide: false, observe: &mut |_, _, _| () }.outputs(inputs)
}

/// Runs a graph of half precision in f32, so that nothing is rounded and nothing overflows: what is f16 or bf16 in the
/// graph, inputs too, is f32 here. `observe` sees each node with what it reads and what it gives.
pub fn evaluate_wide(
    graph: &Graph,
    inputs: &[Tensor],
    weights: &dyn Weights,
    observe: Observe<'_>,
) -> Result<Vec<Tensor>, GraphError> {
    Runner { graph, weights, is_wide: true, observe }.outputs(inputs)
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
    let mut runner = Runner { graph, weights, is_wide: false, observe: &mut |_, _, _| () };
    runner.nodes(&mut known, &needed, &Bindings::new())?;
    constant_or_known(graph, value, &known, weights)
}

/// Hears of each node with its inputs and outputs.
type Observe<'a> = &'a mut dyn FnMut(&Node, &[Tensor], &[Tensor]);

/// How nodes are run.
struct Runner<'a> {
    graph: &'a Graph,
    weights: &'a dyn Weights,
    /// Whether f32 stands for the types of half precision.
    is_wide: bool,
    observe: Observe<'a>,
}

impl Runner<'_> {
    /// The graph's outputs for `inputs`.
    fn outputs(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, GraphError> {
        let graph = self.graph;
        if inputs.len() != graph.inputs().len() {
            let reason = format!("takes {} inputs, got {}", graph.inputs().len(), inputs.len());
            return Err(graph.broken(reason));
        }
        let mut bindings = Bindings::new();
        let mut known: BTreeMap<ValueId, Tensor> = BTreeMap::new();
        for ((name, id), tensor) in graph.inputs().iter().zip(inputs) {
            let mut fact = graph.fact(*id).clone();
            if self.is_wide && fact.dtype.is_half() {
                fact.dtype = DType::F32;
            }
            bind(&fact, tensor, &mut bindings)
                .map_err(|reason| graph.broken(format!("input \"{name}\": {reason}")))?;
            known.insert(*id, tensor.clone());
        }
        let all: Vec<usize> = (0..graph.nodes().len()).collect();
        self.nodes(&mut known, &all, &bindings)?;
        let read = |id: &ValueId| constant_or_known(graph, *id, &known, self.weights);
        graph.outputs().iter().map(|(_, id)| read(id)).collect()
    }

    /// Runs the nodes at `indices`, in order; values are dropped after their last reader.
    fn nodes(
        &mut self,
        known: &mut BTreeMap<ValueId, Tensor>,
        indices: &[usize],
        bindings: &Bindings,
    ) -> Result<(), GraphError> {
        let graph = self.graph;
        let mut last_use: BTreeMap<ValueId, usize> = BTreeMap::new();
        for index in indices {
            last_use.extend(graph.nodes()[*index].inputs.iter().map(|input| (*input, *index)));
        }
        for index in indices {
            let node = &graph.nodes()[*index];
            let read = |input: &ValueId| constant_or_known(graph, *input, known, self.weights);
            let inputs = node.inputs.iter().map(read).collect::<Result<Vec<Tensor>, GraphError>>();
            let inputs = inputs?;
            let outputs = self.node(node, &inputs, bindings).map_err(|source| GraphError::Op {
                node: node.name.clone(),
                op: node.op.name(),
                source,
            })?;
            (self.observe)(node, &inputs, &outputs);
            known.extend(node.outputs.iter().copied().zip(outputs));
            for input in &node.inputs {
                let is_output = graph.outputs().iter().any(|(_, output)| output == input);
                if last_use.get(input) == Some(index) && !is_output {
                    known.remove(input);
                }
            }
        }
        Ok(())
    }

    fn node(
        &self,
        node: &Node,
        inputs: &[Tensor],
        bindings: &Bindings,
    ) -> Result<Vec<Tensor>, OpError> {
        let op = crate::op::bind_shapes(&node.op, bindings)?;
        if !self.is_wide {
            return op.evaluate(inputs);
        }
        let inputs = inputs.iter().map(wide).collect::<Result<Vec<Tensor>, OpError>>()?;
        match (&op, inputs.as_slice()) {
            (Op::Cast(cast), [Tensor::F32(_)]) if cast.dtype.is_half() => Ok(inputs),
            _ => op.evaluate(&inputs),
        }
    }
}

/// The same in f32 if it is of half precision.
fn wide(tensor: &Tensor) -> Result<Tensor, OpError> {
    match tensor.dtype().is_half() {
        true => {
            let cast = Op::from(Cast { dtype: DType::F32 });
            Ok(cast.evaluate(std::slice::from_ref(tensor))?.remove(0))
        }
        false => Ok(tensor.clone()),
    }
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
fn bind(fact: &Fact, tensor: &Tensor, bindings: &mut Bindings) -> Result<(), String> {
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
