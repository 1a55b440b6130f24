//! What `helm test` runs in the cluster: a server, and a client that shows that its own connections are authenticated.
//!
//! The chart's policy allows the client's identity one port of the server and nobody the other. A connection that reaches
//! the first while the second is refused was authenticated: without mutual TLS it would have no identity to allow.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};

/// What the server says to everyone who reaches it.
const GREETING: &[u8] = b"ambit\n";
/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(500);

/// Parts of the chart's test.
#[derive(Debug, Subcommand)]
pub(crate) enum Part {
    /// Greets everyone who connects.
    Serve(Serve),
    /// Waits until one address can be reached and the other can't.
    Check(Check),
}

/// Options of the server.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// Addresses to listen on.
    #[arg(required = true)]
    listen: Vec<SocketAddr>,
}

/// Options of the client.
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// `host:port` that policy allows.
    #[arg(long)]
    allowed: String,
    /// `host:port` that policy denies.
    #[arg(long)]
    denied: String,
    /// Seconds after which the test has failed.
    #[arg(long, default_value_t = 120)]
    within: u64,
}

/// Runs one part.
///
/// # Errors
/// An address can't be listened on, or the test has failed: with what was seen last.
pub(crate) fn run(part: &Part) -> anyhow::Result<ExitCode> {
    match part {
        Part::Serve(options) => serve(&options.listen)?,
        Part::Check(options) => {
            wait(options)?;
            println!(
                "{} was reached with the identity that the policy allows, {} was refused",
                options.allowed, options.denied
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Listens everywhere before it greets anyone, so that whoever is greeted knows that all addresses are served.
fn serve(addresses: &[SocketAddr]) -> anyhow::Result<()> {
    let listeners = addresses
        .iter()
        .map(|address| TcpListener::bind(address).with_context(|| format!("can't listen on {address}")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    println!("listening on {addresses:?}");
    std::thread::scope(|scope| {
        for listener in &listeners {
            scope.spawn(|| greet(listener));
        }
    });
    Ok(())
}

fn greet(listener: &TcpListener) {
    for connection in listener.incoming() {
        let greeted = connection.and_then(|mut stream| stream.write_all(GREETING));
        if let Err(error) = greeted {
            eprintln!("a connection failed: {error}");
            // Out of descriptors, above all: the next accept would fail at once.
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn wait(options: &Check) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(options.within);
    loop {
        match attempt(options) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(error) => eprintln!("not yet: {error:#}"),
        }
        std::thread::sleep(PAUSE);
    }
}

/// The allowed address is reached again after the denied one was refused: by then the policy holds.
fn attempt(options: &Check) -> anyhow::Result<()> {
    let reach = |address: &str| reached(address).with_context(|| format!("can't ask {address}"));
    for (address, wanted) in [(&options.allowed, true), (&options.denied, false), (&options.allowed, true)] {
        match (reach(address)?, wanted) {
            (true, false) => bail!("{address} was reached, though the policy denies it"),
            (false, true) => bail!("{address} was refused, though the policy allows it"),
            _ => {}
        }
    }
    Ok(())
}

/// Whether the server's greeting came; a connection that is refused, reset or closed without it was not let through.
fn reached(address: &str) -> anyhow::Result<bool> {
    let resolved = address.to_socket_addrs()?.next().context("the name has no address")?;
    let stream = match TcpStream::connect_timeout(&resolved, ATTEMPT) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(false),
        other => other?,
    };
    stream.set_read_timeout(Some(ATTEMPT))?;
    let mut answer = Vec::new();
    match stream.take(GREETING.len() as u64).read_to_end(&mut answer) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(false),
        other => other?,
    };
    match answer.as_slice() {
        [] => Ok(false),
        GREETING => Ok(true),
        other => bail!("something else answered: {:?}", String::from_utf8_lossy(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server of the test, on a free port.
    fn server() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || greet(&listener));
        address
    }

    /// A port where connections end without a greeting, as those that policy denies do.
    fn denying() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || listener.incoming().for_each(drop));
        address
    }

    fn check(allowed: String, denied: String) -> anyhow::Result<()> {
        attempt(&Check { allowed, denied, within: 0 })
    }

    #[test]
    fn one_address_is_reached_and_the_other_is_not() {
        check(server(), denying()).unwrap();
        let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        check(server(), unused).unwrap();
    }

    #[test]
    fn a_denied_address_that_answers_fails_the_test() {
        let error = check(server(), server()).unwrap_err().to_string();
        assert!(error.contains("though the policy denies it"), "{error}");
    }

    #[test]
    fn an_allowed_address_that_refuses_fails_the_test() {
        let error = check(denying(), denying()).unwrap_err().to_string();
        assert!(error.contains("though the policy allows it"), "{error}");
    }

    #[test]
    fn a_stranger_that_answers_fails_the_test() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            listener.incoming().flatten().for_each(|mut stream| {
                let _ = stream.write_all(b"HTTP/1.1 400\r\n");
            });
        });
        let error = format!("{:#}", check(address, denying()).unwrap_err());
        assert!(error.contains("something else answered"), "{error}");
    }
}
