//! SPIFFE identities, workload certificates and their renewal, TLS configurations.
//!
//! Used by the node proxy, the waypoint, the tunnel crate and the control plane. The pieces:
//!
//! * [`SpiffeId`] and [`TrustDomain`]: who a workload is.
//! * [`Trust`]: roots per trust domain and revocations; replaced live, read without a lock.
//! * [`WorkloadCertificate`]: one issued certificate with the two TLS configurations built from it, once.
//! * [`ClientTls`]: how a certificate is used to dial; the expected identity is checked inside the handshake.
//! * [`PeerCertificate`]: who is at the other end of a connection; [`Trust::recheck`] says whether it is still trusted.
//! * [`CertificateStore`]: the certificate of each identity, fetched in advance and renewed at half of its lifetime. A valid
//!   certificate is never discarded.
//! * [`Issuer`], [`GrpcIssuer`]: where certificates come from.
//! * [`ControlPlane`]: the authenticated channel to the control plane that discovery and signing share.
//!
//! This crate never decides policy: it says who the peer is, not what that peer may do.

pub mod certificate;
pub mod control_plane;
pub mod files;
pub mod issuer;
pub mod peer;
pub mod renewal;
pub mod revocation;
pub mod spiffe;
pub mod store;
pub mod tls;
pub mod trust;
mod verify;

pub use certificate::{CertificateInfo, CertificateMaterialError, CertificateRequest, WorkloadCertificate};
pub use control_plane::{ControlPlane, ControlPlaneConfig, ControlPlaneError, Credentials};
pub use issuer::{GrpcIssuer, IssueError, Issuer};
pub use peer::PeerCertificate;
pub use revocation::{RevocationError, Revocations};
pub use spiffe::{SpiffeId, SpiffeIdError, TrustDomain};
pub use store::{CertificateError, CertificateState, CertificateStore, StoreConfig, StoreMetrics};
pub use tls::{CipherPreference, ClientTls, TlsSettings, unnamed_server};
pub use trust::{Trust, TrustConfig, TrustError};
pub use verify::{PeerError, Usage};
