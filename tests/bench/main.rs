//! `ambit-bench`: the L4 figures of quality.md.
fn main() {}
