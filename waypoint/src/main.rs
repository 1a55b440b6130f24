//! Program entry: parse, run, exit code. One place prints errors.

use std::process::ExitCode;

use ambit_runtime::configuration::{self, ConfigError};
use ambit_telemetry::heap::SamplingAllocator;
use ambit_waypoint::config::Config;
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: SamplingAllocator<MiMalloc> = SamplingAllocator::new(MiMalloc);

fn main() -> ExitCode {
    // Before anything is allocated. Without it only more memory is used.
    let small_pages = ambit_net::process::disable_huge_pages();
    let config: Config = match configuration::from_environment(std::env::args_os()) {
        Ok(config) => config,
        // Prints help, version or what is wrong with the command line, with the exit code of each.
        Err(ConfigError::Arguments(error)) => error.exit(),
        Err(error) => return fail(&error.into()),
    };
    if let Err(error) = small_pages {
        eprintln!("ambit-waypoint: the kernel may back memory by huge pages: {error}");
    }
    match ambit_waypoint::app::run(config, collect) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

#[allow(unsafe_code, reason = "the allocator's own call, which the safe crate around it does not offer")]
fn collect() {
    // SAFETY: looks at the calling thread's own free memory; may be called at any time.
    unsafe { libmimalloc_sys::mi_collect(true) }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("ambit-waypoint: {error:#}");
    ExitCode::FAILURE
}
