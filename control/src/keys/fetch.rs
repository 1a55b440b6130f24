//! Fetches a key set over HTTP: bounded in time and size, redirected nowhere, and read before it is believed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ambit_token::{KeySetError, keys};
use bytes::Bytes;
use http::header::ACCEPT;
use http::{HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;

use super::addresses::{Addresses, Resolver};
use crate::object::KeyAddress;

/// Largest answer that is read.
const MAX_BODY: usize = 256 << 10;
/// How long an idle connection is kept: not until the next refresh.
const IDLE: Duration = Duration::from_secs(5);

/// Why roots cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// The file cannot be read.
    #[error("cannot read the roots in {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// There is something else than roots in it.
    #[error("{path} has a certificate that is no root")]
    Root {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// The library offers no protocol.
    #[error("no version of TLS can be used")]
    Tls(#[source] rustls::Error),
}

/// Why keys were not fetched, for the log. Statuses don't say it: whoever writes the address would learn what answers there.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("the address can't be used")]
    Address,
    #[error("keys must not be fetched from there")]
    Blocked,
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("no connection")]
    Connect(#[source] hyper_util::client::legacy::Error),
    #[error("the answer is {0}")]
    Status(StatusCode),
    #[error("the answer broke off or is larger than {MAX_BODY} bytes")]
    Body,
    #[error("the answer is no OpenID configuration with a jwks_uri of http or https")]
    Configuration,
    #[error("the answer is no JSON Web Key Set, or too large a one")]
    Keys(#[source] KeySetError),
}

/// Fetches over http and https.
pub(super) struct Fetcher {
    client: Client<HttpsConnector<HttpConnector<Resolver>>, Empty<Bytes>>,
    addresses: Addresses,
}

#[derive(Deserialize)]
struct Configuration {
    jwks_uri: String,
}

impl Fetcher {
    /// Mozilla's roots, as the image has none of a system, and those of a file.
    pub(super) fn new(file: Option<&Path>, addresses: Addresses) -> Result<Self, RootsError> {
        let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        if let Some(path) = file {
            let unreadable = |source| RootsError::Read { path: path.to_owned(), source };
            for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
                let added = roots.add(certificate.map_err(unreadable)?);
                added.map_err(|source| RootsError::Root { path: path.to_owned(), source })?;
            }
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(RootsError::Tls)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut connector = HttpConnector::new_with_resolver(Resolver::new(addresses.clone()));
        // TLS comes on top of it.
        connector.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let client = Client::builder(TokioExecutor::new()).pool_idle_timeout(IDLE).build(connector);
        Ok(Self { client, addresses })
    }

    /// The usable keys of a key set; `None` if it has none.
    pub(super) async fn fetch(
        &self,
        address: &KeyAddress,
        limit: Duration,
    ) -> Result<Option<Bytes>, FetchError> {
        let fetching = async {
            let keys = match address {
                KeyAddress::Uri(uri) => self.get(uri).await?,
                KeyAddress::Issuer(issuer) => {
                    let configuration =
                        self.get(&format!("{issuer}/.well-known/openid-configuration")).await?;
                    let configuration: Configuration =
                        serde_json::from_slice(&configuration).map_err(|_| FetchError::Configuration)?;
                    let scheme = configuration.jwks_uri.split_once("://").map(|(scheme, _)| scheme);
                    // An issuer that is reached safely names no keys that aren't.
                    match scheme {
                        Some("https") => {}
                        Some("http") if issuer.starts_with("http://") => {}
                        _ => return Err(FetchError::Configuration),
                    }
                    self.get(&configuration.jwks_uri).await?
                }
            };
            match keys::canonical(&keys) {
                Ok(keys) => Ok(Some(keys.into())),
                Err(KeySetError::Empty) => Ok(None),
                Err(error) => Err(FetchError::Keys(error)),
            }
        };
        tokio::time::timeout(limit, fetching).await.unwrap_or(Err(FetchError::Timeout(limit)))
    }

    async fn get(&self, uri: &str) -> Result<Bytes, FetchError> {
        let uri: Uri = uri.parse().map_err(|_| FetchError::Address)?;
        if !uri.host().is_some_and(|host| self.addresses.allow_host(host)) {
            return Err(FetchError::Blocked);
        }
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = uri;
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static("application/json"));
        let answer = self.client.request(request).await.map_err(FetchError::Connect)?;
        if answer.status() != StatusCode::OK {
            return Err(FetchError::Status(answer.status()));
        }
        let body = Limited::new(answer.into_body(), MAX_BODY).collect().await;
        body.map(http_body_util::Collected::to_bytes).map_err(|_| FetchError::Body)
    }
}
