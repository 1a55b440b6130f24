//! ServiceEntries and WorkloadEntries: who offers a host, and which port a name means.

use std::net::SocketAddr;

use ambit_local::PodOptions;
use ambit_tests::beds::Trials;

use crate::bed::Cases;

pub(crate) fn add(trials: &mut Trials<Cases>) {
    trials.add("the_oldest_service_entry_has_the_host_whole", duplicate_hosts);
    trials.add("a_service_has_its_own_host", host_of_a_service);
    trials.add("a_service_entry_uses_the_container_port_of_its_name", container_ports);
    trials.add("a_named_target_port_is_looked_up_by_that_name", entry_ports);
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// Case d.
async fn duplicate_hosts(bed: &Cases) {
    let node = bed.outside(9201, "older").await;
    bed.outside(9202, "younger").await;
    let entry = |name: &str, created: &str, address: &str, port: u16, target: u16| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n\
             metadata: {{name: {name}, namespace: shop, creationTimestamp: \"{created}\"}}\n\
             spec: {{hosts: [dup.example.com], addresses: [{address}], resolution: STATIC, \
             ports: [{{number: {port}, name: http, protocol: HTTP, targetPort: {target}}}], \
             endpoints: [{{address: {node}}}]}}\n"
        )
    };
    bed.apply(&entry("a-younger", "2026-02-01T00:00:00Z", "240.0.0.2", 81, 9202)).await;
    bed.will_reach(&bed.cli, at("240.0.0.2", 81), "younger").await;
    bed.apply(&entry("b-older", "2026-01-01T00:00:00Z", "240.0.0.1", 80, 9201)).await;
    bed.will_reach(&bed.cli, at("240.0.0.1", 80), "older").await;
    bed.finding("ServiceEntry shop/a-younger", "offered by ServiceEntry shop/b-older").await;
    bed.will_be_refused(&bed.cli, at("240.0.0.1", 81)).await;
    bed.delete("ServiceEntry", "shop", "b-older").await;
    bed.will_reach(&bed.cli, at("240.0.0.2", 81), "younger").await;
}

/// Case e.
async fn host_of_a_service(bed: &Cases) {
    let own = bed.server("own").await;
    bed.strict("own").await;
    let node = bed.outside(9203, "decoy").await;
    bed.apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: own, namespace: shop}}\n\
         spec: {{hosts: [own.shop.svc.cluster.local], addresses: [240.0.0.3], resolution: STATIC, \
         ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 9203}}], endpoints: [{{address: {node}}}]}}\n"
    ))
    .await;
    bed.finding("ServiceEntry shop/own", "offered by Service shop/own").await;
    bed.must_reach(&bed.cli, own.vip, "own").await;
}

/// Case f.
async fn container_ports(bed: &Cases) {
    let named = |options: PodOptions| options.port("web", 8085).label("kind", "named");
    let with = bed.server_with("with-name", named).await;
    bed.listen(&with.pod, with.pod.ip().into(), 8085, "by-name").await;
    let without = bed.server_with("without-name", |options| options.label("kind", "numbered")).await;
    bed.listen(&without.pod, without.pod.ip().into(), 7100, "by-number").await;
    for (kind, address) in [("named", "240.0.0.4"), ("numbered", "240.0.0.5")] {
        bed.apply(&format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {kind}, namespace: shop}}\n\
             spec: {{hosts: [{kind}.example.com], addresses: [{address}], resolution: STATIC, \
             workloadSelector: {{labels: {{kind: {kind}}}}}, ports: [{{number: 7100, name: web, protocol: HTTP}}]}}\n"
        ))
        .await;
    }
    bed.will_reach(&bed.cli, at("240.0.0.4", 7100), "by-name").await;
    bed.will_reach(&bed.cli, at("240.0.0.5", 7100), "by-number").await;
}

/// Case g.
async fn entry_ports(bed: &Cases) {
    for (port, name) in [(9001, "web"), (9002, "http"), (8080, "number"), (80, "service-port")] {
        bed.outside(port, name).await;
    }
    let node = bed.node_ip();
    let cases = [
        ("both", "http", "{web: 9001, http: 9002}", Some("http")),
        ("other", "http", "{web: 9001}", None),
        ("empty", "http", "{}", None),
        ("numbered", "8080", "{web: 9001}", Some("web")),
    ];
    for (name, target, ports, expected) in cases {
        bed.apply(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{selector: {{entry: {name}}}, ports: [{{name: web, port: 80, targetPort: {target}}}]}}\n---\n\
             apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{address: {node}, labels: {{entry: {name}}}, ports: {ports}}}\n"
        ))
        .await;
        bed.knows(0, "workloads", |it| it["uid"].to_string().contains(&format!("WorkloadEntry/shop/{name}")))
            .await;
        let vips = bed.cluster.service_ips("shop", name);
        let vip = SocketAddr::new(vips.into_iter().find(|ip| ip.is_ipv4()).unwrap(), 80);
        match expected {
            Some(server) => bed.will_reach(&bed.cli, vip, server).await,
            None => bed.will_be_refused(&bed.cli, vip).await,
        }
    }
}
