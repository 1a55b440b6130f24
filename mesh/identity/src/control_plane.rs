//! The channel to the control plane: TLS against a root file, a bearer token, one connection that reconnects.
//!
//! Shared by discovery and certificate signing. Root and token files are read anew for every connection and
//! call, so rotated ones need no restart. Never sends a token before the server's certificate is verified.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};

use crate::tls::TlsSettings;

/// One connection attempt: resolution, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Idle time after which a PING checks whether the peer still responds.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// How long the peer may take to answer the PING.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Flow-control windows: large enough that a full snapshot is not held up by round trips.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// A token file larger than this is not a token.
const MAX_TOKEN: usize = 64 * 1024;

/// Why the control plane is not connected.
#[derive(Debug, thiserror::Error)]
pub enum ControlPlaneError {
    /// The address is not `host:port`.
    #[error("control plane address {0:?} is not host:port")]
    Address(String),
    /// The server name is not one.
    #[error("control plane server name {0:?} is neither a DNS name nor an address")]
    ServerName(String),
    /// The cluster id cannot be sent as a header.
    #[error("cluster id {0:?} cannot be sent as a header")]
    ClusterId(String),
    /// The root file cannot be read or used.
    #[error("roots of the control plane in {path}: {reason}")]
    Roots {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// TCP or TLS failed.
    #[error("connecting to control plane {address} as {server_name}: {reason}")]
    Connect {
        /// Where.
        address: String,
        /// The DNS name that its certificate must have.
        server_name: String,
        /// What went wrong.
        reason: std::io::Error,
    },
    /// TCP and TLS took too long.
    #[error("connecting to control plane {address} took longer than {CONNECT_TIMEOUT:?}")]
    Timeout {
        /// Where.
        address: String,
    },
}

/// Address of the control plane, and how both sides authenticate.
#[derive(Debug, Clone)]
pub struct ControlPlaneConfig {
    /// `host:port`; the host may be a name.
    pub address: String,
    /// PEM file with the roots of its certificate.
    pub root_file: PathBuf,
    /// DNS name that its certificate must have, independent of `address`.
    pub server_name: String,
    /// File with our bearer token. Without one, calls have no `authorization` header.
    pub token_file: Option<PathBuf>,
    /// Our cluster, as header `clusterid`.
    pub cluster_id: String,
}

impl ControlPlaneConfig {
    /// The name under which the control plane serves in its default installation.
    pub const DEFAULT_SERVER_NAME: &'static str = "ambit-control.ambit-system.svc";
}

/// A lazily connected, reconnecting channel with credentials. Clones share the connection.
#[derive(Debug, Clone)]
pub struct ControlPlane {
    channel: Channel,
    credentials: Credentials,
    address: Arc<str>,
}

impl ControlPlane {
    /// Checks the configuration. Nothing is connected before the first call; must be called within a runtime.
    ///
    /// # Errors
    /// [`ControlPlaneError`] if address, server name or cluster id cannot be used.
    pub fn new(config: ControlPlaneConfig) -> Result<Self, ControlPlaneError> {
        let ControlPlaneConfig { address, root_file, server_name, token_file, cluster_id } = config;
        let has_port = address
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        if !has_port {
            return Err(ControlPlaneError::Address(address));
        }
        let name = ServerName::try_from(server_name.clone())
            .map_err(|_| ControlPlaneError::ServerName(server_name.clone()))?;
        let cluster = MetadataValue::try_from(cluster_id.as_str())
            .map_err(|_| ControlPlaneError::ClusterId(cluster_id))?;
        let endpoint = Endpoint::from_shared(format!("https://{server_name}"))
            .map_err(|_| ControlPlaneError::ServerName(server_name.clone()))?
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let dial = Arc::new(Dial { address: address.clone(), root_file, name });
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_| {
            let dial = Arc::clone(&dial);
            async move { dial.connect().await.map(TokioIo::new) }
        }));
        let token_file = token_file.map(|path| Arc::from(path.into_boxed_path()));
        Ok(Self { channel, credentials: Credentials { token_file, cluster }, address: address.into() })
    }

    /// The channel; wrap clients of it with [`ControlPlane::credentials`].
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Puts our token and cluster id on every call.
    pub fn credentials(&self) -> Credentials {
        self.credentials.clone()
    }

    /// `host:port` as configured.
    pub fn address(&self) -> &str {
        &self.address
    }
}

/// Interceptor that adds `authorization` and `clusterid` (certificate contract).
#[derive(Debug, Clone)]
pub struct Credentials {
    token_file: Option<Arc<Path>>,
    cluster: MetadataValue<Ascii>,
}

impl tonic::service::Interceptor for Credentials {
    /// Reads the token file anew: Kubernetes replaces it before it expires, and calls are rare.
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        if let Some(path) = &self.token_file {
            let failed = |reason: String| {
                tonic::Status::unauthenticated(format!("token file {}: {reason}", path.display()))
            };
            let token = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
            let token = token.trim();
            if token.is_empty() || token.len() > MAX_TOKEN {
                return Err(failed(format!("{} bytes are no token", token.len())));
            }
            let mut value: MetadataValue<Ascii> = format!("Bearer {token}")
                .parse()
                .map_err(|_| failed("has characters that are not allowed in a header".to_owned()))?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        request.metadata_mut().insert("clusterid", self.cluster.clone());
        Ok(request)
    }
}

/// How one connection is made.
#[derive(Debug)]
struct Dial {
    address: String,
    root_file: PathBuf,
    name: ServerName<'static>,
}

impl Dial {
    async fn connect(&self) -> Result<TlsStream<TcpStream>, ControlPlaneError> {
        match tokio::time::timeout(CONNECT_TIMEOUT, self.handshake()).await {
            Ok(outcome) => outcome,
            Err(_) => Err(ControlPlaneError::Timeout { address: self.address.clone() }),
        }
    }

    async fn handshake(&self) -> Result<TlsStream<TcpStream>, ControlPlaneError> {
        let failed = |reason| ControlPlaneError::Connect {
            address: self.address.clone(),
            server_name: self.name.to_str().into_owned(),
            reason,
        };
        let config = self.tls_config().await?;
        let socket = TcpStream::connect(&self.address).await.map_err(failed)?;
        socket.set_nodelay(true).map_err(failed)?;
        TlsConnector::from(Arc::new(config)).connect(self.name.clone(), socket).await.map_err(failed)
    }

    async fn tls_config(&self) -> Result<rustls::ClientConfig, ControlPlaneError> {
        let failed = |reason: String| ControlPlaneError::Roots { path: self.root_file.clone(), reason };
        let pem = tokio::fs::read(&self.root_file).await.map_err(|error| failed(error.to_string()))?;
        let mut roots = rustls::RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(&pem) {
            let root = root.map_err(|error| failed(error.to_string()))?;
            roots.add(root).map_err(|error| failed(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(failed("it contains no certificate".to_owned()));
        }
        let mut config = rustls::ClientConfig::builder_with_provider(TlsSettings::default().provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| failed(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}
