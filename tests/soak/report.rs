//! What a soak showed: the verdict, a page of Markdown, and all samples as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::flow_log::{FlowLog, Second, quantile};
use crate::processes::{Processes, Series, Usage, usage};
use crate::verdict::{Judgement, REST_SLACK, Trend, median};

/// The soak's own process: its memory holds the samples, so only its descriptors count.
pub(crate) const OWN: &str = "the soak itself, node agents and applications included";
/// Timers that are later than this, milliseconds, show that the machine was overloaded. The page reports the lateness for each
/// error, which counts nevertheless.
const STARVED: u64 = 250;
/// Errors that the page shows.
const SHOWN: usize = 30;
/// Counters of node proxies that the report gives.
pub(crate) const COUNTERS: [&str; 8] = [
    "ambit_panics_total",
    "ambit_connect_retries_total",
    "ambit_accept_shortages_total",
    "ambit_certificates_issued_total",
    "ambit_certificates_failed_total",
    "ambit_hbone_connections_total",
    "ambit_hbone_ping_timeouts_total",
    "ambit_access_log_dropped_total",
];

/// Five seconds of the load.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    /// Seconds since the start.
    pub(crate) at: f64,
    /// Each of the last seconds.
    pub(crate) seconds: Vec<Second>,
    /// Median latency of small requests, microseconds.
    pub(crate) p50: u32,
    /// Their 99th percentile.
    pub(crate) p99: u32,
    /// The worst that a timer of the soak itself was late by, milliseconds.
    pub(crate) late: u64,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let answered: u32 = self.seconds.iter().map(|second| second.answered).sum();
        let seconds = u32::try_from(self.seconds.len()).unwrap_or(1).max(1);
        write!(
            f,
            "{}/s, p50 {} µs, p99 {} µs, timers late by {} ms",
            answered / seconds,
            self.p50,
            self.p99,
            self.late
        )
    }
}

/// An event that happened.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Happened {
    /// Seconds since the start.
    pub(crate) at: f64,
    /// What.
    pub(crate) event: &'static str,
    /// How long it took.
    pub(crate) seconds: f64,
    /// 99th percentile of small requests until the next, microseconds.
    pub(crate) p99: u32,
}

/// What a part of the mesh holds without load.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rest {
    name: String,
    pid: Option<u32>,
    usage: Option<Usage>,
}

impl Rest {
    /// What a process holds now.
    pub(crate) fn now(name: String, pid: Option<u32>) -> Self {
        // Memory moves without meaning; what is waited for is that descriptors stand still.
        let usage = pid.and_then(|pid| usage(pid).ok()).map(|usage| Usage {
            cpu: 0.0,
            resident: 0,
            anonymous: 0,
            ..usage
        });
        Self { name, pid, usage }
    }

    /// The lesser of this and another look at the same part; a process that is gone holds nothing that counts.
    pub(crate) fn least(&self, other: Self) -> Self {
        let usage = match (self.usage, other.usage) {
            (Some(one), Some(another)) => Some(Usage {
                descriptors: one.descriptors.min(another.descriptors),
                threads: one.threads.min(another.threads),
                ..Usage::default()
            }),
            (one, another) => one.or(another),
        };
        Self { usage, ..other }
    }

    /// The comparison with a later look at the same part.
    pub(crate) fn until(&self, after: &Self) -> Rested {
        Rested { name: self.name.clone(), pid: after.pid, before: self.usage, after: after.usage }
    }
}

/// What a part of the mesh held without load, before and after.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Rested {
    name: String,
    /// The process after the load; before, it may have been another one.
    pid: Option<u32>,
    before: Option<Usage>,
    after: Option<Usage>,
}

impl Rested {
    /// Whether it holds no more descriptors than before.
    pub(crate) fn flat(&self) -> bool {
        match (self.before, self.after) {
            (Some(before), Some(after)) => after.descriptors <= before.descriptors + REST_SLACK,
            _ => false,
        }
    }
}

