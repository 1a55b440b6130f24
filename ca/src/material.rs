//! The CA's files: reading the plugged-in ones, making and keeping self-signed ones.
//!
//! Three layouts are known (contracts.md §5): `ca-cert.pem`, `ca-key.pem`, `cert-chain.pem`, `root-cert.pem`; the
//! first two alone (self-signed); and `tls.crt`, `tls.key`, `ca.crt` of a `kubernetes.io/tls` Secret.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use base64::Engine;
use rcgen::KeyPair;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::signer::{Validity, self_sign};

/// Common name by which a self-made root is known again.
const SELF_SIGNED_NAME: &str = "Ambit self-signed root";
/// A self-made root is renewed when less than this part of its lifetime is left.
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
    /// The certificate may not sign others.
    #[error("certificate {0:?} is not that of a CA")]
    NotCa(String),
    /// Key and certificate do not belong together.
    #[error("CA key does not belong to the CA certificate")]
    KeyMismatch,
    /// What the key signs is not accepted with the roots given.
    #[error("what the CA signs is not accepted with its own chain and roots: {0}")]
    Unproven(String),
    /// A file cannot be read or written.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {reason}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// Parsed CA files.
#[derive(Debug)]
pub(crate) struct Material {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
    /// Between `certificate` and the root, both excluded.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) roots: Vec<CertificateDer<'static>>,
    /// PEM of the revocation list, if there is one.
    pub(crate) revocations: Option<String>,
}

/// How long a self-made root is valid and for whom.
#[derive(Debug, Clone)]
pub(crate) struct SelfSigned {
    pub(crate) organization: String,
    pub(crate) lifetime: Duration,
    pub(crate) backdating: Duration,
}

struct Layout {
    certificate: PathBuf,
    key: PathBuf,
    chain: PathBuf,
    root: PathBuf,
    revocations: PathBuf,
}

impl Layout {
    fn of(directory: &Path) -> Self {
        let tls = directory.join("tls.crt");
        let revocations = directory.join("ca-crl.pem");
        if tls.exists() {
            Self {
                key: directory.join("tls.key"),
                // The file holds the chain as well.
                chain: tls.clone(),
                certificate: tls,
                root: directory.join("ca.crt"),
                revocations,
            }
        } else {
            Self {
                certificate: directory.join("ca-cert.pem"),
                key: directory.join("ca-key.pem"),
                chain: directory.join("cert-chain.pem"),
                root: directory.join("root-cert.pem"),
                revocations,
            }
        }
    }
}

/// Reads the CA files of `directory`, making a self-signed root there if there is none.
pub(crate) fn load_or_create(
    directory: &Path,
    self_signed: &SelfSigned,
    now: SystemTime,
) -> Result<Material, MaterialError> {
    let layout = Layout::of(directory);
    match (layout.certificate.exists(), layout.key.exists()) {
        // The key is written first, so a key alone is one whose certificate was not written any more.
        (false, true) if layout.root.exists() => {}
        (false, _) => create(directory, &layout, self_signed, now)?,
        (true, _) => {}
    }
    load_and_renew(&layout, self_signed, now)
}

/// Reads the CA files of `directory` again. Files that are missing now are being replaced, so none are made.
pub(crate) fn reload(
    directory: &Path,
    self_signed: &SelfSigned,
    now: SystemTime,
) -> Result<Material, MaterialError> {
    load_and_renew(&Layout::of(directory), self_signed, now)
}

fn load_and_renew(
    layout: &Layout,
    self_signed: &SelfSigned,
    now: SystemTime,
) -> Result<Material, MaterialError> {
    let material = load(layout)?;
    if !is_due_for_renewal(&material, now) {
        return Ok(material);
    }
    let path = layout.certificate.display();
    match renew(&material, layout, self_signed, now) {
        Ok(renewed) => {
            tracing::info!(%path, "self-signed root renewed with the same key");
            let roots = vec![renewed.clone(), material.certificate];
            Ok(Material { certificate: renewed, roots, ..material })
        }
        Err(error) => {
            tracing::warn!(%path, %error, "self-signed root is about to expire and cannot be renewed");
            Ok(material)
        }
    }
}

