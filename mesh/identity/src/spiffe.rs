//! Identities of workloads: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
//!
//! Parsed once at the edge; inside the mesh an identity is a [`SpiffeId`], cheap to clone, compare and hash.
//! Only the one canonical form is accepted, so that no two parts of the mesh can read an identity differently.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The scheme and separator of a SPIFFE id.
const SCHEME: &str = "spiffe://";
/// SPIFFE-ID §2: ids are at most 2,048 bytes.
const MAX_ID: usize = 2048;
/// SPIFFE-ID §2.1: trust domain names are at most 255 bytes.
const MAX_TRUST_DOMAIN: usize = 255;

/// Why a text is not an identity of this mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// The text does not begin with `spiffe://`.
    #[error("identity {0:?} does not begin with spiffe://")]
    Scheme(String),
    /// The path is not `/ns/<namespace>/sa/<service account>`.
    #[error("identity {0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Path(String),
    /// The trust domain is empty, too long or has a character that is not allowed.
    #[error("{0:?} is not a trust domain (lower-case letters, digits, '.', '-', '_', at most 255)")]
    TrustDomain(String),
    /// A namespace or service account is empty, a relative segment, or has a character that is not allowed.
    #[error("{0:?} is not a segment of an identity (letters, digits, '.', '-', '_')")]
    Segment(String),
    /// The whole is longer than 2,048 bytes.
    #[error("identity of {0} bytes is longer than 2048")]
    TooLong(usize),
}

/// A trust domain: the name under which one set of roots vouches for identities.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Checks `name` (SPIFFE-ID §2.1).
    ///
    /// # Errors
    /// [`SpiffeIdError::TrustDomain`] if it is empty, longer than 255 bytes or has other characters.
    pub fn new(name: &str) -> Result<Self, SpiffeIdError> {
        check_trust_domain(name)?;
        Ok(Self(name.into()))
    }

    /// The name, without scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::new(name)
    }
}

impl Borrow<str> for TrustDomain {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl PartialEq<str> for TrustDomain {
    fn eq(&self, other: &str) -> bool {
        &*self.0 == other
    }
}

/// The identity of a workload. Cloning copies a pointer; comparison is that of the text.
#[derive(Clone)]
pub struct SpiffeId {
    /// The whole URI.
    uri: Arc<str>,
    /// Where the trust domain ends in `uri`.
    trust_domain_end: u16,
    /// Where the namespace ends in `uri`.
    namespace_end: u16,
}

impl SpiffeId {
    /// The identity of `service_account` of `namespace` in `trust_domain`.
    ///
    /// # Errors
    /// [`SpiffeIdError`] if a part is empty, too long or has a character that is not allowed.
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<Self, SpiffeIdError> {
        check_trust_domain(trust_domain)?;
        check_segment(namespace)?;
        check_segment(service_account)?;
        let uri = format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}");
        if uri.len() > MAX_ID {
            return Err(SpiffeIdError::TooLong(uri.len()));
        }
        let trust_domain_end = SCHEME.len() + trust_domain.len();
        let namespace_end = trust_domain_end + "/ns/".len() + namespace.len();
        Ok(Self {
            uri: uri.into(),
            trust_domain_end: offset(trust_domain_end)?,
            namespace_end: offset(namespace_end)?,
        })
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The whole URI, shared.
    pub fn shared(&self) -> &Arc<str> {
        &self.uri
    }

    /// The URI without `spiffe://`: the form in which policies and metrics name a principal.
    pub fn principal(&self) -> &str {
        self.part(SCHEME.len(), self.uri.len())
    }

    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        self.part(SCHEME.len(), self.trust_domain_end.into())
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        self.part(usize::from(self.trust_domain_end) + "/ns/".len(), self.namespace_end.into())
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &str {
        self.part(usize::from(self.namespace_end) + "/sa/".len(), self.uri.len())
    }

    /// The text between two offsets that the constructor established.
    fn part(&self, from: usize, to: usize) -> &str {
        self.uri.get(from..to).unwrap_or_default()
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        if uri.len() > MAX_ID {
            return Err(SpiffeIdError::TooLong(uri.len()));
        }
        let rest = uri.strip_prefix(SCHEME).ok_or_else(|| SpiffeIdError::Scheme(uri.to_owned()))?;
        let mut parts = rest.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(domain), Some("ns"), Some(namespace), Some("sa"), Some(account), None) => {
                Self::new(domain, namespace, account)
            }
            _ => Err(SpiffeIdError::Path(uri.to_owned())),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.uri, &other.uri) || self.uri == other.uri
    }
}

impl Eq for SpiffeId {}

impl std::hash::Hash for SpiffeId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.uri.hash(state);
    }
}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.uri.cmp(&other.uri)
    }
}

fn offset(position: usize) -> Result<u16, SpiffeIdError> {
    u16::try_from(position).map_err(|_| SpiffeIdError::TooLong(position))
}

/// SPIFFE-ID §2.1: `[a-z0-9.\-_]`, 1 to 255 bytes.
fn check_trust_domain(name: &str) -> Result<(), SpiffeIdError> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
    if name.is_empty() || name.len() > MAX_TRUST_DOMAIN || !name.bytes().all(allowed) {
        return Err(SpiffeIdError::TrustDomain(name.to_owned()));
    }
    Ok(())
}

/// SPIFFE-ID §2.2: `[a-zA-Z0-9.\-_]`, not empty, not `.` or `..`.
fn check_segment(segment: &str) -> Result<(), SpiffeIdError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if segment.is_empty() || segment == "." || segment == ".." || !segment.bytes().all(allowed) {
        return Err(SpiffeIdError::Segment(segment.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_identity_gives_back_its_parts() {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/reviews".parse().unwrap();
        assert_eq!(id.trust_domain(), "cluster.local");
        assert_eq!(id.namespace(), "shop");
        assert_eq!(id.service_account(), "reviews");
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/reviews");
        assert_eq!(id, SpiffeId::new("cluster.local", "shop", "reviews").unwrap());
    }

    #[test]
    fn what_is_not_exactly_an_identity_is_refused() {
        for text in [
            "",
            "cluster.local/ns/a/sa/b",
            "SPIFFE://cluster.local/ns/a/sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe://cluster.local:80/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b/",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local//ns/a/sa/b",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe://cluster.local/ns/a/sa/b?x",
            "spiffe://cluster.local/ns/a%2fb/sa/b",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_identity_survives_text_and_back(
            domain in "[a-z0-9][a-z0-9.-]{0,60}",
            namespace in "[a-z0-9][a-z0-9-]{0,62}",
            account in "[a-z0-9][a-z0-9.-]{0,100}",
        ) {
            let id = SpiffeId::new(&domain, &namespace, &account).unwrap();
            let again: SpiffeId = id.to_string().parse().unwrap();
            prop_assert_eq!(&again, &id);
            prop_assert_eq!(again.trust_domain(), domain.as_str());
            prop_assert_eq!(again.namespace(), namespace.as_str());
            prop_assert_eq!(again.service_account(), account.as_str());
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,200}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.as_str(), text.as_str());
            }
        }
    }
}
