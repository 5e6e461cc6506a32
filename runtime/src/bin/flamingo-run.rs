//! flamingo-run
fn main() {}
