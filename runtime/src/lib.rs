//! Runs flamingoc artifacts: opens them, prepares pictures, encodes each medium once, and answers
//! prompts with text, pictures and videos in between.
//!
//! ```no_run
//! use flamingo_runtime::{GenerateOptions, Model, OpenOptions, PromptFile};
//! let model = Model::open("demo.flamingo".as_ref(), &OpenOptions::default())?;
//! let prompt = PromptFile::from_text("<image>what color ?", &["a.png".into()])?;
//! let answer = model.generate(&prompt, &GenerateOptions::default(), &mut |piece| print!("{piece}"))?;
//! assert_eq!(answer.cache.visual_misses, 1);
//! # Ok::<(), flamingo_runtime::RunError>(())
//! ```
#![forbid(unsafe_code)]

mod artifact;
pub mod backend;
mod contract;
pub mod env;
pub mod image;
pub mod machine;
pub mod native;
#[cfg(any(feature = "ort", feature = "tract"))]
mod onnx_graph;
#[cfg(feature = "ort")]
pub mod ort;
pub mod profile;
mod prompt;
mod sampling;
mod session;
#[cfg(feature = "tract")]
pub mod tract;
mod units;
pub mod video;
pub mod visual_cache;

pub use flamingo_kernels::KvFormat;

pub use artifact::{Artifact, ArtifactError, LoadedGraphs, MappedWeights};
pub use prompt::{PromptEncoder, PromptError, PromptFile, Segment, VideoFiles};
pub use sampling::{Sampler, SamplingOptions, argmax};
pub use session::{
    Answer, CacheCounts, GenerateOptions, Generated, Model, OpenOptions, RunError, Stop, Timings,
};
pub use units::bytes_from_text;
pub use visual_cache::{VisualCache, VisualCacheOptions};
