//! The compiler: from a checkpoint to an artifact, and the tools around it.
#![forbid(unsafe_code)]

pub mod passes;
pub mod synth;
