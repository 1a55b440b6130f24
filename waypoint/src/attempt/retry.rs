//! Which outcomes of a try are followed by another one, within which budget and after which wait.

use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use http::header::{HeaderMap, RETRY_AFTER};
use http::{Response, StatusCode};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::{HeadOfAnswer, Sending};
use crate::balancers::circuit::Guard;
use crate::body::Source;
use crate::failure::Failure;
use crate::proxy::Counted;

/// The first wait before another try, where the route says none; it doubles with each.
const BACKOFF: Duration = Duration::from_millis(25);
/// The longest wait before another try.
const MAX_BACKOFF: Duration = Duration::from_millis(250);
/// The longest wait that an endpoint may ask for; one that asks for more is the client's to follow.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10);

/// Counts a try beyond the first until its answer begins.
pub(super) enum RetryCount {
    /// Within the waypoint's own limit.
    Worker(#[expect(dead_code, reason = "counts until it is dropped")] Counted),
    /// Within that of a policy.
    Policy(#[expect(dead_code, reason = "counts until it is dropped")] Guard),
}

impl Sending<'_> {
    pub(super) async fn tries(&mut self) -> Result<HeadOfAnswer, Failure> {
        let mut retries = 0;
        loop {
            let outcome = self.one_try().await;
            let again = match &outcome {
                Ok((response, _)) => self.is_retriable_answer(response),
                Err(failure) => self.is_retriable(failure),
            };
            if !again || retries >= self.retry.attempts || !self.can_repeat() || self.connects.is_spent() {
                return outcome;
            }
            self.counted = None;
            self.counted = self.count_retry();
            if self.counted.is_none() {
                let tallies = &self.inbound.worker.proxy.tallies;
                tallies.retries_over_budget.fetch_add(1, Ordering::Relaxed);
                return outcome;
            }
            let asked = outcome
                .as_ref()
                .ok()
                .and_then(|(answer, _)| retry_after(answer.headers(), SystemTime::now()));
            let pause = backoff(self.retry.backoff.unwrap_or(BACKOFF), retries, rand::random());
            let pause = pause.max(asked.unwrap_or_default());
            let too_late = self.deadline.is_some_and(|deadline| Instant::now() + pause >= deadline);
            match outcome {
                // The client learns from the endpoint how long to wait.
                Ok(_) if too_late || pause > MAX_RETRY_AFTER => return outcome,
                Err(_) if too_late => return Err(Failure::Timeout),
                // The answer that is not wanted frees its connection or stream.
                Ok(_) | Err(_) => drop(outcome),
            }
            tokio::time::sleep(pause).await;
            retries += 1;
        }
    }

    /// Counts one more try, if there may be one: as a policy says, else as the waypoint's own settings do.
    pub(super) fn count_retry(&self) -> Option<RetryCount> {
        if let Some(gate) = &self.gate
            && let Some(most) = gate.circuit.most_retries(gate.pool(), gate.retry_budget)
        {
            return gate.circuit.retry(most).map(RetryCount::Policy);
        }
        let worker = &self.inbound.worker;
        worker.requests.retry(worker.proxy.settings.limits.retry_budget).map(RetryCount::Worker)
    }

    pub(super) fn can_repeat(&self) -> bool {
        self.source.as_ref().is_none_or(Source::is_whole)
    }

    pub(super) fn is_retriable_answer(&self, response: &Response<Incoming>) -> bool {
        let (status, conditions) = (response.status(), &self.retry.conditions);
        let of_grpc = || {
            let status = response.headers().get("grpc-status")?.to_str().ok()?;
            Some(match status.trim() {
                "1" => conditions.cancelled,
                "4" => conditions.deadline_exceeded,
                "8" => conditions.resource_exhausted,
                "13" => conditions.internal,
                "14" => conditions.unavailable,
                _ => false,
            })
        };
        self.retry.codes.contains(&status)
            || (conditions.server_error && status.is_server_error())
            || (conditions.gateway_error && matches!(status.as_u16(), 502..=504))
            || (conditions.retriable_4xx && status == StatusCode::CONFLICT)
            || of_grpc().unwrap_or(false)
    }

    fn is_retriable(&self, failure: &Failure) -> bool {
        let conditions = &self.retry.conditions;
        let any = conditions.server_error;
        match failure {
            Failure::Connect(_) => conditions.connect_failure || any || conditions.gateway_error,
            Failure::RefusedStream | Failure::GoneAway => conditions.refused_stream || any,
            Failure::Reset(_) | Failure::TryTimeout => conditions.reset || any || conditions.gateway_error,
            _ => false,
        }
    }
}

/// How long to wait before try number `retries` beyond the first: doubling, and somewhere in the upper half of that.
fn backoff(base: Duration, retries: u32, random: u32) -> Duration {
    let most = base.saturating_mul(1 << retries.min(10)).min(MAX_BACKOFF.max(base));
    let half = most / 2;
    half + half.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

/// How long an answer asks to wait (RFC 9110 §10.2.3): in seconds, or until a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).ok(),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn an_answer_may_ask_for_a_wait_in_seconds_or_until_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_770);
        for (text, wait) in [
            ("2", Some(2)),
            (" 120 ", Some(120)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(7)),
            ("Sun, 06 Nov 1994 08:49:20 GMT", None),
            ("soon", None),
            ("-1", None),
        ] {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(text))]);
            assert_eq!(retry_after(&headers, now), wait.map(Duration::from_secs), "{text}");
        }
    }
}
