//! What is done to the graphs of flavour `cuda` after their functions were replaced: fewer nodes, of which each costs a
//! launch.

use std::collections::BTreeMap;

use crate::graph::{Constant, Graph, GraphError, Node, ValueId};
use crate::op::{Cast, Op, RmsNorm, SkipNormalization};
use crate::{DType, Tensor};

/// The same graph with each norm of a sum as one operator with it, and no reshape of a reshape. Nodes stay
/// in their order: target shapes are read from values computed before.
pub(super) fn fewer_nodes(mut graph: Graph, half: DType) -> Result<Graph, GraphError> {
    let mut places = skip_norms(&mut graph, half)?;
    fewer_reshapes(&mut graph, &mut places)?;
    graph.sort_nodes(|node| place_of(&places, node));
    Ok(graph)
}

/// Of a node among all, known by its first output.
fn place_of(places: &BTreeMap<ValueId, usize>, node: &Node) -> usize {
    node.outputs.first().and_then(|output| places.get(output)).copied().unwrap_or(usize::MAX)
}

/// One reshape instead of two, and none instead of two that undo each other.
fn fewer_reshapes(
    graph: &mut Graph,
    places: &mut BTreeMap<ValueId, usize>,
) -> Result<(), GraphError> {
    let is_reshape = |node: &&Node| matches!(node.op, Op::Reshape(_));
    let made_by: BTreeMap<ValueId, ValueId> =
        graph.nodes().iter().filter(is_reshape).map(|n| (n.outputs[0], n.inputs[0])).collect();
    let mut replacements = BTreeMap::new();
    for node in graph.nodes().to_vec().iter().filter(is_reshape) {
        let mut source = node.inputs[0];
        while let Some(before) = made_by.get(&source) {
            source = *before;
        }
        if source == node.inputs[0] {
            continue;
        }
        let output = node.outputs[0];
        if graph.fact(source) == graph.fact(output) {
            replacements.insert(output, source);
        } else {
            let direct = graph.add(&node.name, node.op.clone(), &[source])?;
            places.insert(direct, place_of(places, node));
            replacements.insert(output, direct);
        }
    }
    graph.substitute(&replacements)
}

/// Norms of sums as one operator with the sum. Other norms of the root mean square, which the standard operators of this
/// flavour do not have, are computed in steps of f32. Returns the place of each node.
fn skip_norms(graph: &mut Graph, half: DType) -> Result<BTreeMap<ValueId, usize>, GraphError> {
    let producers = graph.producers();
    let nodes = graph.nodes().to_vec();
    let mut places: BTreeMap<ValueId, usize> =
        nodes.iter().enumerate().map(|(place, node)| (node.outputs[0], place)).collect();
    let mut replacements = BTreeMap::new();
    for (place, node) in nodes.iter().enumerate() {
        let n_before = graph.nodes().len();
        let mut place = place;
        let (epsilon, simplified) = match &node.op {
            Op::LayerNormalization(norm) => (norm.epsilon, false),
            Op::RmsNormalization(norm) => (norm.epsilon, true),
            _ => continue,
        };
        if let [x, scale] = node.inputs[..]
            && !replacements.contains_key(&x)
            && graph.value(scale).constant.is_some()
            && let Some(sum) = producers.get(&x)
            && let Some([a, b]) = summands(graph, graph.node(*sum), x, half)
        {
            place = place_of(&places, graph.node(*sum));
            let op = SkipNormalization { epsilon, simplified };
            let outputs = graph.add_many(&node.name, op, &[a, b, scale])?;
            replacements.extend([(node.outputs[0], outputs[0]), (x, outputs[1])]);
        } else if simplified {
            let y = in_steps(graph, node, epsilon, half)?;
            replacements.insert(node.outputs[0], y);
        }
        places.extend(graph.nodes()[n_before..].iter().map(|new| (new.outputs[0], place)));
    }
    graph.substitute(&replacements)?;
    Ok(places)
}

/// What `x` is the sum of: two values of its own shape, none known before.
fn summands(graph: &Graph, sum: &Node, x: ValueId, half: DType) -> Option<[ValueId; 2]> {
    let fact = graph.fact(x);
    let fits = |id: &ValueId| graph.fact(*id) == fact && graph.value(*id).constant.is_none();
    match (&sum.op, &sum.inputs[..]) {
        (Op::Add(_), [a, b]) if fact.dtype == half && fits(a) && fits(b) => Some([*a, *b]),
        _ => None,
    }
}

