//! Root and revocation files that change while the process runs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ambit_identity::{PeerError, Trust, TrustConfig, Usage};
use support::{TestCa, Wish, domain};

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";

fn config(directory: &Path) -> TrustConfig {
    TrustConfig {
        trust_domain: domain("cluster.local"),
        aliases: Vec::new(),
        roots: Some(directory.join("root-cert.pem")),
        revocations: Some(directory.join("ca-crl.pem")),
    }
}

/// Replaces a file as a careful writer does.
fn replace(path: PathBuf, content: &str) {
    let beside = path.with_extension("new");
    std::fs::write(&beside, content).unwrap();
    std::fs::rename(beside, path).unwrap();
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(15);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not within 15 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn changed_files_take_effect_and_bad_ones_change_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (TestCa::new("old"), TestCa::new("new"));
    let roots = directory.path().join("root-cert.pem");
    replace(roots.clone(), &old.pem);
    let (trust, driver) = Trust::from_files(config(directory.path())).await.unwrap();
    let driver = tokio::spawn(driver);
    let (of_old, _) = old.raw(&Wish::valid(&[CLIENT]));
    let (of_new, _) = new.raw(&Wish { serial: 7, ..Wish::valid(&[CLIENT]) });
    let verify = |leaf: &rustls::pki_types::CertificateDer<'static>| {
        trust.verify(std::slice::from_ref(leaf), Usage::Client, SystemTime::now())
    };
    assert!(verify(&of_old).is_ok());
    assert!(verify(&of_new).is_err());

    replace(roots.clone(), &format!("{}{}", old.pem, new.pem));
    until("both roots", || trust.root_count() == 2).await;
    assert!(verify(&of_old).is_ok() && verify(&of_new).is_ok());

    replace(roots.clone(), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    until("a counted failure", || trust.reload_failures() == 1).await;
    assert!(verify(&of_old).is_ok() && verify(&of_new).is_ok());

    replace(directory.path().join("ca-crl.pem"), &new.revoke(&[7]));
    until("the revocation", || matches!(verify(&of_new), Err(PeerError::Revoked { .. }))).await;
    assert!(verify(&of_old).is_ok());

    std::fs::remove_file(&roots).unwrap();
    replace(directory.path().join("ca-crl.pem"), &new.revoke(&[8]));
    until("the revocation taken back", || verify(&of_new).is_ok()).await;
    driver.abort();
}

#[tokio::test]
async fn a_broken_revocation_list_keeps_no_new_roots_out() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (TestCa::new("old"), TestCa::new("new"));
    let roots = directory.path().join("root-cert.pem");
    replace(roots.clone(), &old.pem);
    let (trust, driver) = Trust::from_files(config(directory.path())).await.unwrap();
    // Both change before the driver looks, as files of one mounted Secret do.
    replace(directory.path().join("ca-crl.pem"), "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n");
    replace(roots, &new.pem);
    let driver = tokio::spawn(driver);
    until("a counted failure", || trust.reload_failures() > 0).await;
    let (of_old, _) = old.raw(&Wish::valid(&[CLIENT]));
    let (of_new, _) = new.raw(&Wish::valid(&[CLIENT]));
    let is_trusted = |leaf: &rustls::pki_types::CertificateDer<'static>| {
        trust.verify(std::slice::from_ref(leaf), Usage::Client, SystemTime::now()).is_ok()
    };
    until("the new root", || is_trusted(&of_new) && !is_trusted(&of_old)).await;
    driver.abort();
}

#[tokio::test]
async fn without_a_root_file_nobody_is_trusted_until_it_appears() {
    let directory = tempfile::tempdir().unwrap();
    let ca = TestCa::new("root");
    let (trust, driver) = Trust::from_files(config(directory.path())).await.unwrap();
    let driver = tokio::spawn(driver);
    let (leaf, _) = ca.raw(&Wish::valid(&[CLIENT]));
    let chain = [leaf];
    let refused = trust.verify(&chain, Usage::Client, SystemTime::now());
    assert!(matches!(refused, Err(PeerError::NoRoots(_))));
    replace(directory.path().join("root-cert.pem"), &ca.pem);
    until("the root", || trust.verify(&chain, Usage::Client, SystemTime::now()).is_ok()).await;
    driver.abort();
}

#[tokio::test]
async fn a_malformed_root_file_at_start_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    replace(directory.path().join("root-cert.pem"), "not a certificate");
    assert!(Trust::from_files(config(directory.path())).await.is_err());
}
