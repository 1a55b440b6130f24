//! Admin, metrics and readiness: what they show and where they listen.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ambit_otlp::Counts as Exported;
use ambit_runtime::stop::Requests;
use ambit_runtime::tasks::Tasks;
use ambit_runtime::{observe, servers};
use ambit_telemetry::logging::Logging;
use ambit_telemetry::{Admin, Readiness};

use super::{Parts, Program};
use crate::balancers::circuit::{CircuitSummary, Overflows};
use crate::clients::Clients;
use crate::proxy::{External, Limited, Tallies};
use crate::traffic::Refusals;
use crate::{datagrams, dump, explain, names};

/// Starts the three servers.
///
/// # Errors
/// An address that can't be listened on, by name.
pub(super) async fn start(
    parts: &Parts,
    program: &Program,
    logging: &Logging,
    readiness: &Readiness,
    stop: &Requests,
    tasks: &mut Tasks,
) -> anyhow::Result<()> {
    register(parts, program, logging);
    let admin = routes(parts, program, logging, stop);
    servers::start(&parts.config.proxy, admin, &parts.registry, readiness, tasks).await?;
    Ok(())
}

fn routes(parts: &Parts, program: &Program, logging: &Logging, stop: &Requests) -> Admin {
    let (directory, published) = (parts.directory.clone(), parts.published.clone());
    let proxy = program.proxy.clone();
    let workers = Arc::clone(&program.workers);
    let pools = move || {
        let all = workers.states().flat_map(|worker| dump::pools(worker.index, &worker.upstreams));
        let mut all: Vec<_> = all.collect();
        all.sort();
        serde_json::to_value(all)
    };
    let admin = Admin::new()
        .section("pools", pools)
        .section("directory", move || serde_json::to_value(&*directory.snapshot()))
        .section("routes", move || serde_json::to_value(dump::routes(&published.load())))
        .section("balancers", move || serde_json::to_value(dump::balancers(&proxy.balancers)));
    let admin = parts.flows.route(explain::routes(admin, &program.proxy));
    let logs = (logging, &parts.reporter.log);
    servers::with_common_routes(admin, parts.config.clone(), env!("CARGO_PKG_VERSION"), logs, stop)
}

fn register(parts: &Parts, program: &Program, logging: &Logging) {
    let registry = &parts.registry;
    logging.register(registry);
    observe::pools(registry, &parts.pool_counters);
    observe::windows(registry, &parts.budget);
    observe::discovery(registry, &parts.discovery);
    observe::certificates(registry, &parts.certificates);
    observe::trust(registry, &parts.trust);
    observe::workers(registry, &program.workers);
    observe::process(registry);
    registry.build_info("waypoint", env!("CARGO_PKG_VERSION"));
    let count = |name: &str, help: &str, tally: fn(&Tallies) -> &AtomicU64| {
        let proxy = program.proxy.clone();
        registry.counter_from(name, help, move || tally(&proxy.tallies).load(Ordering::Relaxed));
    };
    count("ambit_waypoint_unbound", "Tunnels to what is not bound to this waypoint", |t| &t.unbound);
    let help = "Requests and connections past a missing waypoint, as its owner allows";
    count("ambit_waypoint_bypassed", help, |t| &t.waypoint_bypassed);
    count("ambit_request_retries_over_budget", "Requests not sent again because too many were", |t| {
        &t.retries_over_budget
    });
    let help = "Requests sent to a second endpoint because the first was slow";
    count("ambit_request_hedges", help, |t| &t.hedges);
    let help = "Requests sent to a second endpoint that answered first";
    count("ambit_request_hedges_won", help, |t| &t.hedges_won);
    let help = "Clients whose session went to another endpoint than before";
    count("ambit_sessions_moved", help, |t| &t.sessions_moved);
    count("ambit_requests_malformed", "Requests that broke the rules of HTTP", |t| &t.malformed);
    let help = "Requests without the valid token that they need";
    count("ambit_requests_unauthenticated", help, |t| &t.unauthenticated);
    let proxy = program.proxy.clone();
    let closed =
        move || proxy.tallies.closed_listeners.load(Ordering::Relaxed).try_into().unwrap_or(i64::MAX);
    registry.gauge_from("ambit_gateway_closed_ports", "Ports of listeners that can't be opened", closed);
    let help = "Connections of clients outside the mesh whose TLS failed";
    count("ambit_gateway_tls_failures", help, |t| &t.failed_handshakes);
    datagrams(parts, program);
    external(parts, program);
    exports(parts);
    limits(parts, program);
    clients(parts, program);
    traffic(parts, program);
    ejections(parts, program);
    lookups(parts, program);
    circuits(parts, program);
    count("ambit_policy_dry_run_differs", "Decisions that a dry-run policy would change", |t| {
        &t.dry_run_differs
    });
    let help = "Requests that policies with the action AUDIT match";
    count("ambit_policy_audited_requests", help, |t| &t.audited);
    count("ambit_mirrors_failed", "Copies of requests that could not be delivered", |t| &t.mirrors_failed);
    let workers = Arc::clone(&program.workers);
    let open = move || {
        let open: usize = workers.states().map(|worker| worker.upstreams.len()).sum();
        i64::try_from(open).unwrap_or(i64::MAX)
    };
    registry.gauge_from("ambit_upstream_connections", "HTTP connections to endpoints, idle or shared", open);
}

