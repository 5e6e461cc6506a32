//! `flamingo-train`.

fn main() {}
