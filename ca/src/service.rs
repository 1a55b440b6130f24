//! The gRPC service `istio.v1.auth.IstioCertificateService`: authenticate, authorise, sign.
//!
//! Hosted by the control plane on its TLS port. Authorisation is the pure function [`authorize`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ambit_api::ca::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use ambit_api::ca::{IstioCertificateRequest, IstioCertificateResponse};
use ambit_identity::SpiffeId;
use ambit_identity::issuer::IMPERSONATED_IDENTITY;
use async_trait::async_trait;
use prost_types::value::Kind;
use tonic::{Request, Response, Status};

use crate::authentication::{Authenticator, Caller, Credentials, PodRef};
use crate::authority::Authority;
use crate::signer::SignError;

/// A signing request with its metadata is far smaller, bytes.
const MAX_MESSAGE: usize = 64 * 1024;

/// What the control plane knows of pods and nodes.
pub trait NodePods: Send + Sync + 'static {
    /// Whether a live pod (not succeeded, not failed) with this identity's namespace and service account is
    /// scheduled to `node`. The trust domain has been checked.
    fn runs(&self, node: &str, identity: &SpiffeId) -> bool;

    /// The node of a pod, if the pod is known under that uid.
    fn node_of(&self, namespace: &str, pod: &PodRef) -> Option<String> {
        let _ = (namespace, pod);
        None
    }

    /// Whether every live pod is known. If so, a caller whose pod is unknown is refused; if not, the node that its token
    /// names counts.
    fn is_complete(&self) -> bool {
        false
    }
}

/// A service account that may request the identities of pods on its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeProxy {
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
}

/// Who may have what signed.
#[derive(Debug, Clone)]
pub struct IssuancePolicy {
    /// Service accounts of node proxies.
    pub trusted_node_proxies: Vec<NodeProxy>,
}

impl Default for IssuancePolicy {
    /// `ambit-system/ztunnel`.
    fn default() -> Self {
        let ztunnel = NodeProxy { namespace: "ambit-system".into(), service_account: "ztunnel".into() };
        Self { trusted_node_proxies: vec![ztunnel] }
    }
}

/// Counters; the program registers them.
#[derive(Debug, Default)]
pub struct IssuanceMetrics {
    /// Certificates signed.
    pub issued: AtomicU64,
    /// Callers that failed authentication.
    pub unauthenticated: AtomicU64,
    /// Requests that were denied.
    pub denied: AtomicU64,
    /// Requests that are not acceptable.
    pub invalid: AtomicU64,
    /// Failures of ours.
    pub failed: AtomicU64,
}

/// Why a caller does not get the identity that it asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Only node proxies ask for others.
    #[error("{0} is not a trusted node proxy")]
    NotANodeProxy(SpiffeId),
    /// The identity is not one of ours.
    #[error("{0} is not of trust domain {1}")]
    TrustDomain(SpiffeId, String),
    /// It is not known where the caller runs.
    #[error("the token of {0} is not bound to a pod on a node")]
    NoNode(SpiffeId),
    /// The caller's pod is not known: it was deleted, or is so new that we have not heard of it.
    #[error("the pod {pod} of {caller} is not known")]
    UnknownPod {
        /// The caller.
        caller: SpiffeId,
        /// Its pod's name.
        pod: String,
    },
    /// The token names another node than the one its pod runs on.
    #[error("the token of {caller} says node {claimed}, its pod runs on {actual}")]
    NodeMismatch {
        /// The caller.
        caller: SpiffeId,
        /// What the token says.
        claimed: String,
        /// What we know.
        actual: String,
    },
    /// No such pod on the caller's node.
    #[error("no live pod of {identity} runs on node {node}")]
    NotOnNode {
        /// Who was asked for.
        identity: SpiffeId,
        /// Where.
        node: String,
    },
}

impl From<Denied> for Status {
    fn from(denied: Denied) -> Self {
        match denied {
            // A new pod becomes known soon: the caller tries again.
            Denied::UnknownPod { .. } => Self::unavailable(denied.to_string()),
            Denied::NotANodeProxy(_)
            | Denied::TrustDomain(..)
            | Denied::NoNode(_)
            | Denied::NodeMismatch { .. }
            | Denied::NotOnNode { .. } => Self::permission_denied(denied.to_string()),
        }
    }
}

