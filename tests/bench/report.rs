//! From measurements to ratios, Markdown and JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use crate::crowd::Crowd;
use crate::goals;
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

    /// The work of R that a row of `work` is held against.
    pub(crate) fn base_work(work: Work) -> Work {
        if work == Work::Connect { Work::RoundTrip } else { work }
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

/// Which starts first when small messages and a bulk stream share the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// The bulk stream: the others can keep clear of it.
    BulkFirst,
    /// The small connections: they are where the bulk stream comes to.
    SmallFirst,
}

impl Order {
    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::BulkFirst, Self::SmallFirst];

    /// What is first, for a column and for a goal.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::BulkFirst => "bulk",
            Self::SmallFirst => "small",
        }
    }
}

/// Round trips on several connections, without and with a bulk stream between the same pods.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Beside {
    /// Over which path.
    pub(crate) path: Path,
    /// Which of the two was there first.
    pub(crate) order: Order,
    /// How many connections carry the round trips.
    pub(crate) small: usize,
    /// The round trips by themselves.
    pub(crate) alone: Outcome,
    /// The round trips beside the bulk stream.
    pub(crate) beside: Outcome,
    /// The bulk stream.
    pub(crate) bulk: Outcome,
}

impl Beside {
    fn growth(&self) -> f64 {
        self.beside.p99_us / self.alone.p99_us
    }

    fn write_markdown(&self, page: &mut String) {
        let bulk = Sample { outcome: self.bulk.clone(), cpu_seconds: 0.0 }.rate(Work::Bulk);
        let _ = writeln!(
            page,
            "| {} | {} | {} | {:.0} | {:.0} | {:.0} | {:.0} | {:.2} | {bulk:.2} |",
            self.path.title(),
            self.order.title(),
            self.small,
            self.alone.p50_us,
            self.alone.p99_us,
            self.beside.p50_us,
            self.beside.p99_us,
            self.growth(),
        );
    }
}

/// 200 requests a second, half of them on kept connections and half on new ones.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Steady {
    /// Over which path.
    pub(crate) path: Path,
    /// The requests on kept connections.
    pub(crate) kept: Outcome,
    /// The new connections, each with one round trip.
    pub(crate) new: Outcome,
}

