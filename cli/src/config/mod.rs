//! `ambit config`: what a proxy knows, from its configuration dump.

mod tables;

pub(crate) use tables::{binds, expiry, text, waypoint};

use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;

use crate::cluster::{Access, block_on};
use crate::output::{Format, Wait, emit};
use crate::proxies::{self, Proxy, Role, Target};

/// What to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Pods and other endpoints.
    Workloads,
    /// Services with their endpoints.
    Services,
    /// Authorization policies.
    Policies,
    /// Certificates that a node proxy holds for its pods.
    Certificates,
    /// Connections that are open.
    Connections,
    /// Routes of waypoints.
    Routes,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Workloads => "workloads",
            Kind::Services => "services",
            Kind::Policies => "policies",
            Kind::Certificates => "certificates",
            Kind::Connections => "connections",
            Kind::Routes => "routes",
        }
    }

    /// Whether every node proxy has the same, so that one of them is enough.
    fn is_shared(self) -> bool {
        matches!(self, Kind::Workloads | Kind::Services | Kind::Policies)
    }
}

/// Options of `ambit config`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// What to show.
    #[arg(value_enum)]
    kind: Kind,
    /// A node, a pod of ztunnel or of a waypoint, or a pod of an application, whose node's proxy is asked. Default is one node
    /// proxy for what all know, every one for the rest, and every waypoint for routes.
    #[arg(value_name = "NODE|POD")]
    target: Option<String>,
    /// Namespace of the pod.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Form of the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    access: Access,
}

/// What one proxy knows of what was asked for.
#[derive(Debug, Serialize)]
struct Dump {
    /// The proxy's pod.
    proxy: String,
    /// Its node.
    node: String,
    /// The objects.
    entries: Vec<Value>,
}

/// Shows a part of the configuration of proxies.
///
/// # Errors
/// When the cluster or a proxy can't be reached.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let Options { kind, target, namespace, output, access } = options;
    let dumps = block_on(async {
        let cluster = access.connect().await?;
        let wait = Wait::start("finding the proxies");
        let in_namespace = namespace.as_deref().unwrap_or(&cluster.namespace);
        let mut found = match (kind, target) {
            (Kind::Routes, None) => {
                let proxies = proxies::waypoints(&cluster, namespace.as_deref()).await?;
                Target { proxies, pod: None }
            }
            _ => proxies::find(&cluster, target.as_deref(), in_namespace).await?,
        };
        if kind.is_shared() && target.is_none() {
            found.proxies.truncate(1);
        }
        let mut dumps = Vec::new();
        for proxy in &found.proxies {
            check_role(*kind, proxy)?;
            wait.show(&format!("asking {}", proxy.pod));
            let dump = proxies::config_dump(&cluster, proxy).await?;
            let entries = entries(&dump, *kind);
            let entries = entries.into_iter().filter(|entry| concerns(entry, *kind, &found, &dump)).collect();
            dumps.push(Dump { proxy: proxy.pod.to_string(), node: proxy.node.clone(), entries });
        }
        Ok(dumps)
    })?;
    let now = time::OffsetDateTime::now_utc();
    emit(*output, &dumps, |paint| tables::render(*kind, &dumps, now, paint))?;
    Ok(ExitCode::SUCCESS)
}

/// A proxy that does not have what was asked for is an error, not an empty table.
fn check_role(kind: Kind, proxy: &Proxy) -> anyhow::Result<()> {
    match (kind, proxy.role) {
        (Kind::Routes, Role::Ztunnel) => {
            bail!("node proxies have no routes: name a pod of a waypoint, or none for all")
        }
        (Kind::Certificates | Kind::Connections, Role::Waypoint) => {
            bail!("waypoints do not show their {}: name a node or a pod", kind.name())
        }
        _ => Ok(()),
    }
}

/// The objects of a kind in a dump: a waypoint has those of the directory one level deeper.
fn entries(dump: &Value, kind: Kind) -> Vec<Value> {
    let section = dump.get(kind.name()).or_else(|| dump.get("directory")?.get(kind.name()));
    section.and_then(Value::as_array).cloned().unwrap_or_default()
}

/// Whether an object belongs to the pod that was named, if one was.
fn concerns(entry: &Value, kind: Kind, target: &Target, dump: &Value) -> bool {
    let Some(pod) = &target.pod else { return true };
    let is = |key: &str, value: &str| entry.get(key).and_then(Value::as_str) == Some(value);
    let workload = || {
        let mut all = dump.get("workloads").and_then(Value::as_array).into_iter().flatten();
        all.find(|w| w["namespace"] == *pod.namespace && w["name"] == *pod.name)
    };
    match kind {
        Kind::Workloads => is("namespace", &pod.namespace) && is("name", &pod.name),
        Kind::Certificates => workload().is_some_and(|workload| entry["identity"] == workload["identity"]),
        Kind::Connections => {
            workload().is_some_and(|w| entry["workload"] == w["uid"] || is("workload", &pod.name))
        }
        Kind::Policies => binds(entry, &pod.namespace, workload()),
        Kind::Services => workload().is_some_and(|w| {
            let endpoints = entry.get("endpoints").and_then(Value::as_object);
            endpoints.is_some_and(|all| w["uid"].as_str().is_some_and(|uid| all.contains_key(uid)))
        }),
        Kind::Routes => true,
    }
}
