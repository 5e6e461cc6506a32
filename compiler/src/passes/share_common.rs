//! Nodes with the same op and the same inputs become one.

use std::collections::BTreeMap;

use flamingo_ir::{GraphError, Patch, ValueId};

use super::Context;

pub(super) fn run(patch: &mut Patch, _context: &Context) -> Result<(), GraphError> {
    let mut first: BTreeMap<(String, Vec<ValueId>), Vec<ValueId>> = BTreeMap::new();
    let mut moved: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for node in patch.nodes() {
        let inputs = node.inputs.iter().map(|id| moved.get(id).copied().unwrap_or(*id)).collect();
        let attributes = node.op.operator().attributes();
        let key = (format!("{} {attributes:?}", node.op.name()), inputs);
        match first.get(&key) {
            None => {
                first.insert(key, node.outputs);
            }
            Some(outputs) => {
                for (old, new) in node.outputs.iter().zip(outputs) {
                    moved.insert(*old, *new);
                    patch.replace(*old, *new)?;
                }
            }
        }
    }
    Ok(())
}
