//! The authority's files: made and kept, plugged in, replaced while it runs, and what its certificates are like.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_ca::{
    Authority, AuthorityConfig, AuthorityError, AuthorityStore, FileStore, RevokedCertificate, SignError,
    StoreError, StoredMaterial,
};
use ambit_identity::{CertificateRequest, PeerError, Revocations, SpiffeId, Trust, TrustDomain, Usage};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn config(directory: &Path) -> AuthorityConfig {
    AuthorityConfig::new(TrustDomain::new("cluster.local").unwrap(), directory.to_owned())
}

async fn open(directory: &Path) -> Authority {
    let (authority, driver) = Authority::open(config(directory)).await.unwrap();
    tokio::spawn(driver);
    authority
}

fn reviews() -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", "reviews").unwrap()
}

fn csr() -> String {
    CertificateRequest::new(&reviews()).unwrap().csr_pem().to_owned()
}

fn ders(pems: &[String]) -> Vec<CertificateDer<'static>> {
    pems.iter().map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).collect()
}

fn trust(authority: &Authority) -> Trust {
    let trust = Trust::new(authority.trust_domain().clone(), Vec::new());
    trust.set_roots(authority.roots_pem().as_bytes()).unwrap();
    trust
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(15);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not within 15 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A root and an intermediate under it, as an operator plugs them in.
struct Plugged {
    root: String,
    intermediate: String,
    key: String,
}

fn plugged(name: &str) -> Plugged {
    let authority = |common_name: String| {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, common_name);
        parameters.distinguished_name.push(DnType::CountryName, "DE");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        parameters
    };
    let root_key = KeyPair::generate().unwrap();
    let root_parameters = authority(format!("{name} root"));
    let root = root_parameters.self_signed(&root_key).unwrap().pem();
    let root_issuer = Issuer::new(root_parameters, root_key);
    let key = KeyPair::generate().unwrap();
    let intermediate = authority(format!("{name} intermediate")).signed_by(&key, &root_issuer).unwrap().pem();
    Plugged { root, intermediate, key: key.serialize_pem() }
}

/// Writes the files, the key last, so that a reader in between sees a pair that does not fit.
fn plug_in(directory: &Path, plugged: &Plugged, roots: &str) {
    std::fs::write(directory.join("root-cert.pem"), roots).unwrap();
    std::fs::write(directory.join("cert-chain.pem"), format!("{}{}", plugged.intermediate, plugged.root))
        .unwrap();
    std::fs::write(directory.join("ca-cert.pem"), &plugged.intermediate).unwrap();
    std::fs::write(directory.join("ca-key.pem"), &plugged.key).unwrap();
}

#[tokio::test]
async fn a_self_signed_root_is_made_once_with_a_private_key_file() {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().join("ca");
    let first = open(&home).await;
    let second = open(&home).await;
    assert_eq!(first.roots_pem(), second.roots_pem());
    let mode = std::fs::metadata(home.join("ca-key.pem")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let chain = ders(&second.sign(&csr(), &reviews(), None).unwrap().chain);
    assert_eq!(trust(&first).verify(&chain[..1], Usage::Client, SystemTime::now()).unwrap(), reviews());
}

#[tokio::test]
async fn a_crash_between_key_and_certificate_does_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    open(directory.path()).await;
    std::fs::remove_file(directory.path().join("ca-cert.pem")).unwrap();
    let again = open(directory.path()).await;
    again.sign(&csr(), &reviews(), None).unwrap();
}

#[tokio::test]
async fn a_certificate_has_the_identity_of_the_caller() {
    let directory = tempfile::tempdir().unwrap();
    let authority = open(directory.path()).await;
    let key = KeyPair::generate().unwrap();
    let mut greedy = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
    greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    greedy.distinguished_name.push(DnType::CommonName, "admin");
    let request = greedy.serialize_request(&key).unwrap().pem().unwrap();
    let issued = authority.sign(&request, &reviews(), None).unwrap();
    let chain = ders(&issued.chain);
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    let names = &leaf.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert_eq!(names, &[GeneralName::URI(reviews().as_str())]);
    assert_eq!(leaf.subject().iter().count(), 0);
    assert!(!leaf.is_ca());
    assert_eq!(leaf.public_key().subject_public_key.data.as_ref(), rcgen::PublicKeyData::der_bytes(&key));
}

