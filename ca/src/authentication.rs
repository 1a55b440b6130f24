//! Authentication of callers: the trait that verifies tokens, and the caller that it returns.
//!
//! Discovery uses the same seam as signing. One implementation is [`JwtAuthenticator`](crate::JwtAuthenticator).

use std::net::IpAddr;

use ambit_identity::SpiffeId;
use async_trait::async_trait;
use tonic::metadata::MetadataMap;

/// Tokens longer than this are refused unread, bytes.
const MAX_TOKEN: usize = 16 * 1024;

/// Why authentication failed. The message is sent to the caller and must not help a forger.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthenticationError {
    /// No `authorization: Bearer` header.
    #[error("no bearer token")]
    NoToken,
    /// Not a token at all.
    #[error("bearer token of {0} bytes is not one")]
    NotAToken(usize),
    /// Signature, audience, issuer or time is wrong.
    #[error("token refused: {0}")]
    Refused(String),
    /// The token names no service account of ours.
    #[error("token names no identity: {0}")]
    Identity(String),
    /// The caller says that it is of another cluster.
    #[error("cluster {0:?} is not known here")]
    Cluster(String),
    /// We cannot verify now.
    #[error("tokens cannot be verified now: {0}")]
    Unavailable(String),
}

impl From<AuthenticationError> for tonic::Status {
    fn from(error: AuthenticationError) -> Self {
        match error {
            AuthenticationError::Unavailable(_) => Self::unavailable(error.to_string()),
            AuthenticationError::NoToken
            | AuthenticationError::NotAToken(_)
            | AuthenticationError::Refused(_)
            | AuthenticationError::Identity(_)
            | AuthenticationError::Cluster(_) => Self::unauthenticated(error.to_string()),
        }
    }
}

/// What a caller shows (certificate contract).
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    bearer: String,
    cluster_id: String,
    peer: Option<IpAddr>,
}

impl Credentials {
    /// Reads `authorization` and `clusterid`.
    ///
    /// # Errors
    /// [`AuthenticationError::NoToken`] or [`AuthenticationError::NotAToken`].
    pub fn from_metadata(metadata: &MetadataMap) -> Result<Self, AuthenticationError> {
        let text = |name: &str| metadata.get(name).and_then(|value| value.to_str().ok());
        let header = text("authorization").ok_or(AuthenticationError::NoToken)?;
        // RFC 9110 §11.1: the scheme's name is case-insensitive.
        let bearer = match header.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
            _ => return Err(AuthenticationError::NoToken),
        };
        Self::new(bearer, text("clusterid").unwrap_or_default())
    }

    /// A token and the cluster that the caller named (empty if it named none).
    ///
    /// # Errors
    /// [`AuthenticationError::NotAToken`] if it is empty or implausibly long.
    pub fn new(bearer: &str, cluster_id: &str) -> Result<Self, AuthenticationError> {
        if bearer.is_empty() || bearer.len() > MAX_TOKEN {
            return Err(AuthenticationError::NotAToken(bearer.len()));
        }
        Ok(Self { bearer: bearer.to_owned(), cluster_id: cluster_id.to_owned(), peer: None })
    }

    /// The same, shown by a caller at this address.
    #[must_use]
    pub fn with_peer(self, peer: Option<IpAddr>) -> Self {
        Self { peer, ..self }
    }

    /// The address of the caller's connection, if known.
    pub fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// The token.
    pub fn bearer(&self) -> &str {
        &self.bearer
    }

    /// The cluster that the caller names; empty if none.
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }
}

impl std::fmt::Debug for Credentials {
    /// Without the token: it would let a reader of the log in.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("cluster_id", &self.cluster_id).finish_non_exhaustive()
    }
}

/// The pod that a token is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRef {
    /// Name, in the namespace of the caller's identity.
    pub name: String,
    /// Its uid, so that a namesake is not taken for it.
    pub uid: String,
}

/// An authenticated caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Who it is.
    pub identity: SpiffeId,
    /// The pod that its token is bound to.
    pub pod: Option<PodRef>,
    /// The node on which its token says that the pod runs.
    pub node: Option<String>,
    /// The cluster that it named; empty if none.
    pub cluster_id: String,
}

/// Verifies credentials.
#[async_trait]
pub trait Authenticator: Send + Sync + 'static {
    /// Who shows these credentials.
    ///
    /// # Errors
    /// [`AuthenticationError`]; the caller is refused.
    async fn authenticate(&self, credentials: &Credentials) -> Result<Caller, AuthenticationError>;
}