fn load(layout: &Layout) -> Result<Material, MaterialError> {
    let mut certificates = read_certificates(&layout.certificate)?.into_iter();
    let certificate =
        certificates.next().ok_or_else(|| content(&layout.certificate, "no certificate in it"))?;
    let key = PrivateKeyDer::from_pem_slice(&read(&layout.key)?)
        .map_err(|error| content(&layout.key, error.to_string()))?;
    let mut chain: Vec<_> = certificates.collect();
    if layout.chain != layout.certificate && layout.chain.exists() {
        chain.extend(read_certificates(&layout.chain)?);
    }
    let roots = if layout.root.exists() {
        read_certificates(&layout.root)?
    } else {
        vec![chain.iter().find(|der| is_self_issued(der)).unwrap_or(&certificate).clone()]
    };
    if roots.is_empty() {
        return Err(content(&layout.root, "no certificate in it"));
    }
    chain.retain(|der| *der != certificate && !roots.contains(der) && !is_self_issued(der));
    chain.dedup();
    let revocations = match std::fs::read_to_string(&layout.revocations) {
        Ok(pem) => Some(pem),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(reason) => return Err(MaterialError::File { path: layout.revocations.clone(), reason }),
    };
    Ok(Material { certificate, key, chain, roots, revocations })
}

fn create(
    directory: &Path,
    layout: &Layout,
    settings: &SelfSigned,
    now: SystemTime,
) -> Result<(), MaterialError> {
    let file = |reason| MaterialError::File { path: directory.to_owned(), reason };
    std::fs::create_dir_all(directory).map_err(file)?;
    let key = if layout.key.exists() {
        let der = PrivateKeyDer::from_pem_slice(&read(&layout.key)?)
            .map_err(|error| content(&layout.key, error.to_string()))?;
        KeyPair::try_from(&der).map_err(MaterialError::Key)?
    } else {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(MaterialError::Key)?;
        write(&layout.key, key.serialize_pem().as_bytes(), 0o600)?;
        key
    };
    let certificate = self_signed(&key, settings, now)?;
    write(&layout.certificate, to_pem("CERTIFICATE", &certificate).as_bytes(), 0o644)?;
    tracing::info!(directory = %directory.display(), "self-signed root made");
    Ok(())
}

fn self_signed(
    key: &KeyPair,
    settings: &SelfSigned,
    now: SystemTime,
) -> Result<CertificateDer<'static>, MaterialError> {
    let validity = Validity { not_before: now - settings.backdating, not_after: now + settings.lifetime };
    self_sign(key, &settings.organization, SELF_SIGNED_NAME, validity).map_err(MaterialError::Key)
}

/// Whether this is a root that we made and whose end is near.
fn is_due_for_renewal(material: &Material, now: SystemTime) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(&material.certificate) else { return false };
    let is_ours = certificate
        .subject()
        .iter_common_name()
        .any(|name| name.as_str().is_ok_and(|name| name == SELF_SIGNED_NAME));
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let validity = certificate.validity();
    let begin = validity.not_before.timestamp() as f64;
    let end = validity.not_after.timestamp() as f64;
    is_ours && end - now < (end - begin) * RENEW_ROOT_AT
}

/// A new certificate for the same key and name: chains verify with the old root and with the new one.
fn renew(
    material: &Material,
    layout: &Layout,
    settings: &SelfSigned,
    now: SystemTime,
) -> Result<CertificateDer<'static>, MaterialError> {
    let key = KeyPair::try_from(&material.key).map_err(MaterialError::Key)?;
    let renewed = self_signed(&key, settings, now)?;
    write(&layout.certificate, to_pem("CERTIFICATE", &renewed).as_bytes(), 0o644)?;
    Ok(renewed)
}

fn is_self_issued(der: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, certificate)| certificate.subject() == certificate.issuer())
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    CertificateDer::pem_slice_iter(&read(path)?)
        .map(|der| der.map_err(|error| content(path, error.to_string())))
        .collect()
}

fn read(path: &Path) -> Result<Vec<u8>, MaterialError> {
    std::fs::read(path).map_err(|reason| MaterialError::File { path: path.to_owned(), reason })
}

/// Writes a whole file or none: beside it, synced, then renamed.
fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), MaterialError> {
    let file = |reason| MaterialError::File { path: path.to_owned(), reason };
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(mode);
    let mut open = options.open(&beside).map_err(file)?;
    open.write_all(content).and_then(|()| open.sync_all()).map_err(file)?;
    std::fs::rename(&beside, path).map_err(file)
}

fn content(path: &Path, reason: impl Into<String>) -> MaterialError {
    MaterialError::Content { path: path.to_owned(), reason: reason.into() }
}

/// One PEM section, RFC 7468 §2: base64 in lines of 64.
pub(crate) fn to_pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::with_capacity(text.len() + text.len() / 64 + 2 * label.len() + 40);
    pem.push_str("-----BEGIN ");
    pem.push_str(label);
    pem.push_str("-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        // Base64 is ASCII, so that every position is a boundary.
        let (line, further) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = further;
    }
    pem.push_str("-----END ");
    pem.push_str(label);
    pem.push_str("-----\n");
    pem
}
