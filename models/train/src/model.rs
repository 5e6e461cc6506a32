//! The parts of a Flamingo, in the arithmetic and under the names of OpenFlamingo's files.

pub mod gated;
pub mod language;
pub mod resampler;
pub mod text;
pub mod vision;