#[tokio::test]
async fn lifetimes_have_a_default_a_maximum_and_backdating() {
    let directory = tempfile::tempdir().unwrap();
    let settings =
        AuthorityConfig { max_lifetime: AuthorityConfig::MAX_LIFETIME, ..config(directory.path()) };
    let (authority, _driver) = Authority::open(settings).await.unwrap();
    let span = |lifetime: Option<Duration>| {
        let chain = ders(&authority.sign(&csr(), &reviews(), lifetime).unwrap().chain);
        let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64;
        (now - leaf.validity().not_before.timestamp(), leaf.validity().not_after.timestamp() - now)
    };
    for (asked, expected) in [(None, DAY), (Some(DAY * 400), DAY * 90), (Some(DAY / 24), DAY / 24)] {
        let (before, after) = span(asked);
        assert!((120..=122).contains(&before), "{before}");
        assert!((expected.as_secs() as i64 - after).abs() <= 2, "{after} for {asked:?}");
    }
}

#[tokio::test]
async fn serial_numbers_are_positive_and_never_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let authority = open(directory.path()).await;
    let request = csr();
    let mut seen = std::collections::HashSet::new();
    for _ in 0..200 {
        let serial = authority.sign(&request, &reviews(), None).unwrap().serial;
        assert!(serial.len() == 32 && serial.as_str() < "80", "{serial}");
        assert!(seen.insert(serial));
    }
}

#[tokio::test]
async fn a_plugged_in_intermediate_signs_up_to_its_root() {
    let directory = tempfile::tempdir().unwrap();
    let plugged = plugged("corp");
    plug_in(directory.path(), &plugged, &plugged.root);
    let authority = open(directory.path()).await;
    let chain = authority.sign(&csr(), &reviews(), None).unwrap().chain;
    assert_eq!(chain.len(), 3);
    let parsed = ders(&chain);
    assert_eq!(parsed[1], CertificateDer::from_pem_slice(plugged.intermediate.as_bytes()).unwrap());
    assert_eq!(parsed[2], CertificateDer::from_pem_slice(plugged.root.as_bytes()).unwrap());
    assert!(chain.iter().all(|pem| pem.matches("BEGIN").count() == 1));
    let trust = trust(&authority);
    assert_eq!(trust.verify(&parsed[..2], Usage::Server, SystemTime::now()).unwrap(), reviews());
    assert!(trust.verify(&parsed[..1], Usage::Server, SystemTime::now()).is_err());
}

#[tokio::test]
async fn a_kubernetes_tls_secret_can_be_plugged_in() {
    let directory = tempfile::tempdir().unwrap();
    let plugged = plugged("corp");
    std::fs::write(directory.path().join("tls.crt"), &plugged.intermediate).unwrap();
    std::fs::write(directory.path().join("tls.key"), &plugged.key).unwrap();
    std::fs::write(directory.path().join("ca.crt"), &plugged.root).unwrap();
    let chain = ders(&open(directory.path()).await.sign(&csr(), &reviews(), None).unwrap().chain);
    assert_eq!(chain.len(), 3);
}