/// What a run hands over.
pub(crate) struct Findings {
    pub(crate) every: f64,
    pub(crate) minutes: f64,
    pub(crate) machine: String,
    pub(crate) date: String,
    pub(crate) samples: Vec<Sample>,
    pub(crate) happened: Vec<Happened>,
    pub(crate) drained: Vec<f64>,
    pub(crate) rest: Vec<Rested>,
    pub(crate) counters: Vec<(String, f64)>,
    pub(crate) faults: Vec<String>,
}

/// A flow's row.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    connections: u64,
    answered: u64,
    failed: u64,
    asked_again: u64,
    p50: u32,
    p99: u32,
}

/// The description of a failed request.
#[derive(Debug, Serialize)]
struct FailureText {
    text: String,
    /// How late the soak's own timers were while it ran, at worst, milliseconds.
    late: u64,
}

/// Everything that was found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    date: String,
    machine: String,
    minutes: f64,
    every: f64,
    rows: Vec<Row>,
    kept_by_kill: u64,
    new_by_kill: u64,
    errors: Vec<FailureText>,
    error_count: u64,
    faults: Vec<String>,
    judgements: Vec<Judgement>,
    rest: Vec<Rested>,
    drained: Vec<f64>,
    counters: Vec<(String, f64)>,
    happened: Vec<Happened>,
    samples: Vec<Sample>,
    processes: Vec<Series>,
}

impl Report {
    /// Brings everything together and judges it.
    pub(crate) fn new(
        flow_log: &FlowLog,
        processes: &Processes,
        warm_up: Duration,
        findings: Findings,
    ) -> Self {
        let Findings { every, minutes, machine, date, samples, happened, drained, rest, counters, faults } =
            findings;
        let rows = flow_log.titles.iter().zip(flow_log.counts()).map(|(title, mut counts)| {
            counts.latencies.sort_unstable();
            Row {
                name: title.name,
                connections: counts.connections,
                answered: counts.answered,
                failed: counts.failed,
                asked_again: counts.asked_again,
                p50: quantile(&counts.latencies, 0.5),
                p99: quantile(&counts.latencies, 0.99),
            }
        });
        let failures = flow_log.failures();
        let describe = |failure: &crate::flow_log::Failure| {
            let since =
                |time: std::time::Instant| time.saturating_duration_since(flow_log.start).as_secs_f64();
            let name = flow_log.titles.get(failure.flow).map_or("", |title| title.name);
            let (asked, failed, error) = (since(failure.asked), since(failure.failed), &failure.error);
            let late = late_within(&samples, asked, failed);
            let text = format!(
                "{failed:.2} s: {name}: {error} (connection asked for at {asked:.2} s; timers late by {late} ms)"
            );
            FailureText { text, late }
        };
        let series = processes.all();
        let judge = |series: &Series| {
            let judgement = Judgement::of(series, warm_up.as_secs_f64(), series.name != OWN);
            let is_at_rest = rest.iter().any(|rested| rested.pid == Some(series.pid) && rested.flat());
            if is_at_rest { judgement.at_rest() } else { judgement }
        };
        Self {
            date,
            machine,
            minutes,
            every,
            rows: rows.collect(),
            kept_by_kill: failures.kept_by_kill,
            new_by_kill: failures.new_by_kill,
            errors: failures.errors.iter().map(describe).collect(),
            error_count: failures.count(),
            faults,
            judgements: series.iter().map(judge).collect(),
            rest,
            drained,
            counters,
            happened,
            samples,
            processes: series,
        }
    }

