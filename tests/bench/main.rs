//! `ambit-bench`: the L4 figures of docs/benchmarks.md, taken for no mesh, a raw relay and Ambit in one run; `ambit-bench l7`: those
//! of the waypoint beside other proxies.
//!
//! Called by `make bench`. It brings up a local cluster of two nodes, runs the same clients and servers over each
//! path in alternation, and writes Markdown and JSON. `serve`, `drive` and `relay` are its own child processes.

#![allow(missing_docs, reason = "a program; its modules document themselves")]

mod bed;
mod crowd;
mod goals;
mod l7;
mod load;
mod relay;
mod report;

use std::net::SocketAddr;
use std::path::PathBuf;

use ambit_scale::machine;
use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

use crate::bed::Bed;
use crate::load::Work;
use crate::report::{Order, Path, Report, Row, Samples};

/// The L4 figures of this machine.
#[derive(Parser)]
#[command(name = "ambit-bench")]
struct Arguments {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    run: Run,
}

#[derive(Args)]
struct Run {
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
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Only rows whose title contains this.
    #[arg(long)]
    only: Option<String>,
    /// Idle connections held at once; 0 leaves that part out.
    #[arg(long, default_value_t = 100_000)]
    crowd: usize,
    /// Seconds of new connections without pause; 0 leaves that part out.
    #[arg(long, default_value_t = 60.0)]
    storm_seconds: f64,
    /// Seconds of 200 requests a second, each round; 0 leaves that part out.
    #[arg(long, default_value_t = 5.0)]
    steady_seconds: f64,
    /// Small connections beside a bulk stream; 0 leaves that part out.
    #[arg(long, default_value_t = 100)]
    beside: usize,
}

#[derive(Subcommand)]
enum Part {
    /// A server for every kind of work.
    Serve {
        #[arg(long)]
        listen: SocketAddr,
        /// How many ports from that one on.
        #[arg(long)]
        ports: u16,
    },
    /// A client that holds idle connections until it is ended.
    Hold {
        #[arg(long)]
        server: SocketAddr,
        #[arg(long)]
        connections: usize,
    },
    /// A client for one kind of work; prints its outcome as JSON.
    Drive(load::Drive),
    /// The figures of the waypoint.
    L7(l7::Run),
    /// A server for HTTP/1.1, HTTP/2 and gRPC.
    ServeL7 {
        #[arg(long)]
        listen: SocketAddr,
    },
    /// A client for HTTP/1.1, HTTP/2 or gRPC; prints its outcome as JSON.
    DriveL7(l7::load::Drive),
    /// One half of the raw relay.
    Relay {
        #[arg(long, value_enum)]
        side: relay::Side,
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        to: SocketAddr,
        /// Where the relay's certificate and key are.
        #[arg(long)]
        identity: PathBuf,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        match arguments.part {
            Some(Part::Serve { listen, ports }) => load::serve(listen, ports).await,
            Some(Part::Hold { server, connections }) => crowd::run(server, connections).await,
            Some(Part::Drive(drive)) => {
                println!("{}", serde_json::to_string(&load::drive(drive).await?)?);
                Ok(())
            }
            Some(Part::L7(run)) => l7::measure(&run).await,
            Some(Part::ServeL7 { listen }) => l7::load::serve(listen).await,
            Some(Part::DriveL7(drive)) => {
                println!("{}", serde_json::to_string(&l7::load::drive(drive).await?)?);
                Ok(())
            }
            Some(Part::Relay { side, listen, to, identity }) => {
                relay::run(side, listen, to, &relay::Identity::in_dir(&identity)).await
            }
            None => measure(&arguments.run).await,
        }
    })
}

/// The rows of the L4 table.
fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for same_node in [false, true] {
        rows.push(Row::new(Work::Bulk, same_node, 1));
        rows.push(Row::new(Work::Bulk, same_node, 8));
        rows.push(Row::new(Work::RoundTrip, same_node, 1));
        rows.push(Row::new(Work::Http, same_node, 32));
        rows.push(Row::new(Work::Connect, same_node, 8));
    }
    rows
}

async fn measure(run: &Run) -> Result<()> {
    let rows: Vec<Row> = rows()
        .into_iter()
        .filter(|row| run.only.as_ref().is_none_or(|only| row.title().contains(only.as_str())))
        .collect();
    let bed = Bed::start().await.context("bringing the cluster up")?;
    let outcome = measure_on(&bed, run, &rows).await;
    bed.stop().await?;
    let mut report = outcome?;
    if run.crowd > 0 {
        eprintln!("{} idle connections", run.crowd);
        report.crowd = Some(crowd::measure(run.crowd).await?);
    }
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

async fn measure_on(bed: &Bed, run: &Run, rows: &[Row]) -> Result<Report> {
    let idle_resident = bed.at_rest().await?;
    let mut samples = Samples::new();
    for round in 1..=run.rounds {
        for row in rows {
            for path in Path::ALL {
                eprintln!("round {round}: {}, {path:?}", row.title());
                let sample = bed.sample(row, path, run.seconds).await;
                let sample = sample.with_context(|| format!("{} over {path:?}", row.title()))?;
                samples.entry(*row).or_default().entry(path).or_default().push(sample);
            }
        }
    }
    let machine = machine::description().context("describing this machine")?;
    let mut report = Report::new(machine::today(), machine, idle_resident, samples);
    for round in (1..=run.rounds).filter(|_| run.beside > 0) {
        for (order, path) in Order::ALL.into_iter().flat_map(|order| Path::ALL.map(|path| (order, path))) {
            eprintln!("round {round}: {} small connections beside bulk, {path:?}, {order:?}", run.beside);
            report.beside.push(bed.beside(path, order, run.beside, run.seconds).await?);
        }
    }
    for round in (1..=run.rounds).filter(|_| run.steady_seconds > 0.0) {
        for path in Path::ALL {
            eprintln!("round {round}: steady load, {path:?}");
            report.steady.push(bed.steady(path, run.steady_seconds).await?);
        }
    }
    if run.storm_seconds > 0.0 {
        eprintln!("new connections for {} s", run.storm_seconds);
        report.storm = Some(bed.storm(run.storm_seconds).await?);
    }
    Ok(report)
}
