//! What a caller asks of a generation, and what comes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::beam::BeamOptions;
use crate::model::RunError;
use crate::sampling::SamplingOptions;
use crate::visual_cache::Found;

/// What to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// Whether to follow several continuations at once, and how.
    pub beams: BeamOptions,
    /// Go on after end-of-chunk and end-of-text tokens.
    pub ignore_stops: bool,
    /// Let the model generate image tokens, which nothing stands behind.
    pub allow_image_token: bool,
    /// Whether to go on when the context is full, as [`Session::slide`](crate::Session::slide) does.
    pub slide: bool,
    /// Texts that end the answer; it is cut before the first of them.
    pub stop_strings: Vec<String>,
    /// When to give up.
    pub limits: Limits,
}

impl Default for GenerateOptions {
    fn default() -> GenerateOptions {
        GenerateOptions {
            max_new_tokens: 64,
            sampling: SamplingOptions::default(),
            beams: BeamOptions::default(),
            ignore_stops: false,
            allow_image_token: false,
            slide: false,
            stop_strings: Vec::new(),
            limits: Limits::default(),
        }
    }
}

/// Stops work from another thread: all clones are one switch.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Asks the work to stop; it does before its next token, or the next part of a prompt.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether [`CancelToken::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// When to give up on reading a prompt or generating.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Stops when it is cancelled.
    pub cancel: CancelToken,
    /// Stops at this time.
    pub deadline: Option<Instant>,
}

impl Limits {
    /// Goes on, unless there is a reason to stop.
    ///
    /// # Errors
    /// The reason.
    pub(crate) fn check(&self) -> Result<(), RunError> {
        match self.reached() {
            None => Ok(()),
            Some(Stop::Deadline) => Err(RunError::Interrupted { reason: "the deadline passed" }),
            Some(_) => Err(RunError::Interrupted { reason: "it was cancelled" }),
        }
    }

    /// Why to stop now, if there is a reason.
    pub(crate) fn reached(&self) -> Option<Stop> {
        let is_late = |deadline| Instant::now() >= deadline;
        match (self.cancel.is_cancelled(), self.deadline.is_some_and(is_late)) {
            (true, _) => Some(Stop::Cancelled),
            (false, true) => Some(Stop::Deadline),
            (false, false) => None,
        }
    }
}

/// Why generation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// As many tokens as asked for.
    Length,
    /// The context is full.
    Context,
    /// This token came.
    Token(u32),
    /// This stop string came.
    Text(String),
    /// It was cancelled.
    Cancelled,
    /// The deadline passed.
    Deadline,
}

impl Stop {
    fn to_json(&self) -> serde_json::Value {
        match self {
            Stop::Length => "length".into(),
            Stop::Context => "context".into(),
            Stop::Token(id) => serde_json::json!({ "token": id }),
            Stop::Text(text) => serde_json::json!({ "text": text }),
            Stop::Cancelled => "cancelled".into(),
            Stop::Deadline => "deadline".into(),
        }
    }
}

/// Generated ids.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The new tokens, without the one that stopped.
    pub tokens: Vec<u32>,
    /// Tokens chosen, with the one that stopped.
    pub n_steps: usize,
    /// Why it ended.
    pub stop: Stop,
}

/// An answer with what it cost.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// The new tokens; those of a stop string too, which the text lacks.
    pub tokens: Vec<u32>,
    /// Tokens before the answer: the prompt, in a conversation all of it.
    pub n_prompt_tokens: usize,
    /// Why it ended.
    pub stop: Stop,
    /// Times.
    pub timings: Timings,
    /// What was found in caches, and what was not.
    pub cache: CacheCounts,
}

impl Answer {
    /// The answer for machines: the contract of `run --json`.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "text": self.text,
            "tokens": self.tokens,
            "n_prompt_tokens": self.n_prompt_tokens,
            "stop": self.stop.to_json(),
            "timings": {
                "first_token_ms": self.timings.first_token_ms,
                "decode_tokens_per_s": self.timings.decode_tokens_per_s,
            },
            "cache": {
                "visual_hits": self.cache.visual_hits,
                "visual_misses": self.cache.visual_misses,
                "visual_disk_hits": self.cache.visual_disk_hits,
                "prefix_tokens_reused": self.cache.prefix_tokens_reused,
            },
        })
    }
}

/// Times of an answer.
#[derive(Clone, Copy, Debug)]
pub struct Timings {
    /// From the call to the first token, in milliseconds; of a one-shot call with reading the prompt and its pictures.
    pub first_token_ms: f64,
    /// Tokens a second after the first; `None` if there was no second.
    pub decode_tokens_per_s: Option<f64>,
}

/// What was found in caches since the last answer of a session.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheCounts {
    /// Media found, in memory or on disk.
    pub visual_hits: usize,
    /// Media encoded.
    pub visual_misses: usize,
    /// Those of the media found that came from disk.
    pub visual_disk_hits: usize,
    /// Tokens whose keys and values were there, from a prompt that begins alike.
    pub prefix_tokens_reused: usize,
}

impl CacheCounts {
    pub(crate) fn count(&mut self, found: Found) {
        match found {
            Found::Memory => self.visual_hits += 1,
            Found::Disk => {
                self.visual_hits += 1;
                self.visual_disk_hits += 1;
            }
            Found::Encoded => self.visual_misses += 1,
        }
    }
}
