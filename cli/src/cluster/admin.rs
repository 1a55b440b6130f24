//! HTTP to a port of a pod, through a port-forward of the API server: no network path to the pod is needed.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use tokio::sync::mpsc;

use super::PodName;
use crate::remote::Lines;

/// How long an answer may take, the forward included.
const LIMIT: Duration = Duration::from_secs(20);
/// Largest answer: the configuration of a large mesh.
const LARGEST: usize = 512 << 20;

/// `GET` of a path at a port of a pod.
///
/// # Errors
/// When the pod can't be reached or answers with an error.
pub(crate) async fn get(client: &Client, pod: &PodName, port: u16, path: &str) -> anyhow::Result<Vec<u8>> {
    request(client, pod, port, Method::GET, path).await
}

/// `POST` to a path at a port of a pod.
///
/// # Errors
/// When the pod can't be reached or answers with an error.
pub(crate) async fn post(client: &Client, pod: &PodName, port: u16, path: &str) -> anyhow::Result<Vec<u8>> {
    request(client, pod, port, Method::POST, path).await
}

/// `GET` of a path at a port of a pod whose answer goes on: passes on its lines for as long as somebody takes them.
///
/// # Errors
/// When the pod can't be reached or answers with an error.
pub(crate) async fn lines(
    client: &Client,
    pod: &PodName,
    port: u16,
    path: &str,
    taken: &mpsc::Sender<String>,
) -> anyhow::Result<()> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace);
    let opening = async {
        let mut forward = api.portforward(&pod.name, &[port]).await.context("forward the port")?;
        let stream = forward.take_stream(port).context("forward the port")?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream)).await?;
        let mut connection = tokio::spawn(connection);
        let request =
            Request::builder().uri(path).header(hyper::header::HOST, "localhost").body(Empty::new())?;
        let response = tokio::select! {
            response = sender.send_request(request) => response?,
            ended = &mut connection => {
                ended??;
                bail!("the connection ended without an answer");
            }
        };
        anyhow::Ok((forward, connection, sender, response))
    };
    let opened = tokio::time::timeout(LIMIT, opening).await;
    let opened = opened.unwrap_or_else(|_| bail!("no answer within {LIMIT:?}"));
    let (forward, connection, sender, response) =
        opened.with_context(|| format!("pod {pod}, port {port}"))?;
    let status = response.status();
    let mut body = response.into_body();
    let mut lines = Lines::default();
    let read = async {
        if !status.is_success() {
            let body = Limited::new(body, LARGEST).collect().await.map_err(anyhow::Error::from_boxed)?;
            bail!("{path} answered {status}: {}", String::from_utf8_lossy(&body.to_bytes()).trim());
        }
        while let Some(frame) = body.frame().await {
            let Ok(bytes) = frame?.into_data() else { continue };
            for line in lines.feed(&bytes) {
                if taken.send(line).await.is_err() {
                    return Ok(());
                }
            }
        }
        anyhow::Ok(())
    };
    let outcome = read.await.with_context(|| format!("pod {pod}, port {port}"));
    connection.abort();
    drop((forward, sender));
    outcome
}

async fn request(
    client: &Client,
    pod: &PodName,
    port: u16,
    method: Method,
    path: &str,
) -> anyhow::Result<Vec<u8>> {
    let asked = ask(client, pod, port, method, path);
    let answer = tokio::time::timeout(LIMIT, asked).await;
    answer
        .unwrap_or_else(|_| bail!("no answer within {LIMIT:?}"))
        .with_context(|| format!("pod {pod}, port {port}"))
}

async fn ask(
    client: &Client,
    pod: &PodName,
    port: u16,
    method: Method,
    path: &str,
) -> anyhow::Result<Vec<u8>> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace);
    let mut forward = api.portforward(&pod.name, &[port]).await.context("forward the port")?;
    let stream = forward.take_stream(port).context("forward the port")?;
    let refused = forward.take_error(port);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "localhost")
        .header(hyper::header::CONNECTION, "close")
        .body(Empty::new())?;
    let outcome = match sender.send_request(request).await {
        Ok(response) => {
            let status = response.status();
            let body = Limited::new(response.into_body(), LARGEST).collect().await;
            body.map_err(anyhow::Error::from_boxed).map(|body| (status, body.to_bytes()))
        }
        Err(error) => Err(error.into()),
    };
    connection.abort();
    let (status, body) = match outcome {
        Ok(answer) => answer,
        Err(error) => {
            // Kubelet's reason is worth more than that the stream ended.
            let reason = match refused {
                Some(reason) => tokio::time::timeout(Duration::from_secs(1), reason).await.ok().flatten(),
                None => None,
            };
            return match reason {
                Some(reason) => Err(error.context(reason)),
                None => Err(error),
            };
        }
    };
    forward.abort();
    let text = || String::from_utf8_lossy(&body).trim().to_owned();
    ensure!(status.is_success(), "{path} answered {status}: {}", text());
    Ok(body.to_vec())
}
