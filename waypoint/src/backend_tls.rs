//! TLS to endpoints, as policies demand it. Chains are verified by rustls and webpki; `verifier` adds the names that a policy
//! lists.
//!
//! Settings become clients when a policy is compiled, on the control runtime; equal settings share one client. Files are read
//! then, and again by [`TlsClients::reload`]: what can't be read or used does not replace what could.

mod verifier;

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use ambit_api::l7;
use ambit_api::l7::backend_tls::Roots;
use ambit_identity::{CertificateStore, SpiffeId};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use prost::Message;
use rustls::client::{WantsClientCert, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ConfigBuilder, RootCertStore};
use tokio_rustls::TlsConnector;
use webpki::{CertRevocationList, OwnedCertRevocationList};

use self::verifier::{AnyVerifier, Name, NamedVerifier};
use crate::failure::Failure;
use crate::io::Endpoint;

/// Largest file of certificates or a key that is read.
const MAX_FILE: u64 = 1 << 20;

/// Why TLS can't be spoken as a policy demands. It names files, never what is in them.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read.
    #[error("cannot read {file}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        source: io::Error,
    },
    /// What should be PEM is none, or has nothing of what is needed.
    #[error("{what} cannot be used")]
    Pem {
        /// What it should be.
        what: String,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// There is no certificate among the roots.
    #[error("there is no usable root certificate in {0}")]
    NoRoots(String),
    /// A name that no certificate can have.
    #[error("{0:?} is no name of a certificate")]
    Name(String),
    /// The policy does not say who must have signed the certificate.
    #[error("no roots are named")]
    Unsaid,
    /// A revocation list is none.
    #[error("the revocation lists in {of} cannot be used: {reason}")]
    Revocations {
        /// What they should be in.
        of: String,
        /// What is wrong.
        reason: String,
    },
    /// rustls refuses it.
    #[error("certificate and key cannot be used")]
    Tls(#[from] rustls::Error),
}

/// What is spoken inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alpn {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// Bytes that are passed on: nothing is offered.
    None,
}

/// All TLS settings in use.
#[derive(Debug)]
pub struct TlsClients {
    system: Arc<RootCertStore>,
    /// By their encoded form. The lock is held for look-ups and, by the control runtime only, while files are read again.
    known: Mutex<HashMap<Vec<u8>, Weak<BackendTls>>>,
}

impl TlsClients {
    /// With Mozilla's roots, as the image has none of a system, and those of a file.
    ///
    /// # Errors
    /// [`TlsError`] of the file.
    pub fn new(roots: Option<&Path>) -> Result<Self, TlsError> {
        let mut system = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        if let Some(path) = roots {
            let file = path.display().to_string();
            system.roots.extend(root_store(&read(&file)?, &file)?.roots);
        }
        Ok(Self { system: Arc::new(system), known: Mutex::default() })
    }

    /// What settings come to; `None` where they ask for no TLS.
    pub fn get(&self, source: &l7::BackendTls) -> Option<Arc<BackendTls>> {
        if source.mode == i32::from(l7::TlsMode::Plaintext) {
            return None;
        }
        let encoded = source.encode_to_vec();
        let mut known = self.known.lock();
        known.retain(|_, client| client.strong_count() > 0);
        if let Some(found) = known.get(&encoded).and_then(Weak::upgrade) {
            return Some(found);
        }
        let new = Arc::new(BackendTls::new(source, &self.system));
        known.insert(encoded, Arc::downgrade(&new));
        Some(new)
    }

    /// Reads the files of settings again. Blocks for as long as that takes.
    pub fn reload(&self) {
        let all: Vec<_> = self.known.lock().values().filter_map(Weak::upgrade).collect();
        all.iter().for_each(|client| client.reload(&self.system));
    }
}

/// TLS as a policy demands it.
pub struct BackendTls {
    source: l7::BackendTls,
    mode: Mode,
}

enum Mode {
    /// With the waypoint's certificate of the mesh.
    Mesh,
    Tls(ArcSwap<Loaded>),
    /// A mode of a newer control plane.
    Unknown,
}

/// What was read, and what came of it.
struct Loaded {
    material: Option<Material>,
    client: Result<Arc<Client>, Arc<str>>,
}

/// The bytes of roots, revocation lists, chain and key.
#[derive(Default, PartialEq, Eq)]
struct Material {
    roots: Vec<u8>,
    revoked: Vec<u8>,
    chain: Vec<u8>,
    key: Vec<u8>,
}

/// Configurations, which `id` distinguishes from those of other clients.
struct Client {
    id: u64,
    http1: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
    bytes: Arc<ClientConfig>,
}

