//! The L7 figures as Markdown and JSON, beside what is asked of them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::load::Protocol;
use super::rivals::Rival;
use crate::goals::Verdict;
use crate::load::Outcome;
use crate::report::Spread;

/// CPU of a plain request as a share of Envoy's, at most.
const OF_ENVOY: f64 = 0.25;
/// CPU of a plain request as a multiple of nginx's, at most.
const OF_NGINX: f64 = 1.2;
/// Routes whose memory has a limit, and the limit in MB.
const MEMORY: (usize, f64) = (5_000, 40.0);
/// Milliseconds from a route's change to the first answer by it, at most.
const CHANGE: f64 = 30.0;

/// What lies between client and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Path {
    /// Nothing.
    Direct,
    /// A gateway that takes plain connections and sends to servers outside the mesh: the task of the other proxies.
    Gateway,
    /// The client's ztunnel and a waypoint that sends to servers outside the mesh.
    Waypoint,
    /// The client's ztunnel, a waypoint and the server's ztunnel.
    Mesh,
    /// Another proxy, without TLS.
    #[serde(untagged)]
    Rival(Rival),
}

impl Path {
    /// What is written about it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Direct => "no proxy",
            Self::Gateway => "Ambit, gateway, plain in and out",
            Self::Waypoint => "Ambit, waypoint, HBONE in, plain out",
            Self::Mesh => "Ambit, ztunnel → waypoint → ztunnel",
            Self::Rival(rival) => rival.title(),
        }
    }

    /// The program alone.
    fn short(self) -> &'static str {
        match self {
            Self::Gateway => "Ambit, gateway",
            Self::Waypoint => "Ambit, waypoint",
            Self::Direct | Self::Mesh | Self::Rival(_) => self.title(),
        }
    }
}

/// One kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Row {
    /// How many routes there are; the last one is asked for.
    pub(crate) routes: usize,
    /// What the client speaks.
    pub(crate) protocol: Protocol,
    /// Connections at once.
    pub(crate) connections: usize,
    /// Requests at once on each.
    pub(crate) streams: usize,
    /// Milliseconds between two requests of one of them; 0: none.
    pub(crate) every_ms: u32,
}

impl Row {
    pub(crate) fn title(&self) -> String {
        let protocol = match self.protocol {
            Protocol::Http1 => "HTTP/1.1",
            Protocol::Http2 => "HTTP/2",
            Protocol::Grpc => "gRPC",
        };
        let pace = match 1000 * (self.connections * self.streams) as u32 / self.every_ms.max(1) {
            _ if self.every_ms == 0 => String::new(),
            rate => format!(", {rate} a second"),
        };
        let routes = if self.routes == 1 { "1 route".to_owned() } else { format!("{} routes", self.routes) };
        format!("{protocol}, {routes}{pace}")
    }
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Sample {
    /// What the client saw.
    #[serde(flatten)]
    pub(crate) outcome: Outcome,
    /// CPU seconds of the proxy itself.
    pub(crate) cpu_seconds: f64,
    /// CPU seconds of the node proxies beside it.
    pub(crate) node_cpu_seconds: f64,
}

impl Sample {
    /// Microseconds of the proxy's CPU for a request.
    fn cpu_us(&self) -> f64 {
        self.cpu_seconds * 1e6 / self.outcome.operations as f64
    }

    fn node_cpu_us(&self) -> f64 {
        self.node_cpu_seconds * 1e6 / self.outcome.operations as f64
    }
}

/// Everything that one run found out.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    /// The day of the run, UTC.
    pub(crate) date: String,
    /// Processor, cores and kernel.
    pub(crate) machine: String,
    /// The profile that our programs were built with.
    pub(crate) profile: String,
    /// Samples by row and path.
    pub(crate) rows: Vec<RowReport>,
    /// Resident bytes by number of routes and path.
    pub(crate) memory: Vec<(usize, Path, u64)>,
    /// Milliseconds of a change by number of routes and path, each try.
    pub(crate) changes: Vec<(usize, Path, Vec<f64>)>,
}

/// One row with its samples.
#[derive(Debug, Serialize)]
pub(crate) struct RowReport {
    /// The row.
    pub(crate) row: Row,
    /// Samples by path.
    pub(crate) paths: Vec<(Path, Vec<Sample>)>,
}

