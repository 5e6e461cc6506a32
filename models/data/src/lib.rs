//! Training data of a Flamingo: interleaved pages, pairs of picture and text, generated scenes, and the
//! tar shards that hold them.

pub mod scenes;