/// The identity that is signed for `caller`: its own, or the one it may ask for (certificate contract).
///
/// # Errors
/// [`Denied`] saying which condition does not hold.
pub fn authorize(
    caller: &Caller,
    impersonated: Option<SpiffeId>,
    trust_domain: &str,
    policy: &IssuancePolicy,
    pods: &dyn NodePods,
) -> Result<SpiffeId, Denied> {
    let Some(identity) = impersonated else { return Ok(caller.identity.clone()) };
    let is_node_proxy = policy.trusted_node_proxies.iter().any(|proxy| {
        proxy.namespace == caller.identity.namespace()
            && proxy.service_account == caller.identity.service_account()
    });
    if !is_node_proxy {
        return Err(Denied::NotANodeProxy(caller.identity.clone()));
    }
    if identity.trust_domain() != trust_domain {
        return Err(Denied::TrustDomain(identity, trust_domain.to_owned()));
    }
    let node = node_of(caller, pods)?;
    if pods.runs(&node, &identity) { Ok(identity) } else { Err(Denied::NotOnNode { identity, node }) }
}

/// Where the caller's pod runs: what we know ourselves, else what its token says.
fn node_of(caller: &Caller, pods: &dyn NodePods) -> Result<String, Denied> {
    let pod = caller.pod.as_ref().ok_or_else(|| Denied::NoNode(caller.identity.clone()))?;
    match (pods.node_of(caller.identity.namespace(), pod), &caller.node) {
        (Some(actual), Some(claimed)) if actual != *claimed => {
            Err(Denied::NodeMismatch { caller: caller.identity.clone(), claimed: claimed.clone(), actual })
        }
        (Some(actual), _) => Ok(actual),
        // The token outlives its pod: whoever kept it must not get the certificates of the node.
        (None, _) if pods.is_complete() => {
            Err(Denied::UnknownPod { caller: caller.identity.clone(), pod: pod.name.clone() })
        }
        (None, Some(claimed)) => Ok(claimed.clone()),
        (None, None) => Err(Denied::NoNode(caller.identity.clone())),
    }
}

/// The service. Clones share counters and authority.
#[derive(Clone)]
pub struct CertificateService {
    authority: Authority,
    authenticator: Arc<dyn Authenticator>,
    pods: Arc<dyn NodePods>,
    policy: Arc<IssuancePolicy>,
    metrics: Arc<IssuanceMetrics>,
}

impl CertificateService {
    /// Ties authority, authentication and knowledge of pods together.
    pub fn new(
        authority: Authority,
        authenticator: Arc<dyn Authenticator>,
        pods: Arc<dyn NodePods>,
        policy: IssuancePolicy,
    ) -> Self {
        Self { authority, authenticator, pods, policy: Arc::new(policy), metrics: Arc::default() }
    }

    /// Counters.
    pub fn metrics(&self) -> Arc<IssuanceMetrics> {
        Arc::clone(&self.metrics)
    }

    /// The tonic service, to be added to a server.
    pub fn into_server(self) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(self).max_decoding_message_size(MAX_MESSAGE)
    }

    fn sign(
        &self,
        caller: &Caller,
        request: &IstioCertificateRequest,
    ) -> Result<IstioCertificateResponse, Status> {
        let trust_domain = self.authority.trust_domain().as_str();
        let asked = impersonated(request).inspect_err(|_| count(&self.metrics.invalid))?;
        let identity =
            authorize(caller, asked, trust_domain, &self.policy, &*self.pods).map_err(|denied| {
                count(&self.metrics.denied);
                tracing::warn!(caller = %caller.identity, %denied, "certificate denied");
                Status::from(denied)
            })?;
        let lifetime = u64::try_from(request.validity_duration).ok().filter(|seconds| *seconds > 0);
        let issued = self
            .authority
            .sign(&request.csr, &identity, lifetime.map(Duration::from_secs))
            .map_err(|error| self.failure(&identity, &error))?;
        count(&self.metrics.issued);
        tracing::debug!(caller = %caller.identity, %identity, serial = issued.serial, "certificate issued");
        Ok(IstioCertificateResponse { cert_chain: issued.chain })
    }

    fn failure(&self, identity: &SpiffeId, error: &SignError) -> Status {
        match error {
            SignError::Request(_) => {
                count(&self.metrics.invalid);
                Status::invalid_argument(error.to_string())
            }
            SignError::Expired | SignError::Library { .. } => {
                count(&self.metrics.failed);
                tracing::error!(%identity, %error, "certificate not signed");
                Status::unavailable(error.to_string())
            }
        }
    }
}

impl std::fmt::Debug for CertificateService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateService").field("policy", &self.policy).finish_non_exhaustive()
    }
}

#[async_trait]
impl IstioCertificateService for CertificateService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let caller = match Credentials::from_metadata(request.metadata()) {
            Ok(credentials) => {
                let credentials = credentials.with_peer(request.remote_addr().map(|peer| peer.ip()));
                self.authenticator.authenticate(&credentials).await
            }
            Err(error) => Err(error),
        };
        let caller = caller.map_err(|error| {
            count(&self.metrics.unauthenticated);
            tracing::warn!(peer = ?request.remote_addr(), %error, "caller not authenticated");
            Status::from(error)
        })?;
        self.sign(&caller, request.get_ref()).map(Response::new)
    }
}

