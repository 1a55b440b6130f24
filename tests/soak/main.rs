//! `ambit-soak`: a mixed load for half an hour while parts of the mesh are restarted, replaced and rotated.
//!
//! Called by `make soak`. It brings up a local cluster of two nodes, runs an event every 30 s, samples
//! memory and descriptors of every process, and ends with an exit code that says whether no request failed and
//! nothing grew. Requests on connections through a proxy that was killed are the one exception, counted apart.

#![allow(missing_docs, reason = "a program; its modules document themselves")]

mod bed;
mod events;
mod flow_log;
mod flows;
mod processes;
mod report;
mod roots;
mod verdict;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use parking_lot::Mutex;
use tokio::task::JoinSet;

use crate::bed::Bed;
use crate::events::Stage;
use crate::flow_log::{FlowLog, quantile};
use crate::flows::Flows;
use crate::processes::Processes;
use crate::report::{Happened, Report, Rest, Sample};

/// The whole soak.
#[derive(Parser)]
#[command(name = "ambit-soak")]
struct Arguments {
    /// How long the load and the events last.
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Seconds from one event to the next.
    #[arg(long, default_value_t = 30.0)]
    every: f64,
    /// Where the page of Markdown goes.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where all samples go.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Directory for the output of the mesh's programs, access logs included; it is not kept otherwise.
    #[arg(long)]
    logs: Option<PathBuf>,
}

