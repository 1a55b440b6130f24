//! Certificates and kubeconfigs of a cluster's own parts.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::json;
use time::{Duration, OffsetDateTime};

use crate::error::{Error, Result};

const LIFETIME: Duration = Duration::days(100);

/// The cluster's own authority, which signs for all of its parts, and the directory of its files.
pub struct Authority {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("directory", &self.directory).finish_non_exhaustive()
    }
}

/// Whom a certificate names.
#[derive(Debug, Clone, Copy, Default)]
pub struct Subject<'a> {
    /// Common name: the user.
    pub user: &'a str,
    /// Organisation: the user's group.
    pub group: Option<&'a str>,
    /// Host names, for servers.
    pub hosts: &'a [&'a str],
    /// Addresses, for servers.
    pub addresses: &'a [IpAddr],
}

impl Authority {
    /// Makes the authority and the key pair of service accounts: `ca.crt`, `ca.key`, `sa.pub`, `sa.key`.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn create(directory: &Path) -> Result<Self> {
        let fault = |reason| Error::Certificate { name: "the cluster's authority".to_owned(), reason };
        fs::create_dir_all(directory).map_err(Error::system(format!("make {}", directory.display())))?;
        let key = KeyPair::generate().map_err(fault)?;
        let mut params = validity(CertificateParams::default());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = name("kube-ca", None);
        let certificate = params.self_signed(&key).map_err(fault)?;
        let accounts = KeyPair::generate().map_err(fault)?;
        let this = Self { directory: directory.to_owned(), issuer: Issuer::new(params, key) };
        this.write("ca.crt", &certificate.pem())?;
        this.write("ca.key", &this.issuer.key().serialize_pem())?;
        this.write("sa.key", &accounts.serialize_pem())?;
        this.write("sa.pub", &accounts.public_key_pem())?;
        Ok(this)
    }

    /// Signs `NAME.crt` for a key that it writes to `NAME.key`.
    ///
    /// # Errors
    /// When a name is none, or a file can't be written.
    pub fn sign(&self, file: &str, subject: Subject<'_>) -> Result<()> {
        let fault = |reason| Error::Certificate { name: file.to_owned(), reason };
        let key = KeyPair::generate().map_err(fault)?;
        let hosts: Vec<String> = subject.hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = validity(CertificateParams::new(hosts).map_err(fault)?);
        params.subject_alt_names.extend(subject.addresses.iter().copied().map(SanType::IpAddress));
        params.distinguished_name = name(subject.user, subject.group);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(fault)?;
        self.write(&format!("{file}.crt"), &certificate.pem())?;
        self.write(&format!("{file}.key"), &key.serialize_pem())
    }

    /// The path of one of the authority's files.
    #[must_use]
    pub fn path(&self, file: &str) -> String {
        self.directory.join(file).display().to_string()
    }

    /// A kubeconfig for the holder of certificate `file` against `server`, with all files inlined by path.
    #[must_use]
    pub fn kubeconfig(&self, file: &str, server: &str) -> String {
        let user = json!({
            "client-certificate": self.path(&format!("{file}.crt")),
            "client-key": self.path(&format!("{file}.key")),
        });
        kubeconfig(&json!({"server": server, "certificate-authority": self.path("ca.crt")}), &user)
    }

    /// A kubeconfig that holds certificate and key itself, for use where the authority's files can't be seen.
    ///
    /// # Errors
    /// When a file can't be read.
    pub fn portable_kubeconfig(&self, file: &str, server: &str) -> Result<String> {
        let inline = |file: &str| {
            let path = self.directory.join(file);
            let bytes = fs::read(&path).map_err(Error::system(format!("read {}", path.display())))?;
            Ok::<_, Error>(base64(&bytes))
        };
        let user = json!({
            "client-certificate-data": inline(&format!("{file}.crt"))?,
            "client-key-data": inline(&format!("{file}.key"))?,
        });
        Ok(kubeconfig(&json!({"server": server, "certificate-authority-data": inline("ca.crt")?}), &user))
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        write_private(&self.directory.join(file), text)
    }
}

/// Writes a file that only its owner can read.
///
/// # Errors
/// When it can't be written.
pub fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    let file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(Error::system(format!("write {}", path.display())))
}

fn kubeconfig(cluster: &serde_json::Value, user: &serde_json::Value) -> String {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "ambit",
        "contexts": [{"name": "ambit", "context": {"cluster": "ambit", "user": "ambit"}}],
        "clusters": [{"name": "ambit", "cluster": cluster}],
        "users": [{"name": "ambit", "user": user}],
    });
    config.to_string()
}

fn validity(mut params: CertificateParams) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - Duration::hours(1);
    params.not_after = now + LIFETIME;
    params
}

fn name(user: &str, group: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(group) = group {
        name.push(DnType::OrganizationName, group);
    }
    name.push(DnType::CommonName, user);
    name
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
