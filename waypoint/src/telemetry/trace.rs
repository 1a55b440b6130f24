//! The trace of one request: whether it is recorded, its spans while they are open, and what endpoints learn of it.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use ambit_otlp::{KeyValue, bounded, text};
use http::header::{HeaderMap, HeaderName};
use http::request::Parts;
use rand::RngExt;

use super::context::{self, Context, Parent};
use super::{DRAW, Telemetry, Tracing};
use crate::balance::Endpoint;
use crate::sanitise::Sane;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The trace of a request that is recorded: the request itself is a span, and each try below it.
#[derive(Debug)]
pub struct RequestTrace {
    /// How it is traced.
    pub tracing: Arc<Tracing>,
    /// The trace.
    pub trace_id: u128,
    /// The span of the request.
    pub span_id: u64,
    /// The span that the request belongs to.
    pub parent: Option<Parent>,
    /// What vendors say of the trace.
    pub state: Box<str>,
    /// When the request began.
    pub start: SystemTime,
    /// `http` or `https`.
    pub scheme: &'static str,
    /// What was asked for, cut where it is too long.
    pub url: Box<str>,
    /// The path with the query.
    pub query: Option<Box<str>>,
    /// Tags that Telemetry objects want.
    pub tags: Vec<KeyValue>,
    /// Its tries so far.
    pub tries: Vec<Try>,
}

/// A request sent to an endpoint.
#[derive(Debug)]
pub struct Try {
    /// Its span.
    pub span_id: u64,
    /// When it began.
    pub start: SystemTime,
    /// When it ended; `None` while it has not.
    pub end: Option<SystemTime>,
    /// Where it is sent.
    pub endpoint: Arc<Endpoint>,
    /// The status of the answer.
    pub status: Option<u16>,
    /// Why there is none.
    pub error: Option<String>,
}

impl RequestTrace {
    /// The trace of a request that has come at `since`, if it is recorded: as whoever began its trace has decided, else as it is drawn.
    pub fn begin(telemetry: &Telemetry, sane: &Sane, parts: &Parts, since: Instant) -> Option<Box<Self>> {
        let tracing = telemetry.tracing.as_ref()?;
        let Context { parent, sampled } = Context::read(&parts.headers);
        if !sampled.unwrap_or_else(|| tracing.draws(&parts.headers)) {
            return None;
        }
        let most = tracing.max_tag_length;
        let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
        let url = format!("{}://{}{target}", sane.scheme, sane.authority);
        let tags = tracing
            .tags
            .iter()
            .filter_map(|tag| Some(text(&*tag.name, bounded(tag.value(&parts.headers)?, most))));
        let mut rng = rand::rng();
        Some(Box::new(Self {
            trace_id: parent.map_or_else(|| rng.random::<u128>().max(1), |parent| parent.trace_id),
            span_id: rng.random::<u64>().max(1),
            parent,
            state: context::state(&parts.headers).into(),
            start: SystemTime::now().checked_sub(since.elapsed()).unwrap_or(SystemTime::UNIX_EPOCH),
            scheme: sane.scheme,
            url: bounded(&url, most).into(),
            query: parts.uri.query().map(|query| bounded(query, most).into()),
            tags: tags.collect(),
            tries: Vec::new(),
            tracing: tracing.clone(),
        }))
    }

    /// It is sent to an endpoint with these headers.
    pub fn start_try(&mut self, endpoint: &Arc<Endpoint>, headers: &mut HeaderMap) {
        self.end_try(SystemTime::now());
        let span_id = rand::rng().random::<u64>().max(1);
        context::write(headers, self.trace_id, span_id, self.span_id);
        self.tries.push(Try {
            span_id,
            start: SystemTime::now(),
            end: None,
            endpoint: endpoint.clone(),
            status: None,
            error: None,
        });
    }

    /// The try that is under way has got the head of an answer, or an error, which ends it.
    pub fn learn(&mut self, outcome: Result<u16, String>) {
        let Some(open) = self.tries.last_mut().filter(|it| it.end.is_none()) else { return };
        match outcome {
            Ok(status) => open.status = Some(status),
            Err(error) => {
                open.error = Some(error);
                open.end = Some(SystemTime::now());
            }
        }
    }

