//! The certificate authority: its keys, its policy and its service.
//!
//! A library that the control plane hosts. The pieces:
//!
//! * [`Authority`]: signs for identities with a self-made or plugged-in key, reloads and rotates live.
//! * [`AuthorityStore`]: where its key is, and what it must remember about a change of roots.
//! * [`Authenticator`] and [`JwtAuthenticator`]: authentication of callers.
//! * [`NodePods`]: which identities run where, as the control plane knows it.
//! * [`CertificateService`]: the gRPC service that ties them together.
//!
//! The identity that is signed always comes from the authenticated caller, never from the signing request.

pub mod authentication;
pub mod authority;
mod follower;
pub mod jwt;
mod material;
mod request;
mod rotation;
pub mod service;
pub mod serving;
mod signer;
pub mod store;

pub use authentication::{AuthenticationError, Authenticator, Caller, Credentials, PodRef};
pub use authority::{Authority, AuthorityConfig, AuthorityError, RevokedCertificate, ServerCertificate};
pub use jwt::{JwtAuthenticator, JwtConfig, JwtError};
pub use request::RequestError;
pub use service::{CertificateService, IssuanceMetrics, IssuancePolicy, NodePods, NodeProxy};
pub use signer::{Issued, SignError};
pub use store::{AuthorityStore, FileStore, StoreError, StoreWatch, StoredMaterial};
