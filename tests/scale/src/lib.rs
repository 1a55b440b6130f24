//! Meshes of the size that the goals name, for benchmarks and guards: directories, policies, clusters of objects.
//!
//! `ambit-bench-control` (`bench/`) measures with them, `ambit-guard` (`guard/`) counts instructions. The meshes are pure functions of numbers, so
//! that two runs work on the same.

pub mod directory;
pub mod machine;
pub mod objects;
pub mod policies;
pub mod routes;
