//! The runtime part of a graph: build-time values become named weights or literals.

use std::collections::{BTreeMap, BTreeSet};

use super::{MAX_INLINE_BYTES, OnnxError, WeightEntry, WeightLayout};
use crate::graph::{Constant, Graph, ValueId};
use crate::{DType, Tensor};

/// The part of `graph` that is not computed at build time. Its weights are those of `layout`.
pub(super) fn runtime_graph(graph: &Graph, layout: &WeightLayout) -> Result<Graph, OnnxError> {
    let known = graph.build_time_values();
    let mut lowering =
        Lowering { graph, layout, out: Graph::new(&graph.name), ids: BTreeMap::new() };
    for (name, id) in graph.inputs() {
        let input = lowering.out.input(name, graph.fact(*id).clone());
        lowering.ids.insert(*id, input);
    }
    let written =
        || graph.nodes().iter().filter(|node| !node.outputs.iter().all(|o| known.contains(o)));
    let read =
        written().flat_map(|node| &node.inputs).chain(graph.outputs().iter().map(|(_, id)| id));
    lowering.constants(read.copied().filter(|id| known.contains(id)).collect())?;
    for node in written() {
        let inputs: Vec<ValueId> = node.inputs.iter().map(|id| lowering.ids[id]).collect();
        let outputs = lowering.out.add_many(&node.name, node.op.clone(), &inputs)?;
        lowering.ids.extend(node.outputs.iter().copied().zip(outputs));
    }
    for (name, id) in graph.outputs() {
        lowering.out.output(name, lowering.ids[id]);
    }
    Ok(lowering.out)
}

struct Lowering<'a> {
    graph: &'a Graph,
    layout: &'a WeightLayout,
    out: Graph,
    ids: BTreeMap<ValueId, ValueId>,
}

impl Lowering<'_> {
    /// Brings the build-time values `read` over, or lists those that have no place.
    fn constants(&mut self, read: BTreeSet<ValueId>) -> Result<(), OnnxError> {
        let mut missing = Vec::new();
        for id in read {
            if self.ids.contains_key(&id) {
                continue;
            }
            let constant = self.graph.value(id).constant.as_ref();
            let lowered = match (self.layout.entries.get(&id), constant) {
                (Some(entry), _) => self.weight(id, entry)?,
                (None, Some(Constant::Literal(tensor))) if fits_inline(tensor) => {
                    self.out.literal(tensor.clone())
                }
                (None, _) => {
                    missing.push(self.describe(id));
                    continue;
                }
            };
            self.ids.insert(id, lowered);
        }
        match missing.is_empty() {
            true => Ok(()),
            false => Err(OnnxError::MissingWeights(missing)),
        }
    }

    fn weight(&mut self, id: ValueId, entry: &WeightEntry) -> Result<ValueId, OnnxError> {
        let fact = self.graph.fact(id);
        let weight = self.out.weight(&entry.name, fact.clone());
        let wrong = |expected: String, found: String| {
            Err(OnnxError::Weight { name: entry.name.clone(), expected, found })
        };
        if self.out.fact(weight) != fact {
            return wrong(self.out.fact(weight).to_string(), fact.to_string());
        }
        let n_bytes = fact.n_elements().known().and_then(|n| n.checked_mul(fact.dtype.size()));
        match n_bytes.and_then(|n| u64::try_from(n).ok()) {
            Some(n_bytes) if n_bytes == entry.length => Ok(weight),
            Some(n_bytes) => wrong(format!("{n_bytes} bytes"), format!("{} bytes", entry.length)),
            None => wrong("a known shape".into(), fact.to_string()),
        }
    }

    fn describe(&self, id: ValueId) -> String {
        let fact = self.graph.fact(id);
        match &self.graph.value(id).constant {
            Some(Constant::Weight(name)) => format!("weight \"{name}\" ({fact})"),
            Some(Constant::Literal(_)) => format!("literal {} ({fact})", id.index()),
            None => {
                let makes = |node: &&crate::Node| node.outputs.contains(&id);
                let node = self.graph.nodes().iter().find(makes);
                format!("result of \"{}\" ({fact})", node.map_or("", |node| &node.name))
            }
        }
    }
}

fn fits_inline(tensor: &Tensor) -> bool {
    tensor.dtype() == DType::I64
        || tensor.n_elements().saturating_mul(tensor.dtype().size()) <= MAX_INLINE_BYTES
}
