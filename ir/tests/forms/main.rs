//! The forms that a graph can take: ONNX files and text.

mod cases;
mod onnx;
mod text;
