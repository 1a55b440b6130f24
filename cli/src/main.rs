//! The command `ambit`.

mod analyze;
mod authz;
mod check;
mod cluster;
mod config;
mod dashboard;
mod enrolment;
mod finding;
mod gateways;
mod log;
mod mesh;
mod migrate;
mod network_policy;
mod output;
mod proxies;
#[cfg(test)]
mod reference;
mod remote;
mod selftest;
mod status;
mod tap;
mod uninstall;
mod up;
mod waypoint;
mod why;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

/// Ambit, an ambient service mesh.
#[derive(Debug, Parser)]
#[command(name = "ambit", version)]
enum Command {
    /// Checks a cluster before an installation, and the mesh after it.
    Check(check::Options),
    /// Shows the mesh, or whether and how a pod is protected.
    Status(status::Options),
    /// Explains what becomes of a request or connection: every proxy's decision, step by step.
    Why(why::Options),
    /// Follows connections and requests while they happen, and says why they are denied or fail.
    Tap(tap::Options),
    /// Names every object that has no effect or another than it says, in files or in a cluster.
    Analyze(analyze::Options),
    /// Policies from the traffic that proxies observed: writes them, or says what they would change.
    #[command(subcommand)]
    Authz(authz::Command),
    /// Makes, lists and deletes waypoints.
    #[command(subcommand)]
    Waypoint(waypoint::Command),
    /// Takes every pod out of the mesh and removes Ambit from the nodes, then its release.
    Uninstall(uninstall::Options),
    /// For clusters that run Istio's ambient mode.
    #[command(subcommand)]
    Migrate(migrate::Command),
    /// Shows what a proxy knows: workloads, services, policies, certificates, connections, routes.
    Config(config::Options),
    /// Prints the logs of Ambit's programs, or sets their level.
    Log(log::Options),
    /// Opens a dashboard, or the admin interface of a proxy, at a port of this machine.
    Dashboard(dashboard::Options),
    /// Prints a script by which a shell completes this command.
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Runs a mesh with the workloads of a directory of manifests on this machine, without a cluster.
    Up(up::Options),
    /// Runs a command in a pod of a mesh that `ambit up` runs.
    Exec(remote::Exec),
    /// Prints the output of a container of such a mesh.
    Logs(remote::Logs),
    /// Prints the configuration of a node's proxy of such a mesh, as JSON.
    Dump(remote::Dump),
    /// Runs a part of the chart's test (`helm test`).
    #[command(subcommand, hide = true)]
    Selftest(selftest::Part),
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("AMBIT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let outcome = match Command::parse() {
        Command::Check(options) => check::run(&options),
        Command::Status(options) => status::run(&options),
        Command::Why(options) => why::run(&options),
        Command::Tap(options) => tap::run(&options),
        Command::Authz(command) => authz::run(&command),
        Command::Analyze(options) => analyze::run(&options),
        Command::Migrate(command) => migrate::run(&command),
        Command::Waypoint(command) => waypoint::run(&command),
        Command::Uninstall(options) => uninstall::run(&options),
        Command::Config(options) => config::run(&options),
        Command::Log(options) => log::run(&options),
        Command::Dashboard(options) => dashboard::run(&options),
        Command::Completion { shell } => Ok(completion(shell)),
        Command::Up(options) => up::run(&options),
        Command::Exec(options) => remote::exec(&options),
        Command::Logs(options) => remote::logs(&options),
        Command::Dump(options) => remote::dump(&options),
        Command::Selftest(part) => selftest::run(&part),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("ambit: {error:#}");
        ExitCode::FAILURE
    })
}

fn completion(shell: clap_complete::Shell) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Command::command(), "ambit", &mut script);
    output::print(&String::from_utf8_lossy(&script));
    ExitCode::SUCCESS
}
