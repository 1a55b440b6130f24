//! `ambit log`: what Ambit's programs write, and how much.

use std::collections::VecDeque;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use futures_util::{AsyncBufReadExt as _, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::LogParams;
use tokio::sync::mpsc;

use crate::cluster::{Access, Cluster, Component, PROXY_ADMIN, PodName, block_on, pods_of, post};
use crate::output::print;
use crate::proxies;

/// Lines that wait to be printed.
const WAITING: usize = 256;
/// Lines of a proxy's log among which those about a pod are looked for: other pods of the node may have many more.
const SEARCHED: i64 = 50_000;

/// Options of `ambit log`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// A component (control, node, ztunnel), a pod of one or of a waypoint, or a pod of an application: then the lines about
    /// it in the log of its node's proxy.
    #[arg(default_value = "ztunnel", value_name = "POD|COMPONENT")]
    target: String,
    /// Namespace of the pod.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Continue with lines that are written from now on.
    #[arg(short, long)]
    follow: bool,
    /// Lines of each pod to begin with; of those about a pod of an application, as many as there are with --follow.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(i64).range(0..))]
    tail: i64,
    /// Set the level instead, as `debug` or `info,ztunnel=debug`, until the program ends.
    #[arg(long, value_name = "LEVEL", conflicts_with = "follow")]
    level: Option<String>,
    /// Set the level instead, to that of the program's start.
    #[arg(long, conflicts_with_all = ["follow", "level"])]
    reset: bool,
    #[command(flatten)]
    access: Access,
}

/// The pods whose logs are meant, and what a line must contain.
struct Logs {
    pods: Vec<PodName>,
    about: Option<PodName>,
}

/// Prints logs, or sets their level.
///
/// # Errors
/// When the cluster or a pod can't be reached.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    block_on(async {
        let cluster = options.access.connect().await?;
        let logs = find(&cluster, options).await?;
        match (&options.level, options.reset) {
            (Some(level), _) => {
                set_level(&cluster, &logs, &format!("level={}", encoded(level))).await?;
            }
            (None, true) => set_level(&cluster, &logs, "reset").await?,
            (None, false) => show(&cluster, options, logs).await?,
        }
        Ok(ExitCode::SUCCESS)
    })
}

async fn find(cluster: &Cluster, options: &Options) -> anyhow::Result<Logs> {
    if let Ok(component) = options.target.parse::<Component>() {
        let pods = pods_of(cluster, component).await?;
        if pods.is_empty() {
            bail!("there is no pod of {} in {}", component.workload(), cluster.system);
        }
        return Ok(Logs { pods: pods.iter().map(PodName::of).collect(), about: None });
    }
    let namespace = options.namespace.as_deref().unwrap_or(&cluster.namespace);
    let name = PodName::parse(&options.target, namespace);
    if name.namespace == cluster.system {
        return Ok(Logs { pods: vec![name], about: None });
    }
    let target = proxies::find(cluster, Some(&options.target), namespace).await?;
    Ok(Logs { pods: target.proxies.into_iter().map(|proxy| proxy.pod).collect(), about: target.pod })
}

async fn set_level(cluster: &Cluster, logs: &Logs, query: &str) -> anyhow::Result<()> {
    for pod in &logs.pods {
        let answer = post(&cluster.client, pod, PROXY_ADMIN, &format!("/logging?{query}")).await?;
        print(&format!("{pod}: {}\n", String::from_utf8_lossy(&answer).trim()));
    }
    Ok(())
}

/// A filter within a query.
fn encoded(level: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'.' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    level.bytes().map(byte).collect()
}

async fn show(cluster: &Cluster, options: &Options, logs: Logs) -> anyhow::Result<()> {
    let Logs { pods, about } = logs;
    let prefixed = pods.len() > 1;
    let (lines, mut printed) = mpsc::channel::<String>(WAITING);
    let tail_lines = if about.is_some() { options.tail.max(SEARCHED) } else { options.tail };
    let params = LogParams { follow: options.follow, tail_lines: Some(tail_lines), ..LogParams::default() };
    // Of lines that are looked for, the last are wanted, and which these are is known at the end.
    let kept = if about.is_some() && !options.follow { usize::try_from(options.tail).ok() } else { None };
    let read = pods.into_iter().map(move |pod| {
        let (lines, params, about) = (lines.clone(), params.clone(), about.clone());
        async move {
            let api: Api<Pod> = Api::namespaced(cluster.client.clone(), &pod.namespace);
            let stream = api.log_stream(&pod.name, &params).await.with_context(|| format!("log of {pod}"))?;
            let mut stream = std::pin::pin!(stream.lines());
            let mut last = VecDeque::new();
            while let Some(line) = stream.try_next().await.with_context(|| format!("log of {pod}"))? {
                if about.as_ref().is_some_and(|pod| !concerns(&line, pod)) {
                    continue;
                }
                let line = if prefixed { format!("{}: {line}\n", pod.name) } else { format!("{line}\n") };
                match kept {
                    Some(kept) => {
                        last.push_back(line);
                        last.drain(..last.len().saturating_sub(kept));
                    }
                    // Nobody prints any more.
                    None if lines.send(line).await.is_err() => break,
                    None => {}
                }
            }
            for line in last {
                if lines.send(line).await.is_err() {
                    break;
                }
            }
            anyhow::Ok(())
        }
    });
    let read = futures_util::stream::iter(read).map(Ok).try_for_each_concurrent(None, |read| read);
    let write = async {
        while let Some(line) = printed.recv().await {
            print(&line);
        }
    };
    let (read, ()) = tokio::join!(read, write);
    read
}

/// Whether a line of an access log names the pod, as source or destination.
fn concerns(line: &str, pod: &PodName) -> bool {
    let is_end =
        |letter: Option<char>| !letter.is_some_and(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.');
    line.match_indices(&pod.name).any(|(at, name)| {
        let before = line.get(..at).and_then(|text| text.chars().next_back());
        let after = line.get(at + name.len()..).and_then(|text| text.chars().next());
        is_end(before) && is_end(after)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_concerns_a_pod_that_it_names_whole() {
        let pod = PodName { namespace: "shop".into(), name: "web-0".into() };
        assert!(concerns("… src.workload=web-0 src.namespace=shop", &pod));
        assert!(concerns("{\"src.workload\":\"web-0\"}", &pod));
        assert!(!concerns("src.workload=web-01 dst.workload=my-web-0", &pod));
    }

    #[test]
    fn a_filter_is_encoded_for_a_query() {
        assert_eq!(encoded("info,ztunnel=debug"), "info%2Cztunnel%3Ddebug");
    }
}
