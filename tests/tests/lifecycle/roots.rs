//! A new root in three steps under load, as docs/certificates.md describes them: both roots known,
//! the new one signing, the old one gone.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use ambit_ca::{Authority, AuthorityConfig};
use ambit_identity::{CertificateRequest, SpiffeId, TlsSettings, Trust, TrustDomain, unnamed_server};
use ambit_local::{Cluster, Pod, PodOptions};
use ambit_tests::load::{Load, Shape};
use ambit_tests::wait;
use tokio::io::AsyncReadExt;
use tokio_rustls::TlsConnector;

use crate::bed::{Bed, ECHO, HBONE, HTTP, NAMESPACE, until_ended};
use crate::control::certificates;

/// Lifetime of all certificates, seconds.
const LIFETIME: u64 = 20;
/// How long any step may take: two lifetimes.
const STEP: Duration = Duration::from_secs(2 * LIFETIME);

/// A root with its key, which can say who it is.
struct Root {
    authority: Authority,
    certificate: String,
}

impl Root {
    /// That of the files in a directory, as they are now; made there if there are none.
    async fn of(directory: &Path) -> Self {
        let config = AuthorityConfig::new(domain(), directory.to_owned());
        // Without its driver it stays as it is, whatever becomes of the files.
        let (authority, _driver) = Authority::open(config).await.unwrap();
        let certificate = fs::read_to_string(directory.join("ca-cert.pem")).unwrap();
        Self { authority, certificate }
    }

    /// Whether the node proxy of `server` and somebody with a certificate under this root accept each other, when
    /// that somebody believes `roots` only.
    async fn meets(&self, from: &Pod, server: &Pod, roots: &str) -> bool {
        let identity: SpiffeId = format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/friend").parse().unwrap();
        let trust = Trust::new(domain(), Vec::new());
        trust.set_roots(roots.as_bytes()).unwrap();
        let request = CertificateRequest::new(&identity).unwrap();
        let chain = self.authority.sign(request.csr_pem(), &identity, None).unwrap().chain;
        let certificate = request.complete(&chain, &trust, TlsSettings::default()).unwrap();
        let stream = from.connect_within((server.ip(), HBONE).into(), wait::SOON).await.unwrap();
        let connector = TlsConnector::from(certificate.client_tls().dangerous_expecting_anyone());
        let Ok(mut session) = connector.connect(unnamed_server(), stream).await else { return false };
        // RFC 8446 §4.4.4: a client ends its handshake before the server has judged it. A server that accepts it
        // begins with its HTTP/2 settings.
        tokio::time::timeout(wait::SOON, session.read_u8()).await.expect("an answer or an end").is_ok()
    }
}

fn domain() -> TrustDomain {
    TrustDomain::new("cluster.local").unwrap()
}

/// Puts a file in place in one step.
fn put(directory: &Path, name: &str, content: &str) {
    let draft = directory.join(format!("{name}.new"));
    fs::write(&draft, content).and_then(|()| fs::rename(&draft, directory.join(name))).unwrap();
}

/// Waits until the control plane publishes so many roots and every node proxy believes as many.
async fn roots_are(bed: &Bed, count: usize) {
    wait::until("the roots are published", STEP, async || {
        let published = fs::read_to_string(bed.cluster.root_cert()).unwrap_or_default();
        published.matches("BEGIN CERTIFICATE").count() == count
    })
    .await;
    for node in 0..2 {
        wait::until("the roots are believed", STEP, async || {
            bed.count(node, "ambit_trusted_roots", &[]).await == count as f64
        })
        .await;
    }
}

/// Waits until every certificate of the node proxies was issued after this call.
async fn all_renewed(bed: &Bed) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    for node in 0..2 {
        wait::until("every certificate is renewed", STEP, async || {
            certificates(bed, node).await.values().all(|certificate| certificate.end > now + LIFETIME)
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_while_a_root_is_replaced_in_three_steps() {
    // Connections whose certificates are of the old root end with it; clients open kept ones again.
    let builder = Cluster::builder()
        .nodes(2)
        .control_arg(format!("--max-certificate-lifetime={LIFETIME}s"))
        .control_arg("--root-propagation=1s");
    let bed = Bed::on(builder, true, &[1]).await;
    let outside = bed.cluster.pod(PodOptions::new("outside", "probe").node(0)).await.unwrap();
    let server = &bed.servers[0];
    let (files, fresh) = (bed.cluster.ca_dir(), tempfile::tempdir().unwrap());
    let old = Root::of(&files).await;
    let new = Root::of(fresh.path()).await;
    assert!(old.meets(&outside, server, &old.certificate).await);
    assert!(!new.meets(&outside, server, &old.certificate).await, "nobody knows the new root yet");
    let shape = Shape { reopen: true, ..Shape::default() };
    let load = Load::start(&bed.client, bed.vip(HTTP), &shape).await.unwrap();
    let mut idle = bed.echo(bed.vip(ECHO)).await;
    load.more(50).await;

    put(&files, "root-cert.pem", &format!("{}{}", old.certificate, new.certificate));
    roots_are(&bed, 2).await;
    load.more(100).await;
    assert!(
        new.meets(&outside, server, &old.certificate).await,
        "both roots are believed, the old one signs"
    );

    for name in ["ca-cert.pem", "ca-key.pem"] {
        put(&files, name, &fs::read_to_string(fresh.path().join(name)).unwrap());
    }
    let signs = async || new.meets(&outside, server, &new.certificate).await;
    wait::until("the new root signs", STEP, signs).await;
    all_renewed(&bed).await;
    load.more(50).await;

    put(&files, "root-cert.pem", &new.certificate);
    roots_are(&bed, 1).await;
    load.more(100).await;
    assert!(!old.meets(&outside, server, &new.certificate).await, "the old root is still believed");
    assert!(new.meets(&outside, server, &new.certificate).await);
    until_ended(&mut idle, wait::SOON).await;
    // A pod of an identity that is new makes a tunnel of its own.
    bed.assert_a_late_pod_is_served().await;
    let tally = load.finish().await;
    assert!(tally.kept_reopened >= 10, "kept connections of the old root were not closed: {tally:?}");
    bed.end(&tally, |_| false).await;
}
