//! What the agent reports of pods and of itself.

use crate::capabilities::Weakness;

/// How far a pod's enrolment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum PodState {
    /// The rules are in, no proxy serves the pod yet: traffic is refused or waits.
    Pending,
    /// Captured and served. It stays so while a proxy restarts: any other value would have the pod's peers send in
    /// the clear.
    Enabled,
    /// Being unenrolled: nothing new is captured.
    Leaving,
    /// The enrolment failed and left nothing behind; it is tried again.
    Failed,
    /// Not enrolled.
    Out,
}

impl PodState {
    /// The value of the pod's annotation [`REDIRECTION`](crate::enrol::REDIRECTION); `None`: no annotation.
    pub fn annotation(self) -> Option<&'static str> {
        match self {
            Self::Pending => Some("pending"),
            Self::Enabled => Some("enabled"),
            Self::Leaving | Self::Failed | Self::Out => None,
        }
    }

    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Enabled => "enabled",
            Self::Leaving => "leaving",
            Self::Failed => "failed",
            Self::Out => "out",
        }
    }
}

/// What is known of a pod.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// How far its enrolment is.
    pub state: PodState,
    /// Why it is not further, if that is known.
    pub reason: Option<String>,
    /// The id of its sandbox, if the CNI plugin reported it.
    pub sandbox: Option<String>,
    /// Connections that are older than its redirection and still open.
    pub older_connections: usize,
}

/// A change of a pod's status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusEvent {
    /// The pod.
    pub uid: String,
    /// Its status now.
    pub status: PodStatus,
}

/// The agent's own state.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// Whether the first reconciliation is done. Node proxies are served from then on.
    pub reconciled: bool,
    /// Number of connected node proxies.
    pub proxies: usize,
    /// Number of pods that should be enrolled and are not served.
    pub unserved_pods: usize,
    /// Guarantees that do not hold on this node.
    pub weaknesses: Vec<Weakness>,
}

impl Health {
    /// Whether pods of this node can be enrolled and served: the agent and a node proxy work.
    pub fn is_ready(&self) -> bool {
        self.reconciled && self.proxies > 0
    }
}
