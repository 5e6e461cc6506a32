//! Which ops stay in f32 where a graph is of half precision.

use std::collections::BTreeMap;

/// Ops of a graph that are computed in f32 in flavours of half precision, by name.
pub type Islands = BTreeMap<String, Island>;

/// How much of an op is computed in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Island {
    /// What it puts out, and the operation that makes it: the sum of a residual stream, products staying as they are.
    Output,
    /// All of it.
    Whole,
}

impl Island {
    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Island::Output => "output",
            Island::Whole => "whole",
        }
    }

    /// The island called `name`.
    pub fn from_name(name: &str) -> Option<Island> {
        [Island::Output, Island::Whole].into_iter().find(|island| island.name() == name)
    }
}
