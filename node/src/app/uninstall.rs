//! Removes everything of Ambit from a node: the CNI plugin and its entry, the rules in pods and in the host's namespace,
//! the registry, and the annotations of this node's pods.
//!
//! It goes on after a failure, so that as much as possible is removed, and reports the first one at the end.

use std::collections::HashMap;
use std::path::Path;

use ambit_net::{Netns, NetnsId};
use ambit_telemetry::Readiness;
use ambit_telemetry::http::{readiness_router, serve};
use anyhow::Context;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt};

use super::{asked_to_stop, client, listen};
use crate::config::Config;
use crate::enrol::REDIRECTION;
use crate::kubernetes::annotate;
use crate::kubernetes::index::Annotation;
use crate::redirect::{self, FormerSettings};
use crate::registry::Registry;
use crate::{capabilities, probes};

pub(super) async fn run(config: Config, wait: bool) -> anyhow::Result<()> {
    let Config { readiness: address, .. } = config;
    let readiness = Readiness::new();
    let removal = readiness.task("removal");
    let remove = async {
        let removed = remove(config).await;
        if removed.is_ok() {
            tracing::info!("removed from this node");
            removal.done();
        }
        removed
    };
    if !wait {
        return remove.await;
    }
    let listener = listen(address, "readiness").await?;
    let stay = async {
        remove.await?;
        asked_to_stop().await
    };
    tokio::select! {
        outcome = stay => outcome,
        () = serve(listener, readiness_router(&readiness)) => Ok(()),
    }
}

async fn remove(config: Config) -> anyhow::Result<()> {
    if let Err(error) = capabilities::make_settings_writable() {
        tracing::debug!(%error, "/proc/sys is left as it is mounted");
    }
    let mut outcomes = Vec::new();
    if let Some(installation) = &config.installation {
        // First, so that new pods start without the agent.
        let removed = installation.remove();
        for path in removed.iter().flatten() {
            tracing::info!(path = %path.display(), "CNI plugin removed");
        }
        outcomes.push(removed.map(drop).map_err(anyhow::Error::from));
    }
    // Before the rules go: peers stop tunnelling.
    outcomes.push(remove_annotations(&config.node).await);
    outcomes.push(remove_rules(&config).await);
    outcomes.push(remove_host_rules(&config.agent.host_netns).await);
    for path in [&config.cni_socket, &config.agent.zds_socket] {
        outcomes.push(absent(std::fs::remove_file(path), path));
    }
    if outcomes.iter().all(Result::is_ok) {
        // Former settings of pods are known from it until all are restored.
        let registry = &config.agent.registry;
        outcomes.push(absent(std::fs::remove_dir_all(registry), registry));
        outcomes.push(absent(std::fs::remove_file(&config.lock), &config.lock));
    }
    for error in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
        tracing::error!(error = format!("{error:#}"), "not removed");
    }
    outcomes.into_iter().collect()
}

fn absent(outcome: std::io::Result<()>, path: &Path) -> anyhow::Result<()> {
    match outcome {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

async fn remove_rules(config: &Config) -> anyhow::Result<()> {
    let registry = Registry::open(&config.agent.registry)?;
    let records = registry.load()?.records.into_iter();
    let former: HashMap<NetnsId, FormerSettings> =
        records.map(|record| (record.netns, record.former_settings)).collect();
    let mut outcome = Ok(());
    for found in config.agent.discovery.walk().await.namespaces {
        let removed = remove_rules_from(&found.netns, &former).await;
        outcome = outcome.and(removed.with_context(|| found.path.display().to_string()));
    }
    outcome
}

async fn remove_rules_from(netns: &Netns, former: &HashMap<NetnsId, FormerSettings>) -> anyhow::Result<()> {
    if redirect::is_present(netns).await? {
        let former = former.get(&netns.id()).cloned().unwrap_or_default();
        redirect::remove(netns, &former).await?;
        tracing::info!(netns = %netns.id(), "rules removed");
    }
    Ok(())
}

async fn remove_host_rules(host: &Path) -> anyhow::Result<()> {
    probes::remove(&Netns::open(host)?).await?;
    Ok(())
}

async fn remove_annotations(node: &str) -> anyhow::Result<()> {
    let client = client()?;
    let all: Api<Pod> = Api::all(client.clone());
    let on_node = ListParams::default().fields(&format!("spec.nodeName={node}"));
    for pod in all.list(&on_node).await.context("list pods")? {
        if !pod.annotations().contains_key(REDIRECTION) {
            continue;
        }
        let annotation = Annotation {
            uid: pod.uid().unwrap_or_default(),
            namespace: pod.namespace().unwrap_or_default(),
            name: pod.name_any(),
            value: None,
        };
        let patched = annotate::patch(&client, &annotation).await;
        patched.with_context(|| format!("pod {}/{}", annotation.namespace, annotation.name))?;
    }
    Ok(())
}
