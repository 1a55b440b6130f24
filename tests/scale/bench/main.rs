//! `ambit-bench-control`: the figures of docs/benchmarks-control.md: control plane, policies, directory, certificates.
//!
//! Called by `make bench-control`; writes Markdown and JSON. It starts `ambit-control` and `ambit-cluster`, which must have been built
//! with the same profile.

#![allow(missing_docs, reason = "a program; its modules document themselves")]

mod api_server;
mod certificates;
mod control;
mod directory;
mod policies;
mod program;
mod report;
mod subscriber;
mod tokens;
mod world;

use std::path::{Path, PathBuf};

use ambit_scale::machine;
use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use mimalloc::MiMalloc;
use serde::Serialize;

use crate::report::Section;

/// As in the programs.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// The figures of control plane, policies, directory and certificates on this machine.
#[derive(Parser)]
#[command(name = "ambit-bench-control")]
struct Arguments {
    /// Where the page of Markdown goes.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where the figures go as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Only these sections; may be repeated.
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// The control plane's program (default: beside this one).
    #[arg(long)]
    control: Option<PathBuf>,
    /// The program that starts the API server (default: beside this one).
    #[arg(long)]
    cluster: Option<PathBuf>,
}

impl Arguments {
    fn control(&self) -> Result<PathBuf> {
        program(self.control.as_deref(), "ambit-control")
    }

    fn cluster(&self) -> Result<PathBuf> {
        program(self.cluster.as_deref(), "ambit-cluster")
    }
}

/// A program that is given, or the one of this name beside this program.
fn program(given: Option<&Path>, name: &str) -> Result<PathBuf> {
    match given {
        Some(path) => Ok(path.to_owned()),
        None => Ok(std::env::current_exe().context("finding this program")?.with_file_name(name)),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// First, while this process holds nothing else: its memory is one of the figures.
    Directory,
    Policies,
    Certificates,
    /// Of objects in files.
    Control,
    /// Of objects in an API server; needs root and what `make cluster` needs.
    ApiServer,
}

/// Everything one run found out.
#[derive(Debug, Serialize)]
struct Report {
    date: String,
    machine: String,
    sections: Vec<Section>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut report =
        Report { date: machine::today(), machine: machine::description()?, sections: Vec::new() };
    for part in Part::value_variants() {
        if arguments.only.is_empty() || arguments.only.contains(part) {
            report.sections.push(measure(*part, &arguments)?);
        }
    }
    let page = report.markdown();
    print!("{page}");
    if let Some(out) = &arguments.out {
        std::fs::write(out, &page).with_context(|| format!("writing {}", out.display()))?;
    }
    if let Some(json) = &arguments.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(json, text).with_context(|| format!("writing {}", json.display()))?;
    }
    Ok(())
}

fn measure(part: Part, arguments: &Arguments) -> Result<Section> {
    match part {
        Part::Control => runtime()?.block_on(control::measure_directory(&arguments.control()?)),
        Part::ApiServer => {
            runtime()?.block_on(control::measure_api_server(&arguments.control()?, &arguments.cluster()?))
        }
        Part::Policies => policies::measure(),
        Part::Directory => directory::measure(),
        Part::Certificates => certificates::measure(),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting a runtime")
}

impl Report {
    fn markdown(&self) -> String {
        let mut page = String::from("# Benchmarks: control plane, policies, directory, certificates\n\n");
        page.push_str("Written by `make bench-control` (`ambit-bench-control`); the data path has [a page of its own](benchmarks.md).\n\n");
        page.push_str(&format!("Machine: {}. Date: {}.\n", self.machine, self.date));
        for section in &self.sections {
            page.push('\n');
            page.push_str(&section.markdown());
        }
        page
    }
}
