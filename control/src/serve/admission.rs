//! Who may subscribe: whoever the certificate authority would believe.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ambit_ca::{Authenticator, Credentials};
use ambit_xds::Admission;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tonic::Status;
use tonic::metadata::MetadataMap;

/// Lets subscribers in by their token.
#[derive(Clone)]
pub struct TokenAdmission {
    authenticator: Arc<dyn Authenticator>,
    refused: Arc<AtomicU64>,
}

impl TokenAdmission {
    /// Asks the given authenticator.
    pub fn new(authenticator: Arc<dyn Authenticator>) -> TokenAdmission {
        TokenAdmission { authenticator, refused: Arc::default() }
    }

    /// Subscribers that were not believed.
    pub fn refused(&self) -> Arc<AtomicU64> {
        self.refused.clone()
    }
}

impl std::fmt::Debug for TokenAdmission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenAdmission").finish_non_exhaustive()
    }
}

impl Admission for TokenAdmission {
    fn admit(&self, metadata: &MetadataMap) -> BoxFuture<'static, Result<(), Status>> {
        let (authenticator, refused) = (self.authenticator.clone(), self.refused.clone());
        let credentials = Credentials::from_metadata(metadata);
        async move {
            let caller = match credentials {
                Ok(credentials) => authenticator.authenticate(&credentials).await,
                Err(error) => Err(error),
            };
            match caller {
                Ok(caller) => {
                    tracing::info!(caller = %caller.identity, node = caller.node.as_deref(), "subscriber admitted");
                    Ok(())
                }
                Err(error) => {
                    refused.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(%error, "subscriber not authenticated");
                    Err(error.into())
                }
            }
        }
        .boxed()
    }
}
