//! The command `ambit`.

mod remote;
mod selftest;
mod up;

use std::process::ExitCode;

use clap::Parser;

/// Ambit, an ambient service mesh.
#[derive(Debug, Parser)]
#[command(name = "ambit", version)]
enum Command {
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