fn impersonated(request: &IstioCertificateRequest) -> Result<Option<SpiffeId>, Status> {
    let fields = request.metadata.as_ref().map(|metadata| &metadata.fields);
    let Some(value) = fields.and_then(|fields| fields.get(IMPERSONATED_IDENTITY)) else { return Ok(None) };
    match &value.kind {
        Some(Kind::StringValue(text)) => text
            .parse()
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("{IMPERSONATED_IDENTITY}: {error}"))),
        _ => Err(Status::invalid_argument(format!("{IMPERSONATED_IDENTITY} is not a string"))),
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Pods {
        is_complete: bool,
    }

    impl NodePods for Pods {
        fn is_complete(&self) -> bool {
            self.is_complete
        }

        fn runs(&self, node: &str, identity: &SpiffeId) -> bool {
            node == "node-a" && identity.namespace() == "shop"
        }

        fn node_of(&self, _namespace: &str, pod: &PodRef) -> Option<String> {
            (pod.uid == "known").then(|| "node-a".to_owned())
        }
    }

    fn id(text: &str) -> SpiffeId {
        text.parse().unwrap()
    }

    fn ztunnel(uid: Option<&str>, node: Option<&str>) -> Caller {
        Caller {
            identity: id("spiffe://cluster.local/ns/ambit-system/sa/ztunnel"),
            pod: uid.map(|uid| PodRef { name: "ztunnel-x".into(), uid: uid.into() }),
            node: node.map(str::to_owned),
            cluster_id: String::new(),
        }
    }

    fn ask(caller: &Caller, identity: &str) -> Result<SpiffeId, Denied> {
        authorize(caller, Some(id(identity)), "cluster.local", &IssuancePolicy::default(), &Pods::default())
    }

    const SHOP: &str = "spiffe://cluster.local/ns/shop/sa/reviews";

    #[test]
    fn a_node_proxy_gets_the_identities_of_pods_on_its_node() {
        assert_eq!(ask(&ztunnel(Some("known"), None), SHOP), Ok(id(SHOP)));
        assert_eq!(ask(&ztunnel(Some("other"), Some("node-a")), SHOP), Ok(id(SHOP)));
    }

    #[test]
    fn the_token_of_a_deleted_pod_gets_no_certificates() {
        let (policy, pods) = (IssuancePolicy::default(), Pods { is_complete: true });
        let ask = |uid| {
            let caller = ztunnel(Some(uid), Some("node-a"));
            authorize(&caller, Some(id(SHOP)), "cluster.local", &policy, &pods)
        };
        assert_eq!(ask("known"), Ok(id(SHOP)));
        let denied = ask("deleted").unwrap_err();
        assert!(matches!(denied, Denied::UnknownPod { .. }));
        assert_eq!(Status::from(denied).code(), tonic::Code::Unavailable);
    }

    #[test]
    fn a_node_proxy_gets_nobody_who_runs_elsewhere() {
        let denied = ask(&ztunnel(Some("other"), Some("node-b")), SHOP);
        assert!(matches!(denied, Err(Denied::NotOnNode { .. })));
    }

    #[test]
    fn a_token_that_lies_about_its_node_is_denied() {
        let denied = ask(&ztunnel(Some("known"), Some("node-b")), SHOP);
        assert!(matches!(denied, Err(Denied::NodeMismatch { .. })));
    }

    #[test]
    fn a_token_not_bound_to_a_pod_or_node_is_denied() {
        assert!(matches!(ask(&ztunnel(None, Some("node-a")), SHOP), Err(Denied::NoNode(_))));
        assert!(matches!(ask(&ztunnel(Some("other"), None), SHOP), Err(Denied::NoNode(_))));
    }

    #[test]
    fn an_identity_of_another_trust_domain_is_denied() {
        let denied = ask(&ztunnel(Some("known"), None), "spiffe://other.example/ns/shop/sa/reviews");
        assert!(matches!(denied, Err(Denied::TrustDomain(..))));
    }

    #[test]
    fn others_than_node_proxies_get_only_themselves() {
        let mut caller = ztunnel(Some("known"), None);
        caller.identity = id("spiffe://cluster.local/ns/shop/sa/ztunnel");
        assert!(matches!(ask(&caller, SHOP), Err(Denied::NotANodeProxy(_))));
        let own = authorize(&caller, None, "cluster.local", &IssuancePolicy::default(), &Pods::default());
        assert_eq!(own, Ok(caller.identity));
    }
}
