//! What callers of the control plane bring: service account tokens and signing requests.

use std::sync::LazyLock;
use std::time::Duration;

use ambit_ca::{Authenticator, Authority, AuthorityConfig, Caller, Credentials, JwtAuthenticator, JwtConfig};
use ambit_identity::{SpiffeId, TrustDomain};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::FutureExt;
use jsonwebtoken::{Algorithm, EncodingKey};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::pem;

/// A key of this run, and who believes it. No input can be signed by it.
static SIGNING: LazyLock<(EncodingKey, JwtAuthenticator)> = LazyLock::new(|| {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let point = key.der_bytes();
    let part = |from: usize| URL_SAFE_NO_PAD.encode(&point[from..from + 32]);
    let jwk = json!({"keys": [{"kty": "EC", "crv": "P-256", "kid": "1", "x": part(1), "y": part(33)}]});
    let authenticator = JwtAuthenticator::with_key_set(config(), jwk.to_string().as_bytes()).unwrap();
    (EncodingKey::from_ec_der(&key.serialize_der()), authenticator)
});

fn config() -> JwtConfig {
    JwtConfig {
        jwks: "jwks.json".into(),
        audiences: vec!["istio-ca".to_owned()],
        issuers: Vec::new(),
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
        cluster_id: None,
    }
}

fn authenticate(authenticator: &JwtAuthenticator, token: &str) -> Option<Caller> {
    let credentials = Credentials::new(token, "").ok()?;
    authenticator.authenticate(&credentials).now_or_never().expect("nothing to wait for").ok()
}

/// No token that was not signed with the key is believed.
pub(crate) fn token(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let believed = authenticate(&SIGNING.1, &text);
    assert!(believed.is_none(), "{believed:?} was believed");
}

/// The claims of a token that is signed: the caller is the one that they name, for the audience, in their time.
pub(crate) fn claims(data: &[u8]) {
    if std::str::from_utf8(data).is_err() {
        return;
    }
    let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"ES256","kid":"1"}"#);
    let message = format!("{header}.{}", URL_SAFE_NO_PAD.encode(data));
    let signature =
        jsonwebtoken::crypto::sign(message.as_bytes(), &SIGNING.0, Algorithm::ES256).expect("signed");
    let Some(caller) = authenticate(&SIGNING.1, &format!("{message}.{signature}")) else { return };
    let claims: Value = serde_json::from_slice(data).expect("claims in JSON");
    let (namespace, account) = (caller.identity.namespace(), caller.identity.service_account());
    assert_eq!(claims["sub"], format!("system:serviceaccount:{namespace}:{account}").as_str());
    assert_eq!(caller.identity.trust_domain(), "cluster.local");
    let audience = &claims["aud"];
    let named = |it: &Value| it == "istio-ca";
    assert!(named(audience) || audience.as_array().is_some_and(|all| all.iter().any(named)), "{audience}");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!(claims["exp"].as_f64().is_some_and(|end| end > now - 60.0), "{}", claims["exp"]);
    let bound = &claims["kubernetes.io"];
    if !bound.is_null() {
        assert_eq!(bound["namespace"], namespace);
        assert_eq!(bound["serviceaccount"]["name"], account);
        assert_eq!(caller.pod.as_ref().map(|pod| pod.name.as_str()), bound["pod"]["name"].as_str());
        assert_eq!(caller.node.as_deref(), bound["node"]["name"].as_str());
    } else {
        assert!(caller.pod.is_none() && caller.node.is_none());
    }
}

/// A key set is read or refused; with whatever keys, a token without a signature is not believed.
pub(crate) fn key_set(data: &[u8]) {
    let Ok(authenticator) = JwtAuthenticator::with_key_set(config(), data) else { return };
    let claims =
        URL_SAFE_NO_PAD.encode(r#"{"sub":"system:serviceaccount:a:b","aud":"istio-ca","exp":4102444800}"#);
    for algorithm in ["none", "HS256", "ES256", "RS256", "EdDSA"] {
        let header = URL_SAFE_NO_PAD.encode(json!({ "alg": algorithm }).to_string());
        assert!(authenticate(&authenticator, &format!("{header}.{claims}.")).is_none(), "{algorithm}");
    }
}

/// An authority of this run.
static AUTHORITY: LazyLock<Authority> = LazyLock::new(|| {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config =
        AuthorityConfig::new(TrustDomain::new("cluster.local").unwrap(), directory.path().to_owned());
    // It follows no files: what drives that is dropped.
    runtime.block_on(async { Authority::open(config).await.unwrap().0 })
});

/// Whatever a signing request says, the certificate names the caller, for whom it was asked, and signs nothing.
pub(crate) fn certificate_request(data: &[u8]) {
    static CALLER: LazyLock<SpiffeId> =
        LazyLock::new(|| "spiffe://cluster.local/ns/shop/sa/server".parse().unwrap());
    let text = match std::str::from_utf8(data) {
        Ok(text) if text.contains("-----BEGIN") => text.to_owned(),
        _ => pem("CERTIFICATE REQUEST", data),
    };
    let Ok(issued) = AUTHORITY.sign(&text, &CALLER, Some(Duration::from_secs(3600))) else { return };
    let leaf = CertificateDer::from_pem_slice(issued.chain[0].as_bytes()).expect("a certificate");
    let (_, leaf) = X509Certificate::from_der(&leaf).expect("a certificate");
    let names = leaf.subject_alternative_name().expect("readable names").expect("names");
    assert_eq!(names.value.general_names, [GeneralName::URI(CALLER.as_str())]);
    assert_eq!(leaf.subject().as_raw().len(), 2, "a subject was taken from the request");
    assert!(!leaf.is_ca());
}
