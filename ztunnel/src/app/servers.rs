//! Admin, metrics and readiness: what they show and where they listen.

use std::sync::Arc;

use ambit_telemetry::logging::Logging;
use ambit_telemetry::{Admin, Readiness, Registry};
use serde_json::{Value, json};

use super::Requests;
use super::{Parts, Program, dump};
use crate::directory::ondemand::{self, OnDemandClient};
use crate::explain;
use crate::proxy::{Proxy, ProxyMetrics, Tally};
use ambit_runtime::tasks::Tasks;
use ambit_runtime::{observe, servers};

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
    let directory = |shape: fn(Value) -> Value| {
        let reader = parts.directory.clone();
        move || Ok(shape(serde_json::to_value(&*reader.snapshot())?))
    };
    let (certificates, proxy) = (parts.certificates.clone(), program.proxy.clone());
    let pods = program.proxy.clone();
    let admin = Admin::new()
        .section(
            "services",
            directory(|mut dump| {
                let workloads = dump["workloads"].take();
                dump::services(dump["services"].take(), &workloads)
            }),
        )
        .section("workloads", directory(|mut dump| dump::workloads(dump["workloads"].take())))
        .section("policies", directory(|mut dump| dump::policies(dump["policies"].take())))
        .section("certificates", move || Ok(dump::certificates(&certificates.list())))
        .section("connections", move || serde_json::to_value(proxy.connections.summaries()))
        .section("pods", move || Ok(pod_dump(&pods)));
    let admin = parts.flows.route(explain::routes(admin, &program.proxy));
    let logs = (logging, &parts.access_log);
    servers::with_common_routes(admin, parts.config.clone(), env!("CARGO_PKG_VERSION"), logs, stop)
}

fn pod_dump(proxy: &Proxy) -> Value {
    let mut pods = proxy.local.all();
    pods.sort_by(|a, b| a.workload().cmp(b.workload()));
    pods.iter()
        .map(|pod| {
            json!({
                "uid": pod.uid(),
                "workload": pod.workload().as_str(),
                "identity": pod.identity().as_str(),
                "netns": pod.stock().netns().id().to_string(),
            })
        })
        .collect()
}

fn register(parts: &Parts, program: &Program, logging: &Logging) {
    let registry = &parts.registry;
    logging.register(registry);
    program.proxy.shares.register(registry);
    tallies(registry, &program.proxy);
    ejections(registry, &program.proxy);
    observe::pools(registry, &program.pool_counters);
    observe::windows(registry, &parts.budget);
    if let Some(client) = &parts.discovery {
        observe::discovery(registry, client);
    }
    if let Some(on_demand) = &program.proxy.on_demand {
        demands(registry, on_demand);
    }
    observe::certificates(registry, &parts.certificates);
    observe::workers(registry, &program.workers);
    observe::process(registry);
    observe::trust(registry, &parts.trust);
    let proxy = program.proxy.clone();
    let open = move || i64::try_from(proxy.connections.len()).unwrap_or(i64::MAX);
    registry.gauge_from("ambit_connections_open", "Connections open now", open.clone());
    registry.gauge_from("istio_tcp_sockets_open", "Connections open now", open);
    registry.build_info("ztunnel", env!("CARGO_PKG_VERSION"));
    let pods = program.pods.clone();
    let served = move || i64::try_from(pods.counts().0).unwrap_or(i64::MAX);
    registry.gauge_from("ambit_pods_served", "Pods of this node that are served", served.clone());
    registry.gauge_from("workload_manager_active_proxy_count", "Pods of this node that are served", served);
    let pods = program.pods.clone();
    let failed = move || i64::try_from(pods.counts().1).unwrap_or(i64::MAX);
    registry.gauge_from("ambit_pods_failed", "Pods that can't be served and are tried again", failed.clone());
    registry.gauge_from(
        "workload_manager_pending_proxy_count",
        "Pods that can't be served and are tried again",
        failed,
    );
    let shortages = || crate::pods::accept_shortages();
    registry.counter_from(
        "ambit_accept_shortages",
        "Accepts that failed for want of descriptors or memory",
        shortages,
    );
}

fn tallies(registry: &Registry, proxy: &Arc<Proxy>) {
    let register = |name: &str, help: &str, tally: fn(&ProxyMetrics) -> &Tally| {
        let proxy = proxy.clone();
        registry.counter_from(name, help, move || tally(&proxy.tallies).get());
    };
    register(
        "ambit_policy_dry_run_differs",
        "Connections that dry-run policies would have decided otherwise",
        |t| &t.dry_run_differs,
    );
    register("ambit_waypoint_bypassed", "Connections past a missing waypoint, as its owner allows", |t| {
        &t.waypoint_bypassed
    });
    register("ambit_connect_retries", "Attempts on another endpoint after one failed", |t| &t.retries);
    register("ambit_connections_cut", "Live connections ended by policy or revocation", |t| &t.cut);
    register("ambit_connections_idle", "Connections closed because they moved no byte for too long", |t| {
        &t.idle
    });
    register("ambit_handed_over", "Connections handed over on this node", |t| &t.handed_over);
    register("ambit_foreign_sources", "Connections of pods from addresses that are not their own", |t| {
        &t.foreign_sources
    });
    register("ambit_hbone_inbound_ping_timeouts", "Tunnel connections to us whose peer fell silent", |t| {
        &t.silent_clients
    });
}

fn ejections(registry: &Registry, proxy: &Arc<Proxy>) {
    let (total, now) = (proxy.clone(), proxy.clone());
    registry.counter_from(
        "ambit_endpoints_ejected",
        "Endpoints and nodes that a pod leaves out for a while because it could not reach them",
        move || total.tallies.ejected.get(),
    );
    let now = move || {
        let count = now.local.all().iter().map(|pod| pod.ejected().count()).sum::<usize>();
        i64::try_from(count).unwrap_or(i64::MAX)
    };
    registry.gauge_from("ambit_endpoints_ejected_now", "Endpoints and nodes that pods leave out now", now);
}

fn demands(registry: &Registry, on_demand: &OnDemandClient) {
    let register = |name: &str, help: &str, tally: fn(&ondemand::ProxyMetrics) -> &Tally| {
        let on_demand = on_demand.clone();
        registry.counter_from(name, help, move || tally(on_demand.tallies()).get());
    };
    register("ambit_demands", "Times the control plane was asked for what a pod dialled", |t| &t.demands);
    register("ambit_demands_unanswered", "Demands that the control plane did not answer in time", |t| {
        &t.unanswered
    });
    register("ambit_demands_refused", "Demands refused because too many names were asked for", |t| {
        &t.refused
    });
    register("ambit_demands_given_up", "Demanded names unsubscribed, unused or beyond a pod's share", |t| {
        &t.given_up
    });
    let on_demand = on_demand.clone();
    let names = move || i64::try_from(on_demand.names()).unwrap_or(i64::MAX);
    registry.gauge_from("ambit_demanded_names", "Names subscribed because pods dialled them", names);
}
