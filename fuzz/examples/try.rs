//! Runs one target on files: `cargo run -p ambit-fuzz --example try -- TARGET FILE…`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(target) = arguments.next().and_then(|name| ambit_fuzz::target(&name)) else {
        eprintln!("try TARGET FILE…; targets are:");
        ambit_fuzz::targets().iter().for_each(|(name, _)| eprintln!("  {name}"));
        return ExitCode::FAILURE;
    };
    for file in arguments {
        match std::fs::read(&file) {
            Ok(bytes) => target(&bytes),
            Err(error) => {
                eprintln!("{file}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