    /// What does not hold, a sentence each.
    fn broken(&self) -> Vec<String> {
        let mut broken = self.faults.clone();
        if self.error_count > 0 {
            let starved = self.errors.iter().filter(|error| error.late >= STARVED).count();
            broken.push(format!(
                "{} requests failed, {starved} of them while the soak's own timers were late by {STARVED} ms or more",
                self.error_count
            ));
        }
        if self.rows.iter().any(|row| row.answered == 0) {
            broken.push("a flow had no answer at all".to_owned());
        }
        let panics =
            self.counters.iter().filter(|(name, count)| name.starts_with("ambit_panics") && *count > 0.0);
        broken.extend(panics.map(|(name, count)| format!("{name}: {count}")));
        let grown = self.judgements.iter().filter(|judgement| !judgement.flat());
        broken.extend(grown.map(|grown| format!("{} (process {}) grew under load", grown.name, grown.pid)));
        if !self.judgements.iter().any(|judgement| judgement.memory.is_some()) {
            broken.push("no process lived long enough to judge its memory".to_owned());
        }
        let held = self.rest.iter().filter(|rested| !rested.flat());
        broken.extend(held.map(|held| format!("{} holds more descriptors at rest than before", held.name)));
        broken
    }

    /// Whether the soak showed what it is to show.
    pub(crate) fn holds(&self) -> bool {
        self.broken().is_empty()
    }

    /// The page.
    pub(crate) fn markdown(&self) -> String {
        let mut page = String::new();
        // Writing to a string can't fail.
        self.write(&mut page).ok();
        page
    }

    fn write(&self, page: &mut String) -> fmt::Result {
        writeln!(page, "# Soak\n")?;
        writeln!(
            page,
            "Written by `make soak`: two nodes under a mixed load for {} minutes, an event every {} s, certificates that\n\
             live for a minute.\n\n\
             Machine: {}. Date: {}.\n",
            self.minutes, self.every, self.machine, self.date
        )?;
        let broken = self.broken();
        if broken.is_empty() {
            writeln!(page, "**It holds:** no request failed, memory and descriptors stayed flat.\n")?;
        } else {
            writeln!(page, "**It does not hold:**\n")?;
            broken.iter().try_for_each(|sentence| writeln!(page, "- {sentence}"))?;
            writeln!(page)?;
        }
        self.write_load(page)?;
        self.write_events(page)?;
        self.write_processes(page)?;
        if !self.errors.is_empty() {
            writeln!(page, "\n## Errors\n\n```text")?;
            self.errors.iter().take(SHOWN).try_for_each(|error| writeln!(page, "{}", error.text))?;
            writeln!(page, "```")?;
        }
        Ok(())
    }

