//! The L7 figures: Ambit's waypoint beside Envoy, HAProxy and nginx with the same task, in one run.

mod bed;
pub(crate) mod load;
mod report;
mod rivals;

use std::path::PathBuf;

use ambit_scale::machine;
use anyhow::{Context, Result};
use clap::Args;

use self::bed::Bed;
use self::load::Protocol;
use self::report::{Path, Report, Row, RowReport, Samples};

/// Numbers of routes that are measured.
const ROUTES: [usize; 4] = [1, 100, 5_000, 10_000];
/// Numbers of routes at which a change is timed.
const CHANGED: [usize; 2] = [1, 5_000];
/// Changes that are timed, each.
const CHANGES: usize = 5;
/// Milliseconds between two requests of each of 64 connections: 2,000 a second.
const PACE_MS: u32 = 32;

/// What is measured, and where it is written.
#[derive(Args)]
pub(crate) struct Run {
    /// Where the page of Markdown goes.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where the samples go.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Rounds; each runs every row over every path once.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds each measurement lasts.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// No more routes than this.
    #[arg(long, default_value_t = 10_000)]
    max_routes: usize,
    /// Only rows whose title contains this.
    #[arg(long)]
    only: Option<String>,
    /// Only paths whose title contains this.
    #[arg(long)]
    over: Option<String>,
    /// A setting of the waypoints as NAME=VALUE, to see what it costs.
    #[arg(long, value_parser = setting)]
    set: Vec<(String, String)>,
}

impl Run {
    fn wants(&self, row: &Row, path: Path) -> bool {
        let contains = |title: &str, wanted: &Option<String>| {
            wanted.as_ref().is_none_or(|wanted| title.contains(wanted.as_str()))
        };
        contains(&row.title(), &self.only) && contains(path.title(), &self.over)
    }
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("not NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// The loads at a number of routes.
fn rows(routes: usize) -> Vec<Row> {
    let plain = Row { routes, protocol: Protocol::Http1, connections: 64, streams: 1, every_ms: 0 };
    let shared = Row { connections: 8, streams: 8, ..plain };
    match routes {
        1 => vec![
            plain,
            Row { every_ms: PACE_MS, ..plain },
            Row { protocol: Protocol::Http2, ..shared },
            Row { protocol: Protocol::Grpc, ..shared },
        ],
        // Its memory is what counts.
        5_000 => Vec::new(),
        _ => vec![plain],
    }
}

/// Runs everything and writes the report.
///
/// # Errors
/// When a program does not start, or a request fails.
pub(crate) async fn measure(run: &Run) -> Result<()> {
    let mut bed = Bed::start(&run.set).await.context("bringing the cluster up")?;
    let outcome = measure_on(&mut bed, run).await;
    bed.stop().await;
    let report = outcome?;
    let page = report.markdown();
    print!("{page}");
    if let Some(out) = &run.out {
        std::fs::write(out, &page).with_context(|| format!("writing {}", out.display()))?;
    }
    if let Some(json) = &run.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(json, text).with_context(|| format!("writing {}", json.display()))?;
    }
    Ok(())
}

async fn measure_on(bed: &mut Bed, run: &Run) -> Result<Report> {
    let (mut samples, mut memory, mut changes) = (Samples::new(), Vec::new(), Vec::new());
    for routes in ROUTES.into_iter().filter(|routes| *routes <= run.max_routes) {
        eprintln!("{routes} routes");
        bed.set_routes(routes).await?;
        for round in 1..=run.rounds {
            let of_row = |row: Row| bed.paths().into_iter().map(move |path| (row, path));
            let wanted = rows(routes).into_iter().flat_map(of_row);
            for (row, path) in wanted.filter(|(row, path)| run.wants(row, *path)) {
                eprintln!("round {round}: {row:?} over {}", path.title());
                let sample = bed.sample(&row, path, run.seconds).await;
                let sample = sample.with_context(|| format!("{row:?} over {}", path.title()))?;
                samples.entry(row).or_default().entry(path).or_default().push(sample);
            }
        }
        for path in bed.paths().into_iter().filter(|path| !matches!(path, Path::Direct | Path::Mesh)) {
            if run.over.as_ref().is_some_and(|over| !path.title().contains(over.as_str())) {
                continue;
            }
            memory.push((routes, path, bed.resident(path).await?));
            let changes_live = match path {
                Path::Rival(rival) => rival.can_change(),
                Path::Direct | Path::Gateway | Path::Waypoint | Path::Mesh => true,
            };
            if CHANGED.contains(&routes) && changes_live {
                let mut times = Vec::new();
                for _ in 0..CHANGES {
                    times.push(bed.change(path).await?);
                }
                changes.push((routes, path, times));
            }
        }
    }
    Ok(Report {
        date: machine::today(),
        machine: machine::description().context("describing this machine")?,
        profile: profile()?,
        rows: RowReport::all(samples),
        memory,
        changes,
    })
}

/// The profile that this program, and those beside it, were built with: the name of their directory.
fn profile() -> Result<String> {
    let program = std::env::current_exe().context("finding this program")?;
    let directory = program.parent().and_then(std::path::Path::file_name);
    Ok(directory.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default())
}
