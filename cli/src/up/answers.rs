//! The checks of `ambit.dev/expect-answers`: requests from inside a pod, their answers, and what the waypoints report of them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use ambit_local::{Cluster, Pod};
use anyhow::{Context, bail, ensure};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use crate::up::expectations::Exchange;
use crate::up::flows;
use crate::up::proof::{PATIENCE, POLL};

/// Requests by which a split is judged.
const SPLIT: u32 = 400;
/// Requests by which one service, or retries, are judged.
const SEVERAL: u32 = 30;
/// How far a share may be from what is wanted, in standard deviations: chance exceeds it once in 16,000 times.
const DEVIATIONS: f64 = 4.0;
/// How long one answer may take before it counts as missing.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Larger answers are an error, bytes.
const MAX_BODY: usize = 1024 * 1024;

/// Where a request goes.
pub(crate) struct Target {
    /// The address that its host resolves to.
    pub(crate) address: SocketAddr,
    /// Host and port as they are written.
    pub(crate) host: String,
    /// Path and query.
    pub(crate) path: String,
}

impl Target {
    /// Reads a URL, and resolves its host as the pod does.
    ///
    /// # Errors
    /// When it is not of the form `http://host:port/path` or its host has no address.
    pub(crate) async fn resolve(pod: &Pod, url: &str) -> anyhow::Result<Self> {
        let rest =
            url.strip_prefix("http://").with_context(|| format!("{url} does not begin with http://"))?;
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (name, port) = host.rsplit_once(':').unwrap_or((host, "80"));
        let port: u16 = port.parse().with_context(|| format!("{url} has no sound port"))?;
        let addresses = pod.resolve(name).await.with_context(|| format!("resolve {name} in {pod}"))?;
        let address = addresses.first().with_context(|| format!("{name} has no address"))?;
        let address = SocketAddr::new(*address, port);
        Ok(Self { address, host: host.to_owned(), path: format!("/{path}") })
    }
}

/// What is checked, as a sentence.
pub(crate) fn claim(exchange: &Exchange) -> String {
    let headers: Vec<String> =
        exchange.headers.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    let headers = if headers.is_empty() { String::new() } else { format!(" ({})", headers.join(", ")) };
    let mut sentence =
        format!("{} {}{headers} is answered with {}", exchange.method, exchange.url, exchange.status);
    match exchange.from.len() {
        0 => {}
        1 => sentence.extend(exchange.from.keys().map(|name| format!(" by {name}"))),
        _ => {
            let shares: Vec<String> =
                exchange.from.iter().map(|(name, share)| format!("{share} % {name}")).collect();
            sentence.push_str(&format!(" by {}", shares.join(", ")));
        }
    }
    if let Some(limit) = exchange.within_seconds {
        sentence.push_str(&format!(" within {limit} s"));
    }
    if exchange.retried {
        sentence.push_str(", some after a retry");
    }
    sentence
}