/// Samples by row and path.
pub(crate) type Samples = BTreeMap<Row, BTreeMap<Path, Vec<Sample>>>;

impl RowReport {
    /// The rows of a run.
    pub(crate) fn all(samples: Samples) -> Vec<Self> {
        let rows = samples.into_iter();
        rows.map(|(row, paths)| Self { row, paths: paths.into_iter().collect() }).collect()
    }

    fn cpu(&self, path: Path) -> Option<f64> {
        let samples = &self.paths.iter().find(|(of, _)| *of == path)?.1;
        Some(Spread::of_all(samples, Sample::cpu_us).median)
    }
}

impl Report {
    /// The report as a page of Markdown.
    pub(crate) fn markdown(&self) -> String {
        let mut page = String::new();
        page.push_str("# Benchmarks of the waypoint\n\n");
        page.push_str("Written by `make bench`. A client sends requests to a server that answers 64 bytes, through one proxy with two\n");
        page.push_str("workers: a route by path prefix with a 90 to 10 split over two servers, retries on 503, kept connections to\n");
        page.push_str("the servers, metrics and an access log. HTTP/1.1: 64 connections; HTTP/2 and gRPC: 8 connections with 8 requests at once;\n");
        page.push_str("one request after the other, unless a rate is given. CPU is that of the proxy, user and system; the client, the servers\n");
        page.push_str("and the proxies share the machine. The gateway has the task of Envoy, HAProxy and nginx: plain connections on both sides. The waypoint\n");
        page.push_str("terminates mutual TLS with HTTP/2 CONNECT at its client's side and, the whole way, at its servers' side too. Medians of alternating runs,\n");
        page.push_str("lowest to highest in brackets.\n\n");
        let _ = writeln!(
            page,
            "Machine: {}. Date: {}. Our programs: profile `{}`.\n",
            self.machine, self.date, self.profile
        );
        self.write_goals(&mut page);
        self.write_rows(&mut page);
        self.write_memory(&mut page);
        self.write_changes(&mut page);
        page
    }

    fn write_goals(&self, page: &mut String) {
        page.push_str(
            "## Against the goals\n\n| what | measured | goal | met |\n| --- | --- | --- | --- |\n",
        );
        for verdict in self.verdicts() {
            let _ = writeln!(page, "{}", verdict.markdown());
        }
    }