impl fmt::Debug for BackendTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A key may be in it.
        let l7::BackendTls { mode, server_name, names, .. } = &self.source;
        f.debug_struct("BackendTls")
            .field("mode", mode)
            .field("server_name", server_name)
            .field("names", names)
            .finish_non_exhaustive()
    }
}

impl PartialEq for BackendTls {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl BackendTls {
    fn new(source: &l7::BackendTls, system: &Arc<RootCertStore>) -> Self {
        let mode = match l7::TlsMode::try_from(source.mode) {
            Ok(l7::TlsMode::MeshTls) => Mode::Mesh,
            Ok(l7::TlsMode::Tls) => {
                let (material, client) = load(source, system);
                if let Err(error) = &client {
                    tracing::warn!(%error, "TLS to endpoints cannot be spoken as a policy demands");
                }
                Mode::Tls(ArcSwap::from_pointee(Loaded { material, client: client.map(Arc::new) }))
            }
            Ok(l7::TlsMode::Plaintext) | Err(_) => Mode::Unknown,
        };
        Self { source: source.clone(), mode }
    }

    fn reload(&self, system: &Arc<RootCertStore>) {
        let Mode::Tls(loaded) = &self.mode else { return };
        if !has_files(&self.source) {
            return;
        }
        let before = loaded.load();
        let material = match material(&self.source) {
            Ok(material) if before.material.as_ref() == Some(&material) => return,
            Ok(material) => material,
            Err(error) => {
                return tracing::warn!(error = %chain(&error), "a certificate of a policy is not there");
            }
        };
        match client(&self.source, &material, system) {
            Ok(client) => {
                tracing::info!(
                    server_name = self.source.server_name,
                    "certificates of a policy were read again"
                );
                loaded.store(Arc::new(Loaded { material: Some(material), client: Ok(Arc::new(client)) }));
            }
            Err(error) => {
                tracing::warn!(error = %chain(&error), "a certificate of a policy has changed and cannot be used");
            }
        }
    }

    /// Whether it is for endpoints that have no tunnel only: those of the mesh are reached by its TLS anyway.
    pub fn is_of_mesh(&self) -> bool {
        matches!(self.mode, Mode::Mesh)
    }

    /// The name to ask for, if the policy says one.
    pub fn server_name(&self) -> Option<&str> {
        Some(&*self.source.server_name).filter(|name| !name.is_empty())
    }

    /// The identities that it names.
    fn identities(&self) -> impl Iterator<Item = SpiffeId> + '_ {
        self.source.names.iter().filter_map(|name| match &name.kind {
            Some(l7::subject_name::Kind::Uri(uri)) => uri.parse().ok(),
            Some(l7::subject_name::Kind::Host(_)) | None => None,
        })
    }

    fn client(&self) -> Result<Option<Arc<Client>>, Failure> {
        let invalid = |reason: &str| Failure::InvalidPolicy(format!("TLS to the endpoint: {reason}"));
        match &self.mode {
            Mode::Mesh => Ok(None),
            Mode::Unknown => Err(invalid("this waypoint does not know the mode")),
            Mode::Tls(loaded) => loaded.load().client.clone().map(Some).map_err(|reason| invalid(&reason)),
        }
    }
}

/// TLS to one endpoint.
#[derive(Debug, Clone)]
pub struct EndpointTls {
    /// What the policy says.
    pub settings: Arc<BackendTls>,
    /// The name that is asked for.
    pub name: Arc<str>,
    /// Who may answer, with the mesh's certificates and unless the policy says so; none for what is no workload.
    pub identity: Option<SpiffeId>,
}

/// What connections with TLS may be shared by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TlsKey {
    /// The client; 0: the mesh's.
    client: u64,
    name: Arc<str>,
}

impl EndpointTls {
    /// What its connections may be shared by.
    ///
    /// # Errors
    /// [`Failure::InvalidPolicy`].
    pub fn key(&self) -> Result<TlsKey, Failure> {
        let client = self.settings.client()?.map_or(0, |client| client.id);
        Ok(TlsKey { client, name: self.name.clone() })
    }

    /// Begins TLS on a connection.
    ///
    /// # Errors
    /// [`Failure::InvalidPolicy`], [`Failure::Connect`], [`Failure::Unavailable`].
    pub async fn handshake(
        &self,
        io: Endpoint,
        alpn: Alpn,
        mesh: (&CertificateStore, &SpiffeId),
    ) -> Result<Endpoint, Failure> {
        let (config, name) = match self.settings.client()? {
            Some(client) => {
                let name = ServerName::try_from(self.name.to_string());
                let no_name = |_| Failure::InvalidPolicy(format!("{:?} is no name to ask for", self.name));
                (client.config(alpn), name.map_err(no_name)?)
            }
            None => (self.of_mesh(alpn, mesh).await?, ambit_identity::unnamed_server()),
        };
        begin(config, name, io, alpn).await
    }

