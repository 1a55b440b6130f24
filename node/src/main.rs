//! Program entry of `ambit-node`: parse, run, exit code. One place prints errors.

use std::process::ExitCode;

use ambit_node::{app, config};

fn main() -> ExitCode {
    match config::from_command_line().map_err(anyhow::Error::from).and_then(app::main) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ambit-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}
