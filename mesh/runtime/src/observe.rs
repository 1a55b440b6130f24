//! Metrics of what every proxy program has: tunnels, discovery, certificates, trust, workers.

use std::sync::Arc;

use ambit_hbone::{PoolCounters, WindowBudget};
use ambit_identity::Trust;
use ambit_telemetry::Registry;

use crate::workers::Workers;

/// Registers the counters of tunnel pools.
pub fn pools(registry: &Registry, counters: &Arc<PoolCounters>) {
    let register = |name: &str, help: &str, count: fn(&PoolCounters) -> u64| {
        let counters = counters.clone();
        registry.counter_from(name, help, move || count(&counters));
    };
    register("ambit_hbone_connections", "Tunnel connections made", |c| c.connections.get());
    register("ambit_hbone_connections_failed", "Tunnel connections that failed", |c| {
        c.failed_connections.get()
    });
    register("ambit_hbone_tunnels", "Tunnels opened", |c| c.tunnels.get());
    register("ambit_hbone_tunnels_failed", "Tunnels that failed to open", |c| c.failed_tunnels.get());
    register("ambit_hbone_waits_shared", "Tunnels that waited for a connection being made", |c| {
        c.shared.get()
    });
    register("ambit_hbone_evicted", "Tunnel connections dropped with their workload or trust", |c| {
        c.evicted.get()
    });
    register("ambit_hbone_silent", "Tunnel connections on which a CONNECT and a PING met silence", |c| {
        c.silent.get()
    });
    register("ambit_hbone_ping_timeouts", "Tunnel connections whose peer fell silent", |c| {
        c.ping_timeouts.get()
    });
}

/// Registers the counters of tunnel windows.
pub fn windows(registry: &Registry, budget: &WindowBudget) {
    let budget = budget.clone();
    registry.counter_from(
        "ambit_hbone_windows_refused",
        "Windows that did not grow because their pod's or peer's share of memory was used up",
        move || budget.refused(),
    );
}

/// Registers the counters of the discovery stream.
pub fn discovery(registry: &Registry, client: &ambit_xds::Client) {
    use std::sync::atomic::Ordering::Relaxed;
    type Read = fn(&ambit_xds::ClientMetrics) -> u64;
    let register = |name: &str, help: &str, read: Read| {
        let metrics = client.metrics().clone();
        registry.counter_from(name, help, move || read(&metrics));
    };
    register("ambit_xds_connections", "Discovery streams opened", |m| m.connections.load(Relaxed));
    register("ambit_xds_disconnections", "Discovery streams that ended", |m| m.disconnections.load(Relaxed));
    register("ambit_xds_answers", "Discovery answers received", |m| m.answers.load(Relaxed));
    register("ambit_xds_resources", "Resources received", |m| m.resources.load(Relaxed));
    register("ambit_xds_removals", "Removals received", |m| m.removals.load(Relaxed));
    register("ambit_xds_rejected", "Resources rejected", |m| m.rejected.load(Relaxed));
    register("ambit_xds_split_batches", "Batches too large to be applied at once", |m| {
        m.split_batches.load(Relaxed)
    });
    let metrics = client.metrics().clone();
    let reasons = ambit_xds::Termination::ALL.map(|reason| {
        let metrics = metrics.clone();
        (reason.as_str().to_owned(), move || metrics.terminations(reason))
    });
    let help = "Discovery streams and attempts that ended";
    registry.counters_from("istio_xds_connection_terminations", help, "reason", reasons);
    let messages = client.metrics().clone();
    let types: Vec<_> = metrics
        .type_urls()
        .enumerate()
        .map(|(index, url)| {
            let messages = messages.clone();
            (url.to_owned(), move || messages.messages(index))
        })
        .collect();
    registry.counters_from("istio_xds_message", "Discovery answers received", "url", types);
    let connected = move || i64::from(metrics.connected.load(Relaxed));
    registry.gauge_from("ambit_xds_connected", "Whether a discovery stream is open", connected);
}

/// Registers the counters of certificates.
pub fn certificates(registry: &Registry, store: &ambit_identity::CertificateStore) {
    use std::sync::atomic::Ordering::Relaxed;
    type Read = fn(&ambit_identity::StoreMetrics) -> u64;
    let register = |name: &str, help: &str, read: Read| {
        let store = store.clone();
        registry.counter_from(name, help, move || read(store.metrics()));
    };
    register("ambit_certificates_requested", "Certificate requests started", |m| m.requests.load(Relaxed));
    register("ambit_certificates_issued", "Certificates received", |m| m.issued.load(Relaxed));
    register("ambit_certificates_failed", "Certificate requests that failed", |m| m.failed.load(Relaxed));
    register("ambit_certificate_waits", "Connections that waited for a certificate", |m| {
        m.waits.load(Relaxed)
    });
    register("ambit_certificate_wait_failures", "Connections that waited in vain", |m| {
        m.wait_failures.load(Relaxed)
    });
}

/// Registers the number of trusted roots.
pub fn trust(registry: &Registry, trust: &Trust) {
    let trust = trust.clone();
    let roots = move || i64::try_from(trust.root_count()).unwrap_or(i64::MAX);
    registry.gauge_from(
        "ambit_trusted_roots",
        "Roots that peers of our trust domain are verified with",
        roots,
    );
}

/// Registers panics and delays of the workers.
pub fn workers<W: Send + Sync + 'static>(registry: &Registry, workers: &Arc<Workers<W>>) {
    let panics = workers.panics().clone();
    registry.counter_from("ambit_panics", "Data-path tasks that panicked", move || panics.count());
    let workers = workers.clone();
    let delay = move || {
        let latest = workers.handles().map(|handle| handle.lag().millis()).max().unwrap_or_default();
        i64::try_from(latest).unwrap_or(i64::MAX)
    };
    registry.gauge_from(
        "ambit_worker_delay_milliseconds",
        "How late the slowest worker's last beat was",
        delay,
    );
}

/// Registers what the process holds open.
pub fn process(registry: &Registry) {
    registry.gauge_from("process_open_fds", "Descriptors open now", open_descriptors);
}

/// Descriptors of this process; 0 if the system does not say.
fn open_descriptors() -> i64 {
    let listed = std::fs::read_dir("/proc/self/fd").map(Iterator::count).unwrap_or_default();
    // The directory itself is open while it is read.
    i64::try_from(listed).unwrap_or(i64::MAX).saturating_sub(1)
}
