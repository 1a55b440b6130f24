//! One signing key with its chain and roots, proven to work before it is used.
//!
//! Immutable: a changed CA is a new [`Signer`]. Used by [`Authority`](crate::Authority) only.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use ambit_identity::SpiffeId;
use aws_lc_rs::hmac;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PublicKeyData,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::authority::RevokedCertificate;
use crate::material::{Material, MaterialError, certificate_pem};

/// Validity of the certificate that a new signer proves itself with.
const PROBE_LIFETIME: Duration = Duration::from_secs(60);

/// Why a certificate was not signed. Ours to blame, not the caller's.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The request is not acceptable.
    #[error(transparent)]
    Request(#[from] crate::request::RequestError),
    /// The CA's own certificate has expired.
    #[error("the certificate authority's own certificate has expired")]
    Expired,
    /// The library failed.
    #[error("cannot sign for {subject}: {reason}")]
    Library {
        /// Subject of the certificate.
        subject: String,
        /// What it said.
        reason: rcgen::Error,
    },
}

/// A signed certificate.
#[derive(Debug, Clone)]
pub struct Issued {
    /// PEM texts: leaf, intermediates, and in the last one all roots that are published, the active one first.
    pub chain: Vec<String>,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// Begin of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
}

/// Beginning and end of a certificate to be signed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Validity {
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
}

