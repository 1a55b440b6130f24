//! Program entry.

use std::process::ExitCode;

use ambit_control::app;
use ambit_control::config::{self, ConfigError};
use ambit_telemetry::heap::SamplingAllocator;
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: SamplingAllocator<MiMalloc> = SamplingAllocator::new(MiMalloc);

fn main() -> ExitCode {
    // Before anything is allocated. Without it only more memory is used.
    if let Err(error) = ambit_net::process::disable_huge_pages() {
        eprintln!("ambit-control: the kernel may back memory by huge pages: {error}");
    }
    let config = match config::from_environment(std::env::args_os()) {
        Ok(config) => config,
        // Prints help, version or what is wrong with the command line, with the exit code of each.
        Err(ConfigError::Arguments(error)) => error.exit(),
        Err(error) => return fail(&error.into()),
    };
    match app::main(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("ambit-control: {error:#}");
    ExitCode::FAILURE
}
