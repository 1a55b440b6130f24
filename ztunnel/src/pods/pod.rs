//! One pod that this proxy serves.

use std::sync::Arc;

use ambit_api::workload::zds::WorkloadInfo;
use ambit_directory::WorkloadUid;
use ambit_identity::{CertificateStore, SpiffeId};
use ambit_net::{NetnsId, SocketStock};
use ambit_runtime::shares::{PodShares, Taken};
use tokio::sync::watch;

use crate::directory::ondemand::Pinned;
use crate::outbound::ejections::EjectedEndpoints;

/// One pod: who it is and where its sockets are made. Lives as long as a connection of it does.
#[derive(Debug)]
pub struct Pod {
    pub(super) uid: Arc<str>,
    pub(super) netns: NetnsId,
    pub(super) info: WorkloadInfo,
    pub(super) identity: SpiffeId,
    pub(super) workload: WorkloadUid,
    /// Where resources come on demand: keeps the pod's own.
    pub(super) pinned: Option<Pinned>,
    pub(super) stock: SocketStock,
    pub(super) certificates: CertificateStore,
    pub(super) dns: Arc<crate::dns::Client>,
    pub(super) shares: PodShares,
    pub(super) ejected: EjectedEndpoints,
    /// For the pod's listeners and what else it costs without a connection.
    pub(super) _descriptors: Taken,
    pub(super) left: watch::Sender<bool>,
}

impl Pod {
    /// The pod's Kubernetes uid.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// As [`Pod::uid`], to keep.
    pub fn shared_uid(&self) -> &Arc<str> {
        &self.uid
    }

    /// The network namespace that the pod had when its proxy started.
    pub(crate) fn netns(&self) -> NetnsId {
        self.netns
    }

    /// Where resources come on demand: the pod's own.
    pub fn pinned(&self) -> Option<&Pinned> {
        self.pinned.as_ref()
    }

    /// Name, namespace and service account as the node agent gave them.
    pub fn info(&self) -> &WorkloadInfo {
        &self.info
    }

    /// Who the pod is on the wire.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// The pod's name in the directory.
    pub fn workload(&self) -> &WorkloadUid {
        &self.workload
    }

    /// The pod as one that asks DNS questions.
    pub fn dns(&self) -> &Arc<crate::dns::Client> {
        &self.dns
    }

    /// What the pod and its peers hold.
    pub fn shares(&self) -> &PodShares {
        &self.shares
    }

    /// What the pod could not reach lately.
    pub fn ejected(&self) -> &EjectedEndpoints {
        &self.ejected
    }

    /// Resolves when the pod has left and peers must be notified.
    pub async fn leaving(&self) {
        // The sender lives as long as `self`.
        self.left.subscribe().wait_for(|left| *left).await.ok();
    }

    /// Sockets in the pod's namespace.
    pub fn stock(&self) -> &SocketStock {
        &self.stock
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.certificates.release(&self.identity);
    }
}
