//! A small world to learn from: coloured shapes and handwritten digits in pictures and short videos, and
//! prompts about them.
//!
//! `facts` says what a medium shows, `draw` paints it, `words` is the vocabulary, `episode` the prompts of
//! every task, with the weight that each word has in the loss. All of it is a pure function of a seed.

#![forbid(unsafe_code)]

pub mod digits;
pub mod draw;
pub mod episode;
pub mod facts;
pub mod random;
pub mod words;

/// Pictures and pairs of colour and kind that training may see, or those kept for the test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Digits and pairs that training sees.
    Train,
    /// Digits that training never sees, pairs that it does.
    Test,
    /// Digits and pairs of colour and kind that training never sees.
    Unseen,
}
