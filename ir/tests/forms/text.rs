//! Text form of graphs of every op.

use flamingo_ir::Graph;
use flamingo_ir::onnx::inline_functions;
use flamingo_ir::op::Flavour;

use crate::cases::{all_cases, build, build_time_cases};

#[test]
fn parsing_what_is_printed_gives_the_same_graph() {
    let built = build("all", &all_cases());
    let inlined = inline_functions(&built.graph, Flavour::Portable).unwrap();
    let at_build_time = build("build_time", &build_time_cases()).graph;
    for graph in [built.graph, inlined, at_build_time] {
        let text = graph.to_string();
        let parsed = Graph::parse(&text).unwrap();
        assert_eq!(parsed.to_string(), text);
        // Ids follow the text from here on, so that the graphs are equal in every part.
        assert_eq!(Graph::parse(&parsed.to_string()).unwrap(), parsed);
        let ops = |graph: &Graph| -> Vec<_> {
            graph.nodes().iter().map(|node| (node.name.clone(), node.op.clone())).collect()
        };
        assert_eq!(ops(&parsed), ops(&graph));
    }
}

#[test]
fn cut_texts_never_panic() {
    let text = build("all", &all_cases()).graph.to_string();
    for (end, _) in text.char_indices().step_by(7) {
        let _ = Graph::parse(&text[..end]);
        let _ = Graph::parse(&text[end..]);
    }
}
