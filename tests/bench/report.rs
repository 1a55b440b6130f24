//! From measurements to ratios, Markdown and JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use crate::load::{Outcome, Work};

/// What lies between client and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Path {
    /// Nothing.
    NoMesh,
    /// The raw relay R.
    Raw,
    /// Two ztunnels, or one on the same node.
    Ambit,
}

impl Path {
    /// In the order in which a round alternates.
    pub(crate) const ALL: [Path; 3] = [Path::NoMesh, Path::Raw, Path::Ambit];

    fn title(self) -> &'static str {
        match self {
            Path::NoMesh => "no mesh",
            Path::Raw => "R",
            Path::Ambit => "Ambit",
        }
    }
}

/// One row of the table: a kind of work between two places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Row {
    /// What the client does; ordered by its place in the table.
    #[serde(serialize_with = "serialize_work")]
    pub(crate) work: RowWork,
    /// Client and server on the same node.
    pub(crate) same_node: bool,
    /// Connections at once.
    pub(crate) connections: usize,
}

/// [`Work`] with the order of the table.
pub(crate) type RowWork = OrderedWork;

/// A kind of work, ordered as the table lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OrderedWork(pub(crate) Work);

impl PartialOrd for OrderedWork {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for OrderedWork {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0 as u8).cmp(&(other.0 as u8))
    }
}

fn serialize_work<S: serde::Serializer>(work: &OrderedWork, serializer: S) -> Result<S::Ok, S::Error> {
    work.0.serialize(serializer)
}

impl Row {
    /// A row of the table.
    pub(crate) fn new(work: Work, same_node: bool, connections: usize) -> Self {
        Self { work: OrderedWork(work), same_node, connections }
    }

    /// What the row is called in the table.
    pub(crate) fn title(&self) -> String {
        let work = match self.work.0 {
            Work::Bulk => "bulk",
            Work::RoundTrip => "64-byte round trip",
            Work::Http => "HTTP keep-alive",
            Work::Connect => "new connections",
        };
        let place = if self.same_node { "same node" } else { "across nodes" };
        format!(
            "{work}, {} connection{}, {place}",
            self.connections,
            if self.connections == 1 { "" } else { "s" }
        )
    }
}

/// One run of one row over one path.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    /// What the client saw.
    #[serde(flatten)]
    pub(crate) outcome: Outcome,
    /// CPU seconds of what lies between: both ztunnels, both halves of R, or nothing.
    pub(crate) cpu_seconds: f64,
}

impl Sample {
    /// CPU of the proxies per unit: seconds a GB for bulk, microseconds an operation else.
    pub(crate) fn cpu_per_unit(&self, work: Work) -> f64 {
        match work {
            Work::Bulk => self.cpu_seconds / (self.outcome.bytes as f64 / 1e9),
            Work::RoundTrip | Work::Http | Work::Connect => {
                self.cpu_seconds * 1e6 / self.outcome.operations as f64
            }
        }
    }

    /// Gigabits a second for bulk, thousands of operations a second else.
    pub(crate) fn rate(&self, work: Work) -> f64 {
        match work {
            Work::Bulk => self.outcome.bytes as f64 * 8.0 / 1e9 / self.outcome.seconds,
            Work::RoundTrip | Work::Http | Work::Connect => {
                self.outcome.operations as f64 / 1e3 / self.outcome.seconds
            }
        }
    }
}

/// All samples, by row and path.
pub(crate) type Samples = BTreeMap<Row, BTreeMap<Path, Vec<Sample>>>;

/// Everything one run of the benchmark found out.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The day of the run, UTC, `YYYY-MM-DD`.
    pub(crate) date: String,
    /// Processor, cores and kernel.
    pub(crate) machine: String,
    /// Resident bytes of each ztunnel before any connection.
    pub(crate) idle_resident: Vec<u64>,
    /// The rows, as a list for JSON.
    pub(crate) rows: Vec<RowReport>,
}

/// One row with its samples.
#[derive(Debug, Serialize)]
pub(crate) struct RowReport {
    /// What the row is called.
    pub(crate) title: String,
    /// The row.
    pub(crate) row: Row,
    /// Samples by path.
    pub(crate) paths: BTreeMap<Path, Vec<Sample>>,
}

impl Report {
    /// Puts the samples into a report.
    pub(crate) fn new(date: String, machine: String, idle_resident: Vec<u64>, samples: Samples) -> Self {
        let rows =
            samples.into_iter().map(|(row, paths)| RowReport { title: row.title(), row, paths }).collect();
        Self { date, machine, idle_resident, rows }
    }

