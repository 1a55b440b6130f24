//! Identities and the certificates that carry them.

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use ambit_identity::{
    CertificateRequest, PeerCertificate, Revocations, SpiffeId, TlsSettings, Trust, TrustDomain, Usage,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::pieces::cut;

/// Trusts one root, whose key died with the making of it: nothing that comes can be signed by it.
static TRUST: LazyLock<Trust> = LazyLock::new(|| {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let trust = trust();
    trust.set_roots(root.pem().as_bytes()).unwrap();
    trust
});

fn trust() -> Trust {
    Trust::new(TrustDomain::new("cluster.local").unwrap(), vec![TrustDomain::new("old.local").unwrap()])
}

/// An identity is read exactly as it is written, and its parts make it up.
pub(crate) fn spiffe(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(id) = text.parse::<SpiffeId>() else { return };
    assert_eq!(id.as_str(), text);
    let (domain, namespace, account) = (id.trust_domain(), id.namespace(), id.service_account());
    assert_eq!(text, format!("spiffe://{domain}/ns/{namespace}/sa/{account}"));
    assert_eq!(text, format!("spiffe://{}", id.principal()));
    assert_eq!(SpiffeId::new(domain, namespace, account).as_ref(), Ok(&id));
    assert!([namespace, account].iter().all(|part| !part.is_empty() && !part.contains('/') && *part != ".."));
}

/// A chain in DER, leaf first. Whoever it names is the one that another reader finds in it too; nobody is believed.
pub(crate) fn certificate(data: &[u8]) {
    let parts = cut(data);
    let chain: Vec<CertificateDer<'_>> = parts.iter().map(|part| CertificateDer::from(*part)).collect();
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    if let Ok(peer) = PeerCertificate::from_chain(&chain, Usage::Client) {
        if let Some(names) = uri_names(&chain[0]) {
            assert_eq!(names, [peer.identity().as_str()]);
        }
        assert!(TRUST.recheck(&peer, now).is_err());
        assert!(peer.serial().bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
    for usage in [Usage::Client, Usage::Server] {
        let verified = TRUST.verify(&chain, usage, now);
        assert!(verified.is_err(), "{verified:?} was believed");
    }
    complete(&parts);
}

/// As an authority's answer: it is for another key, so it is refused, whatever it is.
fn complete(parts: &[&[u8]]) {
    static ASKED: LazyLock<SpiffeId> =
        LazyLock::new(|| "spiffe://cluster.local/ns/shop/sa/server".parse().unwrap());
    let Ok(request) = CertificateRequest::new(&ASKED) else { return };
    let chain: Vec<String> = parts.iter().map(|part| pem("CERTIFICATE", part)).collect();
    assert!(request.complete(&chain, &TRUST, TlsSettings::default()).is_err());
}

/// The URI names of a certificate, by another parser; nothing if that one refuses it.
fn uri_names(der: &[u8]) -> Option<Vec<String>> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    });
    Some(uris.collect())
}

/// A bundle of roots is taken as a whole or changes nothing.
pub(crate) fn roots(data: &[u8]) {
    let trust = trust();
    match trust.set_roots(data) {
        Ok(()) => assert!(trust.root_count() > 0, "a bundle without a root was taken"),
        Err(_) => assert_eq!(trust.root_count(), 0),
    }
}

/// A revocation list is read or refused, and what was read can be asked.
pub(crate) fn revocations(data: &[u8]) {
    let lists =
        Revocations::from_pem(data).or_else(|_| Revocations::from_pem(pem("X509 CRL", data).as_bytes()));
    let Ok(lists) = lists else { return };
    assert!(lists.len() <= data.len());
    let trust = trust();
    trust.set_revocations(lists);
}

/// DER as PEM.
pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")
}
