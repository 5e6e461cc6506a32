//! Training data of a Flamingo: interleaved pages, pairs of picture and text, and the tar shards
//! that hold them.
//!
//! ```
//! // `<image>` is token 7: with the coin at *next*, words look at the picture that follows them.
//! let tokens = [1, 7, 2, 7, 3];
//! assert_eq!(flamingo_data::phi::media_indices(&tokens, 7, false), [0, 1, 1, 2, 2]);
//! assert_eq!(flamingo_data::phi::media_indices(&tokens, 7, true), [1, 1, 2, 2, 0]);
//! ```

#![forbid(unsafe_code)]

pub mod command;
pub mod error;
mod folder;
pub mod pages;
pub mod pairs;
pub mod phi;
pub mod picture;
pub mod report;
pub mod shard;
pub mod shards;
pub mod vocabulary;

pub use command::{DataCommand, Progress, WritingArgs};
pub use error::Error;
pub use report::Report;
pub use shard::{Sample, ShardReader, ShardWriter};
pub use shards::{Place, Shards};