    /// R across nodes for the same work, which the goals are ratios to; a new connection is held against a round trip.
    fn base_of(&self, row: &Row) -> Option<&[Sample]> {
        let work = if row.work.0 == Work::Connect { Work::RoundTrip } else { row.work.0 };
        let across = |candidate: &&RowReport| !candidate.row.same_node && candidate.row.work.0 == work;
        self.rows.iter().find(across)?.paths.get(&Path::Raw).map(Vec::as_slice)
    }

    /// The report as a page of Markdown.
    pub(crate) fn markdown(&self) -> String {
        let mut page = String::new();
        page.push_str("# Benchmarks\n\n");
        page.push_str("Written by `make bench`. R is a raw relay of two processes on the same TLS library: no HTTP/2, no policy\n");
        page.push_str("(on the same node: one process, no TLS). CPU is that of both node proxies, or both halves of R. Each figure is the\n");
        page.push_str("median of alternating runs, its spread (lowest to highest) in brackets. The last columns are ratios to R across nodes\n");
        page.push_str("on the same work with as few connections as the table has (a new connection: to R's round trip).\n\n");
        let _ = writeln!(page, "Machine: {}. Date: {}.\n", self.machine, self.date);
        page.push_str("| work | path | rate | CPU a unit | p50 | p99 | CPU / R | rate / R | p50 / R |\n");
        page.push_str("| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n");
        for row in &self.rows {
            row.write_markdown(&mut page, self.base_of(&row.row));
        }
        page.push_str("\nBulk: Gb/s and CPU seconds a GB; else thousands a second and microseconds of CPU each. Latencies in microseconds.\n");
        let resident: Vec<String> =
            self.idle_resident.iter().map(|bytes| format!("{:.1} MB", *bytes as f64 / 1e6)).collect();
        let _ = writeln!(page, "\nResident memory of an idle ztunnel: {}.", resident.join(", "));
        page
    }
}

impl RowReport {
    fn write_markdown(&self, page: &mut String, base: Option<&[Sample]>) {
        let work = self.row.work.0;
        for (path, samples) in &self.paths {
            let rate = Spread::of(samples, |s| s.rate(work));
            let cpu = Spread::of(samples, |s| s.cpu_per_unit(work));
            let p50 = Spread::of(samples, |s| s.outcome.p50_us);
            let p99 = Spread::of(samples, |s| s.outcome.p99_us);
            let ratio = |mine: f64, of: &dyn Fn(&Sample) -> f64| match base {
                Some(base) if *path == Path::Ambit => format!("{:.2}", mine / Spread::of(base, of).median),
                _ => String::new(),
            };
            let latency = |spread: &Spread| if work == Work::Bulk { String::new() } else { spread.show(0) };
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                self.title,
                path.title(),
                rate.show(2),
                if *path == Path::NoMesh { String::new() } else { cpu.show(2) },
                latency(&p50),
                latency(&p99),
                ratio(cpu.median, &|s| s.cpu_per_unit(work)),
                // A connection is held against a round trip in CPU only: its rate and latency are not alike.
                if work == Work::Connect { String::new() } else { ratio(rate.median, &|s| s.rate(work)) },
                if matches!(work, Work::Bulk | Work::Connect) {
                    String::new()
                } else {
                    ratio(p50.median, &|s| s.outcome.p50_us)
                },
            );
        }
    }
}

/// Median and range of a figure over the runs.
struct Spread {
    low: f64,
    median: f64,
    high: f64,
}

impl Spread {
    fn of(samples: &[Sample], figure: impl Fn(&Sample) -> f64) -> Self {
        let mut values: Vec<f64> = samples.iter().map(figure).collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        Self { low: at(0), median: at(values.len() / 2), high: at(values.len().saturating_sub(1)) }
    }

    fn show(&self, digits: usize) -> String {
        format!("{:.digits$} ({:.digits$}–{:.digits$})", self.median, self.low, self.high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(bytes: u64, seconds: f64, cpu_seconds: f64) -> Sample {
        Sample { outcome: Outcome { bytes, seconds, ..Outcome::default() }, cpu_seconds }
    }

    #[test]
    fn the_ratio_is_that_of_medians_to_the_raw_relay() {
        let mut paths = BTreeMap::new();
        paths.insert(Path::Raw, vec![sample(1_000_000_000, 1.0, 1.5); 3]);
        paths.insert(Path::Ambit, vec![sample(1_000_000_000, 1.0, 3.0); 3]);
        let samples = Samples::from([(Row::new(Work::Bulk, false, 1), paths)]);
        let page = Report::new("2026-01-01".into(), "a machine".into(), vec![], samples).markdown();
        let line = page.lines().find(|l| l.contains("| Ambit |")).unwrap();
        assert!(line.contains("| 2.00 | 1.00 |"), "{line}");
    }
}
