//! R: the raw relay that Ambit's figures are ratios to.
//!
//! Two processes, one per node: the near one accepts plain TCP and speaks TLS to the far one, which
//! speaks plain TCP to the server. The same TLS library and first cipher suite as the mesh, 256 KiB
//! buffers, one TLS connection per application connection; no HTTP/2, no policy, no look-ups.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const BUFFER: usize = 256 * 1024;
const NAME: &str = "raw-relay";

/// Which half of the relay a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Side {
    /// Plain TCP in, TLS out.
    Near,
    /// TLS in, plain TCP out.
    Far,
    /// Plain TCP in and out: the same-node comparison.
    Plain,
}

/// Where the relay's self-signed certificate and key are, made by [`write_identity`].
pub(crate) struct Identity {
    certificate: PathBuf,
    key: PathBuf,
}

impl Identity {
    /// The identity in `dir`.
    pub(crate) fn in_dir(dir: &Path) -> Self {
        Self { certificate: dir.join("relay.pem"), key: dir.join("relay.key") }
    }
}

/// Makes a P-256 certificate for the relay in `dir`.
pub(crate) fn write_identity(dir: &Path) -> Result<()> {
    let key = KeyPair::generate().context("making the relay's key")?;
    let certificate = CertificateParams::new(vec![NAME.to_owned()])?.self_signed(&key)?;
    let identity = Identity::in_dir(dir);
    std::fs::write(&identity.certificate, certificate.pem()).context("writing the relay's certificate")?;
    std::fs::write(&identity.key, key.serialize_pem()).context("writing the relay's key")
}

/// The provider with AES-128-GCM first, as the mesh offers it.
fn provider() -> rustls::crypto::CryptoProvider {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites = vec![
        rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
    ];
    provider
}

fn client_config(identity: &Identity) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&identity.certificate)?)?;
    let config = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

fn server_config(identity: &Identity) -> Result<Arc<ServerConfig>> {
    let config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_file(&identity.certificate)?],
            PrivateKeyDer::from_pem_file(&identity.key)?,
        )?;
    Ok(Arc::new(config))
}

/// Relays from `listen` to `to` until the process ends.
pub(crate) async fn run(side: Side, listen: SocketAddr, to: SocketAddr, identity: &Identity) -> Result<()> {
    let listener = TcpListener::bind(listen).await.with_context(|| format!("binding {listen}"))?;
    let connector = match side {
        Side::Near => Some(TlsConnector::from(client_config(identity)?)),
        Side::Far | Side::Plain => None,
    };
    let acceptor = match side {
        Side::Far => Some(TlsAcceptor::from(server_config(identity)?)),
        Side::Near | Side::Plain => None,
    };
    println!("ready");
    loop {
        let (stream, _) = listener.accept().await.context("accepting")?;
        let (connector, acceptor) = (connector.clone(), acceptor.clone());
        tokio::spawn(async move {
            if let Err(error) = relay_one(stream, to, connector, acceptor).await {
                tracing::debug!(%error, "relayed connection ended");
            }
        });
    }
}

async fn relay_one(
    near: TcpStream,
    to: SocketAddr,
    connector: Option<TlsConnector>,
    acceptor: Option<TlsAcceptor>,
) -> Result<()> {
    near.set_nodelay(true)?;
    match (connector, acceptor) {
        (Some(connector), _) => {
            let far = dial(to).await?;
            let far = connector.connect(ServerName::try_from(NAME)?, far).await?;
            pump(near, far).await
        }
        (None, Some(acceptor)) => {
            let near = acceptor.accept(near).await?;
            pump(near, dial(to).await?).await
        }
        (None, None) => pump(near, dial(to).await?).await,
    }
}

async fn dial(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(to).await.with_context(|| format!("connecting to {to}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn pump<A, B>(mut a: A, mut b: B) -> Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    copy_bidirectional_with_sizes(&mut a, &mut b, BUFFER, BUFFER).await?;
    a.shutdown().await?;
    b.shutdown().await?;
    Ok(())
}
