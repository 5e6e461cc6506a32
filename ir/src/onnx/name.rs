//! Names of values in a file.
//!
//! Inputs, outputs and weights keep their own names, other values take the name of the node
//! that computes them; `#` marks names that only the file knows.

use std::collections::{BTreeMap, BTreeSet};

use super::OnnxError;
use crate::graph::{Constant, Graph, ValueId};

/// Names of a graph's values.
#[derive(Default)]
pub(super) struct Names {
    by_value: BTreeMap<ValueId, String>,
    /// Outputs whose value has another name already: that name, and the output's.
    pub(super) copies: Vec<(String, String)>,
}

impl Names {
    /// The name of `id`.
    pub(super) fn of(&self, id: ValueId) -> String {
        self.by_value.get(&id).cloned().unwrap_or_else(|| format!("value#{}", id.index()))
    }
}

/// Names all values of `graph`.
pub(super) fn name_values(graph: &Graph) -> Result<Names, OnnxError> {
    let mut names = Names::default();
    let mut taken = BTreeSet::new();
    let mut take = |name: &str| match taken.insert(name.to_owned()) {
        true => Ok(name.to_owned()),
        false => Err(OnnxError::Name { graph: graph.name.clone(), name: name.to_owned() }),
    };
    for (name, id) in graph.inputs() {
        names.by_value.insert(*id, take(name)?);
    }
    for (name, _) in graph.outputs() {
        take(name)?;
    }
    let mut n_literals = 0;
    for (id, value) in graph.values() {
        let name = match &value.constant {
            Some(Constant::Weight(name)) => take(name)?,
            Some(Constant::Literal(_)) => {
                n_literals += 1;
                take(&format!("literal#{n_literals}"))?
            }
            None => continue,
        };
        names.by_value.insert(id, name);
    }
    let mut copied = Vec::new();
    for (name, id) in graph.outputs() {
        match names.by_value.contains_key(id) {
            true => copied.push((*id, name.clone())),
            false => {
                names.by_value.insert(*id, name.clone());
            }
        }
    }
    for node in graph.nodes() {
        for (index, id) in node.outputs.iter().enumerate() {
            if !names.by_value.contains_key(id) {
                let mut name = match node.outputs.len() {
                    1 => node.name.clone(),
                    _ => format!("{}:{index}", node.name),
                };
                while take(&name).is_err() {
                    name.push_str("#value");
                }
                names.by_value.insert(*id, name);
            }
        }
    }
    names.copies = copied.into_iter().map(|(id, name)| (names.of(id), name)).collect();
    Ok(names)
}
