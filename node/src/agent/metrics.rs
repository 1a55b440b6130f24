//! The agent's metrics.

use std::fmt;
use std::sync::Arc;

use ambit_telemetry::{Counter, Registry};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;

use super::{AgentError, PodState, Shared};

/// Failed enrolments by [`ErrorKind`](super::ErrorKind).
type Failures = Family<[(&'static str, &'static str); 1], Counter>;

/// What the agent counts. Clones count together.
#[derive(Debug, Clone, Default)]
pub(super) struct Metrics {
    pub(super) enrolments: Counter,
    failures: Failures,
    pub(super) refusals: Counter,
    pub(super) repairs: Counter,
    pub(super) cleaned: Counter,
    pub(super) unreadable: Counter,
}

impl Metrics {
    pub(super) fn failed(&self, error: &AgentError) {
        self.failures.get_or_create(&[("kind", error.kind().as_str())]).inc();
    }
}

/// Registers everything; pods are counted by state at each scrape.
pub(super) fn register(shared: &Arc<Shared>, registry: &Registry) {
    let Metrics { enrolments, failures, refusals, repairs, cleaned, unreadable } = shared.metrics.clone();
    registry.register("ambit_node_enrolments", "Enrolments of pods that succeeded", enrolments);
    registry.register("ambit_node_enrolment_failures", "Enrolments of pods that failed", failures);
    registry.register("ambit_node_refusals", "Pods that a node proxy could not start to serve", refusals);
    registry.register("ambit_node_repairs", "Differences from the plan that were repaired", repairs);
    registry.register(
        "ambit_node_namespaces_cleaned",
        "Namespaces of no pod whose rules were removed",
        cleaned,
    );
    registry.register("ambit_node_records_unreadable", "Registry records that could not be read", unreadable);
    let proxies = Arc::downgrade(shared);
    registry.gauge_from("ambit_node_proxies", "Connected node proxies", move || {
        proxies.upgrade().map_or(0, |shared| shared.served.proxies().try_into().unwrap_or(i64::MAX))
    });
    let weaknesses = Arc::downgrade(shared);
    registry.gauge_from("ambit_node_weaknesses", "Guarantees that do not hold on this node", move || {
        weaknesses.upgrade().map_or(0, |shared| shared.weaknesses.len().try_into().unwrap_or(i64::MAX))
    });
    registry.collect(PodsByState(Arc::downgrade(shared)));
}

struct PodsByState(std::sync::Weak<Shared>);

impl fmt::Debug for PodsByState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PodsByState")
    }
}

impl Collector for PodsByState {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(shared) = self.0.upgrade() else { return Ok(()) };
        let states: Vec<PodState> = shared.statuses.lock().values().map(|status| status.state).collect();
        let mut encoder =
            encoder.encode_descriptor("ambit_node_pods", "Pods by state.", None, MetricType::Gauge)?;
        for state in [PodState::Pending, PodState::Enabled, PodState::Leaving, PodState::Failed] {
            let count = states.iter().filter(|other| **other == state).count();
            let gauge = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_family(&[("state", state.as_str())])?)?;
        }
        Ok(())
    }
}
