//! Which execution provider ONNX Runtime gave each node of a session to. The `ort` crate has no words for it: the one place
//! of this crate with `unsafe`.

use std::ffi::{CStr, c_char};
use std::ptr;
use std::slice;

use ort::session::Session;
use ort::{AsPointer, Error};

/// The option of a session that makes it remember.
pub(super) const RECORD: (&str, &str) = ("session.record_ep_graph_assignment_info", "1");

/// A node and who runs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) provider: String,
    pub(super) node: String,
    pub(super) op_type: String,
}

impl Placement {
    /// Whether the node computes a target shape: ONNX Runtime keeps those on the CPU, where shapes are, and nothing is
    /// copied for them. Their names have a `#`, which no other node of our files has.
    pub(super) fn is_of_shape(&self) -> bool {
        self.node.contains('#')
    }
}

/// All nodes of a session that was made with [`RECORD`].
#[expect(unsafe_code, reason = "calls of ONNX Runtime's C API")]
pub(super) fn placements(session: &Session) -> Result<Vec<Placement>, Error> {
    let api = ort::api();
    let mut placements = Vec::new();
    let (mut graphs, mut n_graphs) = (ptr::null(), 0);
    // SAFETY: the session is alive; the list belongs to it.
    let graphs = unsafe {
        let status =
            (api.Session_GetEpGraphAssignmentInfo)(session.ptr(), &mut graphs, &mut n_graphs);
        Error::result_from_status(status)?;
        list(graphs, n_graphs)
    };
    for &graph in graphs {
        let (mut nodes, mut n_nodes) = (ptr::null(), 0);
        // SAFETY: a graph of the session's own list, and the nodes of its own list.
        let nodes = unsafe {
            let status = (api.EpAssignedSubgraph_GetNodes)(graph, &mut nodes, &mut n_nodes);
            Error::result_from_status(status)?;
            list(nodes, n_nodes)
        };
        // SAFETY: as before; the texts belong to the session.
        let provider = unsafe { text(|out| (api.EpAssignedSubgraph_GetEpName)(graph, out))? };
        for &node in nodes {
            // SAFETY: as before.
            let (node, op_type) = unsafe {
                (
                    text(|out| (api.EpAssignedNode_GetName)(node, out))?,
                    text(|out| (api.EpAssignedNode_GetOperatorType)(node, out))?,
                )
            };
            placements.push(Placement { provider: provider.clone(), node, op_type });
        }
    }
    Ok(placements)
}

/// # Safety
/// `n` elements at `first`, or none.
#[expect(unsafe_code, reason = "a list of C")]
unsafe fn list<'a, T>(first: *const T, n: usize) -> &'a [T] {
    match first.is_null() || n == 0 {
        true => &[],
        // SAFETY: the caller's.
        false => unsafe { slice::from_raw_parts(first, n) },
    }
}

/// # Safety
/// `get` puts a text of C there, or null, or gives an error.
#[expect(unsafe_code, reason = "a text of C")]
unsafe fn text(
    get: impl FnOnce(*mut *const c_char) -> ort::sys::OrtStatusPtr,
) -> Result<String, Error> {
    let mut text = ptr::null();
    // SAFETY: the caller's.
    unsafe {
        Error::result_from_status(get(&mut text))?;
        Ok(match text.is_null() {
            true => String::new(),
            false => CStr::from_ptr(text).to_string_lossy().into_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use flamingo_ir::onnx::{WeightLayout, write_onnx};
    use flamingo_ir::op::{Flavour, Mul, Reshape};
    use flamingo_ir::{Dim, Fact, Graph, verify};

    use super::*;
    use crate::ort::library;

    /// ONNX Runtime tells every node, and nodes of target shapes are known by their names.
    #[test]
    fn every_node_has_a_provider() {
        let mut graph = Graph::new("decoder");
        let [n, m] = ["n", "m"].map(Dim::symbol);
        let x = graph.input("x", Fact::f32([n.clone() * m.clone(), Dim::from(2)]));
        let like = graph.input("like", Fact::f32([n.clone(), m.clone(), Dim::from(2)]));
        let shape = vec![n, m, Dim::from(2)];
        let y = graph.add("split", Reshape { shape }, &[x]).unwrap();
        let y = graph.add("product", Mul, &[y, like]).unwrap();
        graph.output("y", y);
        let bytes =
            write_onnx(&verify(graph).unwrap(), Flavour::Portable, &WeightLayout::default());
        let library_path = std::env::var_os("FLAMINGO_TEST_ORT_LIB");
        let library_path = library_path.expect("`cargo xtask test` installs ONNX Runtime");
        let environment = library::load(Some(library_path.as_ref())).unwrap();
        let builder = Session::builder(&environment).unwrap();
        let mut builder = builder.with_config_entry(RECORD.0, RECORD.1).unwrap();
        let session = builder.commit_from_memory(&bytes.unwrap()).unwrap();
        let placements = placements(&session).unwrap();
        assert!(placements.iter().all(|placed| placed.provider == "CPUExecutionProvider"));
        let mut found: Vec<_> = placements
            .iter()
            .map(|p| (p.op_type.as_str(), p.node.as_str(), p.is_of_shape()))
            .collect();
        found.sort_unstable();
        assert!(found.contains(&("Mul", "product", false)), "{found:?}");
        assert!(found.contains(&("Reshape", "split", false)), "{found:?}");
        assert!(
            found.iter().any(|(op_type, _, is_of_shape)| *op_type == "Concat" && *is_of_shape),
            "{found:?}"
        );
    }
}
