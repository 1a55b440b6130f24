//! The label sets of the TCP families: who, to whom, how.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};

/// The label value for everything unknown.
const UNKNOWN: &str = "unknown";

/// The side of a connection that reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's proxy.
    Source,
    /// The server's proxy.
    Destination,
    /// A waypoint.
    Waypoint,
}

impl Reporter {
    fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Waypoint => "waypoint",
        }
    }
}

/// How the peer was authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Security {
    /// By certificate, or because both ends are known pods of one node.
    MutualTls,
    /// Not at all.
    Unknown,
}

impl Security {
    fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Unknown => UNKNOWN,
        }
    }
}

/// Why a connection failed, in the values of Istio's node proxy (observability contract).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ResponseFlags {
    /// The connection did not fail.
    None,
    /// Denied by policy.
    Denied,
    /// No connection to the destination.
    Connect,
    /// The TLS handshake failed.
    Tls,
    /// The HTTP/2 handshake failed, or the peer broke HTTP/2.
    Http2,
    /// The tunnel port did not answer, as when a network policy drops its packets.
    NetworkPolicy,
    /// The peer is not who it must be, or no certificate could be had.
    Identity,
    /// The peer's certificate was revoked.
    Revoked,
    /// There are as many connections to the destination as a policy allows.
    Overflow,
}

/// All flags, in the order of [`ResponseFlags::index`].
pub(super) const FLAGS: [ResponseFlags; 9] = [
    ResponseFlags::None,
    ResponseFlags::Denied,
    ResponseFlags::Connect,
    ResponseFlags::Tls,
    ResponseFlags::Http2,
    ResponseFlags::NetworkPolicy,
    ResponseFlags::Identity,
    ResponseFlags::Revoked,
    ResponseFlags::Overflow,
];

impl ResponseFlags {
    pub(super) fn index(self) -> usize {
        self as usize
    }

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Denied => "DENY",
            Self::Connect => "CONNECT",
            Self::Tls => "TLS_FAILURE",
            Self::Http2 => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::Identity => "IDENTITY_ERROR",
            Self::Revoked => "CERT_REVOKED",
            // As Envoy names it: node proxies have no such limit.
            Self::Overflow => "UO",
        }
    }
}

/// One end of a connection. Empty values are reported as `unknown`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Name of the owner: the Deployment, not the pod.
    pub workload: Arc<str>,
    /// The workload's namespace.
    pub workload_namespace: Arc<str>,
    /// `spiffe://…`.
    pub principal: Arc<str>,
    /// Canonical service name.
    pub canonical_service: Arc<str>,
    /// Canonical revision.
    pub canonical_revision: Arc<str>,
    /// The `app` of the workload; with Kubernetes the canonical service.
    pub app: Arc<str>,
    /// The `version` of the workload; with Kubernetes the canonical revision.
    pub version: Arc<str>,
    /// Cluster id.
    pub cluster: Arc<str>,
}

/// A [`Peer`] with its hash, made once per workload and shared by its connections.
#[derive(Debug)]
pub struct PeerLabels {
    peer: Peer,
    hash: u64,
}

impl PeerLabels {
    /// Hashes the peer once.
    pub fn new(peer: Peer) -> Self {
        let mut hasher = DefaultHasher::new();
        peer.hash(&mut hasher);
        Self { peer, hash: hasher.finish() }
    }

    /// The labels.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }
}

/// The service dialled.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServiceLabels {
    /// Host name: `reviews.default.svc.cluster.local`.
    pub host: Arc<str>,
    /// Short name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
}

/// The labels of one series, response flags apart.
#[derive(Debug, Clone)]
pub struct Labels {
    /// The reporting side.
    pub reporter: Reporter,
    /// The client.
    pub source: Arc<PeerLabels>,
    /// The server.
    pub destination: Arc<PeerLabels>,
    /// The service, if one was dialled.
    pub service: Option<Arc<ServiceLabels>>,
    /// `tcp`, or the protocol that a waypoint sees.
    pub request_protocol: &'static str,
    /// How the peer was authenticated.
    pub security: Security,
}

impl Labels {
    /// Everything unknown.
    pub(crate) fn unknown(reporter: Reporter) -> Self {
        let peer = Arc::new(PeerLabels::new(Peer::default()));
        Self {
            reporter,
            source: Arc::clone(&peer),
            destination: peer,
            service: None,
            request_protocol: "tcp",
            security: Security::Unknown,
        }
    }

    pub(super) fn with_flags(&self, flags: ResponseFlags) -> impl EncodeLabelSet + '_ {
        Flagged { labels: self, flags }
    }

    /// Writes everything but the flags.
    pub(crate) fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let Labels { reporter, source, destination, service, request_protocol, security } = self;
        let mut put = |name: &'static str, value: &str| label(encoder, name, value);
        put("reporter", reporter.as_str())?;
        let source = &source.peer;
        put("source_workload", &source.workload)?;
        put("source_canonical_service", &source.canonical_service)?;
        put("source_canonical_revision", &source.canonical_revision)?;
        put("source_workload_namespace", &source.workload_namespace)?;
        put("source_principal", &source.principal)?;
        put("source_app", &source.app)?;
        put("source_version", &source.version)?;
        put("source_cluster", &source.cluster)?;
        let (host, name, namespace) = match service {
            Some(service) => (&*service.host, &*service.name, &*service.namespace),
            None => ("", "", ""),
        };
        put("destination_service", host)?;
        put("destination_service_namespace", namespace)?;
        put("destination_service_name", name)?;
        let destination = &destination.peer;
        put("destination_workload", &destination.workload)?;
        put("destination_canonical_service", &destination.canonical_service)?;
        put("destination_canonical_revision", &destination.canonical_revision)?;
        put("destination_workload_namespace", &destination.workload_namespace)?;
        put("destination_principal", &destination.principal)?;
        put("destination_app", &destination.app)?;
        put("destination_version", &destination.version)?;
        put("destination_cluster", &destination.cluster)?;
        put("request_protocol", request_protocol)?;
        put("connection_security_policy", security.as_str())
    }
}

fn same<T>(left: &Arc<T>, right: &Arc<T>, equal: impl Fn(&T, &T) -> bool) -> bool {
    Arc::ptr_eq(left, right) || equal(left, right)
}

impl PartialEq for Labels {
    fn eq(&self, other: &Self) -> bool {
        let Self { reporter, source, destination, service, request_protocol, security } = self;
        let peers =
            |left: &PeerLabels, right: &PeerLabels| left.hash == right.hash && left.peer == right.peer;
        *reporter == other.reporter
            && *security == other.security
            && *request_protocol == other.request_protocol
            && same(source, &other.source, peers)
            && same(destination, &other.destination, peers)
            && *service == other.service
    }
}

impl Eq for Labels {}

impl Hash for Labels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { reporter, source, destination, service, request_protocol: _, security } = self;
        reporter.hash(state);
        security.hash(state);
        source.hash.hash(state);
        destination.hash.hash(state);
        service.as_ref().map(|service| &service.host).hash(state);
    }
}

struct Flagged<'a> {
    labels: &'a Labels,
    flags: ResponseFlags,
}

/// Writes one label. Empty values are reported as `unknown`.
pub(crate) fn label(
    encoder: &mut LabelSetEncoder<'_>,
    name: &'static str,
    value: &str,
) -> Result<(), fmt::Error> {
    let value = if value.is_empty() { UNKNOWN } else { value };
    (name, value).encode(encoder.encode_label())
}

impl EncodeLabelSet for Flagged<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        self.labels.encode(encoder)?;
        label(encoder, "response_flags", self.flags.as_str())
    }
}