fn datagrams(parts: &Parts, program: &Program) {
    type Tally = fn(&datagrams::Counts) -> &AtomicU64;
    let registry = &parts.registry;
    let proxy = program.proxy.clone();
    let open = move || i64::try_from(proxy.datagrams.shares.total()).unwrap_or(i64::MAX);
    registry.gauge_from("ambit_gateway_udp_sessions", "Sessions of clients that send datagrams", open);
    let proxy = program.proxy.clone();
    let unreachable = move || proxy.datagrams.counts.unreachable.load(Ordering::Relaxed);
    let help = "Sessions of datagrams whose endpoint could not be reached";
    registry.counter_from("ambit_gateway_udp_unreachable", help, unreachable);
    let series = |families: Vec<(&'static str, Tally)>| {
        let proxy = program.proxy.clone();
        families.into_iter().map(move |(name, tally)| {
            let proxy = proxy.clone();
            (name.to_owned(), move || tally(&proxy.datagrams.counts).load(Ordering::Relaxed))
        })
    };
    let directions: Vec<(&str, Tally)> =
        vec![("to_endpoint", |it| &it.to_endpoints), ("to_client", |it| &it.to_clients)];
    let help = "Datagrams that were sent on";
    registry.counters_from("ambit_gateway_udp_datagrams", help, "direction", series(directions));
    let directions: Vec<(&str, Tally)> =
        vec![("to_endpoint", |it| &it.lost_to_endpoints), ("to_client", |it| &it.lost_to_clients)];
    let help = "Datagrams that could not be sent on, because a buffer was full or they were too large";
    registry.counters_from("ambit_gateway_udp_lost", help, "direction", series(directions));
    let reasons: Vec<(&str, Tally)> = vec![
        ("limit", |it| &it.refused.total),
        ("client_share", |it| &it.refused.client),
        ("policy", |it| &it.refused.policy),
        ("route", |it| &it.refused.route),
        ("endpoint", |it| &it.refused.endpoint),
        ("socket", |it| &it.refused.socket),
        ("draining", |it| &it.refused.draining),
        ("own_address", |it| &it.refused.own_address),
    ];
    let help = "Datagrams that began no session";
    registry.counters_from("ambit_gateway_udp_refused", help, "reason", series(reasons));
}

fn ejections(parts: &Parts, program: &Program) {
    let registry = &parts.registry;
    let counts = program.proxy.balancers.counts.clone();
    let ejections = move || counts.ejections.load(Ordering::Relaxed);
    registry.counter_from("ambit_outlier_ejections", "Endpoints ejected because they failed", ejections);
    let counts = program.proxy.balancers.counts.clone();
    let withheld = move || counts.ejections_withheld.load(Ordering::Relaxed);
    let help = "Ejections that did not happen because too many endpoints were ejected";
    registry.counter_from("ambit_outlier_ejections_withheld", help, withheld);
    let proxy = program.proxy.clone();
    let ejected = move || i64::try_from(proxy.balancers.ejected()).unwrap_or(i64::MAX);
    registry.gauge_from("ambit_outlier_ejected", "Endpoints that are ejected now", ejected);
}

fn lookups(parts: &Parts, program: &Program) {
    type Tally = fn(&names::Counts) -> &AtomicU64;
    let families: [(&str, Tally); 4] = [
        ("found", |it| &it.found),
        ("failed", |it| &it.failed),
        ("refused", |it| &it.refused),
        ("overflow", |it| &it.overflow),
    ];
    let series = families.map(|(name, tally)| {
        let proxy = program.proxy.clone();
        (name.to_owned(), move || tally(&proxy.names.counts).load(Ordering::Relaxed))
    });
    let help = "Host names of endpoints outside the mesh that were looked up";
    parts.registry.counters_from("ambit_host_lookups", help, "outcome", series);
}

fn circuits(parts: &Parts, program: &Program) {
    type Refused = fn(&Overflows) -> &AtomicU64;
    let families: [(&str, Refused); 4] = [
        ("connections", |refused| &refused.connections),
        ("pending", |refused| &refused.pending),
        ("requests", |refused| &refused.requests),
        ("retries", |refused| &refused.retries),
    ];
    let series = families.map(|(limit, refused)| {
        let overflows = program.proxy.balancers.counts.overflows.clone();
        (limit.to_owned(), move || refused(&overflows).load(Ordering::Relaxed))
    });
    let help = "Connections, requests and retries refused because a limit of their destination was reached";
    parts.registry.counters_from("ambit_upstream_overflows", help, "limit", series);
    type Open = fn(&CircuitSummary) -> u32;
    let families: [(&str, Open); 3] = [
        ("pending", |open| open.pending),
        ("requests", |open| open.requests),
        ("retries", |open| open.retries),
    ];
    let series = families.map(|(state, open)| {
        let proxy = program.proxy.clone();
        let sum = move || {
            let slots = proxy.balancers.all();
            slots.iter().map(|slot| i64::from(open(&slot.circuit().summary()))).sum()
        };
        (state.to_owned(), sum)
    });
    let help =
        "Requests to endpoints: those without a connection yet, those in progress, and retries among these";
    parts.registry.gauges_from("ambit_upstream_requests", help, "state", series);
}

