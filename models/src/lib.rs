//! Flamingo-family models: their files, configs, key maps, graphs as the references compute them,
//! the mask rule, and the artifact's manifest.
//!
//! ```no_run
//! use flamingo_models::Source;
//! let source = Source::open("checkpoint/recipe.toml".as_ref())?;
//! let graphs = source.graphs()?;
//! println!("{}", graphs.decoder.nodes().len());
//! # Ok::<(), flamingo_models::SourceError>(())
//! ```
#![deny(unsafe_code)]

mod build;
pub mod checkpoint;
pub mod components;
pub mod config;
mod family;
pub mod image_spec;
pub mod manifest;
pub mod map;
mod media_time;
pub mod profile;
mod source;
mod survey;
mod tokenizer;

pub use config::{Family, ModelConfig, SpecialTokens};
pub use family::{Graphs, Recipe, RecipeFamily, Source, TokensRecipe};
pub use media_time::{MediaClock, media_time};
pub use source::{Parts, SourceError, WeightProblem};
pub use survey::{Survey, SurveyedPart};
pub use tokenizer::{read_tokenizer, token_ids, tokenizer_json};