#[tokio::test]
async fn files_that_do_not_fit_together_are_refused_with_the_reason() {
    let (ours, theirs) = (plugged("ours"), plugged("theirs"));
    let refuse = async |change: &dyn Fn(&Path)| {
        let directory = tempfile::tempdir().unwrap();
        plug_in(directory.path(), &ours, &ours.root);
        change(directory.path());
        match Authority::open(config(directory.path())).await.map(|_| ()) {
            Err(error @ AuthorityError::Material { .. }) => error.to_string(),
            outcome => panic!("{outcome:?}"),
        }
    };
    let write = |name: &'static str, content: String| {
        move |directory: &Path| std::fs::write(directory.join(name), &content).unwrap()
    };
    assert!(refuse(&write("ca-key.pem", theirs.key.clone())).await.contains("does not belong"));
    assert!(refuse(&write("root-cert.pem", theirs.root.clone())).await.contains("not accepted"));
    assert!(refuse(&write("ca-cert.pem", "nonsense".into())).await.contains("no certificate"));
    assert!(refuse(&write("ca-key.pem", "nonsense".into())).await.contains("ca-key.pem"));
    let gone = |directory: &Path| std::fs::remove_file(directory.join("ca-key.pem")).unwrap();
    assert!(refuse(&gone).await.contains("ca-key.pem"));
}

#[tokio::test]
async fn a_root_replaced_while_running_signs_after_its_propagation() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (plugged("old"), plugged("new"));
    plug_in(directory.path(), &old, &old.root);
    let settings =
        AuthorityConfig { root_propagation: Some(Duration::from_secs(3)), ..config(directory.path()) };
    let (authority, driver) = Authority::open(settings).await.unwrap();
    tokio::spawn(driver);
    // The root that signs comes first in the last element of a chain; others that are published follow.
    let root_of = |authority: &Authority| {
        let roots = authority.sign(&csr(), &reviews(), None).unwrap().chain.pop().unwrap();
        CertificateDer::from_pem_slice(roots.as_bytes()).unwrap()
    };
    let before = root_of(&authority);
    let changes = authority.subscribe();

    plug_in(directory.path(), &new, &new.root);
    until("both roots published", || authority.roots_pem().matches("BEGIN").count() == 2).await;
    assert_eq!(root_of(&authority), before, "the new root signs before everybody had time to learn it");
    assert!(changes.has_changed().unwrap());
    until("the new root signs", || root_of(&authority) != before).await;
    assert_eq!(
        authority.roots_pem().matches("BEGIN").count(),
        2,
        "the old root goes with its last certificate"
    );
    let chain = ders(&authority.sign(&csr(), &reviews(), None).unwrap().chain);
    assert!(trust(&authority).verify(&chain[..2], Usage::Client, SystemTime::now()).is_ok());
}

#[tokio::test]
async fn broken_files_leave_the_last_good_ones_in_force() {
    let directory = tempfile::tempdir().unwrap();
    let authority = open(directory.path()).await;
    let before = authority.roots_pem();
    std::fs::write(directory.path().join("ca-key.pem"), "nonsense").unwrap();
    std::fs::remove_file(directory.path().join("ca-cert.pem")).unwrap();
    until("the driver has looked", || authority.reload_failures() > 0).await;
    assert_eq!(authority.roots_pem(), before);
    authority.sign(&csr(), &reviews(), None).unwrap();
    assert!(!directory.path().join("ca-cert.pem").exists(), "no root is made while running");
}

#[tokio::test]
async fn an_own_root_near_its_end_is_renewed_with_the_same_key() {
    let directory = tempfile::tempdir().unwrap();
    let settings = AuthorityConfig {
        root_lifetime: Duration::from_secs(100),
        backdating: Duration::from_secs(450),
        ..config(directory.path())
    };
    let (first, _driver) = Authority::open(settings).await.unwrap();
    let old_trust = trust(&first);
    let at_once = AuthorityConfig { root_propagation: Some(Duration::ZERO), ..config(directory.path()) };
    let (renewed, _driver) = Authority::open(at_once).await.unwrap();
    assert!(renewed.not_after() > SystemTime::now() + DAY * 1000);
    let chain = ders(&renewed.sign(&csr(), &reviews(), None).unwrap().chain);
    assert!(old_trust.verify(&chain[..1], Usage::Client, SystemTime::now()).is_ok());
    let old_chain = ders(&first.sign(&csr(), &reviews(), None).unwrap().chain);
    assert!(trust(&renewed).verify(&old_chain[..1], Usage::Client, SystemTime::now()).is_ok());
}