/// The numbers of a tensor of floats of any width.
fn floats(tensor: &Tensor) -> Option<Vec<f32>> {
    let wide = Op::from(Cast { dtype: DType::F32 }).evaluate(std::slice::from_ref(tensor));
    wide.ok()?.first()?.to_f32_vec()
}

fn in_steps(
    graph: &mut Graph,
    node: &Node,
    epsilon: f32,
    half: DType,
) -> Result<ValueId, GraphError> {
    let [x, scale] = node.inputs[..] else { return Err(graph.broken("a norm of x".into())) };
    let wide = |graph: &mut Graph, id| match graph.fact(id).dtype {
        DType::F32 => Ok(id),
        _ => graph.add(&format!("{}/f32", node.name), Cast { dtype: DType::F32 }, &[id]),
    };
    let is_ones = |tensor: &Tensor| floats(tensor).is_some_and(|s| s.iter().all(|s| *s == 1.0));
    let scale = match &graph.value(scale).constant {
        Some(Constant::Literal(tensor)) if is_ones(tensor) => None,
        _ => Some(wide(graph, scale)?),
    };
    let dtype = graph.fact(x).dtype;
    let x = wide(graph, x)?;
    let norm = RmsNorm { epsilon, n_heads: 1, scale: scale.is_some() };
    let y = norm.in_steps(graph, x, scale)?;
    match dtype {
        DType::F32 => Ok(y),
        _ => graph.add(&format!("{}/half", node.name), Cast { dtype: half }, &[y]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Add, Neg, Reshape, RmsNormalization};
    use crate::{Dim, Fact, evaluate, verify};

    /// A sum that is read twice, a norm of it, a norm of no sum, and a reshape of a reshape back.
    #[test]
    fn fewer_nodes_compute_the_same() {
        let half = DType::F16;
        let as_half =
            |tensor: Tensor| Op::from(Cast { dtype: half }).evaluate(&[tensor]).unwrap().remove(0);
        let mut graph = Graph::new("norms");
        let [x, y] = ["x", "y"].map(|name| graph.input(name, Fact::new(half, [2usize, 4])));
        let scale = graph.literal(as_half(Tensor::vector(vec![1.0, 2.0, 0.5, 1.0])));
        let norm = RmsNormalization { epsilon: 1e-5 };
        let before = graph.add("before", norm.clone(), &[x, scale]).unwrap();
        let sum = graph.add("sum", Add, &[before, y]).unwrap();
        let negated = graph.add("negated", Neg, &[sum]).unwrap();
        let normed = graph.add("normed", norm, &[sum, scale]).unwrap();
        let apart = Reshape { shape: [1usize, 2, 4].map(Dim::from).to_vec() };
        let apart = graph.add("apart", apart, &[normed]).unwrap();
        let back = Reshape { shape: [2usize, 4].map(Dim::from).to_vec() };
        let back = graph.add("back", back, &[apart]).unwrap();
        let end = graph.add("end", Neg, &[back]).unwrap();
        graph.output("negated", negated);
        graph.output("end", end);
        let fewer = verify(fewer_nodes(graph.clone(), half).unwrap()).unwrap();
        let names: Vec<&str> = fewer.nodes().iter().map(|node| node.op.name()).collect();
        assert_eq!(names.iter().filter(|name| **name == "SkipNormalization").count(), 1);
        for gone in ["RmsNormalization", "Reshape", "LayerNormalization"] {
            assert!(!names.contains(&gone), "{names:?}");
        }
        let row = |seed: usize| {
            let values = (0..8).map(|i| ((i * 7 + seed) as f32).sin()).collect();
            as_half(Tensor::f32(&[2, 4], values).unwrap())
        };
        let inputs = [row(1), row(2)];
        let (expected, found) =
            (evaluate(&graph, &inputs).unwrap(), evaluate(&fewer, &inputs).unwrap());
        for (expected, found) in expected.iter().zip(&found) {
            let (expected, found) = (floats(expected).unwrap(), floats(found).unwrap());
            for (expected, found) in expected.iter().zip(found) {
                assert!((expected - found).abs() <= 2e-3, "{expected} {found}");
            }
        }
    }
}