/// Subject of a certificate.
pub(crate) enum Subject<'a> {
    Workload(&'a SpiffeId),
    Server(&'a [String]),
}

/// A CA key that signs.
pub(crate) struct Signer {
    issuer: Issuer<'static, KeyPair>,
    /// What follows the leaf in a handshake.
    intermediates: Vec<CertificateDer<'static>>,
    /// The same as PEM, as sent to callers.
    intermediates_pem: Vec<String>,
    active_root: CertificateDer<'static>,
    not_after: SystemTime,
    /// Longest lifetime that was given, seconds, with a margin.
    longest_lifetime: AtomicU64,
}

impl Signer {
    /// Takes key and chain, and proves them by signing a certificate and verifying it against the roots.
    pub(crate) fn new(material: &Material, now: SystemTime) -> Result<Self, MaterialError> {
        let key = KeyPair::try_from(&material.key).map_err(MaterialError::Key)?;
        let (_, parsed) = X509Certificate::from_der(&material.certificate)
            .map_err(|error| MaterialError::Certificate(error.to_string()))?;
        if !parsed.is_ca() {
            return Err(MaterialError::NotCa(parsed.subject().to_string()));
        }
        // Otherwise the proof below would fail too, but with a reason that hides the cause.
        if parsed.public_key().subject_public_key.data.as_ref() != key.der_bytes() {
            return Err(MaterialError::KeyMismatch);
        }
        let not_after = unix(parsed.validity().not_after.timestamp());
        let is_root = material.roots.contains(&material.certificate);
        let issuer = Issuer::from_ca_cert_der(&material.certificate, key).map_err(MaterialError::Key)?;
        let mut intermediates = Vec::new();
        if !is_root {
            intermediates.push(material.certificate.clone());
            intermediates.extend(material.chain.iter().cloned());
        }
        let mut signer = Self {
            issuer,
            intermediates,
            intermediates_pem: Vec::new(),
            active_root: material.certificate.clone(),
            not_after,
            longest_lifetime: AtomicU64::new(0),
        };
        signer.active_root = signer.prove(&material.roots, now)?;
        signer.intermediates_pem = signer.intermediates.iter().map(certificate_pem).collect();
        Ok(signer)
    }

    /// Extract and expand (RFC 5869, sections 2.2 and 2.3): one block is as long as the secret.
    pub(crate) fn derive(&self, purpose: &str) -> [u8; 32] {
        let extract = hmac::Key::new(hmac::HMAC_SHA256, b"ambit derived secrets");
        let extracted = hmac::sign(&extract, self.issuer.key().serialized_der());
        let expand = hmac::Key::new(hmac::HMAC_SHA256, extracted.as_ref());
        let block = hmac::sign(&expand, &[purpose.as_bytes(), &[1]].concat());
        let mut secret = [0; 32];
        secret.iter_mut().zip(block.as_ref()).for_each(|(to, from)| *to = *from);
        secret
    }

    /// The root that this key's certificates lead to.
    pub(crate) fn active_root(&self) -> &CertificateDer<'static> {
        &self.active_root
    }

    /// End of the CA certificate's validity.
    pub(crate) fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// At least the longest lifetime that was given with this key.
    pub(crate) fn longest_lifetime(&self) -> Duration {
        Duration::from_secs(self.longest_lifetime.load(Ordering::Relaxed))
    }

    /// Notes that a certificate of this lifetime is given; true if the longest one changed. It grows by an eighth more
    /// than needed, so that callers who ask for ever longer ones change it a few dozen times at most.
    pub(crate) fn note_lifetime(&self, lifetime: Duration) -> bool {
        let seconds = lifetime.as_secs().saturating_add(1);
        if self.longest_lifetime.load(Ordering::Relaxed) >= seconds {
            return false;
        }
        self.longest_lifetime.fetch_max(seconds.saturating_add(seconds / 8), Ordering::Relaxed) < seconds
    }

    /// Signs a key whose possession the caller has verified. `roots_pem` becomes the last element of the chain.
    pub(crate) fn issue(
        &self,
        key: &impl PublicKeyData,
        identity: &SpiffeId,
        validity: Validity,
        roots_pem: &str,
    ) -> Result<Issued, SignError> {
        let (leaf, serial) = self.sign(key, &Subject::Workload(identity), validity)?;
        let mut chain = Vec::with_capacity(2 + self.intermediates_pem.len());
        chain.push(certificate_pem(&leaf));
        chain.extend_from_slice(&self.intermediates_pem);
        chain.push(roots_pem.to_owned());
        let Validity { not_before, not_after } = validity;
        Ok(Issued { chain, serial, not_before, not_after })
    }

    /// Makes a key and signs a server certificate for `names`.
    pub(crate) fn issue_server(
        &self,
        names: &[String],
        validity: Validity,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), SignError> {
        let subject = Subject::Server(names);
        let failed = |reason| SignError::Library { subject: names.join(","), reason };
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let (leaf, _serial) = self.sign(&key, &subject, validity)?;
        let chain = std::iter::once(leaf).chain(self.intermediates.iter().cloned()).collect();
        Ok((chain, key.into()))
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        subject: &Subject<'_>,
        validity: Validity,
    ) -> Result<(CertificateDer<'static>, String), SignError> {
        let failed = |reason| SignError::Library { subject: subject.to_string(), reason };
        let serial = random_serial();
        let mut parameters = CertificateParams::default();
        parameters.not_before = OffsetDateTime::from(validity.not_before);
        parameters.not_after = OffsetDateTime::from(validity.not_after);
        parameters.serial_number = Some(SerialNumber::from_slice(&serial));
        parameters.distinguished_name = DistinguishedName::new();
        parameters.subject_alt_names = subject.names().map_err(failed)?;
        parameters.is_ca = IsCa::ExplicitNoCa;
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = match subject {
            Subject::Workload(_) => {
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
            }
            Subject::Server(_) => vec![ExtendedKeyUsagePurpose::ServerAuth],
        };
        parameters.use_authority_key_identifier_extension = true;
        let certificate = parameters.signed_by(key, &self.issuer).map_err(failed)?;
        Ok((certificate.into(), hex(&serial)))
    }

    /// Signs a revocation list; PEM.
    pub(crate) fn sign_revocations(
        &self,
        revoked: &[RevokedCertificate],
        this_update: SystemTime,
        next_update: SystemTime,
    ) -> Result<String, SignError> {
        let failed = |reason| SignError::Library { subject: "the revocation list".to_owned(), reason };
        let seconds = this_update.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let revoked_certs = revoked
            .iter()
            .map(|certificate| RevokedCertParams {
                serial_number: SerialNumber::from_slice(&certificate.serial),
                revocation_time: OffsetDateTime::from(certificate.since),
                reason_code: None,
                invalidity_date: None,
            })
            .collect();
        let list = CertificateRevocationListParams {
            this_update: OffsetDateTime::from(this_update),
            next_update: OffsetDateTime::from(next_update),
            // RFC 5280 §5.2.3: numbers grow; the time does.
            crl_number: SerialNumber::from(seconds),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).and_then(|list| list.pem()).map_err(failed)
    }

    /// Signs a short-lived certificate and verifies it; returns the root that it leads to.
    fn prove(
        &self,
        roots: &[CertificateDer<'static>],
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, MaterialError> {
        let unproven = |reason: String| MaterialError::Unproven(reason);
        let validity = Validity { not_before: now, not_after: now + PROBE_LIFETIME };
        let (chain, _key) = self
            .issue_server(&["probe.invalid".to_owned()], validity)
            .map_err(|error| unproven(error.to_string()))?;
        let leaf = chain.first().ok_or_else(|| unproven("no leaf".to_owned()))?;
        let leaf = webpki::EndEntityCert::try_from(leaf).map_err(|error| unproven(error.to_string()))?;
        let now = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        let mut last = webpki::Error::UnknownIssuer;
        for root in roots {
            let anchor =
                webpki::anchor_from_trusted_cert(root).map_err(|error| unproven(error.to_string()))?;
            let anchors = [anchor];
            let verified = leaf
                .verify_for_usage(
                    webpki::ALL_VERIFICATION_ALGS,
                    &anchors,
                    &self.intermediates,
                    now,
                    webpki::KeyUsage::server_auth(),
                    None,
                    None,
                )
                .map(drop);
            match verified {
                Ok(()) => return Ok(root.clone()),
                Err(error) => last = error,
            }
        }
        Err(unproven(last.to_string()))
    }
}

impl Subject<'_> {
    fn names(&self) -> Result<Vec<SanType>, rcgen::Error> {
        match self {
            Subject::Workload(identity) => Ok(vec![SanType::URI(identity.as_str().try_into()?)]),
            Subject::Server(names) => names
                .iter()
                .map(|name| match name.parse() {
                    Ok(address) => Ok(SanType::IpAddress(address)),
                    Err(_) => Ok(SanType::DnsName(name.as_str().try_into()?)),
                })
                .collect(),
        }
    }
}

impl std::fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Subject::Workload(identity) => identity.fmt(f),
            Subject::Server(names) => f.write_str(&names.join(",")),
        }
    }
}

/// Makes a self-signed root for `key`.
pub(crate) fn self_sign(
    key: &KeyPair,
    organization: &str,
    common_name: &str,
    validity: Validity,
) -> Result<CertificateDer<'static>, rcgen::Error> {
    let mut parameters = CertificateParams::default();
    parameters.not_before = OffsetDateTime::from(validity.not_before);
    parameters.not_after = OffsetDateTime::from(validity.not_after);
    parameters.serial_number = Some(SerialNumber::from_slice(&random_serial()));
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, organization);
    name.push(DnType::CommonName, common_name);
    parameters.distinguished_name = name;
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(parameters.self_signed(key)?.into())
}

/// RFC 5280 §4.1.2.2: positive, unique, at most 20 octets; unguessable, so that no collision can be prepared.
fn random_serial() -> [u8; 16] {
    let mut serial: [u8; 16] = rand::random();
    let [first, ..] = &mut serial;
    *first = (*first & 0x7f) | 0x40;
    serial
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unix(timestamp: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(timestamp).unwrap_or_default())
}