#[tokio::test]
async fn no_certificate_outlives_the_authority() {
    let directory = tempfile::tempdir().unwrap();
    let short = AuthorityConfig { root_lifetime: Duration::from_secs(2), ..config(directory.path()) };
    let (authority, _driver) = Authority::open(short).await.unwrap();
    let issued = authority.sign(&csr(), &reviews(), None).unwrap();
    assert!(issued.not_after <= authority.not_after());
    let end = authority.not_after();
    until("expiry", || SystemTime::now() > end).await;
    assert!(matches!(authority.sign(&csr(), &reviews(), None), Err(SignError::Expired)));
}

#[tokio::test]
async fn a_revocation_list_that_it_signs_revokes_what_it_signed() {
    let directory = tempfile::tempdir().unwrap();
    let authority = open(directory.path()).await;
    let issued = authority.sign(&csr(), &reviews(), None).unwrap();
    let serial: Vec<u8> = (0..issued.serial.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&issued.serial[i..i + 2], 16).unwrap())
        .collect();
    let revoked = RevokedCertificate { serial, since: SystemTime::now() };
    let list = authority.sign_revocations(&[revoked], SystemTime::now() + DAY).unwrap();
    let trust = trust(&authority);
    let chain = ders(&issued.chain);
    trust.set_revocations(Revocations::from_pem(list.as_bytes()).unwrap());
    let refused = trust.verify(&chain[..1], Usage::Client, SystemTime::now());
    assert!(matches!(refused, Err(PeerError::Revoked { .. })));

    std::fs::write(directory.path().join("ca-crl.pem"), &list).unwrap();
    until("the plugged-in list", || authority.revocations_pem().as_deref() == Some(list.as_str())).await;
}

/// Settings under which a new root signs only after a while that no test waits for.
fn slow(directory: &Path) -> AuthorityConfig {
    AuthorityConfig { root_propagation: Some(DAY), ..config(directory) }
}

/// The name of the authority that signs.
fn signs(authority: &Authority) -> String {
    let chain = ders(&authority.sign(&csr(), &reviews(), None).unwrap().chain);
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    leaf.issuer().to_string()
}

fn roots(authority: &Authority) -> usize {
    authority.roots_pem().matches("BEGIN").count()
}

#[tokio::test]
async fn a_restart_during_propagation_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (plugged("old"), plugged("new"));
    plug_in(directory.path(), &old, &old.root);
    {
        let (authority, driver) = Authority::open(slow(directory.path())).await.unwrap();
        let driver = tokio::spawn(driver);
        plug_in(directory.path(), &new, &new.root);
        until("both roots published", || roots(&authority) == 2).await;
        driver.abort();
    }
    // The files hold the new key only; the old one is still to sign.
    for _ in 0..2 {
        let (authority, _driver) = Authority::open(slow(directory.path())).await.unwrap();
        assert!(signs(&authority).contains("old intermediate"), "{}", signs(&authority));
        assert_eq!(roots(&authority), 2);
        let chain = ders(&authority.sign(&csr(), &reviews(), None).unwrap().chain);
        assert!(trust(&authority).verify(&chain[..2], Usage::Client, SystemTime::now()).is_ok());
    }
}

#[tokio::test]
async fn files_swapped_while_no_replica_runs_are_propagated_first() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (plugged("old"), plugged("new"));
    plug_in(directory.path(), &old, &old.root);
    drop(Authority::open(slow(directory.path())).await.unwrap());
    plug_in(directory.path(), &new, &new.root);
    let (authority, _driver) = Authority::open(slow(directory.path())).await.unwrap();
    assert!(signs(&authority).contains("old intermediate"));
    assert_eq!(roots(&authority), 2);
}

