//! The CNI plugin: called by the container runtime for each sandbox. See [`ambit_node::cni`].

use std::process::ExitCode;

use ambit_node::cni::plugin::{Environment, run};

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("ambit-cni: {error}");
            return ExitCode::FAILURE;
        }
    };
    if runtime.block_on(run(Environment::of_process(), std::io::stdin(), std::io::stdout())) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
