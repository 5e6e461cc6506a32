//! Runs flamingoc artifacts: opens them, prepares pictures, encodes each medium once, and answers
//! prompts with text, pictures and videos in between.
//!
//! ```no_run
//! use flamingo_runtime::{GenerateOptions, Limits, Model, OpenOptions, PromptFile};
//! let model = Model::open("demo.flamingo".as_ref(), &OpenOptions::default())?;
//! let prompt = PromptFile::from_text("<image>what color ?", &["a.png".into()])?;
//! let answer = model.generate(&prompt, &GenerateOptions::default(), &mut |piece| print!("{piece}"))?;
//! assert_eq!(answer.cache.visual_misses, 1);
//!
//! let mut session = model.session()?; // a conversation: later turns cost their own tokens only
//! session.append(&prompt, &Limits::default())?;
//! for piece in session.pieces(&GenerateOptions::default())? {
//!     print!("{}", piece?.text);
//! }
//! # Ok::<(), flamingo_runtime::RunError>(())
//! ```
#![deny(unsafe_code)]

mod answer;
mod artifact;
pub mod backend;
mod bank;
mod beam;
mod contract;
pub mod engines;
pub mod env;
pub mod image;
mod lru;
pub mod machine;
mod model;
pub mod native;
#[cfg(any(feature = "ort", feature = "tract"))]
mod onnx_graph;
#[cfg(feature = "ort")]
pub mod ort;
mod prefix_cache;
pub mod profile;
mod prompt;
mod sampling;
mod score;
mod session;
mod text_stream;
#[cfg(feature = "tract")]
pub mod tract;
mod units;
pub mod video;
pub mod visual_cache;
pub mod watch;

pub use flamingo_kernels::KvFormat;

pub use answer::{
    Answer, CacheCounts, CancelToken, GenerateOptions, Generated, Limits, Stop, Timings,
};
pub use artifact::{Artifact, ArtifactError, LoadedGraphs, MappedWeights};
pub use bank::{Bank, BankError, BankReport, Selection, Shots};
pub use beam::BeamOptions;
pub use model::{Model, OpenOptions, RunError, default_kv_format};
pub use prompt::{PromptEncoder, PromptError, PromptFile, Segment, VideoFiles};
pub use sampling::{Sampler, SamplingOptions, argmax};
pub use score::{Question, Score};
pub use session::{Mark, Medium, PREFILL_TOKENS, Piece, Pieces, Session, SessionMemory, Tokens};
pub use units::bytes_from_text;
pub use visual_cache::{VisualCache, VisualCacheOptions};
