//! Where certificates come from: the seam [`Issuer`], and the control plane's CA behind it over gRPC.
//!
//! Called by the certificate store, which owns retries; an issuer tries once.

use std::collections::BTreeMap;
use std::time::Duration;

use ambit_api::ca::IstioCertificateRequest;
use ambit_api::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use async_trait::async_trait;
use prost_types::value::Kind;
use prost_types::{Struct, Value};

use crate::control_plane::ControlPlane;
use crate::spiffe::SpiffeId;

/// Metadata key under which a node proxy names the identity that it asks for (certificate contract).
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// Why a certificate was not issued.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IssueError {
    /// The CA could not be reached or broke off.
    #[error("certificate authority {address} not reachable for {identity}: {reason}")]
    Unavailable {
        /// Who was asked.
        address: String,
        /// The requested identity.
        identity: SpiffeId,
        /// What went wrong.
        reason: String,
    },
    /// The CA refused: we may not request this identity, or not now.
    #[error("certificate authority {address} denies {identity}: {reason}")]
    Denied {
        /// Who was asked.
        address: String,
        /// The requested identity.
        identity: SpiffeId,
        /// What it said.
        reason: String,
    },
    /// The answer cannot be used.
    #[error("certificate for {identity} cannot be used: {reason}")]
    Unusable {
        /// The requested identity.
        identity: SpiffeId,
        /// What is wrong.
        reason: String,
    },
    /// No answer in time.
    #[error("no certificate for {identity} within {waited:?}")]
    Timeout {
        /// The requested identity.
        identity: SpiffeId,
        /// How long was waited.
        waited: Duration,
    },
}

/// Something that signs certificates for identities.
#[async_trait]
pub trait Issuer: Send + Sync + 'static {
    /// Has `csr_pem` signed for `identity`, valid for `lifetime` if the issuer allows that much.
    ///
    /// Returns the chain as PEM texts: leaf first, intermediates, root last.
    ///
    /// # Errors
    /// [`IssueError`]; the caller decides when to try again.
    async fn issue(
        &self,
        identity: &SpiffeId,
        csr_pem: &str,
        lifetime: Duration,
    ) -> Result<Vec<String>, IssueError>;
}

/// The CA of the control plane, asked by a node proxy on behalf of a workload.
#[derive(Debug, Clone)]
pub struct GrpcIssuer {
    control_plane: ControlPlane,
    impersonate: bool,
}

impl GrpcIssuer {
    /// Asks for identities other than the caller's own, by impersonation: what a node proxy does.
    pub fn impersonating(control_plane: ControlPlane) -> Self {
        Self { control_plane, impersonate: true }
    }

    /// Asks for the caller's own identity: what a waypoint does.
    pub fn own_identity(control_plane: ControlPlane) -> Self {
        Self { control_plane, impersonate: false }
    }

    fn request(&self, identity: &SpiffeId, csr_pem: &str, lifetime: Duration) -> IstioCertificateRequest {
        let metadata = self.impersonate.then(|| Struct {
            fields: BTreeMap::from([(
                IMPERSONATED_IDENTITY.to_owned(),
                Value { kind: Some(Kind::StringValue(identity.to_string())) },
            )]),
        });
        IstioCertificateRequest {
            csr: csr_pem.to_owned(),
            validity_duration: i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata,
        }
    }
}

#[async_trait]
impl Issuer for GrpcIssuer {
    async fn issue(
        &self,
        identity: &SpiffeId,
        csr_pem: &str,
        lifetime: Duration,
    ) -> Result<Vec<String>, IssueError> {
        let request = self.request(identity, csr_pem, lifetime);
        let mut client = IstioCertificateServiceClient::with_interceptor(
            self.control_plane.channel(),
            self.control_plane.credentials(),
        );
        match client.create_certificate(request).await {
            Ok(response) => Ok(response.into_inner().cert_chain),
            Err(status) => Err(self.failure(identity, &status)),
        }
    }
}

impl GrpcIssuer {
    fn failure(&self, identity: &SpiffeId, status: &tonic::Status) -> IssueError {
        let address = self.control_plane.address().to_owned();
        let identity = identity.clone();
        let reason = format!("{:?}: {}", status.code(), describe(status));
        match status.code() {
            tonic::Code::PermissionDenied | tonic::Code::Unauthenticated => {
                IssueError::Denied { address, identity, reason }
            }
            tonic::Code::InvalidArgument => IssueError::Unusable { identity, reason },
            _ => IssueError::Unavailable { address, identity, reason },
        }
    }
}

/// The status's message with the causes below it (a refused connection, a bad server certificate).
fn describe(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
