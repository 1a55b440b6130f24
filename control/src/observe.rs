//! What the program shows of itself: its metrics and its admin interface.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ambit_ca::{Authority, IssuanceMetrics};
use ambit_telemetry::http::reply;
use ambit_telemetry::{Admin, Registry};
use ambit_xds::ServerMetrics;
use http::StatusCode;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::index::{Finding, NO_EFFECT_AT_L4};
use crate::keys::KeyMetrics;
use crate::kind::Kind;
use crate::object::ObjectRef;
use crate::serve::live_pods::LivePods;
use crate::serve::port::PortMetrics;
use crate::serve::publish::Published;
use crate::serve::token_review::ReviewMetrics;
use crate::source::SourceMetrics;
use crate::syncz;
use crate::write::WriteMetrics;
use crate::write::queue::StatusQueue;

/// The version of Istio whose behaviour tools may expect, and ours.
pub(crate) const VERSION: &str = concat!("1.31.0-ambit-", env!("CARGO_PKG_VERSION"));

/// Live counters of the index.
#[derive(Debug, Default)]
pub(crate) struct IndexMetrics {
    /// Batches of changes taken.
    pub(crate) batches: AtomicU64,
    /// Producers computed.
    pub(crate) computed: AtomicU64,
    /// Time spent, microseconds.
    pub(crate) micros: AtomicU64,
}

/// The findings about objects, kept for the admin interface.
pub(crate) type Findings = Arc<Mutex<BTreeMap<ObjectRef, Vec<Finding>>>>;

/// What is counted with an API server as the source.
pub(crate) struct OnKubernetes {
    /// `None` where callers are believed by a key set.
    pub(crate) reviews: Option<Arc<ReviewMetrics>>,
    pub(crate) written: Arc<WriteMetrics>,
}

/// Everything that is counted.
pub(crate) struct Observed {
    pub(crate) source: Arc<SourceMetrics>,
    pub(crate) index: Arc<IndexMetrics>,
    pub(crate) keys: Arc<KeyMetrics>,
    pub(crate) published: Published,
    pub(crate) live_pods: Arc<LivePods>,
    pub(crate) port: Arc<PortMetrics>,
    pub(crate) xds: Arc<ServerMetrics>,
    pub(crate) xds_refused: Arc<AtomicU64>,
    pub(crate) issuance: Arc<IssuanceMetrics>,
    pub(crate) authority: Authority,
    pub(crate) findings: Findings,
    pub(crate) statuses: Arc<StatusQueue>,
    pub(crate) waypoints: Arc<StatusQueue>,
    pub(crate) kubernetes: Option<OnKubernetes>,
    /// Name of the cluster.
    pub(crate) cluster_id: Arc<str>,
}

/// A counter that lives in a struct behind an `Arc`.
fn counter<T: Send + Sync + 'static>(
    registry: &Registry,
    (name, help): (&str, &str),
    of: &Arc<T>,
    read: impl Fn(&T) -> &AtomicU64 + Send + Sync + 'static,
) {
    let of = of.clone();
    registry.counter_from(&format!("ambit_control_{name}"), help, move || read(&of).load(Ordering::Relaxed));
}

fn gauge(registry: &Registry, (name, help): (&str, &str), read: impl Fn() -> u64 + Send + Sync + 'static) {
    let read = move || i64::try_from(read()).unwrap_or(i64::MAX);
    registry.gauge_from(&format!("ambit_control_{name}"), help, read);
}

impl Observed {
    /// Registers all metrics.
    pub(crate) fn register(&self, registry: &Registry) {
        registry.build_info("pilot", VERSION);
        self.register_source(registry);
        self.register_index(registry);
        self.register_keys(registry);
        self.register_port(registry);
        self.register_xds(registry);
        self.register_issuance(registry);
        if let Some(kubernetes) = &self.kubernetes {
            self.register_kubernetes(registry, kubernetes);
        }
    }