    fn write_load(&self, page: &mut String) -> fmt::Result {
        let answered: u64 = self.rows.iter().map(|row| row.answered).sum();
        let connections: u64 = self.rows.iter().map(|row| row.connections).sum();
        let mut seconds: Vec<u32> =
            self.samples.iter().flat_map(|sample| &sample.seconds).map(|second| second.answered).collect();
        seconds.sort_unstable();
        let late = self.samples.iter().map(|sample| sample.late).max().unwrap_or(0);
        writeln!(
            page,
            "{answered} requests were answered on {connections} connections, {} a second (fewest in a second: {}); {} failed.\n\
             Timers of the soak itself were late by at most {late} ms: that is what the machine did to it.\n\
             Killed proxies took {} requests on kept connections with them, and {} on new ones that they had accepted;\n\
             connections that were asked for after a kill were all to succeed.\n",
            quantile(&seconds, 0.5),
            seconds.first().unwrap_or(&0),
            self.error_count,
            self.kept_by_kill,
            self.new_by_kill
        )?;
        writeln!(page, "| flow | connections | answered | failed | asked again | p50, µs | p99, µs |")?;
        writeln!(page, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |")?;
        for Row { name, connections, answered, failed, asked_again, p50, p99 } in &self.rows {
            writeln!(
                page,
                "| {name} | {connections} | {answered} | {failed} | {asked_again} | {p50} | {p99} |"
            )?;
        }
        writeln!(
            page,
            "\n\"failed\" counts what killed proxies took with them too; \"asked again\" are DNS questions."
        )
    }

    fn write_events(&self, page: &mut String) -> fmt::Result {
        let mut kinds: BTreeMap<&str, Vec<&Happened>> = BTreeMap::new();
        for happened in &self.happened {
            kinds.entry(happened.event).or_default().push(happened);
        }
        writeln!(
            page,
            "\n## Events\n\n| event | times | took, s (median) | p99 until the next, ms (median, highest) |"
        )?;
        writeln!(page, "| --- | ---: | ---: | ---: |")?;
        for (event, all) in kinds {
            let took: Vec<f64> = all.iter().map(|happened| happened.seconds).collect();
            let p99: Vec<f64> = all.iter().map(|happened| f64::from(happened.p99) / 1000.0).collect();
            let highest = p99.iter().copied().fold(0.0, f64::max);
            let (times, took, p99) = (all.len(), median(&took), median(&p99));
            writeln!(page, "| {event} | {times} | {took:.1} | {p99:.1}, {highest:.1} |")?;
        }
        let longest = self.drained.iter().copied().fold(0.0, f64::max);
        writeln!(
            page,
            "\nProxies that were handed over from: {} ended by themselves, after at most {longest:.0} s.",
            self.drained.len()
        )
    }

    fn write_processes(&self, page: &mut String) -> fmt::Result {
        writeln!(
            page,
            "\n## Memory and descriptors\n\nUnder load: medians of the first and the last sixth of a process's life after its warm-up.\n\n\
             | process | lived, s | CPU, % of a core | anonymous memory, MiB | descriptors | threads, most |\n\
             | --- | ---: | ---: | ---: | ---: | ---: |"
        )?;
        for judgement in self.judgements.iter().filter(|judgement| judgement.descriptors.is_some()) {
            writeln!(
                page,
                "| {} ({}) | {:.0} | {:.1} | {} | {} | {} |",
                judgement.name,
                judgement.pid,
                judgement.lived,
                100.0 * judgement.cpu / judgement.lived.max(1.0),
                change(judgement.memory, 1024.0 * 1024.0),
                change(judgement.descriptors, 1.0),
                judgement.threads
            )?;
        }
        writeln!(
            page,
            "\nAt rest, before and after the load:\n\n| part | descriptors | threads |\n| --- | ---: | ---: |"
        )?;
        for Rested { name, before, after, .. } in &self.rest {
            let (Some(before), Some(after)) = (before, after) else {
                writeln!(page, "| {name} | gone | gone |")?;
                continue;
            };
            let (descriptors, threads) = (before.descriptors, before.threads);
            writeln!(
                page,
                "| {name} | {descriptors} → {} | {threads} → {} |",
                after.descriptors, after.threads
            )?;
        }
        writeln!(page, "\nCounters of the node proxies that ran at the end: ")?;
        let counters: Vec<String> =
            self.counters.iter().map(|(name, count)| format!("`{name}` {count}")).collect();
        writeln!(page, "{}.", counters.join("; "))
    }
}

/// How late the soak's own timers were while a request ran, at worst.
fn late_within(samples: &[Sample], from: f64, to: f64) -> u64 {
    // A sample covers the time before it.
    let first = samples.iter().position(|sample| sample.at >= from).unwrap_or(samples.len());
    let last = samples.iter().position(|sample| sample.at >= to).unwrap_or(samples.len());
    let within = samples.get(first..samples.len().min(last + 1)).unwrap_or_default();
    within.iter().map(|sample| sample.late).max().unwrap_or(0)
}

fn change(trend: Option<Trend>, unit: f64) -> String {
    match trend {
        None => "–".to_owned(),
        Some(Trend { first, last, flat, .. }) => {
            let grew = if flat { "" } else { " **grew**" };
            format!("{:.1} → {:.1}{grew}", first / unit, last / unit)
        }
    }
}