fn external(parts: &Parts, program: &Program) {
    type Tally = fn(&External) -> &AtomicU64;
    let families: [(&str, Tally); 3] =
        [("allowed", |it| &it.allowed), ("denied", |it| &it.denied), ("failed", |it| &it.failed)];
    let series = families.map(|(name, tally)| {
        let proxy = program.proxy.clone();
        (name.to_owned(), move || tally(&proxy.tallies.external).load(Ordering::Relaxed))
    });
    let help = "Requests that external authorizers were asked about";
    parts.registry.counters_from("ambit_external_authorizations", help, "outcome", series);
}

fn exports(parts: &Parts) {
    let signals = [
        ("ambit_otlp_spans", "Spans for collectors", &parts.exports.spans),
        ("ambit_otlp_log_records", "Log records for collectors", &parts.exports.logs),
    ];
    for (name, help, counts) in signals {
        type Tally = fn(&Exported) -> &AtomicU64;
        let families: [(&str, Tally); 3] =
            [("exported", |it| &it.exported), ("dropped", |it| &it.dropped), ("failed", |it| &it.failed)];
        let series = families.map(|(outcome, tally)| {
            let counts = counts.clone();
            (outcome.to_owned(), move || tally(&counts).load(Ordering::Relaxed))
        });
        parts.registry.counters_from(name, help, "outcome", series);
    }
}

fn traffic(parts: &Parts, program: &Program) {
    type Tally = fn(&Refusals) -> &AtomicU64;
    let families: [(&str, Tally); 4] = [
        ("rate_limited", |it| &it.rate_limited),
        ("table_full", |it| &it.table_full),
        ("condition", |it| &it.condition),
        ("failed", |it| &it.failed),
    ];
    let series = families.map(|(name, tally)| {
        let proxy = program.proxy.clone();
        (name.to_owned(), move || tally(&proxy.tallies.traffic).load(Ordering::Relaxed))
    });
    let help = "Requests and connections that TrafficPolicies refused";
    parts.registry.counters_from("ambit_traffic_policy_refusals", help, "reason", series);
}

fn clients(parts: &Parts, program: &Program) {
    type Tally = fn(&crate::clients::Refusals) -> &AtomicU64;
    let families: [(&str, Tally); 5] = [
        ("address", |refused| &refused.address),
        ("total", |refused| &refused.total),
        ("pending_address", |refused| &refused.pending_address),
        ("pending_total", |refused| &refused.pending_total),
        ("proxy_protocol", |refused| &refused.proxy_protocol),
    ];
    let series = families.map(|(name, tally)| {
        let proxy = program.proxy.clone();
        (name.to_owned(), move || tally(&proxy.tallies.clients).load(Ordering::Relaxed))
    });
    let help = "Connections of clients outside the mesh that were refused";
    parts.registry.counters_from("ambit_gateway_connections_refused", help, "limit", series);
    type Open = fn(&Clients) -> usize;
    let families: [(&str, Open); 2] =
        [("open", |clients| clients.open.open()), ("pending", |clients| clients.pending.open())];
    let series = families.map(|(state, open)| {
        let proxy = program.proxy.clone();
        (state.to_owned(), move || i64::try_from(open(&proxy.clients)).unwrap_or(i64::MAX))
    });
    let help = "Connections of clients outside the mesh, and those of them whose client has not begun";
    parts.registry.gauges_from("ambit_gateway_connections", help, "state", series);
}

fn limits(parts: &Parts, program: &Program) {
    type Tally = fn(&Limited) -> &AtomicU64;
    let families: [(&str, Tally); 8] = [
        ("head_size", |limited| &limited.head_size),
        ("target_size", |limited| &limited.target_size),
        ("head_timeout", |limited| &limited.head_timeout),
        ("body_timeout", |limited| &limited.body_timeout),
        ("idle_timeout", |limited| &limited.idle_timeout),
        ("requests_per_connection", |limited| &limited.requests_per_connection),
        ("abandoned_requests", |limited| &limited.abandoned_requests),
        ("write_timeout", |limited| &limited.write_timeout),
    ];
    let series = families.map(|(name, tally)| {
        let proxy = program.proxy.clone();
        (name.to_owned(), move || tally(&proxy.tallies.limited).load(Ordering::Relaxed))
    });
    let help = "Requests refused, or connections closed, because a client passed a limit";
    parts.registry.counters_from("ambit_client_limits_exceeded", help, "limit", series);
}
