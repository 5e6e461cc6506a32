//! Ops, graphs, verification, text form and ONNX form of flamingoc.
#![forbid(unsafe_code)]

mod dtype;

pub use dtype::DType;
