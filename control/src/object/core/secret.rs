//! Secrets, of which only certificates with their keys are read.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use serde::Deserialize;
use serde_json::Value;

use crate::object::NamespacedName;
use crate::object::meta::{Invalid, namespaced};

/// The type of Secrets with a certificate.
const TLS: &str = "kubernetes.io/tls";

/// A Secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secret {
    /// Its namespace and name.
    pub id: NamespacedName,
    /// The certificate in it with its key, or why there is none.
    pub key_pair: Result<KeyPair, String>,
    /// Roots in PEM that servers are verified by (`ca.crt`), as they are written.
    pub roots: Option<Arc<str>>,
    /// Revocation lists in PEM (`ca.crl`), as they are written.
    pub revoked: Option<Arc<str>>,
}

/// A certificate with its key, both in PEM. They belong together.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyPair {
    /// The chain, its own certificate first.
    pub certificates: Arc<[u8]>,
    /// The private key.
    pub private_key: Arc<[u8]>,
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyPair").finish_non_exhaustive()
    }
}

/// The manifest. Values are read one by one: an error of theirs must not be shown with what is in them.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    metadata: ObjectMeta,
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    data: Option<BTreeMap<String, Value>>,
    #[serde(default)]
    string_data: Option<BTreeMap<String, Value>>,
}

impl TryFrom<Manifest> for Secret {
    type Error = Invalid;

    fn try_from(manifest: Manifest) -> Result<Secret, Invalid> {
        let id = namespaced(&manifest.metadata)?;
        // A finding of the rule that asks for them says why there are none.
        let text = |key: &str| {
            let value = manifest.value(key).ok().filter(|value| !value.is_empty() && manifest.kind == TLS)?;
            Some(String::from_utf8_lossy(&value).into_owned().into())
        };
        let (roots, revoked) = (text("ca.crt"), text("ca.crl"));
        Ok(Secret { id, key_pair: manifest.key_pair(), roots, revoked })
    }
}

impl Manifest {
    fn key_pair(&self) -> Result<KeyPair, String> {
        if self.kind != TLS {
            return Err(format!("is not of type {TLS}"));
        }
        let (certificates, private_key) = (self.value("tls.crt")?, self.value("tls.key")?);
        check(&certificates, &private_key)?;
        Ok(KeyPair { certificates: certificates.into(), private_key: private_key.into() })
    }

    /// `stringData` overrides `data` (API reference, Secret).
    fn value(&self, key: &str) -> Result<Vec<u8>, String> {
        let text = |map: &Option<BTreeMap<String, Value>>| {
            map.as_ref().and_then(|map| map.get(key)).and_then(Value::as_str).map(str::to_owned)
        };
        if let Some(text) = text(&self.string_data) {
            return Ok(text.into_bytes());
        }
        let encoded = text(&self.data).ok_or_else(|| format!("has no {key}"))?;
        STANDARD.decode(encoded.trim()).map_err(|_| format!("has a {key} that is not base64"))
    }
}

/// Whether a certificate and a key can be read and belong together.
fn check(certificates: &[u8], private_key: &[u8]) -> Result<(), String> {
    let chain = CertificateDer::pem_slice_iter(certificates).collect::<Result<Vec<_>, _>>();
    let chain = chain.ok().filter(|chain| !chain.is_empty()).ok_or("has a tls.crt without a certificate")?;
    let key =
        PrivateKeyDer::from_pem_slice(private_key).map_err(|_| "has a tls.key without a private key")?;
    match CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider()) {
        Ok(_) => Ok(()),
        Err(rustls::Error::InconsistentKeys(_)) => Err("has a key of another certificate".to_owned()),
        Err(_) => Err("has a certificate or key that can't be used".to_owned()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use rcgen::{CertificateParams, KeyPair as Key};
    use serde_json::json;

    use super::*;

    fn read(kind: &str, certificate: &str, key: &str) -> Secret {
        let manifest = json!({
            "metadata": { "name": "s", "namespace": "n" }, "type": kind,
            "data": { "tls.crt": STANDARD.encode(certificate), "tls.key": STANDARD.encode(key) },
        });
        serde_json::from_value::<Manifest>(manifest).unwrap().try_into().unwrap()
    }

    #[test]
    fn a_certificate_is_read_with_its_own_key_alone() {
        let (key, other) = (Key::generate().unwrap(), Key::generate().unwrap());
        let parameters = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        let certificate = parameters.self_signed(&key).unwrap().pem();
        let whole = read(TLS, &certificate, &key.serialize_pem());
        assert_eq!(&*whole.key_pair.as_ref().unwrap().certificates, certificate.as_bytes());
        assert!(!format!("{whole:?}").contains("PRIVATE"));
        for (secret, wrong) in [
            (read("Opaque", &certificate, &key.serialize_pem()), "is not of type"),
            (read(TLS, &certificate, &other.serialize_pem()), "another certificate"),
            (read(TLS, "nothing", &key.serialize_pem()), "without a certificate"),
            (read(TLS, &certificate, "nothing"), "without a private key"),
        ] {
            let reason = secret.key_pair.unwrap_err();
            assert!(reason.contains(wrong), "{reason}");
        }
    }
}
