//! Groups of nodes that a provider gets in one piece.

use std::collections::{BTreeMap, BTreeSet};

use flamingo_ir::onnx::Listing;
use serde::Serialize;

use super::{Assigned, Provider, Role};

/// Nodes that a provider runs in one piece.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// The provider.
    pub provider: Provider,
    /// How many nodes.
    pub n_nodes: usize,
    /// The first of them, in the order of the file.
    pub first: String,
    /// Its place in the file.
    #[serde(skip)]
    index: usize,
}

/// What a node is to one provider.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The provider's.
    Own,
    /// Another's.
    Foreign,
    /// Shapes and constants, which belong to no partition.
    Transparent,
}

/// Partitions of every provider, in the order of the file.
pub(super) fn partitions(listing: &Listing, nodes: &[Assigned]) -> Vec<Partition> {
    let edges = edges(listing);
    let mut partitions = Vec::new();
    for provider in Provider::ALL {
        let kind = |assigned: &Assigned| match (assigned.role, assigned.provider) {
            (Role::Shape | Role::Folded, _) => Kind::Transparent,
            (Role::Work, Some(own)) if own == provider => Kind::Own,
            (Role::Work, _) => Kind::Foreign,
        };
        let kinds: Vec<Kind> = nodes.iter().map(kind).collect();
        for group in groups(&kinds, &edges) {
            let index = group.iter().min().copied().unwrap_or(0);
            let first = nodes[index].name.clone();
            partitions.push(Partition { provider, n_nodes: group.len(), first, index });
        }
    }
    partitions.sort_by_key(|partition| partition.index);
    partitions
}

/// By node, the nodes that read its outputs.
fn edges(listing: &Listing) -> Vec<BTreeSet<usize>> {
    let mut readers = vec![BTreeSet::new(); listing.nodes.len()];
    let mut computed: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, node) in listing.nodes.iter().enumerate() {
        for input in &node.inputs {
            if let Some(source) = computed.get(input.value.name.as_str()) {
                readers[*source].insert(index);
            }
        }
        for value in node.outputs.iter().filter(|value| !value.name.is_empty()) {
            computed.insert(&value.name, index);
        }
    }
    readers
}

/// ONNX Runtime's grouping (`CreateSupportedPartitionNodeGroups`): walks nodes in topological order and grows one group
/// as long as it may; a foreign node that reads from the group (on its border) waits until the group is closed, so that
/// no group needs a result that needs the group itself.
fn groups(kinds: &[Kind], readers: &[BTreeSet<usize>]) -> Vec<Vec<usize>> {
    let mut n_open = vec![0usize; kinds.len()];
    for reader in readers.iter().flatten() {
        n_open[*reader] += 1;
    }
    let mut ready: BTreeSet<usize> = (0..kinds.len()).filter(|index| n_open[*index] == 0).collect();
    let mut later = BTreeSet::new();
    let mut border: BTreeSet<usize> = BTreeSet::new();
    let mut group = Vec::new();
    let mut groups = Vec::new();
    loop {
        let Some(index) = ready.pop_first() else {
            groups.extend((!group.is_empty()).then(|| std::mem::take(&mut group)));
            border.clear();
            if later.is_empty() {
                return groups;
            }
            std::mem::swap(&mut ready, &mut later);
            continue;
        };
        let is_on_border = border.remove(&index);
        match kinds[index] {
            Kind::Foreign if is_on_border => {
                border.insert(index);
                later.insert(index);
                continue;
            }
            Kind::Own => {
                group.push(index);
                border.extend(&readers[index]);
            }
            Kind::Transparent if is_on_border => border.extend(&readers[index]),
            Kind::Transparent | Kind::Foreign => {}
        }
        for reader in &readers[index] {
            n_open[*reader] -= 1;
            if n_open[*reader] == 0 {
                ready.insert(*reader);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Groups of nodes: `o` own, `f` foreign, `t` transparent; readers of each.
    fn grouped(kinds: &str, readers: &[&[usize]]) -> Vec<Vec<usize>> {
        let kind = |kind| match kind {
            'o' => Kind::Own,
            'f' => Kind::Foreign,
            _ => Kind::Transparent,
        };
        let readers: Vec<BTreeSet<usize>> =
            readers.iter().map(|readers| readers.iter().copied().collect()).collect();
        groups(&kinds.chars().map(kind).collect::<Vec<Kind>>(), &readers)
    }

    #[test]
    fn foreign_nodes_split_chains() {
        assert_eq!(grouped("ooo", &[&[1], &[2], &[]]), [vec![0, 1, 2]]);
        assert_eq!(grouped("ofo", &[&[1], &[2], &[]]), [vec![0], vec![2]]);
        assert_eq!(grouped("foof", &[&[1], &[2], &[3], &[]]), [vec![1, 2]]);
        assert_eq!(grouped("fff", &[&[1], &[2], &[]]), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn branches_join_a_group_unless_that_makes_a_cycle() {
        // 0 → 1 (foreign) → 3 and 0 → 2 → 3: 3 needs what 1 makes of the group.
        assert_eq!(grouped("ofoo", &[&[1, 2], &[3], &[3], &[]]), [vec![0, 2], vec![3]]);
        // A foreign branch that starts elsewhere runs first.
        assert_eq!(grouped("foo", &[&[2], &[2], &[]]), [vec![1, 2]]);
    }

    #[test]
    fn shapes_do_not_split_but_carry_order() {
        assert_eq!(grouped("oto", &[&[1], &[2], &[]]), [vec![0, 2]]);
        // 0 → shape → foreign → 3 would be a cycle.
        assert_eq!(grouped("otfo", &[&[1, 3], &[2], &[3], &[]]), [vec![0], vec![3]]);
    }
}