    fn register_kubernetes(&self, registry: &Registry, kubernetes: &OnKubernetes) {
        let OnKubernetes { reviews, written } = kubernetes;
        counter(registry, ("watch_failures", "Watches that broke or could not begin"), &self.source, |m| {
            &m.watch_failures
        });
        let ages = Kind::ALL.map(|kind| {
            let source = self.source.clone();
            let age = move || i64::try_from(source.last_events.age(kind)).unwrap_or(i64::MAX);
            (kind.as_str().to_owned(), age)
        });
        let help = "Seconds since something last came by the watch of the kind";
        registry.gauges_from("ambit_control_watch_last_event_age_seconds", help, "kind", ages);
        counter(registry, ("objects_written", "Objects written to the API server"), written, |m| &m.written);
        counter(registry, ("writes_failed", "Writes to the API server that failed"), written, |m| &m.failed);
        let help = "Certificates signed for PodCertificateRequests";
        counter(registry, ("pod_certificates_issued", help), written, |m| &m.certificates_issued);
        let help = "PodCertificateRequests that were denied or failed";
        counter(registry, ("pod_certificates_refused", help), written, |m| &m.certificates_refused);
        let help = "Writes that waited because somebody else keeps changing the object";
        counter(registry, ("writes_held", help), &written.backoffs, |m| &m.held);
        let statuses = self.statuses.clone();
        gauge(registry, ("statuses_pending", "Objects whose status is to be looked at"), move || {
            statuses.len() as u64
        });
        let waypoints = self.waypoints.clone();
        gauge(registry, ("waypoints_pending", "Waypoints whose deployment is to be looked at"), move || {
            waypoints.len() as u64
        });
        let election = written.clone();
        let leads = move || election.leads.load(Ordering::Relaxed);
        gauge(registry, ("leader", "1 while this replica holds the lease and writes"), leads);
        let Some(reviews) = reviews else { return };
        counter(registry, ("token_reviews", "Tokens that the API server was asked about"), reviews, |m| {
            &m.asked
        });
        let help = "Token reviews without an answer";
        counter(registry, ("token_reviews_failed", help), reviews, |m| &m.failed);
        let help = "Callers admitted by an older answer while the API server was away";
        counter(registry, ("token_reviews_stale", help), reviews, |m| &m.stale);
    }

    fn register_source(&self, registry: &Registry) {
        let source = &self.source;
        counter(
            registry,
            ("source_malformed", "Documents, files and objects that could not be taken"),
            source,
            |m| &m.malformed,
        );
        counter(registry, ("source_reads", "Files or objects read"), source, |m| &m.reads);
        counter(registry, ("source_scans", "Comparisons of everything with what was read"), source, |m| {
            &m.scans
        });
        let problems = source.clone();
        gauge(registry, ("source_problems", "Problems in sources now"), move || {
            problems.problems.load(Ordering::Relaxed)
        });
        let objects = source.clone();
        gauge(registry, ("source_objects", "Objects now"), move || objects.objects.load(Ordering::Relaxed));
    }

    fn register_index(&self, registry: &Registry) {
        let index = &self.index;
        counter(registry, ("index_batches", "Batches of changes taken"), index, |m| &m.batches);
        counter(registry, ("index_computed", "Producers of resources computed"), index, |m| &m.computed);
        counter(registry, ("index_microseconds", "Time spent on changes"), index, |m| &m.micros);
        let (policies, addresses, live_pods) =
            (self.published.clone(), self.published.clone(), self.live_pods.clone());
        gauge(registry, ("policies", "Policies served"), move || policies.policies() as u64);
        gauge(registry, ("addresses", "Workloads and services served"), move || addresses.addresses() as u64);
        let findings = self.findings.clone();
        let unmet = |finding: &Finding| !finding.met;
        gauge(
            registry,
            ("objects_not_accepted", "Objects of which a part has no or another effect"),
            move || findings.lock().values().filter(|findings| findings.iter().any(unmet)).count() as u64,
        );
        let findings = self.findings.clone();
        let no_effect = |finding: &Finding| finding.reason == NO_EFFECT_AT_L4;
        gauge(
            registry,
            ("policies_without_effect", "DENY policies with a rule that has no effect at L4"),
            move || findings.lock().values().filter(|findings| findings.iter().any(no_effect)).count() as u64,
        );
        gauge(registry, ("live_pods", "Live pods bound to a node"), move || live_pods.len() as u64);
    }

    fn register_keys(&self, registry: &Registry) {
        let keys = &self.keys;
        counter(registry, ("key_sets_fetched", "Key sets of token issuers fetched"), keys, |m| &m.fetched);
        let help = "Key sets dropped as they could not be refreshed for a day";
        counter(registry, ("key_sets_expired", help), keys, |m| &m.expired);
        let help = "Attempts to fetch a key set that failed";
        counter(registry, ("key_set_fetches_failed", help), keys, |m| &m.failed);
        let (unknown, stale) = (keys.clone(), keys.clone());
        let help = "Key sets that are not known, so that tokens of their issuers are refused";
        gauge(registry, ("key_sets_unknown", help), move || unknown.unknown.load(Ordering::Relaxed));
        let help = "Key sets that could not be refreshed and are kept";
        gauge(registry, ("key_sets_stale", help), move || stale.stale.load(Ordering::Relaxed));
    }

    fn register_port(&self, registry: &Registry) {
        let port = &self.port;
        counter(registry, ("connections", "Connections accepted"), port, |m| &m.accepted);
        let open = port.clone();
        gauge(registry, ("open_connections", "Connections open now, handshakes included"), move || {
            open.open.load(Ordering::Relaxed)
        });
        counter(
            registry,
            ("connections_refused", "Connections refused: too many of one address or in all"),
            port,
            |m| &m.refused,
        );
        counter(registry, ("requests_unfinished", "Requests that did not arrive in time"), port, |m| {
            &m.unfinished
        });
        counter(registry, ("connections_aged", "Connections ended because of their age"), port, |m| &m.aged);
        counter(registry, ("connections_idle", "Connections ended because they were idle"), port, |m| {
            &m.idle
        });
        counter(registry, ("tls_failures", "TLS handshakes that failed or took too long"), port, |m| {
            &m.failed_handshakes
        });
        counter(registry, ("tls_silent", "Connections that sent nothing"), port, |m| &m.silent);
        counter(registry, ("tls_evicted", "TLS handshakes that gave way to newer ones"), port, |m| {
            &m.evicted
        });
    }

