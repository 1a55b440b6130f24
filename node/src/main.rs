//! Program entry of `ambit-node`: parse, run, exit code. One place prints errors.

use std::process::ExitCode;

use ambit_node::app;
use ambit_node::config::{self, ConfigError};

fn main() -> ExitCode {
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
    eprintln!("ambit-node: {error:#}");
    ExitCode::FAILURE
}
