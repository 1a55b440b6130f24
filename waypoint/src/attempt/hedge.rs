//! Hedging: where an endpoint has not answered for a while, a second one is asked too, and the first answer counts.
//!
//! Only by opt-in, for requests without a body whose method is safe (RFC 9110 §9.2.1), and within the budget of retries.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::timeout;

use super::{HeadOfAnswer, Sending, learn};
use crate::balance::{Chosen, Endpoint, request_endpoint};
use crate::failure::Failure;
use crate::names;

/// How a race ended.
#[derive(Debug, PartialEq, Eq)]
struct Raced<T> {
    is_second: bool,
    outcome: T,
    /// How the other one ended, if it did.
    other: Option<T>,
}

impl Sending<'_> {
    /// Sends the request to `first`, and after a while to another endpoint too, if there is one.
    pub(super) async fn hedged(
        &mut self,
        first: &Endpoint,
        after: Duration,
    ) -> Result<HeadOfAnswer, Failure> {
        let (second, raced) = {
            let mut trying = Box::pin(self.exchange(first, self.gate.as_ref()));
            if let Ok(outcome) = timeout(after, trying.as_mut()).await {
                return outcome;
            }
            let Some((second, counted)) = self.second() else { return trying.await };
            let worker = &self.inbound.worker;
            let other = Box::pin(async {
                let located = names::locate(worker, second.endpoint.clone()).await?;
                self.exchange(&located, second.gate.as_ref()).await
            });
            let is_good = |outcome: &Result<HeadOfAnswer, Failure>| {
                outcome.as_ref().is_ok_and(|(response, _)| !self.is_retriable_answer(response))
            };
            let raced = race(trying, other, is_good).await;
            drop(counted);
            (second, raced)
        };
        let Raced { is_second, outcome, other } = raced;
        let Chosen { endpoint, trial, gate } = second;
        self.tried.extend(endpoint.workload.as_ref().map(|workload| workload.uid.clone()));
        self.record.add_hedge(is_second.then_some(&endpoint));
        let loser = if is_second {
            self.inbound.worker.proxy.tallies.hedges_won.fetch_add(1, Ordering::Relaxed);
            self.gate = gate;
            self.answered = Some(endpoint);
            std::mem::replace(&mut self.trial, trial)
        } else {
            trial
        };
        // One that was given up is only seen as slow.
        if let Some(other) = other {
            let learned = learn(loser, Duration::ZERO, self.has_deadline(), other);
            if let Err(failure) = learned {
                tracing::debug!(%failure, "one of two endpoints failed");
            }
        }
        outcome
    }

    /// Another endpoint for the request, within the budget of retries.
    fn second(&self) -> Option<(Chosen, super::retry::RetryCount)> {
        let worker = &self.inbound.worker;
        let source = self.inbound.remote;
        let chosen = request_endpoint(worker, source, self.target, &self.tried, self.key).ok()?;
        let counted = self.count_retry();
        let tallies = &worker.proxy.tallies;
        let tally = if counted.is_some() { &tallies.hedges } else { &tallies.retries_over_budget };
        tally.fetch_add(1, Ordering::Relaxed);
        Some((chosen, counted?))
    }
}

/// Waits for the first good outcome of two; for the first of all if none is good.
async fn race<T>(
    mut first: Pin<Box<impl Future<Output = T>>>,
    mut second: Pin<Box<impl Future<Output = T>>>,
    is_good: impl Fn(&T) -> bool,
) -> Raced<T> {
    let (is_second, outcome) = tokio::select! {
        biased;
        outcome = first.as_mut() => (false, outcome),
        outcome = second.as_mut() => (true, outcome),
    };
    if is_good(&outcome) {
        return Raced { is_second, outcome, other: None };
    }
    let other = if is_second { first.await } else { second.await };
    match is_good(&other) {
        true => Raced { is_second: !is_second, outcome: other, other: Some(outcome) },
        false => Raced { is_second, outcome, other: Some(other) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Outcomes below 10 are good.
    async fn raced(first: (u64, u32), second: (u64, u32)) -> Raced<u32> {
        let ending = async |(millis, outcome): (u64, u32)| {
            tokio::time::sleep(Duration::from_millis(millis)).await;
            outcome
        };
        race(Box::pin(ending(first)), Box::pin(ending(second)), |outcome| *outcome < 10).await
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_good_outcome_counts() {
        let cases = [
            ((10, 1), (20, 2), Raced { is_second: false, outcome: 1, other: None }),
            ((20, 1), (10, 2), Raced { is_second: true, outcome: 2, other: None }),
            ((10, 11), (20, 2), Raced { is_second: true, outcome: 2, other: Some(11) }),
            ((20, 1), (10, 12), Raced { is_second: false, outcome: 1, other: Some(12) }),
            ((20, 11), (10, 12), Raced { is_second: true, outcome: 12, other: Some(11) }),
        ];
        for (first, second, expected) in cases {
            assert_eq!(raced(first, second).await, expected, "{first:?} {second:?}");
        }
    }
}