/// Time between samples.
const SAMPLE: Duration = Duration::from_secs(5);
/// How often the soak looks how late its timers are.
const BEAT: Duration = Duration::from_millis(100);
/// The first second of a load is one of beginnings.
const SECOND: Duration = Duration::from_secs(1);
/// Load before the first look at the mesh at rest, so that what is made on first use is there.
const REHEARSAL: Duration = Duration::from_secs(20);
/// How long the mesh may take to come to rest.
const REST: Duration = Duration::from_secs(90);
/// Seconds without fewer descriptors after which the mesh is at rest: unused tunnels are closed after 15 s, and
/// pods that left are served for 10 s.
const STEADY: usize = 25;
/// The most of a process's life that counts as its warm-up.
const WARM_UP: Duration = Duration::from_secs(120);
/// Lines of a program's output that a failure shows.
const TAIL: usize = 40;

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let report = soak(&arguments).await?;
        let page = report.markdown();
        print!("{page}");
        if let Some(out) = &arguments.out {
            std::fs::write(out, &page).with_context(|| format!("writing {}", out.display()))?;
        }
        if let Some(json) = &arguments.json {
            let text = serde_json::to_string(&report)?;
            std::fs::write(json, text).with_context(|| format!("writing {}", json.display()))?;
        }
        Ok(if report.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

async fn soak(arguments: &Arguments) -> Result<Report> {
    let bed = Arc::new(Bed::start(arguments.logs.as_deref()).await.context("bringing the cluster up")?);
    let flows = Arc::new(Flows::new(&bed)?);
    let flow_log = Arc::new(FlowLog::new(flows.titles()));
    let mut run = Run {
        stage: Stage::new(&bed, &flows, &flow_log),
        processes: Processes::since(flow_log.start),
        samples: Mutex::default(),
        happened: Vec::new(),
        faults: Vec::new(),
        drained: Vec::new(),
        bed,
        flows,
        flow_log,
    };
    eprintln!("rehearsal, then a look at the mesh at rest");
    let rehearsal = run.flows.run(&run.flow_log);
    tokio::time::sleep(REHEARSAL).await;
    rehearsal.stop().await?;
    let before = run.rest(None).await;
    let minutes = Duration::from_secs_f64(arguments.minutes * 60.0);
    run.under_load(minutes, Duration::from_secs_f64(arguments.every)).await?;
    eprintln!("the load has ended; waiting for rest");
    let after = run.rest(Some(&before)).await;
    run.faults.extend(run.bed.cluster.program_troubles());
    let warm_up = WARM_UP.min(minutes / 6);
    let counters = run.counters().await;
    let report = Report::new(
        &run.flow_log,
        &run.processes,
        warm_up,
        report::Findings {
            every: arguments.every,
            minutes: arguments.minutes,
            machine: ambit_scale::machine::description()?,
            date: ambit_scale::machine::today(),
            samples: run.samples.into_inner(),
            happened: run.happened,
            drained: run.drained,
            rest: before.into_iter().zip(after).map(|(before, after)| before.until(&after)).collect(),
            counters,
            faults: run.faults,
        },
    );
    if !report.holds() {
        for (name, lines) in run.bed.cluster.mesh_logs() {
            eprintln!("== {name}");
            lines.iter().skip(lines.len().saturating_sub(TAIL)).for_each(|line| eprintln!("{line}"));
        }
    }
    drop((run.stage, run.flows));
    if let Some(bed) = Arc::into_inner(run.bed) {
        bed.cluster.shutdown().await;
    }
    Ok(report)
}

/// A run in progress.
struct Run {
    bed: Arc<Bed>,
    flows: Arc<Flows>,
    flow_log: Arc<FlowLog>,
    stage: Stage,
    processes: Processes,
    samples: Mutex<Vec<Sample>>,
    happened: Vec<Happened>,
    drained: Vec<f64>,
    /// What went wrong besides requests.
    faults: Vec<String>,
}

impl Run {
    /// The load with its events.
    async fn under_load(&mut self, total: Duration, every: Duration) -> Result<()> {
        let load = self.flows.run(&self.flow_log);
        let mut beating = JoinSet::new();
        beating.spawn(beat(Arc::clone(&self.flow_log)));
        let (start, mut nth) = (Instant::now(), 0);
        let mut mark = self.flow_log.mark();
        let mut sampled = tokio::time::interval_at((start + SAMPLE + SECOND).into(), SAMPLE);
        let mut last: Option<(usize, Vec<usize>)> = None;
        while start.elapsed() < total {
            sampled.tick().await;
            self.sample(&mut mark);
            let due = start.elapsed() >= every * u32::try_from(nth + 1).unwrap_or(u32::MAX);
            // Whatever is begun is to be over, and looked at, before the end.
            if !due || total.saturating_sub(start.elapsed()) < every / 2 {
                continue;
            }
            self.close_event(last.take());
            let began = self.flow_log.mark();
            self.event(nth, &mut sampled, &mut mark).await;
            last = Some((self.happened.len() - 1, began));
            nth += 1;
        }
        self.close_event(last);
        load.stop().await?;
        self.stage.restore().await
    }

    /// Lets one event happen, sampling on.
    async fn event(&mut self, nth: usize, sampled: &mut tokio::time::Interval, mark: &mut Vec<usize>) {
        let (at, began) = (self.flow_log.start.elapsed().as_secs_f64(), Instant::now());
        let Self { stage, bed, flow_log, processes, samples, .. } = self;
        // Who drains is known from before the event; one that it makes drain is sampled from the next on.
        let draining = stage.draining();
        let mut playing = Box::pin(stage.play(nth));
        let (event, outcome) = loop {
            tokio::select! {
                ended = &mut playing => break ended,
                _ = sampled.tick() => {
                    sample_processes(bed, processes, &draining);
                    samples.lock().push(sample(flow_log, mark));
                }
            }
        };
        drop(playing);
        let seconds = began.elapsed().as_secs_f64();
        eprintln!("{at:>6.0} s: {} ({seconds:.1} s)", event.title());
        if let Err(error) = outcome {
            eprintln!("{at:>6.0} s: FAILED: {error:#}");
            self.faults.push(format!("{error:#}, {at:.0} s after the start"));
        }
        self.happened.push(Happened { at, event: event.title(), seconds, p99: 0 });
        self.reap().await;
    }

    /// Writes down the latencies since an event began, when the next begins.
    fn close_event(&mut self, last: Option<(usize, Vec<usize>)>) {
        let Some((index, mark)) = last else { return };
        if let Some(happened) = self.happened.get_mut(index) {
            happened.p99 = quantile(&self.flow_log.since(&mark), 0.99);
        }
    }

    fn sample(&self, mark: &mut Vec<usize>) {
        sample_processes(&self.bed, &self.processes, &self.stage.draining());
        let sample = sample(&self.flow_log, mark);
        if self.samples.lock().len().is_multiple_of(12) {
            let errors = self.flow_log.failures().count();
            eprintln!("{:>6.0} s: {sample}, {errors} errors", sample.at);
        }
        self.samples.lock().push(sample);
    }

    /// The least that each part holds without load. After it was seen before, waits until that is no more than then.
    ///
    /// The least, because housekeeping such as the renewal of a certificate takes descriptors for moments.
    async fn rest(&mut self, before: Option<&[Rest]>) -> Vec<Rest> {
        let deadline = Instant::now() + REST;
        let mut least = self.at_rest();
        let mut steady = 0;
        loop {
            self.reap().await;
            let now: Vec<Rest> =
                least.iter().zip(self.at_rest()).map(|(least, now)| least.least(now)).collect();
            steady = if now == least { steady + 1 } else { 0 };
            least = now;
            let flat =
                |before: &[Rest]| before.iter().zip(&least).all(|(one, other)| one.until(other).flat());
            if steady >= STEADY || before.is_some_and(flat) || Instant::now() > deadline {
                return least;
            }
            tokio::time::sleep(SECOND).await;
        }
    }

    /// Clears away what has drained.
    async fn reap(&mut self) {
        match self.stage.reap().await {
            Ok(took) => self.drained.extend(took.iter().map(Duration::as_secs_f64)),
            Err(error) => self.faults.push(format!("{error:#}")),
        }
    }

    fn at_rest(&self) -> Vec<Rest> {
        roles(&self.bed).into_iter().map(|(name, pid)| Rest::now(name, pid)).collect()
    }

    /// Counters of the node proxies that say what the mesh went through, summed over those that run now.
    async fn counters(&self) -> Vec<(String, f64)> {
        let mut counters = Vec::new();
        for node in 0..self.bed.cluster.nodes() {
            let Ok(ztunnel) = self.bed.ztunnel(node) else { continue };
            let Ok(metrics) = ztunnel.metrics().await else { continue };
            for name in report::COUNTERS {
                counters.push((format!("{name}, node {}", node + 1), metrics.sum(name, &[])));
            }
        }
        counters
    }
}

/// Sees how late its own timers are: what a busy machine does to this process, it does to the mesh as well.
async fn beat(flow_log: Arc<FlowLog>) {
    loop {
        let due = tokio::time::Instant::now() + BEAT;
        tokio::time::sleep_until(due).await;
        flow_log.note_late(due.elapsed());
    }
}

fn sample(flow_log: &FlowLog, mark: &mut Vec<usize>) -> Sample {
    let latencies = flow_log.since(mark);
    *mark = flow_log.mark();
    let seconds = flow_log.seconds();
    let recent = seconds.get(seconds.len().saturating_sub(SAMPLE.as_secs() as usize)..).unwrap_or_default();
    Sample {
        at: flow_log.start.elapsed().as_secs_f64(),
        seconds: recent.to_vec(),
        p50: quantile(&latencies, 0.5),
        p99: quantile(&latencies, 0.99),
        late: flow_log.take_late(),
    }
}

/// The mesh's processes and this one, which also runs the node agents, by their parts.
fn roles(bed: &Bed) -> Vec<(String, Option<u32>)> {
    let mut roles: Vec<(String, Option<u32>)> = (0..bed.cluster.nodes())
        .map(|node| (format!("ztunnel of node {}", node + 1), bed.ztunnel(node).ok().and_then(|z| z.pid())))
        .collect();
    roles.push(("ambit-control".to_owned(), bed.cluster.control().ok().and_then(|control| control.pid())));
    roles.push((report::OWN.to_owned(), Some(std::process::id())));
    roles
}

fn sample_processes(bed: &Bed, processes: &Processes, draining: &[(usize, u32)]) {
    for (name, pid) in roles(bed) {
        if let Some(pid) = pid {
            processes.sample(&name, pid);
        }
    }
    for (node, pid) in draining {
        processes.sample(&format!("ztunnel of node {}, draining", node + 1), *pid);
    }
}
