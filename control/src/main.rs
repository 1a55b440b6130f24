//! Program entry.

use std::process::ExitCode;

use ambit_control::{app, config};
use ambit_telemetry::heap::SamplingAllocator;
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: SamplingAllocator<MiMalloc> = SamplingAllocator::new(MiMalloc);

fn main() -> ExitCode {
    match config::from_command_line().map_err(anyhow::Error::from).and_then(app::main) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ambit-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}