    fn register_xds(&self, registry: &Registry) {
        let xds = &self.xds;
        let subscribers = xds.clone();
        gauge(registry, ("xds_subscribers", "Streams open now"), move || {
            u64::try_from(subscribers.subscribers.load(Ordering::Relaxed)).unwrap_or(0)
        });
        let subscribers = xds.clone();
        // By the name that dashboards of Istio read.
        registry.gauge_from("pilot_xds", "Streams open now", move || {
            subscribers.subscribers.load(Ordering::Relaxed)
        });
        let xds_convergence = xds.clone();
        registry.histogram_from(
            "pilot_proxy_convergence_time",
            "Seconds from a change until a subscriber has been sent all of it",
            move || (xds_convergence.convergence.seconds(), xds_convergence.convergence.buckets()),
        );
        let services = self.published.clone();
        registry.gauge_from("pilot_services", "Services served", move || {
            i64::try_from(services.services()).unwrap_or(i64::MAX)
        });
        counter(registry, ("xds_refused", "Streams refused because too many were open"), xds, |m| &m.refused);
        counter(
            registry,
            ("xds_unauthenticated", "Subscribers without valid credentials or right"),
            &self.xds_refused,
            |m| m,
        );
        counter(registry, ("xds_lagged", "Streams ended because they fell behind"), xds, |m| &m.lagged);
        counter(registry, ("xds_requests", "Requests received"), xds, |m| &m.requests);
        counter(registry, ("xds_nacks", "Requests that rejected resources"), xds, |m| &m.nacks);
        counter(registry, ("xds_answers", "Answers sent"), xds, |m| &m.answers);
        counter(registry, ("xds_bytes", "Bytes of answers sent"), xds, |m| &m.bytes);
        counter(registry, ("xds_resources", "Resources sent"), xds, |m| &m.resources);
        counter(registry, ("xds_removals", "Removals sent"), xds, |m| &m.removals);
    }

    fn register_issuance(&self, registry: &Registry) {
        let ca = &self.issuance;
        counter(registry, ("ca_issued", "Certificates signed"), ca, |m| &m.issued);
        counter(registry, ("ca_unauthenticated", "Callers not believed"), ca, |m| &m.unauthenticated);
        counter(registry, ("ca_denied", "Callers that may not have what they asked for"), ca, |m| &m.denied);
        counter(registry, ("ca_invalid", "Requests that are not acceptable"), ca, |m| &m.invalid);
        let authority = self.authority.clone();
        let help = "Changes of the authority's store that could not be used";
        registry.counter_from("ambit_control_ca_reload_failures", help, move || authority.reload_failures());
        let authority = self.authority.clone();
        let help = "Records and roots that the authority's store had lost and that were written back";
        registry.counter_from("ambit_control_ca_restored", help, move || authority.restorations());
        counter(registry, ("ca_failed", "Certificates not signed by a failure of ours"), ca, |m| &m.failed);
    }

    /// The sections of the configuration dump.
    pub(crate) fn admin(&self) -> Admin {
        let (findings, published) = (self.findings.clone(), self.published.clone());
        let (xds, cluster_id) = (self.xds.clone(), self.cluster_id.clone());
        Admin::new()
            .get("/debug/syncz", move |_| {
                let list = syncz::render(&xds.streams.statuses(), &cluster_id, VERSION).to_string();
                async move { reply(StatusCode::OK, "application/json", list.into()) }
            })
            .section("findings", move || Ok(dump(&findings.lock())))
            .section("resources", move || {
                Ok(json!({ "policies": published.policies(), "addresses": published.addresses() }))
            })
            .section("version", || Ok(json!(env!("CARGO_PKG_VERSION"))))
    }
}

fn dump(findings: &BTreeMap<ObjectRef, Vec<Finding>>) -> Value {
    let parent = |f: &Finding| f.parent.as_ref().map(ToString::to_string);
    let finding = |f: &Finding| {
        json!({
            "type": f.condition,
            "status": f.met,
            "reason": f.reason,
            "message": f.message,
            "parent": parent(f),
            "controller": f.controller,
        })
    };
    let of_object = |(object, findings): (&ObjectRef, &Vec<Finding>)| {
        json!({
            "kind": object.kind.as_str(),
            "namespace": &*object.name.namespace,
            "name": &*object.name.name,
            "conditions": findings.iter().map(finding).collect::<Vec<_>>(),
        })
    };
    findings.iter().map(of_object).collect()
}
