//! Pods from the API server: which of this node's pods are enrolled, and what is written back of them.
//!
//! [`watch`] fills the [`index`], which decides; [`sync`] brings the agent in line with it; [`lookup`] asks for single
//! pods, for the CNI plugin; [`annotate`] writes the status of pods; [`taint`] takes the node's taint off.

pub mod annotate;
pub mod index;
pub mod lookup;
mod progress;
pub mod sync;
pub mod taint;
pub mod watch;

pub use index::{Index, Metadata, PodObject, Source, Verdict, WantedPod};
pub use lookup::{PodSource, SourceError};