#[tokio::test]
async fn a_retired_root_is_still_published_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (plugged("old"), plugged("new"));
    plug_in(directory.path(), &old, &old.root);
    let at_once = || AuthorityConfig { root_propagation: Some(Duration::ZERO), ..config(directory.path()) };
    {
        let (authority, driver) = Authority::open(at_once()).await.unwrap();
        let driver = tokio::spawn(driver);
        signs(&authority);
        plug_in(directory.path(), &new, &new.root);
        until("the new root signs", || signs(&authority).contains("new intermediate")).await;
        driver.abort();
    }
    let (authority, _driver) = Authority::open(at_once()).await.unwrap();
    assert!(signs(&authority).contains("new intermediate"));
    assert_eq!(roots(&authority), 2, "certificates under the old root are still valid");
}

#[tokio::test]
async fn two_replicas_make_one_root_and_switch_together() {
    let directory = tempfile::tempdir().unwrap();
    let settings =
        || AuthorityConfig { root_propagation: Some(Duration::from_secs(2)), ..config(directory.path()) };
    let (one, other) = tokio::join!(Authority::open(settings()), Authority::open(settings()));
    let ((one, first), (other, second)) = (one.unwrap(), other.unwrap());
    tokio::spawn(first);
    tokio::spawn(second);
    assert_eq!(one.roots_pem(), other.roots_pem());
    let new = plugged("new");
    plug_in(directory.path(), &new, &new.root);
    until("both publish both roots", || roots(&one) == 2 && roots(&other) == 2).await;
    until("both sign with the new key", || {
        [&one, &other].iter().all(|authority| signs(authority).contains("new intermediate"))
    })
    .await;
    until("they publish the same", || one.roots_pem() == other.roots_pem()).await;
}

#[tokio::test]
async fn the_record_of_rotations_is_private_and_never_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    drop(Authority::open(config(directory.path())).await.unwrap());
    let record = directory.path().join("rotation.json");
    assert_eq!(std::fs::metadata(&record).unwrap().permissions().mode() & 0o777, 0o600);
    for unknown in ["{\"version\": 99}", "nonsense"] {
        std::fs::write(&record, unknown).unwrap();
        let outcome = Authority::open(config(directory.path())).await.map(|_| ());
        assert!(matches!(outcome, Err(AuthorityError::Record { .. })), "{outcome:?}");
        assert_eq!(std::fs::read_to_string(&record).unwrap(), unknown);
    }
}

/// Files in a directory that cannot be written to, as a mounted Secret: the record lives as long as the program.
struct ReadOnly {
    files: FileStore,
    record: std::sync::Mutex<Option<String>>,
}

#[async_trait::async_trait]
impl AuthorityStore for ReadOnly {
    async fn material(&self) -> Result<StoredMaterial, StoreError> {
        self.files.material().await
    }

    async fn replace_material(&self, _: &StoredMaterial, _: &str, _: &str) -> Result<bool, StoreError> {
        panic!("a plugged-in authority is not replaced")
    }

    async fn rotation(&self) -> Result<Option<String>, StoreError> {
        Ok(self.record.lock().unwrap().clone())
    }

    async fn replace_rotation(&self, _: Option<&str>, record: &str) -> Result<bool, StoreError> {
        *self.record.lock().unwrap() = Some(record.to_owned());
        Ok(true)
    }

    fn forgets_rotation(&self) -> bool {
        self.record.lock().unwrap().is_some()
    }

    fn watch(&self) -> ambit_ca::StoreWatch {
        self.files.watch()
    }

    fn name(&self) -> String {
        self.files.name()
    }
}

/// After a restart nobody would know that the other root signed before.
#[tokio::test]
async fn no_root_begins_to_sign_where_the_record_is_not_kept() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (plugged("old"), plugged("new"));
    plug_in(directory.path(), &old, &old.root);
    let files = FileStore::new(directory.path().to_owned());
    let store = Arc::new(ReadOnly { files, record: std::sync::Mutex::default() });
    let settings =
        AuthorityConfig { root_propagation: Some(Duration::ZERO), store, ..config(directory.path()) };
    let (authority, driver) = Authority::open(settings).await.unwrap();
    tokio::spawn(driver);
    plug_in(directory.path(), &new, &new.root);
    until("both roots published", || roots(&authority) == 2).await;
    assert!(signs(&authority).contains("old intermediate"), "{}", signs(&authority));
}
