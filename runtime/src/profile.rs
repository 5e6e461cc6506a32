//! What a backend did, instruction by instruction: times, bytes of weights, operations.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Kind of arithmetic that an instruction's multiply-adds are done in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arithmetic {
    /// f32 products and sums.
    F32,
    /// bfloat16 products, f32 sums.
    Bf16,
    /// Products of bytes, i32 sums.
    Int8,
}

impl Arithmetic {
    /// `f32`, `bf16` or `int8`.
    pub fn name(self) -> &'static str {
        match self {
            Arithmetic::F32 => "f32",
            Arithmetic::Bf16 => "bf16",
            Arithmetic::Int8 => "int8",
        }
    }
}

/// What an instruction reads and computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Bytes of weights read, once for each pass over them. Literals, inputs, caches and
    /// intermediate values do not count.
    pub weight_bytes: usize,
    /// Multiply-adds of matrix products and attention, each as two operations. Normalisations,
    /// activations and sums do not count; causal attention counts in full.
    pub operations: u64,
    /// What the multiply-adds are done in.
    pub arithmetic: Arithmetic,
}

/// One instruction that ran.
#[derive(Clone, Debug)]
pub struct Record {
    /// The graph: `media` or `decoder`.
    pub graph: String,
    /// The node that the instruction comes from, with its layer: `decoder.3.mlp`.
    pub node: String,
    /// What it does: `linear`, `self_attention`, …
    pub op: &'static str,
    /// When it began.
    pub start: Instant,
    /// How long it took.
    pub duration: Duration,
    /// What it read and computed.
    pub work: Work,
}

/// Gathers records while it is on.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    is_on: AtomicBool,
    records: Mutex<Vec<Record>>,
}

impl Recorder {
    /// Starts or stops recording.
    pub(crate) fn set(&self, is_on: bool) {
        self.is_on.store(is_on, Ordering::Relaxed);
    }

    /// Now, if it is on.
    pub(crate) fn start(&self) -> Option<Instant> {
        self.is_on.load(Ordering::Relaxed).then(Instant::now)
    }

    /// Adds a record.
    pub(crate) fn add(&self, record: Record) {
        self.records.lock().unwrap_or_else(PoisonError::into_inner).push(record);
    }

    /// The records so far, which it forgets.
    pub(crate) fn take(&self) -> Vec<Record> {
        std::mem::take(&mut self.records.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
