//! The program `ambit-cluster-app`: the applications of the cluster's tests, as a client and a server of HTTP/1.1.
//!
//! It runs as the first process of a container whose image holds nothing else.

mod load;
mod request;
mod serve;

use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// A client and a server for tests.
#[derive(Debug, Parser)]
enum Command {
    /// Answers every request with who answers, who asks and what for, as JSON.
    Serve(serve::Options),
    /// Sends one request and prints the answer's body; fails unless the answer is 200.
    Get {
        /// `http://HOST[:PORT]/PATH`.
        url: String,
    },
    /// Sends requests at a steady rate, half of them on new connections, and prints the counts each second as JSON.
    Load(load::Options),
    /// Does nothing until it is asked to stop.
    Wait,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let command = Command::parse();
    let work = async {
        match command {
            Command::Serve(options) => serve::serve(&options).await,
            Command::Get { url } => request::get(&url).await.map(|body| println!("{body}")),
            Command::Load(options) => load::run(&options).await,
            Command::Wait => std::future::pending().await,
        }
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        ended = terminated() => ended,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The kernel delivers no signal to a container's first process that it has no handler for.
async fn terminated() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    terminate.recv().await;
    Ok(())
}