/// A storm of new connections for a while.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Storm {
    /// What the client saw.
    #[serde(flatten)]
    pub(crate) outcome: Outcome,
    /// Resident bytes of each ztunnel before and after it.
    pub(crate) resident: Vec<(u64, u64)>,
}

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
    /// Small messages beside bulk, every round and path.
    pub(crate) beside: Vec<Beside>,
    /// A steady load that leaves the machine idle most of the time, every round and path.
    pub(crate) steady: Vec<Steady>,
    /// New connections without pause, if that was run.
    pub(crate) storm: Option<Storm>,
    /// A crowd of idle connections, if that was run.
    pub(crate) crowd: Option<Crowd>,
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
        Self {
            date,
            machine,
            idle_resident,
            rows,
            beside: Vec::new(),
            steady: Vec::new(),
            storm: None,
            crowd: None,
        }
    }

    /// The samples of a row over a path.
    pub(crate) fn samples(&self, row: &Row, path: Path) -> Option<&[Sample]> {
        self.rows.iter().find(|report| report.row == *row)?.paths.get(&path).map(Vec::as_slice)
    }

    /// How much the 99th percentile of small messages grew beside bulk: the median over the rounds.
    pub(crate) fn beside_growth(&self, path: Path, order: Order) -> Option<f64> {
        let these = self.beside.iter().filter(|run| run.path == path && run.order == order);
        median(these.map(Beside::growth).collect())
    }

    /// The median over the rounds of a latency under steady load, in microseconds.
    pub(crate) fn steady_latency(&self, path: Path, figure: impl Fn(&Steady) -> f64) -> Option<f64> {
        median(self.steady.iter().filter(|run| run.path == path).map(figure).collect())
    }

    /// The median of a figure.
    pub(crate) fn median(&self, samples: &[Sample], figure: impl Fn(&Sample) -> f64) -> f64 {
        Spread::of(samples, figure).median
    }

    /// R across nodes for the same work, which the goals are ratios to; a new connection is held against a round trip.
    pub(crate) fn base_of(&self, row: &Row) -> Option<&[Sample]> {
        let work = Row::base_work(row.work.0);
        let across = |candidate: &&RowReport| !candidate.row.same_node && candidate.row.work.0 == work;
        self.rows.iter().find(across)?.paths.get(&Path::Raw).map(Vec::as_slice)
    }

    /// The report as a page of Markdown.
    pub(crate) fn markdown(&self) -> String {
        let mut page = String::new();
        page.push_str("# Benchmarks\n\n");
        page.push_str("Written by `make bench`. R is a raw relay of two processes on the same TLS library: no HTTP/2, no policy\n");
        page.push_str("(on the same node: one process, no TLS). CPU is that of both node proxies, or both halves of R. Each figure is the\n");
        page.push_str("median of alternating runs, its spread (lowest to highest) in brackets. Goals are ratios to R across nodes\n");
        page.push_str("on the same work with as few connections as the table has (a new connection: to R's round trip).\n\n");
        let _ = writeln!(page, "Machine: {}. Date: {}.\n", self.machine, self.date);
        self.write_goals(&mut page);
        page.push_str("## Figures\n\n");
        page.push_str("Bulk: Gb/s and CPU seconds a GB; else thousands a second and microseconds of CPU each. Latencies in microseconds.\n\n");
        page.push_str(
            "| work | path | rate | CPU a unit | p50 | p99 |\n| --- | --- | --- | --- | --- | --- |\n",
        );
        for row in &self.rows {
            row.write_markdown(&mut page);
        }
        self.write_beside(&mut page);
        self.write_steady(&mut page);
        self.write_storm(&mut page);
        self.write_crowd(&mut page);
        page
    }

    fn write_goals(&self, page: &mut String) {
        let verdicts = goals::verdicts(self);
        if verdicts.is_empty() {
            return;
        }
        page.push_str(
            "## Against the goals\n\n| what | measured | goal | met |\n| --- | --- | --- | --- |\n",
        );
        for verdict in verdicts {
            let _ = writeln!(page, "{}", verdict.markdown());
        }
        page.push('\n');
    }

    fn write_beside(&self, page: &mut String) {
        if self.beside.is_empty() {
            return;
        }
        page.push_str("\n## Small messages beside a bulk stream\n\n");
        page.push_str("64-byte round trips, one after another on each connection, and one bulk stream between the same two pods. Both cores are\n");
        page.push_str("busy in each case, so a part of the growth is the machine's: the row without a mesh shows it. Either the bulk stream is there\n");
        page.push_str("first, or the small connections are, as happens when an application that talks to a server begins a transfer.\n\n");
        page.push_str("| path | first | connections | p50 alone | p99 alone | p50 beside | p99 beside | p99 grows | bulk, Gb/s |\n");
        page.push_str("| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n");
        for run in &self.beside {
            run.write_markdown(page);
        }
    }

    fn write_steady(&self, page: &mut String) {
        if self.steady.is_empty() {
            return;
        }
        page.push_str("\n## 200 requests a second\n\n");
        page.push_str("HTTP/1.1 on 10 kept connections, 100 a second, beside 100 new connections a second with a round trip of 64 bytes each,\n");
        page.push_str("across nodes: what an application sees that does not load the machine. Microseconds, medians of the rounds.\n\n");
        page.push_str(
            "| path | kept, p50 | kept, p99 | new, p50 | new, p99 |\n| --- | --- | --- | --- | --- |\n",
        );
        for path in Path::ALL {
            let latency = |figure: fn(&Steady) -> f64| self.steady_latency(path, figure).unwrap_or_default();
            let _ = writeln!(
                page,
                "| {} | {:.0} | {:.0} | {:.0} | {:.0} |",
                path.title(),
                latency(|run| run.kept.p50_us),
                latency(|run| run.kept.p99_us),
                latency(|run| run.new.p50_us),
                latency(|run| run.new.p99_us),
            );
        }
    }

    fn write_storm(&self, page: &mut String) {
        let Some(Storm { outcome, resident }) = &self.storm else { return };
        let grown: Vec<String> = resident
            .iter()
            .map(|(before, after)| format!("{:.1} → {:.1} MB", *before as f64 / 1e6, *after as f64 / 1e6))
            .collect();
        let _ = writeln!(
            page,
            "\n## New connections without pause\n\n{} connections in {:.0} s ({:.0} a second, all that two cores give with client and server on them), \
             {}; p50 {:.0} µs, p99 {:.0} µs. Resident memory of the two ztunnels: {}.",
            outcome.operations,
            outcome.seconds,
            outcome.operations as f64 / outcome.seconds,
            failed(outcome),
            outcome.p50_us,
            outcome.p99_us,
            grown.join(", "),
        );
    }

    fn write_crowd(&self, page: &mut String) {
        let Some(crowd) = &self.crowd else { return };
        let _ = writeln!(
            page,
            "\n## {} idle connections\n\nBetween {} pairs of nodes, one exchange of 64 bytes on each, then held; opened in {:.0} s. \
             Resident memory of all ztunnels of a side.\n\n\
             | side | before, MB | held, MB | after, MB | bytes a connection |\n| --- | --- | --- | --- | --- |",
            crowd.connections, crowd.pairs, crowd.opening_seconds
        );
        for (side, memory) in [("source", &crowd.source), ("destination", &crowd.destination)] {
            let megabytes = [memory.before, memory.held, memory.after].map(|bytes| bytes as f64 / 1e6);
            let _ = writeln!(
                page,
                "| {side} | {:.1} | {:.1} | {:.1} | {:.0} |",
                megabytes[0],
                megabytes[1],
                megabytes[2],
                memory.each(crowd.connections)
            );
        }
    }
}

