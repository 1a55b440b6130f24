//! Program entry: parse, run, exit code. One place prints errors.

use std::process::ExitCode;

use ambit_runtime::configuration::{self, ConfigError};
use ambit_telemetry::heap::SamplingAllocator;
use ambit_waypoint::config::Config;
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: SamplingAllocator<MiMalloc> = SamplingAllocator::new(MiMalloc);

fn main() -> ExitCode {
    let config: Config = match configuration::from_environment(std::env::args_os()) {
        Ok(config) => config,
        // Prints help, version or what is wrong with the command line, with the exit code of each.
        Err(ConfigError::Arguments(error)) => error.exit(),
        Err(error) => return fail(&error.into()),
    };
    match ambit_waypoint::app::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("ambit-waypoint: {error:#}");
    ExitCode::FAILURE
}
