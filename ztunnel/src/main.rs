//! Program entry: parse, run, exit code. One place prints errors.

use std::process::ExitCode;

use ambit_telemetry::heap::SamplingAllocator;
use mimalloc::MiMalloc;
use ztunnel::config::{ConfigError, load};

#[global_allocator]
static ALLOCATOR: SamplingAllocator<MiMalloc> = SamplingAllocator::new(MiMalloc);

fn main() -> ExitCode {
    let config = match load::from_environment(std::env::args_os()) {
        Ok(config) => config,
        // Prints help, version or what is wrong with the command line, with the exit code of each.
        Err(ConfigError::Arguments(error)) => error.exit(),
        Err(error) => return fail(&error.into()),
    };
    match ztunnel::app::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("ztunnel: {error:#}");
    ExitCode::FAILURE
}
