//! The compiler: from a checkpoint to an artifact, and the tools around it.
//!
//! [`compile::compile`] is the pipeline; [`passes`] are what it does to graphs; [`parity`] compares
//! an artifact with its source; [`mod@bench`] times one; [`plan`] predicts one on a device; [`device`] reads what a
//! device has; [`coverage`] tells which provider of ONNX Runtime would run what; [`cli`] is the command line.
#![forbid(unsafe_code)]

pub mod bench;
pub mod calibrate;
pub mod cli;
pub mod compile;
pub mod coverage;
pub mod device;
pub mod emit;
pub mod eval;
pub mod gate;
pub mod hub;
pub mod inspection;
pub mod observer;
pub mod origin;
pub mod original;
pub mod page;
pub mod parity;
pub mod passes;
pub mod plan;
pub mod profile;
pub mod ranges;
pub mod scheme;
pub mod scratch;
pub mod static_ranges;
pub mod synth;
mod walk;
