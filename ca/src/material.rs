//! Key and certificates of the authority, parsed: what an operator plugged in, what the authority made itself, and
//! what a record of rotations holds.

use std::time::{Duration, SystemTime};

use pem::{EncodeConfig, LineEnding, Pem};
use rcgen::KeyPair;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::rotation::SigningKey;
use crate::signer::{Validity, self_sign};
use crate::store::StoredMaterial;

/// Common name that marks a self-signed root as our own.
const SELF_SIGNED_NAME: &str = "Ambit self-signed root";
/// A self-signed root of ours is renewed when less than this part of its lifetime is left.
const RENEW_ROOT_AT: f64 = 0.2;

/// Why the CA's key or certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MaterialError {
    /// The private key cannot be used.
    #[error("CA key: {0}")]
    Key(rcgen::Error),
    /// The CA certificate cannot be parsed.
    #[error("CA certificate: {0}")]
    Certificate(String),
    /// The certificate is not that of a certificate authority.
    #[error("certificate {0:?} is not that of a CA")]
    NotCa(String),
    /// Key and certificate do not belong together.
    #[error("CA key does not belong to the CA certificate")]
    KeyMismatch,
    /// What the key signs is not accepted with the roots given.
    #[error("what the CA signs is not accepted with its own chain and roots: {0}")]
    Unproven(String),
    /// A part is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A part does not hold what it should.
    #[error("{part}: {reason}")]
    Content {
        /// Which part.
        part: &'static str,
        /// What is wrong.
        reason: String,
    },
}

const CERTIFICATE: &str = "CA certificate (ca-cert.pem or tls.crt)";
const KEY: &str = "CA key (ca-key.pem or tls.key)";
const CHAIN: &str = "chain (cert-chain.pem)";
const ROOTS: &str = "roots (root-cert.pem or ca.crt)";

/// Parsed key and certificates.
#[derive(Debug)]
pub(crate) struct Material {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
    /// Between `certificate` and the root, both excluded.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) roots: Vec<CertificateDer<'static>>,
}

impl Material {
    pub(crate) fn parse(stored: &StoredMaterial) -> Result<Self, MaterialError> {
        let StoredMaterial { certificate, key, chain, roots, revocations: _ } = stored;
        let certificate = certificate.as_ref().ok_or(MaterialError::Missing(CERTIFICATE))?;
        let mut certificates = certificates(CERTIFICATE, certificate)?.into_iter();
        let certificate = certificates.next().ok_or_else(|| content(CERTIFICATE, "no certificate in it"))?;
        let key = private_key(key.as_ref().ok_or(MaterialError::Missing(KEY))?)?;
        let mut further: Vec<_> = certificates.collect();
        if let Some(chain) = chain {
            further.extend(self::certificates(CHAIN, chain)?);
        }
        let roots = match roots {
            Some(roots) => self::certificates(ROOTS, roots)?,
            None => vec![further.iter().find(|der| is_self_issued(der)).unwrap_or(&certificate).clone()],
        };
        if roots.is_empty() {
            return Err(content(ROOTS, "no certificate in it"));
        }
        further.retain(|der| *der != certificate && !roots.contains(der) && !is_self_issued(der));
        further.dedup();
        Ok(Self { certificate, key, chain: further, roots })
    }

    /// The recorded key.
    pub(crate) fn of_record(record: &SigningKey) -> Result<Self, MaterialError> {
        let one = |pem: &String| {
            CertificateDer::from_pem_slice(pem.as_bytes())
                .map_err(|error| content("record of root rotations", error.to_string()))
        };
        Ok(Self {
            certificate: one(&record.certificate)?,
            key: private_key(&record.key)?,
            chain: record.chain.iter().map(one).collect::<Result<_, _>>()?,
            roots: record.roots.iter().map(one).collect::<Result<_, _>>()?,
        })
    }