    async fn of_mesh(
        &self,
        alpn: Alpn,
        (certificates, own): (&CertificateStore, &SpiffeId),
    ) -> Result<Arc<ClientConfig>, Failure> {
        let certificate = certificates.certificate(own).await;
        let certificate = certificate.map_err(|error| Failure::Unavailable(error.to_string()))?;
        let mut expected: Vec<SpiffeId> = self.settings.identities().collect();
        if expected.is_empty() {
            expected.extend(self.identity.clone());
        }
        let mut config = ClientConfig::clone(&certificate.client_tls().expecting(&expected));
        config.alpn_protocols = alpn.offered();
        Ok(Arc::new(config))
    }
}

/// Begins TLS; HTTP/2 must be agreed on.
async fn begin(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    io: Endpoint,
    alpn: Alpn,
) -> Result<Endpoint, Failure> {
    let stream = TlsConnector::from(config).connect(name, io).await;
    let stream = stream.map_err(|error| Failure::Connect(format!("TLS: {error}")))?;
    match (alpn, stream.get_ref().1.alpn_protocol()) {
        (Alpn::Http2, Some(b"h2")) | (Alpn::Http1 | Alpn::None, _) => Ok(Endpoint::Tls(Box::new(stream))),
        (Alpn::Http2, _) => Err(Failure::Connect("TLS: the endpoint does not speak HTTP/2".to_owned())),
    }
}

impl Alpn {
    fn offered(self) -> Vec<Vec<u8>> {
        match self {
            Self::Http1 => vec![b"http/1.1".to_vec()],
            Self::Http2 => vec![b"h2".to_vec()],
            Self::None => Vec::new(),
        }
    }
}

impl Client {
    fn new(config: &ClientConfig) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let with = |alpn: Alpn| {
            let mut config = config.clone();
            config.alpn_protocols = alpn.offered();
            Arc::new(config)
        };
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            http1: with(Alpn::Http1),
            http2: with(Alpn::Http2),
            bytes: with(Alpn::None),
        }
    }

    fn config(&self, alpn: Alpn) -> Arc<ClientConfig> {
        match alpn {
            Alpn::Http1 => self.http1.clone(),
            Alpn::Http2 => self.http2.clone(),
            Alpn::None => self.bytes.clone(),
        }
    }
}

fn load(
    source: &l7::BackendTls,
    system: &Arc<RootCertStore>,
) -> (Option<Material>, Result<Client, Arc<str>>) {
    let text = |error: TlsError| -> Arc<str> { chain(&error).into() };
    match material(source) {
        Ok(material) => {
            let client = client(source, &material, system).map_err(text);
            (Some(material), client)
        }
        Err(error) => (None, Err(text(error))),
    }
}

/// An error with what caused it.
fn chain(error: &TlsError) -> String {
    use std::error::Error as _;
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

fn has_files(source: &l7::BackendTls) -> bool {
    let certificate = source.certificate.as_ref();
    matches!(source.roots, Some(Roots::File(_)))
        || !source.revoked_file.is_empty()
        || certificate.is_some_and(|it| !it.chain_file.is_empty())
}

/// Reads a file that a policy names: whoever writes the policy must not make the waypoint read without end, or wait.
fn read(file: &str) -> Result<Vec<u8>, TlsError> {
    let limited = || {
        if !std::fs::metadata(file)?.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        let mut bytes = Vec::new();
        let read = std::fs::File::open(file)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        let is_whole = u64::try_from(read).is_ok_and(|read| read <= MAX_FILE);
        is_whole.then_some(bytes).ok_or_else(|| io::Error::other("it is too large"))
    };
    limited().map_err(|source| TlsError::Read { file: file.to_owned(), source })
}

fn material(source: &l7::BackendTls) -> Result<Material, TlsError> {
    let mut material = Material::default();
    match &source.roots {
        Some(Roots::Pem(pem)) => material.roots = pem.to_vec(),
        Some(Roots::File(file)) => material.roots = read(file)?,
        Some(Roots::System(_) | Roots::DangerousAny(_)) | None => {}
    }
    let either = |file: &str, bytes: &[u8]| if file.is_empty() { Ok(bytes.to_vec()) } else { read(file) };
    material.revoked = either(&source.revoked_file, &source.revoked)?;
    if let Some(certificate) = &source.certificate {
        material.chain = either(&certificate.chain_file, &certificate.chain)?;
        material.key = either(&certificate.key_file, &certificate.key)?;
    }
    Ok(material)
}

fn client(
    source: &l7::BackendTls,
    material: &Material,
    system: &Arc<RootCertStore>,
) -> Result<Client, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let names: Vec<Name> = source.names.iter().map(Name::read).collect::<Result<_, _>>()?;
    let builder =
        ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let roots = match &source.roots {
        Some(Roots::System(true)) => Some(system.clone()),
        Some(Roots::Pem(_)) => Some(Arc::new(root_store(&material.roots, "the policy")?)),
        Some(Roots::File(file)) => Some(Arc::new(root_store(&material.roots, file)?)),
        Some(Roots::DangerousAny(true)) => None,
        Some(Roots::System(false) | Roots::DangerousAny(false)) | None => return Err(TlsError::Unsaid),
    };
    let builder = match roots {
        Some(roots) => {
            let verifier = verifying(roots, names, revocations(source, material)?, &provider)?;
            builder.dangerous().with_custom_certificate_verifier(verifier)
        }
        None => {
            let algorithms = provider.signature_verification_algorithms;
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyVerifier { algorithms }))
        }
    };
    Ok(Client::new(&authenticated(builder, source, material)?))
}

