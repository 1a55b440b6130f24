//! `ambit authz`: policies from the traffic that proxies observed.
//!
//! `suggest` writes the policies that would allow just what was seen; `diff` says which of it given policies would decide differently.
//! What was observed comes from the proxies ([`observed`]), what it meets from the objects of the mesh ([`world`]).

mod diff;
#[cfg(test)]
mod fixtures;
mod observed;
mod rules;
mod suggest;
mod traffic;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::ensure;
use clap::{Args, Subcommand};

use crate::analyze;
use crate::cluster::block_on;
use crate::mesh;
use crate::output::{Format, Wait, emit, print};

use observed::Observed;
use world::World;

/// Commands of `ambit authz`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Writes AuthorizationPolicies that allow what was observed in a namespace, and nothing else.
    Suggest(Suggest),
    /// Shows which observed connections and requests given policies would decide differently.
    Diff(Diff),
}

/// Options of `ambit authz suggest`.
#[derive(Debug, Args)]
pub(crate) struct Suggest {
    /// The namespace whose workloads and services are to be protected.
    namespace: String,
    /// Write policies that are enforced. Without it they are dry runs: proxies only count and log what they would decide.
    #[arg(long)]
    enforce: bool,
    /// Only what was seen within this time, as 30m or 24h.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = crate::tap::duration)]
    since: Duration,
    #[command(flatten)]
    mesh: mesh::Selection,
}

/// Options of `ambit authz diff`.
#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// Files or directories with the policies to judge, AuthorizationPolicies and TrafficPolicies; `-` is standard input. One of the same
    /// name takes the place of the mesh's, and a dry run is judged as if it were enforced.
    #[arg(short, long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Only connections and requests to this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Only what was seen within this time, as 30m or 24h.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = crate::tap::duration)]
    since: Duration,
    /// Form of the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    mesh: mesh::Selection,
}

/// Runs a command.
///
/// # Errors
/// When the mesh or a file can't be read.
pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Suggest(options) => suggest(options),
        Command::Diff(options) => diff(options),
    }
}

fn suggest(options: &Suggest) -> anyhow::Result<ExitCode> {
    let (observed, world) = block_on(async {
        let mesh = options.mesh.connect().await?;
        let wait = Wait::start("asking the proxies");
        let observed = Observed::read(&mesh, since(options.since)).await?;
        wait.show("reading the objects");
        let world = World::new(mesh.objects().await?, Vec::new(), mesh.settings().await?)?;
        anyhow::Ok((observed, world))
    })?;
    let suggested = suggest::suggest(&observed, &world, &options.namespace);
    print(&suggested.render(&options.namespace, options.enforce)?);
    Ok(if suggested.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn diff(options: &Diff) -> anyhow::Result<ExitCode> {
    let given = analyze::read_files(&options.files)?;
    let (observed, before, after) = block_on(async {
        let mesh = options.mesh.connect().await?;
        let wait = Wait::start("asking the proxies");
        let observed = Observed::read(&mesh, since(options.since)).await?;
        wait.show("reading the objects");
        let (objects, settings) = (mesh.objects().await?, mesh.settings().await?);
        let before = World::new(objects.clone(), Vec::new(), settings.clone())?;
        let after = World::new(objects, given, settings)?;
        anyhow::Ok((observed, before, after))
    })?;
    ensure!(after.given() > 0, "the files have no AuthorizationPolicy and no TrafficPolicy");
    let differences = diff::diff(&observed, &before, &after, options.namespace.as_deref());
    emit(options.output, &differences, |paint| differences.render(paint))?;
    Ok(if differences.denies_what_was_allowed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The time that lies so far back, in seconds since the epoch.
fn since(back: Duration) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(back).as_secs()
}
