//! Program entry.

use std::process::ExitCode;

use ambit_control::{app, config};
use ambit_telemetry::heap::SamplingAllocator;
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: SamplingAllocator<MiMalloc> = SamplingAllocator::new(MiMalloc);

fn main() -> ExitCode {
    // Before anything is allocated. Without it only more memory is used.
    if let Err(error) = ambit_net::process::disable_huge_pages() {
        eprintln!("ambit-control: the kernel may back memory by huge pages: {error}");
    }
    match config::from_command_line().map_err(anyhow::Error::from).and_then(app::main) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ambit-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}
