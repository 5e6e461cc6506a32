//! flamingoc
fn main() {}