/// Makes the requests and judges their answers; the routes and policies may take a moment to be in force.
///
/// # Errors
/// With what was seen instead.
pub(crate) async fn check(
    cluster: &Cluster,
    pod: &Pod,
    workload: &str,
    exchange: &Exchange,
) -> anyhow::Result<String> {
    let target = Target::resolve(pod, &exchange.url).await?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = attempt(cluster, pod, workload, exchange, &target).await;
        if seen.is_ok() || Instant::now() >= deadline {
            return seen;
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn attempt(
    cluster: &Cluster,
    pod: &Pod,
    workload: &str,
    exchange: &Exchange,
    target: &Target,
) -> anyhow::Result<String> {
    let count = match (exchange.from.len(), exchange.retried) {
        (0, false) => 1,
        (0 | 1, _) => SEVERAL,
        _ => SPLIT,
    };
    let before = Reported::read(cluster, pod, workload, exchange.status).await;
    let mut slowest = Duration::ZERO;
    for _ in 0..count {
        let began = Instant::now();
        let asking = tokio::time::timeout(ANSWER_WITHIN, ask(pod, exchange, target));
        let status = asking.await.with_context(|| format!("no answer within {ANSWER_WITHIN:?}"))??;
        ensure!(status == exchange.status, "it was answered with {status}");
        slowest = slowest.max(began.elapsed());
    }
    if let Some(limit) = exchange.within_seconds {
        ensure!(slowest <= Duration::from_secs(limit.into()), "it took {slowest:.1?}");
    }
    let mut seen = vec![match count {
        1 => format!("answered after {} ms", slowest.as_millis()),
        _ => format!("{count} requests, the slowest took {} ms", slowest.as_millis()),
    }];
    if exchange.from.is_empty() && !exchange.retried {
        return Ok(seen.remove(0));
    }
    let now = Reported::read(cluster, pod, workload, exchange.status).await.since(&before);
    if !exchange.from.is_empty() {
        seen.push(judge_shares(&exchange.from, &now.requests, f64::from(count))?);
    }
    if exchange.retried {
        ensure!(now.retries > 0.0, "no request was sent again");
        seen.push(format!("{} retries", now.retries));
    }
    Ok(seen.join("; "))
}

/// What the waypoints report of a workload's requests.
struct Reported {
    /// Requests with the wanted status by service.
    requests: BTreeMap<String, f64>,
    retries: f64,
}

impl Reported {
    async fn read(cluster: &Cluster, pod: &Pod, workload: &str, status: u16) -> Self {
        let flows = flows::read(cluster).await;
        let (mut requests, mut retries) = (BTreeMap::<String, f64>::new(), 0.0);
        for (key, row) in &flows.requests {
            if key.source == workload && key.source_namespace == pod.namespace() {
                *requests.entry(key.service.clone()).or_default() +=
                    row.codes.get(&status).copied().unwrap_or_default();
                retries += row.retries;
            }
        }
        Self { requests, retries }
    }

    fn since(mut self, before: &Self) -> Self {
        for (service, count) in &mut self.requests {
            *count -= before.requests.get(service).copied().unwrap_or_default();
        }
        self.retries -= before.retries;
        self
    }
}

/// Compares how many requests each service answered with the wanted shares. The workload may make other requests to them
/// at the same time, which are split alike.
fn judge_shares(
    wanted: &BTreeMap<String, u8>,
    answered: &BTreeMap<String, f64>,
    requests: f64,
) -> anyhow::Result<String> {
    let of = |service: &String| answered.get(service).copied().unwrap_or_default();
    let all: f64 = wanted.keys().map(of).sum();
    ensure!(all >= requests, "of {requests} requests, only {all} came to {}", names(wanted));
    let mut seen = Vec::new();
    for (service, percent) in wanted {
        let (share, wanted) = (of(service) / all, f64::from(*percent) / 100.0);
        let allowed = DEVIATIONS * (wanted * (1.0 - wanted) / all).sqrt();
        let text = format!("{service} {:.1} %", share * 100.0);
        if (share - wanted).abs() > allowed + f64::EPSILON {
            bail!("{text} of {all} requests");
        }
        seen.push(text);
    }
    Ok(seen.join(", "))
}

fn names(wanted: &BTreeMap<String, u8>) -> String {
    wanted.keys().cloned().collect::<Vec<_>>().join(", ")
}

/// One request on a connection of its own; its status, once all of the answer has come.
async fn ask(pod: &Pod, exchange: &Exchange, target: &Target) -> anyhow::Result<u16> {
    let stream = pod.connect(target.address).await.context("connect")?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut request =
        Request::builder().method(exchange.method.as_str()).uri(&target.path).header("host", &target.host);
    for (name, value) in &exchange.headers {
        request = request.header(name, value);
    }
    let request = request.body(Empty::<Bytes>::new()).context("the request is not one of HTTP")?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
        body.map_err(|error| anyhow::anyhow!("read the answer: {error}"))?;
        Ok(status)
    };
    let (mut answer, mut connection) = (std::pin::pin!(answer), std::pin::pin!(connection));
    tokio::select! {
        status = &mut answer => status,
        // The connection may close as soon as the answer is complete, so the answer decides.
        _ = &mut connection => answer.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(wanted: &[(&str, u8)], answered: &[(&str, f64)], requests: f64) -> anyhow::Result<String> {
        let wanted = wanted.iter().map(|(name, share)| ((*name).to_owned(), *share)).collect();
        let answered = answered.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
        judge_shares(&wanted, &answered, requests)
    }

    #[test]
    fn a_split_may_differ_as_much_as_chance_makes_likely() {
        let wanted = [("a", 90), ("b", 10)];
        assert!(judge(&wanted, &[("a", 350.0), ("b", 50.0)], 400.0).is_ok());
        assert!(judge(&wanted, &[("a", 320.0), ("b", 80.0)], 400.0).is_err());
        assert!(judge(&wanted, &[("a", 400.0)], 400.0).is_err());
    }

    #[test]
    fn requests_to_another_service_are_missed() {
        assert!(judge(&[("c", 100)], &[("c", 30.0), ("a", 5.0)], 30.0).is_ok());
        assert!(judge(&[("c", 100)], &[("c", 29.0), ("a", 1.0)], 30.0).is_err());
    }

    #[test]
    fn a_claim_says_all_that_is_checked() {
        let text = "{url: 'http://a/', status: 200, headers: {who: me}, from: {v1: 90, v2: 10}, retried: true, within-seconds: 2}";
        let exchange: Exchange = serde_saphyr::from_str(text).expect("sound YAML");
        let expected =
            "GET http://a/ (who: me) is answered with 200 by 90 % v1, 10 % v2 within 2 s, some after a retry";
        assert_eq!(claim(&exchange), expected);
    }
}
