//! What the DNS proxy counts.

use ambit_telemetry::{Counter, Registry};

/// Counters of the DNS proxy; every question ends in exactly one of `answered`, `forwarded`, `failed`,
/// `refused` and `malformed`.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub(super) answered: Counter,
    pub(super) forwarded: Counter,
    pub(super) failed: Counter,
    pub(super) refused: Counter,
    pub(super) malformed: Counter,
    pub(super) bad_answers: Counter,
    pub(super) truncated: Counter,
    pub(super) foreign: Counter,
}

impl Metrics {
    /// Registers the counters.
    pub fn register(registry: &Registry) -> Self {
        let counter = |name: &str, help: &str| registry.counter(&format!("ambit_dns_{name}"), help);
        let metrics = Self {
            answered: counter("answered", "Questions answered from the directory"),
            forwarded: counter("forwarded", "Questions answered by a resolver"),
            failed: counter("failed", "Questions that no resolver answered"),
            refused: counter("refused", "Questions refused because too many were with resolvers"),
            malformed: counter("malformed", "Messages of pods that are no questions"),
            bad_answers: counter("bad_answers", "Messages of resolvers that answer no question of ours"),
            truncated: counter("truncated", "Answers cut because the client takes no more by UDP"),
            foreign: counter("foreign", "Datagrams to resolvers outside the cluster, passed on as they are"),
        };
        // Under the names that dashboards of Istio's node proxy read.
        let all = metrics.clone();
        registry.counter_from("istio_dns_requests", "Questions of pods", move || {
            [&all.answered, &all.forwarded, &all.failed, &all.refused]
                .map(|counter| counter.get())
                .iter()
                .sum()
        });
        let upstream = metrics.clone();
        registry.counter_from("istio_dns_upstream_requests", "Questions put to resolvers", move || {
            upstream.forwarded.get() + upstream.failed.get()
        });
        metrics
    }
}
