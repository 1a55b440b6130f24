//! Certificates of a cluster's own authority for any identity, and the list of revoked ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ambit_ca::{Authority, AuthorityConfig, RevokedCertificate};
use ambit_identity::{CertificateRequest, SpiffeId, TlsSettings, Trust, TrustDomain, WorkloadCertificate};
use parking_lot::Mutex;

use ambit_local::Cluster;

/// An hour.
const HOUR: Duration = Duration::from_secs(3600);

/// A cluster's authority, used by a test with the key from its directory.
pub struct Credentials {
    authority: Authority,
    trust: Trust,
    crl_file: PathBuf,
    revoked: Mutex<Vec<RevokedCertificate>>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("crl_file", &self.crl_file).finish_non_exhaustive()
    }
}

/// When a certificate of a node proxy's dump ends, in seconds of the Unix epoch.
pub fn end_of_dumped(certificate: &serde_json::Value) -> Option<u64> {
    let text = certificate["certChain"][0]["expirationTime"].as_str()?;
    let end = time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()?;
    u64::try_from(end.unix_timestamp()).ok()
}

impl Credentials {
    /// Reads the authority's files of `cluster`, of trust domain `cluster.local`; revocations go to `crl_file`.
    ///
    /// # Panics
    /// When they can't be read.
    pub async fn of(cluster: &Cluster, crl_file: &Path) -> Self {
        let domain = TrustDomain::new("cluster.local").expect("a trust domain");
        let config = AuthorityConfig::new(domain.clone(), cluster.ca_dir());
        let (authority, _driver) = Authority::open(config).await.expect("the cluster's authority");
        let trust = Trust::new(domain, Vec::new());
        trust.set_roots(authority.roots_pem().as_bytes()).expect("the cluster's roots");
        Self { authority, trust, crl_file: crl_file.to_owned(), revoked: Mutex::default() }
    }

    /// A certificate for `identity`, valid for an hour.
    ///
    /// # Panics
    /// When the identity is none, or signing fails.
    pub fn certificate(&self, identity: &str) -> WorkloadCertificate {
        let identity: SpiffeId = identity.parse().expect("an identity");
        let request = CertificateRequest::new(&identity).expect("a signing request");
        let chain = self.authority.sign(request.csr_pem(), &identity, Some(HOUR)).expect("a signature").chain;
        request.complete(&chain, &self.trust, TlsSettings::default()).expect("a usable certificate")
    }

    /// The cluster's roots.
    pub fn trust(&self) -> Trust {
        self.trust.clone()
    }

    /// Puts a certificate on the list that the node proxies watch, which is replaced in one step.
    ///
    /// # Panics
    /// When the list can't be written.
    pub fn revoke(&self, certificate: &WorkloadCertificate) {
        let serial = &certificate.info().serial;
        let byte = |at| u8::from_str_radix(&serial[at..at + 2], 16).expect("hexadecimal");
        let serial = (0..serial.len()).step_by(2).map(byte).collect();
        let mut revoked = self.revoked.lock();
        revoked.push(RevokedCertificate { serial, since: SystemTime::now() });
        let list = self.authority.sign_revocations(&revoked, SystemTime::now() + HOUR).expect("a list");
        let fresh = self.crl_file.with_extension("new");
        fs::write(&fresh, list)
            .and_then(|()| fs::rename(fresh, &self.crl_file))
            .expect("the list is written");
    }
}