    /// To be recorded, with the root that its certificates were proven to lead to.
    pub(crate) fn to_record(&self, active_root: &CertificateDer<'_>, not_after: SystemTime) -> SigningKey {
        let label = match &self.key {
            PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
            PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
            _ => "PRIVATE KEY",
        };
        let all = |ders: &[CertificateDer<'_>]| ders.iter().map(|der| certificate_pem(der)).collect();
        SigningKey {
            certificate: certificate_pem(&self.certificate),
            key: to_pem(label, self.key.secret_der()),
            chain: all(&self.chain),
            roots: all(&self.roots),
            active_root: certificate_pem(active_root),
            not_after: not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
        }
    }
}

/// Lifetime and organization of a self-signed root.
#[derive(Debug, Clone)]
pub(crate) struct SelfSigned {
    pub(crate) organization: String,
    pub(crate) lifetime: Duration,
    pub(crate) backdating: Duration,
}

/// A self-signed root as PEM.
pub(crate) struct OwnRoot {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl SelfSigned {
    /// The first root, if the store holds no certificate yet. A key alone is one whose certificate was not written any
    /// more, unless roots beside it say that it was plugged in.
    pub(crate) fn create(
        &self,
        stored: &StoredMaterial,
        now: SystemTime,
    ) -> Result<Option<OwnRoot>, MaterialError> {
        match stored {
            StoredMaterial { certificate: Some(_), .. }
            | StoredMaterial { key: Some(_), roots: Some(_), .. } => Ok(None),
            StoredMaterial { key: Some(key), .. } => self.sign(key.clone(), now).map(Some),
            StoredMaterial { key: None, .. } => {
                let key =
                    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(MaterialError::Key)?;
                self.sign(key.serialize_pem(), now).map(Some)
            }
        }
    }

    /// A new certificate for the key and name of a self-made root that is near its end. Chains verify with either.
    pub(crate) fn renew(
        &self,
        stored: &StoredMaterial,
        now: SystemTime,
    ) -> Result<Option<OwnRoot>, MaterialError> {
        let (Some(certificate), Some(key)) = (&stored.certificate, &stored.key) else { return Ok(None) };
        let Ok(der) = CertificateDer::from_pem_slice(certificate.as_bytes()) else { return Ok(None) };
        if is_due_for_renewal(&der, now) { self.sign(key.clone(), now).map(Some) } else { Ok(None) }
    }

    fn sign(&self, key: String, now: SystemTime) -> Result<OwnRoot, MaterialError> {
        let pair = KeyPair::try_from(&private_key(&key)?).map_err(MaterialError::Key)?;
        let validity = Validity { not_before: now - self.backdating, not_after: now + self.lifetime };
        let certificate =
            self_sign(&pair, &self.organization, SELF_SIGNED_NAME, validity).map_err(MaterialError::Key)?;
        Ok(OwnRoot { certificate: certificate_pem(&certificate), key })
    }
}

/// Whether this certificate, PEM, is a root that we made.
pub(crate) fn is_own(certificate: &str) -> bool {
    let Ok(der) = CertificateDer::from_pem_slice(certificate.as_bytes()) else { return false };
    X509Certificate::from_der(&der).is_ok_and(|(_, certificate)| has_own_name(&certificate))
}

fn has_own_name(certificate: &X509Certificate<'_>) -> bool {
    let mut names = certificate.subject().iter_common_name();
    names.any(|name| name.as_str().is_ok_and(|name| name == SELF_SIGNED_NAME))
}

/// Each certificate of a text as PEM of its own.
pub(crate) fn split_certificates(pem: &str) -> Result<Vec<String>, MaterialError> {
    Ok(certificates(ROOTS, pem)?.iter().map(|der| certificate_pem(der)).collect())
}

/// Whether this is a root that we made and whose end is near.
fn is_due_for_renewal(der: &CertificateDer<'_>, now: SystemTime) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return false };
    let is_ours = has_own_name(&certificate);
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let validity = certificate.validity();
    let begin = validity.not_before.timestamp() as f64;
    let end = validity.not_after.timestamp() as f64;
    is_ours && end - now < (end - begin) * RENEW_ROOT_AT
}

fn is_self_issued(der: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, certificate)| certificate.subject() == certificate.issuer())
}

fn certificates(part: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .map(|der| der.map_err(|error| content(part, error.to_string())))
        .collect()
}

fn private_key(pem: &str) -> Result<PrivateKeyDer<'static>, MaterialError> {
    PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|error| content(KEY, error.to_string()))
}

fn content(part: &'static str, reason: impl Into<String>) -> MaterialError {
    MaterialError::Content { part, reason: reason.into() }
}

/// A certificate as PEM.
pub(crate) fn certificate_pem(der: &CertificateDer<'_>) -> String {
    to_pem("CERTIFICATE", der)
}

fn to_pem(label: &str, der: &[u8]) -> String {
    pem::encode_config(&Pem::new(label, der), EncodeConfig::new().set_line_ending(LineEnding::LF))
}
