//! What files of half precision need to know beside the graph: which ops stay in f32, and which products are of bytes.

use std::collections::BTreeMap;

/// Ops of a graph that are computed in f32 in flavours of half precision, by name.
pub type Islands = BTreeMap<String, Island>;

/// How a graph is typed in a flavour of half precision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Typing {
    /// What is computed in f32.
    pub islands: Islands,
    /// Distance of the levels that the activations of a linear with a weight of bytes are rounded to, by the linear's name
    /// (`decoder.3.mlp/down` of an op that holds several): for flavours of standard operators.
    pub x_scales: BTreeMap<String, f32>,
}

impl From<Islands> for Typing {
    fn from(islands: Islands) -> Typing {
        Typing { islands, x_scales: BTreeMap::new() }
    }
}

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
