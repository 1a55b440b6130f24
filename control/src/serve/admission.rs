//! Who may subscribe, and to what: node proxies to workloads, services and policies; a waypoint to what is bound to it.
//!
//! Any workload can get a token for the control plane, so a valid one is not enough: the whole mesh is shown only to the
//! service accounts that the certificate authority also trusts as node proxies.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, GATEWAY_TYPE_URL};
use ambit_ca::{Authenticator, Caller, Credentials, IssuancePolicy};
use ambit_identity::SpiffeId;
use ambit_xds::{Admission, Permit, Store, Subscriber, View};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tonic::transport::server::TcpConnectInfo;

use crate::index::{ResourceType, root_of_view};

/// Streams at the same time of one pod, or of one identity whose tokens are bound to no pod: one in use, and those of
/// broken connections that have not been noticed yet.
const MAX_STREAMS: usize = 8;

/// Admits subscribers by their token.
#[derive(Clone)]
pub struct TokenAdmission {
    authenticator: Arc<dyn Authenticator>,
    policy: Arc<IssuancePolicy>,
    /// Knows the waypoints.
    store: Store,
    streams: Arc<Streams>,
    refused: Arc<AtomicU64>,
}

/// Who subscribes: an identity is shared by the node proxies of all nodes, so the pod counts where the token names one.
type Owner = (SpiffeId, Option<String>);

/// Streams by who opened them.
#[derive(Default)]
struct Streams(Mutex<HashMap<Owner, usize>>);

impl Streams {
    fn open(self: &Arc<Self>, caller: &Caller) -> Result<OpenStream, Status> {
        let owner = (caller.identity.clone(), caller.pod.as_ref().map(|pod| pod.uid.clone()));
        let mut streams = self.0.lock();
        let count = streams.entry(owner.clone()).or_default();
        if *count >= MAX_STREAMS {
            return Err(Status::resource_exhausted(format!(
                "{} has {MAX_STREAMS} discovery streams already",
                caller.identity
            )));
        }
        *count += 1;
        Ok(OpenStream { streams: Arc::clone(self), owner })
    }
}

/// One stream, until it is dropped.
struct OpenStream {
    streams: Arc<Streams>,
    owner: Owner,
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        let mut streams = self.streams.0.lock();
        if let Some(count) = streams.get_mut(&self.owner) {
            *count -= 1;
            if *count == 0 {
                streams.remove(&self.owner);
            }
        }
    }
}

impl TokenAdmission {
    /// Asks the given authenticator who a caller is, the policy whether that is a node proxy, and the store whether it is
    /// a waypoint.
    pub fn new(
        authenticator: Arc<dyn Authenticator>,
        policy: IssuancePolicy,
        store: Store,
    ) -> TokenAdmission {
        TokenAdmission {
            authenticator,
            policy: Arc::new(policy),
            store,
            streams: Arc::default(),
            refused: Arc::default(),
        }
    }

    /// Callers that were refused.
    pub fn refused(&self) -> Arc<AtomicU64> {
        self.refused.clone()
    }
}

/// The caller's view, if it may see anything.
fn view_of(caller: &Caller, policy: &IssuancePolicy, store: &Store) -> Result<View, Status> {
    let identity = &caller.identity;
    let is_node_proxy = policy.trusted_node_proxies.iter().any(|known| {
        known.namespace == identity.namespace() && known.service_account == identity.service_account()
    });
    if is_node_proxy {
        return Ok(View::of_types([AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL]));
    }
    // A waypoint runs under the service account that has the name of its Gateway.
    let gateway = format!("{}/{}", identity.namespace(), identity.service_account());
    if store.version(GATEWAY_TYPE_URL, &gateway).is_some() {
        return Ok(View::below(root_of_view(&gateway), ResourceType::ALL.map(ResourceType::type_url)));
    }
    Err(Status::permission_denied(format!("{identity} is neither a node proxy nor a waypoint")))
}

impl std::fmt::Debug for TokenAdmission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenAdmission").finish_non_exhaustive()
    }
}

impl Admission for TokenAdmission {
    fn admit(
        &self,
        metadata: &MetadataMap,
        extensions: &http::Extensions,
    ) -> BoxFuture<'static, Result<Subscriber, Status>> {
        let Self { authenticator, policy, store, streams, refused } = self.clone();
        let peer = extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
        let credentials = Credentials::from_metadata(metadata)
            .map(|credentials| credentials.with_peer(peer.map(|peer| peer.ip())));
        async move {
            let caller = match credentials {
                Ok(credentials) => authenticator.authenticate(&credentials).await,
                Err(error) => Err(error),
            };
            let admitted = caller.map_err(Status::from).and_then(|caller| {
                let view = view_of(&caller, &policy, &store)?;
                let permit = Some(Permit::new(streams.open(&caller)?));
                tracing::info!(caller = %caller.identity, node = caller.node.as_deref(), "subscriber admitted");
                Ok(Subscriber { identity: caller.identity.to_string().into(), view, permit })
            });
            admitted.inspect_err(|status| {
                refused.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(code = ?status.code(), reason = status.message(), "subscriber refused");
            })
        }
        .boxed()
    }
}