    /// The answer that counts is that of another endpoint, which was asked at the same time.
    pub fn set_endpoint(&mut self, endpoint: &Arc<Endpoint>) {
        if let Some(open) = self.tries.last_mut() {
            open.endpoint = endpoint.clone();
        }
    }

    /// Ends the try that is under way.
    pub fn end_try(&mut self, now: SystemTime) {
        if let Some(open) = self.tries.last_mut() {
            open.end.get_or_insert(now);
        }
    }
}

impl Tracing {
    /// Whether a request that belongs to no trace begins one. Proxies that see the same `x-request-id` draw alike, as Envoy does.
    fn draws(&self, headers: &HeaderMap) -> bool {
        let number = headers.get(X_REQUEST_ID).and_then(|id| id.to_str().ok()).and_then(number);
        number.unwrap_or_else(rand::random) % DRAW < self.sampled
    }
}

/// What is drawn by of a request's id: the first eight digits of a UUID.
fn number(id: &str) -> Option<u32> {
    let digits = id.get(..8).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
    u32::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use ambit_api::l7;
    use http::{HeaderValue, Request, Version};

    use super::*;
    use crate::telemetry::{Exports, TelemetryTable};

    fn telemetry(sampling: f64) -> Arc<Telemetry> {
        let tracing =
            l7::Tracing { collector: Some(l7::Collector::default()), sampling, ..l7::Tracing::default() };
        let telemetry = l7::Telemetry { tracing: Some(tracing), ..l7::Telemetry::default() };
        let gateway = l7::Gateway { telemetry: Some(telemetry), ..l7::Gateway::default() };
        let table = TelemetryTable::new([&gateway], &TelemetryTable::default(), &Exports::new(1));
        table.everywhere.unwrap()
    }

    fn begins(telemetry: &Telemetry, fields: &[(&'static str, &str)]) -> Option<Box<RequestTrace>> {
        let mut request = Request::new(());
        for (name, value) in fields {
            request.headers_mut().insert(*name, HeaderValue::from_str(value).unwrap());
        }
        let (parts, ()) = request.into_parts();
        let sane = Sane {
            authority: "web".into(),
            host: "web".into(),
            upgrade: None,
            version: Version::HTTP_11,
            grpc: false,
            scheme: "http",
            remote: None,
        };
        RequestTrace::begin(telemetry, &sane, &parts, Instant::now())
    }

    #[test]
    fn who_began_the_trace_decides_and_nobody_else() {
        let (all, none) = (telemetry(100.0), telemetry(0.0));
        let context = |flags: &str| format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}");
        assert!(begins(&all, &[("traceparent", &context("00"))]).is_none());
        let child = begins(&none, &[("traceparent", &context("01"))]).unwrap();
        assert_eq!(child.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c);
        assert_eq!(child.parent.unwrap().span_id, 0xb7ad_6b71_6920_3331);
        assert_ne!(child.span_id, child.parent.unwrap().span_id);
        assert!(begins(&none, &[]).is_none());
        let root = begins(&all, &[]).unwrap();
        assert_eq!(root.parent, None);
        assert!(begins(&Telemetry::default(), &[("traceparent", &context("01"))]).is_none());
    }

    #[test]
    fn requests_of_one_id_are_drawn_alike() {
        let one = telemetry(1.0);
        for (id, wanted) in [
            ("00000000-0000-4000-8000-000000000000", true),
            ("00000063-0000-4000-8000-000000000000", true),
            ("00000064-0000-4000-8000-000000000000", false),
            ("00002710-0000-4000-8000-000000000000", true),
        ] {
            for _ in 0..3 {
                assert_eq!(begins(&one, &[("x-request-id", id)]).is_some(), wanted, "{id}");
            }
        }
        let drawn = (0..20_000).filter(|_| begins(&one, &[("x-request-id", "none")]).is_some()).count();
        assert!((100..400).contains(&drawn), "{drawn}");
    }
}
