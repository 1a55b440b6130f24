//! Rules in the host's network namespace: kubelet's connections to enrolled pods leave with the source address that
//! stands for probes (redirection contract), so that probes work under STRICT and default-deny.
//!
//! The agent keeps the set of pods; one task brings the table in line with it. A host process of kubelet's user counts as
//! kubelet.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ambit_net::Netns;
use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot};

use crate::nft::{
    self, Action, Chain, ChainKind, Compare, Hook, HookPoint, Match, NftError, Protocol, Rule, Table,
};
use crate::redirect::{PROBE_V4, PROBE_V6};

/// The name of our table in the host's namespace.
pub const HOST_TABLE: &str = "ambit-host";
/// Just before the translations of kube-proxy and CNI plugins (100): the first one that matches a connection decides.
const BEFORE_SRCNAT: i32 = 99;
/// Changes that may wait.
const QUEUE: usize = 1024;

/// The table for these pods' addresses.
pub fn plan(pods: &BTreeSet<IpAddr>, kubelet_uid: u32) -> Table {
    let to_pod = |ip: &IpAddr| {
        let probe = if ip.is_ipv4() { PROBE_V4.into() } else { PROBE_V6.into() };
        let to = Match::Destination(Compare::Is, IpNet::from(*ip));
        Rule::new([to, Match::Protocol(Protocol::Tcp)], Action::Snat(probe), "probes of an enrolled pod")
    };
    let probes = Chain { name: "probes".into(), hook: None, rules: pods.iter().map(to_pod).collect() };
    let from_kubelet = Rule::new(
        [Match::Protocol(Protocol::Tcp), Match::LocalUser(kubelet_uid)],
        Action::Jump(probes.name.clone()),
        "connections of kubelet",
    );
    let hook = Hook { kind: ChainKind::Nat, point: HookPoint::Postrouting, priority: BEFORE_SRCNAT };
    let postrouting = Chain { name: "postrouting".into(), hook: Some(hook), rules: vec![from_kubelet] };
    Table { name: HOST_TABLE.into(), chains: vec![probes, postrouting] }
}

/// Removes the table from the host's namespace. Returns whether there was one.
pub async fn remove(host: &Netns) -> Result<bool, NftError> {
    nft::remove(host, HOST_TABLE).await
}

/// A pod's addresses, none when it has left, and who waits for the rules.
type Change = (String, Vec<IpAddr>, oneshot::Sender<()>);

/// The handle of the task that keeps the table.
#[derive(Debug, Clone)]
pub struct ProbeRules {
    changes: mpsc::Sender<Change>,
}

impl ProbeRules {
    /// The handle and the task, which begins with `pods`. Without a `host`, whose kubelet has the uid, nothing is done.
    pub fn new(
        host: Option<(Netns, u32)>,
        pods: BTreeMap<String, Vec<IpAddr>>,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (changes, queue) = mpsc::channel(QUEUE);
        (Self { changes }, keep(host, pods, queue))
    }

    /// Says which addresses a pod has; none when it is no longer enrolled. Returns once the rules are tried.
    pub async fn set(&self, uid: &str, ips: Vec<IpAddr>) {
        let (done, tried) = oneshot::channel();
        if self.changes.send((uid.into(), ips, done)).await.is_ok() {
            // A task that ended applies nothing.
            tried.await.ok();
        }
    }

    /// Brings the table in line again.
    pub async fn repair(&self) {
        self.set("", Vec::new()).await;
    }
}

async fn keep(
    host: Option<(Netns, u32)>,
    mut pods: BTreeMap<String, Vec<IpAddr>>,
    mut queue: mpsc::Receiver<Change>,
) {
    let mut changes = Vec::new();
    // Many pods at once cost one transaction.
    while queue.recv_many(&mut changes, QUEUE).await > 0 {
        let mut waiting = Vec::new();
        for (uid, ips, done) in changes.drain(..) {
            if ips.is_empty() {
                pods.remove(&uid);
            } else {
                pods.insert(uid, ips);
            }
            waiting.push(done);
        }
        if let Some((host, kubelet_uid)) = &host {
            let table = plan(&pods.values().flatten().copied().collect(), *kubelet_uid);
            if let Err(error) = bring_in_line(host, table).await {
                // The next repair tries again. Until then, probes are captured as any other connection.
                tracing::error!(%error, "probes do not work for pods under STRICT");
            }
        }
        for done in waiting {
            done.send(()).ok();
        }
    }
}

async fn bring_in_line(host: &Netns, table: Table) -> Result<(), NftError> {
    if nft::verify(host, table.clone()).await?.is_some() {
        nft::apply(host, table).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_kubelets_connections_to_enrolled_pods_are_translated() {
        let pods = ["10.1.0.5", "fd00::5"].map(|ip| ip.parse().unwrap()).into();
        insta::assert_snapshot!(plan(&pods, 0));
    }
}