impl RowReport {
    fn write_markdown(&self, page: &mut String) {
        let work = self.row.work.0;
        for (path, samples) in &self.paths {
            let rate = Spread::of(samples, |s| s.rate(work));
            let cpu = Spread::of(samples, |s| s.cpu_per_unit(work));
            let p50 = Spread::of(samples, |s| s.outcome.p50_us);
            let p99 = Spread::of(samples, |s| s.outcome.p99_us);
            let latency = |spread: &Spread| if work == Work::Bulk { String::new() } else { spread.show(0) };
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | {} | {} |",
                self.title,
                path.title(),
                rate.show(2),
                if *path == Path::NoMesh { String::new() } else { cpu.show(2) },
                latency(&p50),
                latency(&p99),
            );
        }
    }
}

/// How many operations failed, and of what.
fn failed(outcome: &Outcome) -> String {
    let causes: Vec<String> =
        outcome.failures.iter().map(|(cause, count)| format!("{count}: {cause}")).collect();
    match causes.as_slice() {
        [] => "0 failed".to_owned(),
        causes => format!("{} failed ({})", outcome.errors(), causes.join("; ")),
    }
}

/// The median; nothing of nothing.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Median and range of a figure over the runs.
pub(crate) struct Spread {
    low: f64,
    /// The median.
    pub(crate) median: f64,
    high: f64,
}

impl Spread {
    fn of(samples: &[Sample], figure: impl Fn(&Sample) -> f64) -> Self {
        Self::of_all(samples, figure)
    }

    /// Of any samples.
    pub(crate) fn of_all<T>(samples: &[T], figure: impl Fn(&T) -> f64) -> Self {
        let mut values: Vec<f64> = samples.iter().map(figure).collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        Self { low: at(0), median: at(values.len() / 2), high: at(values.len().saturating_sub(1)) }
    }

    /// Median, lowest and highest.
    pub(crate) fn show(&self, digits: usize) -> String {
        format!("{:.digits$} ({:.digits$}–{:.digits$})", self.median, self.low, self.high)
    }
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
