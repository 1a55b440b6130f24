//! Program entry.

use std::process::ExitCode;

use ambit_control::{app, config};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match config::from_command_line().map_err(anyhow::Error::from).and_then(app::main) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ambit-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}
