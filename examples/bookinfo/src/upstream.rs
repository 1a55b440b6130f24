//! Requests from one service to another, with the headers that tie a trace together.
//!
//! Each request has a connection of its own, so that balancing at L4 shows in every page.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::header::{self, HeaderName};
use hyper::{HeaderMap, Request, StatusCode, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Larger answers are refused, bytes.
const MAX_BODY: usize = 1024 * 1024;
/// Who visits the page.
pub(crate) const END_USER: HeaderName = HeaderName::from_static("end-user");
/// What a service hands on from its request to those that it makes for it.
const HANDED_ON: [HeaderName; 8] = [
    HeaderName::from_static("x-request-id"),
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    HeaderName::from_static("b3"),
    HeaderName::from_static("baggage"),
    END_USER,
    header::USER_AGENT,
    header::AUTHORIZATION,
];

/// A client.
#[derive(Clone)]
pub(crate) struct Upstream {
    client: Client<HttpConnector, Empty<Bytes>>,
}

impl Upstream {
    /// A client.
    pub(crate) fn new() -> Self {
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http();
        Self { client }
    }

    /// Gets `url` with the headers of `from` that are handed on.
    ///
    /// # Errors
    /// When there is no answer in time, or it is not a success.
    pub(crate) async fn get(&self, url: &str, from: &HeaderMap) -> Result<Bytes> {
        let uri: Uri = url.parse().with_context(|| format!("{url} is no URL"))?;
        let mut request = Request::get(uri).body(Empty::new()).context("making the request")?;
        for name in HANDED_ON {
            if let Some(value) = from.get(&name) {
                request.headers_mut().insert(name, value.clone());
            }
        }
        let exchange = async {
            let response = self.client.request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!("reading the answer: {error}"))?;
            Ok::<(StatusCode, Bytes), anyhow::Error>((status, body.to_bytes()))
        };
        let (status, body) = tokio::time::timeout(TIMEOUT, exchange)
            .await
            .with_context(|| format!("{url} did not answer within {TIMEOUT:?}"))?
            .with_context(|| format!("getting {url}"))?;
        if !status.is_success() {
            bail!("{url} answered {status}");
        }
        Ok(body)
    }

    /// [`get`](Self::get), read as JSON.
    ///
    /// # Errors
    /// As `get`, and when the answer is no JSON.
    pub(crate) async fn get_json(&self, url: &str, from: &HeaderMap) -> Result<Value> {
        let body = self.get(url, from).await?;
        serde_json::from_slice(&body)
            .with_context(|| format!("{url} answered with something that is no JSON"))
    }
}
