//! The goals of the L4 data path, and whether a report meets it.

use crate::load::Work;
use crate::report::{Order, Path, Report, Row, Sample, Steady};

/// One demand, and what was measured.
pub(crate) struct Verdict {
    /// What is asked for.
    pub(crate) what: String,
    /// What was measured.
    pub(crate) measured: f64,
    /// The limit.
    pub(crate) goal: f64,
    /// Whether the figure must not be above the limit, rather than not below.
    pub(crate) at_most: bool,
    unit: &'static str,
}

impl Verdict {
    /// A demand for no more than the goal.
    pub(crate) fn at_most(what: impl Into<String>, measured: f64, goal: f64, unit: &'static str) -> Self {
        Self { what: what.into(), measured, goal, at_most: true, unit }
    }

    /// Whether it is met.
    pub(crate) fn is_met(&self) -> bool {
        if self.at_most { self.measured <= self.goal } else { self.measured >= self.goal }
    }

    /// As a row of a table.
    pub(crate) fn markdown(&self) -> String {
        let Self { what, measured, goal, unit, .. } = self;
        let (sign, met) = (if self.at_most { "≤" } else { "≥" }, if self.is_met() { "yes" } else { "no" });
        format!("| {what} | {measured:.2}{unit} | {sign} {goal}{unit} | {met} |")
    }
}

#[derive(Clone, Copy)]
enum Figure {
    Cpu,
    Rate,
    P50,
    P99,
}

impl Figure {
    fn of(self, sample: &Sample, work: Work) -> f64 {
        match self {
            Figure::Cpu => sample.cpu_per_unit(work),
            Figure::Rate => sample.rate(work),
            Figure::P50 => sample.outcome.p50_us,
            Figure::P99 => sample.outcome.p99_us,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Figure::Cpu => "CPU",
            Figure::Rate => "rate",
            Figure::P50 => "p50",
            Figure::P99 => "p99",
        }
    }
}

/// Row (work, same node, connections), figure, and its limit as a ratio to R across nodes.
const RATIOS: [(Work, bool, usize, Figure, f64); 14] = [
    (Work::Bulk, false, 1, Figure::Cpu, 1.05),
    (Work::Bulk, false, 1, Figure::Rate, 0.9),
    (Work::Bulk, false, 8, Figure::Cpu, 1.1),
    (Work::Bulk, true, 1, Figure::Cpu, 0.18),
    (Work::Bulk, true, 1, Figure::Rate, 2.7),
    (Work::RoundTrip, false, 1, Figure::Cpu, 1.25),
    (Work::RoundTrip, false, 1, Figure::P50, 1.25),
    (Work::RoundTrip, false, 1, Figure::P99, 1.25),
    (Work::RoundTrip, true, 1, Figure::Cpu, 0.37),
    (Work::RoundTrip, true, 1, Figure::P50, 0.6),
    (Work::Http, false, 32, Figure::Cpu, 1.3),
    (Work::Http, true, 32, Figure::Cpu, 0.45),
    (Work::Connect, false, 8, Figure::Cpu, 3.7),
    (Work::Connect, true, 8, Figure::Cpu, 2.0),
];
/// Bytes of a node proxy's memory that an idle connection may take.
const IDLE_CONNECTION: f64 = 4096.0;
/// Memory of an idle node proxy, MB.
const IDLE_PROCESS: f64 = 12.0;
/// Memory that may stay after a crowd, as a share of what was there before.
const LEFT: f64 = 0.2;
/// What the mesh may add to the median latency at a load of 200 requests a second, milliseconds.
const ADDED: f64 = 0.5;
/// How much the 99th percentile of small messages may grow beside a bulk stream.
const BESIDE: f64 = 2.0;

/// All demands that the report has figures for.
pub(crate) fn verdicts(report: &Report) -> Vec<Verdict> {
    let mut verdicts: Vec<Verdict> = RATIOS.iter().filter_map(|goal| ratio(report, goal)).collect();
    for (n, bytes) in report.idle_resident.iter().enumerate() {
        let what = format!("resident, idle process of node {}", n + 1);
        verdicts.push(Verdict::at_most(what, *bytes as f64 / 1e6, IDLE_PROCESS, " MB"));
    }
    if let Some(storm) = &report.storm {
        let failed = storm.outcome.errors() as f64;
        verdicts.push(Verdict::at_most("new connections without pause, failed", failed, 0.0, ""));
    }
    if let Some(crowd) = &report.crowd {
        for (side, memory) in [("source", &crowd.source), ("destination", &crowd.destination)] {
            let what = format!("idle connection, memory, {side} side ({} held)", crowd.connections);
            verdicts.push(Verdict::at_most(what, memory.each(crowd.connections), IDLE_CONNECTION, " B"));
            let what = format!("memory above the start after they closed, {side} side");
            verdicts.push(Verdict::at_most(what, memory.left().max(0.0), LEFT, ""));
        }
    }
    for (what, figure) in
        [("kept", (|run| run.kept.p50_us) as fn(&Steady) -> f64), ("new", |run| run.new.p50_us)]
    {
        let p50 = |path| report.steady_latency(path, figure);
        if let (Some(mesh), Some(none)) = (p50(Path::Ambit), p50(Path::NoMesh)) {
            let what = format!("200 requests a second, {what} connections: p50 above that of no mesh");
            verdicts.push(Verdict::at_most(what, (mesh - none) / 1e3, ADDED, " ms"));
        }
    }
    for order in Order::ALL {
        if let Some(growth) = report.beside_growth(Path::Ambit, order) {
            let what = format!("p99 of small messages beside a bulk stream, {} first", order.title());
            verdicts.push(Verdict::at_most(what, growth, BESIDE, "×"));
        }
    }
    verdicts
}

fn ratio(
    report: &Report,
    &(work, same_node, connections, figure, goal): &(Work, bool, usize, Figure, f64),
) -> Option<Verdict> {
    let row = Row::new(work, same_node, connections);
    let of = |sample: &Sample| figure.of(sample, work);
    let base_work = Row::base_work(work);
    let base = report.median(report.base_of(&row)?, |sample| figure.of(sample, base_work));
    let mine = report.median(report.samples(&row, Path::Ambit)?, of);
    let what = format!("{}: {} / R", row.title(), figure.title());
    Some(Verdict { what, measured: mine / base, goal, at_most: !matches!(figure, Figure::Rate), unit: "" })
}