type RevocationLists = Vec<CertificateRevocationListDer<'static>>;

/// The revocation lists. A text without any is none, since whoever gave it wants certificates to be looked up in it.
fn revocations(source: &l7::BackendTls, material: &Material) -> Result<RevocationLists, TlsError> {
    if source.revoked_file.is_empty() && source.revoked.is_empty() {
        return Ok(Vec::new());
    }
    let of = || match source.revoked_file.as_str() {
        "" => "the policy".to_owned(),
        file => file.to_owned(),
    };
    let lists: Result<RevocationLists, _> =
        CertificateRevocationListDer::pem_slice_iter(&material.revoked).collect();
    let lists = lists.map_err(|error| TlsError::Revocations { of: of(), reason: error.to_string() })?;
    match lists.is_empty() {
        true => Err(TlsError::Revocations { of: of(), reason: "there is none".to_owned() }),
        false => Ok(lists),
    }
}

/// Verifies by roots, and by one of `names` or, without any, the name that is asked for. With revocation lists, every certificate of a
/// chain must be covered by one, as Envoy has it.
fn verifying(
    roots: Arc<RootCertStore>,
    names: Vec<Name>,
    revoked: RevocationLists,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::client::danger::ServerCertVerifier>, TlsError> {
    let wrong = |reason: String| TlsError::Revocations { of: "the policy".to_owned(), reason };
    if names.is_empty() {
        let builder = WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).with_crls(revoked);
        return Ok(builder.build().map_err(|error| wrong(error.to_string()))?);
    }
    let lists = revoked.iter().map(|list| OwnedCertRevocationList::from_der(list).map(Into::into));
    let revoked: Vec<CertRevocationList<'static>> =
        lists.collect::<Result<_, _>>().map_err(|error: webpki::Error| wrong(error.to_string()))?;
    let algorithms = provider.signature_verification_algorithms;
    Ok(Arc::new(NamedVerifier { roots, names, revoked, algorithms }))
}

/// With the certificate that the waypoint shows, if there is one.
fn authenticated(
    builder: ConfigBuilder<ClientConfig, WantsClientCert>,
    source: &l7::BackendTls,
    material: &Material,
) -> Result<ClientConfig, TlsError> {
    let Some(certificate) = &source.certificate else { return Ok(builder.with_no_client_auth()) };
    let named = |file: &str, or: &str| if file.is_empty() { or.to_owned() } else { file.to_owned() };
    let pem = |what: String| move |source| TlsError::Pem { what, source };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&material.chain).collect();
    let chain = chain.map_err(pem(named(&certificate.chain_file, "the client certificate")))?;
    let key = PrivateKeyDer::from_pem_slice(&material.key)
        .map_err(pem(named(&certificate.key_file, "the key of the client certificate")))?;
    Ok(builder.with_client_auth_cert(chain, key)?)
}

fn root_store(pem: &[u8], of: &str) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|source| TlsError::Pem { what: of.to_owned(), source })?;
        roots.add(certificate)?;
    }
    if roots.is_empty() { Err(TlsError::NoRoots(of.to_owned())) } else { Ok(roots) }
}

#[cfg(test)]
mod tests;
