//! What `ambit check --probe` runs on each node before an installation: it tries out what the agent will need, says what it
//! found, and dials the probes of other nodes at the port of tunnels, where it listens too.
//!
//! It changes nothing on the node: what it tries is tried in a network namespace of its own.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use ambit_net::Netns;
use ambit_telemetry::http::{Query, Reply, Router, reply, serve, text};
use anyhow::Context;
use http::StatusCode;
use serde::Serialize;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::{asked_to_stop, listen};
use crate::capabilities::{self, Weakness};
use crate::cni::install::Installation;
use crate::config::Config;

/// The host's files, by its first process.
const HOST_ROOT: &str = "/proc/1/root";
/// Where tunnels arrive.
const HBONE: u16 = 15008;
/// Content type of answers.
const JSON: &str = "application/json";
/// How long the way to another node may take.
const REACH: Duration = Duration::from_secs(5);
/// Pause after a failed accept, as when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What was found on a node.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    /// Guarantees that will not hold.
    weaknesses: Vec<Weakness>,
    /// What keeps the CNI plugin from being installed or called.
    cni_problems: Vec<String>,
}

pub(super) async fn run(config: Config) -> anyhow::Result<()> {
    // The pod counts as ready when it listens for tunnels, and then has a report.
    let report = report(&config).await;
    let body = serde_json::to_vec(&report).context("write the report")?;
    let routes = Router::new()
        .get("/report", move |_| {
            let body = body.clone();
            async move { reply(StatusCode::OK, JSON, body.into()) }
        })
        .get("/reach", |query| async move { reach(&query).await });
    let admin = listen(config.admin, "the report").await?;
    let tunnels = listen_for_tunnels().await?;
    tokio::select! {
        outcome = asked_to_stop() => outcome,
        () = serve(admin, routes) => Ok(()),
        () = accept(tunnels) => Ok(()),
    }
}

async fn report(config: &Config) -> Report {
    if let Err(error) = capabilities::make_settings_writable() {
        tracing::debug!(%error, "/proc/sys is left as it is mounted");
    }
    let mut weaknesses = capabilities::probe().await;
    if let Err(error) = Netns::open(&config.agent.host_netns) {
        weaknesses.push(capabilities::host_unknown(&error));
    }
    let cni_problems =
        config.installation.as_ref().map(|installation| cni_problems(installation, Path::new(HOST_ROOT)));
    Report { weaknesses, cni_problems: cni_problems.unwrap_or_default() }
}

/// What is wrong with the host's CNI directories, by their names on the host, whose files are below `root`.
fn cni_problems(installation: &Installation, root: &Path) -> Vec<String> {
    let on_host = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let bin_dir = &installation.bin_dir;
    let is_empty = fs::read_dir(on_host(bin_dir)).map(|mut entries| entries.next().is_none());
    let plugins = match is_empty {
        Ok(false) => None,
        Ok(true) => Some(format!("no CNI plugin is in {}", bin_dir.display())),
        Err(error) => Some(format!("{}: {error}", bin_dir.display())),
    };
    let conf_dir = on_host(&installation.conf_dir);
    let network = Installation { conf_dir, ..installation.clone() }.find_network().err();
    // The host's name of a path is what a reader knows.
    let network = network.map(|error| error.to_string().replace(&root.display().to_string(), ""));
    plugins.into_iter().chain(network).collect()
}

/// Listens on every address of the pod.
async fn listen_for_tunnels() -> anyhow::Result<TcpListener> {
    let any = |address: IpAddr| SocketAddr::new(address, HBONE);
    match TcpListener::bind(any(Ipv6Addr::UNSPECIFIED.into())).await {
        Ok(listener) => Ok(listener),
        // No IPv6 in the kernel.
        Err(_) => listen(any(Ipv4Addr::UNSPECIFIED.into()), "tunnels").await,
    }
}

/// Accepts whoever dials: that is the answer.
async fn accept(listener: TcpListener) {
    loop {
        if let Err(error) = listener.accept().await {
            tracing::warn!(%error, "accept a dial of another node");
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }
}

/// Dials the probe of another node, `to`, at the port of tunnels. Answers why it can't be reached, else null.
async fn reach(query: &Query) -> Reply {
    let Some(peer) = query.get("to").and_then(|peer| peer.parse::<IpAddr>().ok()) else {
        return text(StatusCode::BAD_REQUEST, "expected ?to=ADDRESS\n");
    };
    let dialled = timeout(REACH, TcpStream::connect((peer, HBONE))).await;
    let problem = match dialled {
        Ok(Ok(_)) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some(format!("no answer within {REACH:?}")),
    };
    reply(StatusCode::OK, JSON, json!(problem).to_string().into())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::cni::conflist::Entry;
    use crate::cni::install::Placement;

    const NETWORK: &str = r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp"}]}"#;

    fn installation() -> Installation {
        Installation {
            program: PathBuf::new(),
            bin_dir: "/opt/cni/bin".into(),
            conf_dir: "/etc/cni/net.d".into(),
            placement: Placement::Chained,
            entry: Entry { socket: String::new(), excluded_namespaces: Vec::new() },
        }
    }

    #[test]
    fn absent_and_empty_directories_are_named_as_on_the_host() {
        let host = tempfile::tempdir().unwrap();
        let problems = cni_problems(&installation(), host.path());
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].starts_with("/opt/cni/bin: No such file"), "{problems:?}");
        assert!(problems[1].contains(" /etc/cni/net.d: No such file"), "{problems:?}");
        fs::create_dir_all(host.path().join("opt/cni/bin")).unwrap();
        fs::create_dir_all(host.path().join("etc/cni/net.d")).unwrap();
        let expected = ["no CNI plugin is in /opt/cni/bin", "no network configuration in /etc/cni/net.d yet"];
        assert_eq!(cni_problems(&installation(), host.path()), expected);
    }

    #[test]
    fn a_host_with_plugins_and_a_network_has_no_problem() {
        let host = tempfile::tempdir().unwrap();
        for (file, text) in [("opt/cni/bin/ptp", ""), ("etc/cni/net.d/10-net.conflist", NETWORK)] {
            let path = host.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        assert_eq!(cni_problems(&installation(), host.path()), Vec::<String>::new());
    }
}
