//! Ops, graphs, verification, text form and ONNX form of flamingoc.
//!
//! ```
//! use flamingo_ir::{Fact, Graph, Tensor, evaluate, op::Linear};
//! let mut graph = Graph::new("example");
//! let x = graph.input("x", Fact::f32([1, 2]));
//! let weight = graph.literal(Tensor::f32(&[1, 2], vec![3.0, 4.0]).unwrap());
//! let y = graph.add("linear", Linear::default(), &[x, weight])?;
//! graph.output("y", y);
//! let outputs = evaluate(&graph, &[Tensor::f32(&[1, 2], vec![1.0, 2.0]).unwrap()])?;
//! assert_eq!(outputs[0].to_f32_vec().unwrap(), [11.0]);
//! # Ok::<(), flamingo_ir::GraphError>(())
//! ```
#![forbid(unsafe_code)]

mod dim;
mod dtype;
mod evaluate;
mod fact;
mod graph;
pub mod onnx;
pub mod op;
mod patch;
mod tensor;
mod text;
mod verify;

pub use dim::{Bindings, Dim};
pub use dtype::DType;
pub use evaluate::{NoWeights, Weights, evaluate, evaluate_wide, evaluate_with, fold};
pub use fact::Fact;
pub use graph::{Constant, Graph, GraphError, Node, NodeId, Value, ValueId};
pub use patch::Patch;
pub use tensor::{Tensor, TensorError};
pub use text::{TextError, TextProblem};
pub use verify::{Verified, Verifier, verify};
