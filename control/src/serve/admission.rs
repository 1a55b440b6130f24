//! Who may subscribe, and to what: node proxies, to everything.
//!
//! Any workload can get a token for the control plane, so a valid one is not enough: the whole mesh is shown only to the
//! service accounts that the certificate authority also trusts as node proxies.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ambit_ca::{Authenticator, Caller, Credentials, IssuancePolicy};
use ambit_xds::{Admission, Subscriber, View};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tonic::Status;
use tonic::metadata::MetadataMap;

/// Admits subscribers by their token.
#[derive(Clone)]
pub struct TokenAdmission {
    authenticator: Arc<dyn Authenticator>,
    policy: Arc<IssuancePolicy>,
    refused: Arc<AtomicU64>,
}

impl TokenAdmission {
    /// Asks the given authenticator who a caller is, and the policy whether that is a node proxy.
    pub fn new(authenticator: Arc<dyn Authenticator>, policy: IssuancePolicy) -> TokenAdmission {
        TokenAdmission { authenticator, policy: Arc::new(policy), refused: Arc::default() }
    }

    /// Callers that were refused.
    pub fn refused(&self) -> Arc<AtomicU64> {
        self.refused.clone()
    }
}

/// The caller's view, if it may see anything.
fn view_of(caller: &Caller, policy: &IssuancePolicy) -> Result<View, Status> {
    let identity = &caller.identity;
    let is_node_proxy = policy.trusted_node_proxies.iter().any(|known| {
        known.namespace == identity.namespace() && known.service_account == identity.service_account()
    });
    match is_node_proxy {
        true => Ok(View::everything()),
        false => Err(Status::permission_denied(format!("{identity} is not a node proxy"))),
    }
}

impl std::fmt::Debug for TokenAdmission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenAdmission").finish_non_exhaustive()
    }
}

impl Admission for TokenAdmission {
    fn admit(&self, metadata: &MetadataMap) -> BoxFuture<'static, Result<Subscriber, Status>> {
        let Self { authenticator, policy, refused } = self.clone();
        let credentials = Credentials::from_metadata(metadata);
        async move {
            let caller = match credentials {
                Ok(credentials) => authenticator.authenticate(&credentials).await,
                Err(error) => Err(error),
            };
            let admitted = caller.map_err(Status::from).and_then(|caller| {
                let view = view_of(&caller, &policy)?;
                tracing::info!(caller = %caller.identity, node = caller.node.as_deref(), "subscriber admitted");
                Ok(Subscriber { identity: caller.identity.to_string().into(), view })
            });
            admitted.inspect_err(|status| {
                refused.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(code = ?status.code(), reason = status.message(), "subscriber refused");
            })
        }
        .boxed()
    }
}