    /// What is asked for and was measured.
    fn verdicts(&self) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        let is_plain = |row: &Row| row.routes == 1 && row.protocol == Protocol::Http1 && row.every_ms == 0;
        if let Some(row) = self.rows.iter().find(|report| is_plain(&report.row)) {
            for (own, title) in [(Path::Gateway, "gateway"), (Path::Waypoint, "waypoint, with HBONE")] {
                for (rival, goal) in [(Rival::Envoy, OF_ENVOY), (Rival::Nginx, OF_NGINX)] {
                    if let (Some(own), Some(other)) = (row.cpu(own), row.cpu(Path::Rival(rival))) {
                        let what = format!("{}, {title}: CPU / {}", row.row.title(), rival.title());
                        verdicts.push(Verdict::at_most(what, own / other, goal, ""));
                    }
                }
            }
        }
        let is_own = |path: Path| matches!(path, Path::Gateway | Path::Waypoint);
        for (routes, path, bytes) in &self.memory {
            if *routes == MEMORY.0 && is_own(*path) {
                let what = format!("memory with {} routes, {}", MEMORY.0, path.short());
                verdicts.push(Verdict::at_most(what, *bytes as f64 / 1e6, MEMORY.1, " MB"));
            }
        }
        for (routes, path, times) in self.changes.iter().filter(|(_, path, _)| is_own(*path)) {
            let what = format!("a route's change reaches the data path, {routes} in all, {}", path.short());
            verdicts.push(Verdict::at_most(what, Spread::of_all(times, |it| *it).median, CHANGE, " ms"));
        }
        verdicts
    }

    fn write_rows(&self, page: &mut String) {
        page.push_str("\n## Requests\n\nThousands a second; microseconds of CPU a request; latencies in microseconds.\n\n");
        page.push_str("| load | proxy | rate | CPU a request | CPU of both ztunnels | p50 | p99 | p99.9 |\n");
        page.push_str("| --- | --- | --- | --- | --- | --- | --- | --- |\n");
        for report in &self.rows {
            for (path, samples) in &report.paths {
                let show = |digits, figure: fn(&Sample) -> f64| Spread::of_all(samples, figure).show(digits);
                let rate = show(1, |it| it.outcome.operations as f64 / it.outcome.seconds / 1e3);
                let cpu = if *path == Path::Direct { String::new() } else { show(1, Sample::cpu_us) };
                let nodes = match path {
                    Path::Mesh | Path::Waypoint => show(1, Sample::node_cpu_us),
                    Path::Direct | Path::Gateway | Path::Rival(_) => String::new(),
                };
                let _ = writeln!(
                    page,
                    "| {} | {} | {rate} | {cpu} | {nodes} | {} | {} | {} |",
                    report.row.title(),
                    path.title(),
                    show(0, |it| it.outcome.p50_us),
                    show(0, |it| it.outcome.p99_us),
                    show(0, |it| it.outcome.p999_us),
                );
            }
        }
    }

    fn write_memory(&self, page: &mut String) {
        page.push_str("\n## Memory\n\nResident MB after the load with that many routes.\n\n");
        page.push_str("| routes | proxy | MB |\n| --- | --- | --- |\n");
        for (routes, path, bytes) in &self.memory {
            let _ = writeln!(page, "| {routes} | {} | {:.1} |", path.short(), *bytes as f64 / 1e6);
        }
    }

    fn write_changes(&self, page: &mut String) {
        page.push_str("\n## A route's change\n\nMilliseconds from the moment it is written to the first answer by it, looked for every millisecond; half a second after the change before. Ambit: an HTTPRoute\n");
        page.push_str("in the control plane's directory; Envoy: its file of routes, by its file discovery; nginx: its settings and SIGHUP.\n\n");
        page.push_str("| routes | proxy | ms |\n| --- | --- | --- |\n");
        for (routes, path, times) in &self.changes {
            let spread = Spread::of_all(times, |it| *it);
            let _ = writeln!(page, "| {routes} | {} | {} |", path.title(), spread.show(0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(cpu_seconds: f64) -> Sample {
        let outcome = Outcome { operations: 1_000_000, seconds: 10.0, ..Outcome::default() };
        Sample { outcome, cpu_seconds, node_cpu_seconds: 1.0 }
    }

    #[test]
    fn goals_are_ratios_of_medians_in_one_run() {
        let row = Row { routes: 1, protocol: Protocol::Http1, connections: 64, streams: 1, every_ms: 0 };
        let paths = BTreeMap::from([
            (Path::Gateway, vec![sample(20.0), sample(19.0), sample(30.0)]),
            (Path::Waypoint, vec![sample(40.0)]),
            (Path::Rival(Rival::Envoy), vec![sample(80.0)]),
            (Path::Rival(Rival::Nginx), vec![sample(10.0)]),
        ]);
        let report = Report {
            date: "2026-01-01".into(),
            machine: "a machine".into(),
            profile: "release".into(),
            rows: RowReport::all(Samples::from([(row, paths)])),
            memory: vec![(5_000, Path::Waypoint, 39_000_000)],
            changes: vec![(1, Path::Waypoint, vec![31.0, 20.0, 40.0])],
        };
        let page = report.markdown();
        for line in [
            "| HTTP/1.1, 1 route, gateway: CPU / Envoy | 0.25 | ≤ 0.25 | yes |",
            "| HTTP/1.1, 1 route, gateway: CPU / nginx | 2.00 | ≤ 1.2 | no |",
            "| HTTP/1.1, 1 route, waypoint, with HBONE: CPU / Envoy | 0.50 | ≤ 0.25 | no |",
            "| memory with 5000 routes, Ambit, waypoint | 39.00 MB | ≤ 40 MB | yes |",
        ] {
            assert!(page.contains(line), "{line}\n{page}");
        }
        assert!(page.contains("| 31.00 ms | ≤ 30 ms | no |"), "{page}");
    }
}
