//! How good a model is.
//!
//! [`generated`] asks the demo's own prompts, each with examples of its own. The rest evaluates in-context learning as the
//! Flamingo paper does: a [`task::Task`] is a data set with examples and questions; [`select`] chooses the examples before
//! a question, by [`features`] for RICES, [`ask`] asks it, [`journal`] keeps the answers, [`metric`] says what they are worth, [`run`] is the loop,
//! [`compare`] holds two runs against each other, [`page`] shows one.

pub mod ask;
pub mod builtin;
pub mod compare;
pub mod data;
pub mod features;
pub mod generated;
pub mod interval;
pub mod journal;
mod lines;
pub mod metric;
mod ok_vqa;
pub mod page;
pub mod run;
pub mod select;
pub mod task;
pub mod template;

pub use generated::{EvalOptions, Question, Score, SplitName, TASKS, eval, tasks, words};
pub(crate) use generated::{check_words, pixel_values};
