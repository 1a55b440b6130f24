//! Memory, descriptors and threads of the mesh's processes, from `/proc`, a series for each process that lived.

use std::collections::BTreeMap;
use std::time::Instant;

use ambit_scale::machine;
use anyhow::{Context, Result};
use parking_lot::Mutex;
use serde::Serialize;

/// What one process uses at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Usage {
    /// CPU time so far, user and system, seconds.
    pub(crate) cpu: f64,
    /// Resident memory, bytes.
    pub(crate) resident: u64,
    /// The part of it that no file backs, bytes: what a leak makes grow, without pages of the program that are
    /// read when they are needed first.
    pub(crate) anonymous: u64,
    /// Open descriptors.
    pub(crate) descriptors: u64,
    /// Threads.
    pub(crate) threads: u64,
}

/// One process from its first sample to its last.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Series {
    /// Whose process it is.
    pub(crate) name: String,
    /// Its process id.
    pub(crate) pid: u32,
    /// Seconds since the start, and what was used then.
    pub(crate) samples: Vec<(f64, Usage)>,
}

impl Series {
    /// CPU time that it used while it was watched, seconds.
    pub(crate) fn cpu(&self) -> f64 {
        self.samples
            .last()
            .map_or(0.0, |(_, last)| last.cpu - self.samples.first().map_or(0.0, |(_, first)| first.cpu))
    }

    /// How long it was watched, seconds.
    pub(crate) fn lived(&self) -> f64 {
        self.samples
            .last()
            .map_or(0.0, |(last, _)| last - self.samples.first().map_or(0.0, |(first, _)| *first))
    }
}

/// The series of all processes.
#[derive(Debug)]
pub(crate) struct Processes {
    start: Instant,
    series: Mutex<BTreeMap<(String, u32), Series>>,
}

impl Processes {
    /// None yet; times count from `start`.
    pub(crate) fn since(start: Instant) -> Self {
        Self { start, series: Mutex::default() }
    }

    /// Takes a sample of a process. One that has ended meanwhile is left out.
    pub(crate) fn sample(&self, name: &str, pid: u32) {
        let Ok(usage) = usage(pid) else { return };
        let at = self.start.elapsed().as_secs_f64();
        let mut series = self.series.lock();
        let entry = series.entry((name.to_owned(), pid)).or_insert_with(|| Series {
            name: name.to_owned(),
            pid,
            samples: Vec::new(),
        });
        entry.samples.push((at, usage));
    }

    /// All series, the first that began first.
    pub(crate) fn all(&self) -> Vec<Series> {
        let mut all: Vec<Series> = self.series.lock().values().cloned().collect();
        let began = |series: &Series| series.samples.first().map_or(0.0, |(at, _)| *at);
        all.sort_by(|one, other| one.name.cmp(&other.name).then(began(one).total_cmp(&began(other))));
        all
    }
}

/// What a process uses now.
///
/// # Errors
/// When it is gone.
pub(crate) fn usage(pid: u32) -> Result<Usage> {
    let path = format!("/proc/{pid}/status");
    let status = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        number.with_context(|| format!("no {name} in {path}"))
    };
    Ok(Usage {
        cpu: machine::cpu_seconds(pid)?,
        resident: machine::resident(pid)?,
        anonymous: field("RssAnon:")? * 1024,
        descriptors: machine::descriptors(pid)? as u64,
        threads: field("Threads:")?,
    })
}
