//! Who talked to whom, and what was decided: connections and requests of the last hours, counted by source and destination.
//!
//! A proxy keeps a [`Table`]: each [`Observation`] is counted in a row, a table never takes more memory than it may, and rows that were not
//! seen for long go. The admin server shows it as a [`Report`], which `ambit authz` reads. Nothing here does I/O or reads a clock.

mod flow;
mod pattern;
mod table;

pub use flow::{Flow, Kind, Lost, Report, ServiceName, Side};
pub use pattern::{ANY_PATH, path_pattern};
pub use table::{Limits, Observation, ObservedSide, Outcome, Table};
