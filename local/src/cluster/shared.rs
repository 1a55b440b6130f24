//! State that all parts of a running cluster share.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, watch};

use crate::addresses::{Plan, PodRange};
use crate::agent::NodeAgent;
use crate::cluster::mesh::Ztunnel;
use crate::cluster::objects::Objects;
use crate::dns::Dns;
use crate::error::{Error, Result};
use crate::fabric::{Attached, Fabric};
use crate::kubelet::plan::Programs;
use crate::kubelet::status::Redirection;
use crate::pod::Pod;
use crate::token::{Subject, TokenSigner};

/// The longest wait for a controller's pass.
const PASS: Duration = Duration::from_secs(30);

/// One node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) index: u8,
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) attached: Attached,
    pub(crate) range: Mutex<PodRange>,
    /// Absent in a cluster without a mesh.
    pub(crate) agent: Option<NodeAgent>,
    /// Its node proxies; more than one during an upgrade.
    pub(crate) ztunnels: Mutex<Vec<Ztunnel>>,
}

/// State shared by the cluster's handle, its controller and its pods' tasks.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) plan: Plan,
    pub(crate) trust_domain: String,
    /// Work directory: sockets, tokens, certificates, published objects.
    pub(crate) directory: PathBuf,
    pub(crate) programs: Arc<Programs>,
    pub(crate) fabric: Fabric,
    pub(crate) control_node: Attached,
    pub(crate) nodes: Vec<Node>,
    pub(crate) dns: Dns,
    pub(crate) records: Mutex<BTreeMap<String, Vec<IpAddr>>>,
    pub(crate) signer: TokenSigner,
    pub(crate) token_lifetime: Duration,
    /// Tokens that are renewed, with the files they stand in.
    pub(crate) tokens: Mutex<Vec<(Subject, PathBuf)>>,
    pub(crate) objects: Mutex<Objects>,
    pub(crate) pods: RwLock<BTreeMap<(String, String), Pod>>,
    /// Faults of objects that a person should see, by object.
    pub(crate) problems: Mutex<BTreeMap<String, String>>,
    /// Wakes the controller.
    pub(crate) changed: Notify,
    /// How many passes were asked for; the controller publishes how many it had seen when it last finished.
    pub(crate) asked: Mutex<u64>,
    pub(crate) passed: watch::Sender<u64>,
}

impl Shared {
    /// The node of an index.
    ///
    /// # Errors
    /// [`Error::Unknown`] when there is none.
    pub(crate) fn node(&self, index: usize) -> Result<&Node> {
        self.nodes.get(index).ok_or_else(|| Error::Unknown(format!("node {index}")))
    }

    /// A pod by name.
    pub(crate) fn pod(&self, namespace: &str, name: &str) -> Option<Pod> {
        self.pods.read().get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// All pods.
    pub(crate) fn pods(&self) -> Vec<Pod> {
        self.pods.read().values().cloned().collect()
    }

    /// Records the redirection that the agent reports for a pod.
    pub(crate) fn set_redirection(&self, uid: &str, redirection: Option<Redirection>) {
        let pods = self.pods.read();
        if let Some(pod) = pods.values().find(|pod| pod.uid() == uid) {
            pod.inner.view.send_if_modified(|view| {
                let before = std::mem::replace(&mut view.redirection, redirection);
                before != redirection
            });
        }
    }

    /// Wakes the controller without waiting for it.
    pub(crate) fn wake(&self) {
        *self.asked.lock() += 1;
        self.changed.notify_one();
    }

    /// Waits until the controller has made a whole pass that began after this call.
    ///
    /// # Errors
    /// [`Error::Deadline`] when it takes longer than 30 s.
    pub(crate) async fn settle(&self) -> Result<()> {
        self.wake();
        let wanted = *self.asked.lock();
        let mut passed = self.passed.subscribe();
        match tokio::time::timeout(PASS, passed.wait_for(|passed| *passed >= wanted)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::Ended("the cluster's controller".to_owned())),
            Err(_) => {
                Err(Error::Deadline { what: "a controller's pass".to_owned(), after: PASS, detail: None })
            }
        }
    }
}
