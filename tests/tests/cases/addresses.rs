//! Ownership of addresses: a pod owns its addresses and a Service its cluster IPs, whatever other objects claim.

use std::net::SocketAddr;

use ambit_tests::beds::Trials;

use crate::bed::{Cases, PORT};

pub(crate) fn add(trials: &mut Trials<Cases>) {
    trials.add("claims_of_a_pods_address_divert_nobody", claims_of_a_pod);
    trials.add("claims_of_a_cluster_ip_divert_nobody", claims_of_a_cluster_ip);
    trials.add("a_range_captures_its_own_ports_only", ranges);
    trials.add("a_load_balancers_address_stays_reachable", load_balancer);
}

/// Case a.
async fn claims_of_a_pod(bed: &Cases) {
    let vm = bed.server("vm").await;
    bed.strict("vm").await;
    let (address, at) = (vm.pod.ip(), SocketAddr::new(vm.pod.ip().into(), PORT));
    let slices = "apiVersion: v1\nkind: Service\nmetadata: {name: slices, namespace: plain}\n\
                  spec: {ports: [{name: http, port: 80}]}\n";
    bed.apply(slices).await;
    let claims = [
        (
            "WorkloadEntry plain/bare",
            format!(
                "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: bare, namespace: plain}}\n\
                 spec: {{address: {address}}}\n"
            ),
        ),
        (
            "WorkloadEntry plain/captured",
            format!(
                "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n\
                 metadata: {{name: captured, namespace: plain, annotations: {{ambient.istio.io/redirection: enabled}}}}\n\
                 spec: {{address: {address}, serviceAccount: other}}\n"
            ),
        ),
        (
            "ServiceEntry plain/endpoint",
            format!(
                "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: endpoint, namespace: plain}}\n\
                 spec: {{hosts: [endpoint.example.com], resolution: STATIC, endpoints: [{{address: {address}}}], \
                 ports: [{{number: 80, name: http, protocol: HTTP}}]}}\n"
            ),
        ),
    ];
    for (object, manifest) in claims {
        bed.apply(&manifest).await;
        bed.finding(object, "belongs to Pod shop/vm").await;
        bed.must_reach(&bed.cli, at, "vm").await;
        bed.must_reach(&bed.cli, vm.vip, "vm").await;
    }
    // Of an endpoint whose pod is not there it is the pod with the address, through its tunnel.
    bed.apply(&format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: slices-1, namespace: plain, labels: {{kubernetes.io/service-name: slices}}}}\n\
         addressType: IPv4\nports: [{{name: http, port: {PORT}}}]\n\
         endpoints: [{{addresses: [{address}], targetRef: {{kind: Pod, name: nope}}}}]\n"
    ))
    .await;
    let vips = bed.cluster.service_ips("plain", "slices");
    let vip = vips.into_iter().find(|ip| ip.is_ipv4()).unwrap();
    bed.will_reach(&bed.cli, (vip, 80).into(), "vm").await;
    bed.must_reach(&bed.cli, at, "vm").await;
    bed.must_reach(&bed.cli, vm.vip, "vm").await;
}

/// Case b.
async fn claims_of_a_cluster_ip(bed: &Cases) {
    let pay = bed.server("pay").await;
    bed.strict("pay").await;
    let decoy = bed.outside(9100, "decoy").await;
    bed.apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: claims, namespace: plain}}\n\
         spec: {{hosts: [claims.example.com], addresses: [{}, {}], resolution: STATIC, \
         ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 9100}}, \
         {{number: {PORT}, name: http-pod, protocol: HTTP, targetPort: 9100}}], endpoints: [{{address: {decoy}}}]}}\n",
        pay.vip.ip(),
        pay.pod.ip(),
    ))
    .await;
    bed.finding("ServiceEntry plain/claims", "belongs to Service shop/pay").await;
    bed.knows(0, "services", |it| it["hostname"] == "claims.example.com").await;
    for client in [&bed.cli, &bed.third] {
        bed.must_reach(client, pay.vip, "pay").await;
        bed.must_reach(client, SocketAddr::new(pay.pod.ip().into(), PORT), "pay").await;
    }
}

/// Case c.
async fn ranges(bed: &Cases) {
    let inside = bed.server("inside").await;
    bed.strict("inside").await;
    bed.listen(&inside.pod, inside.pod.ip().into(), 5432, "inside").await;
    let node = bed.outside(9101, "outside").await;
    bed.outside(5432, "database").await;
    let range = |name: &str, block: &str, port: u16| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: plain}}\n\
             spec: {{hosts: [{name}.example.com], addresses: [{block}], resolution: NONE, \
             ports: [{{number: {port}, name: tcp, protocol: TCP}}]}}\n"
        )
    };
    bed.apply(&range("everything", "0.0.0.0/0", 5432)).await;
    bed.apply(&range("nodes", &format!("{node}/16"), 6379)).await;
    for name in ["everything", "nodes"] {
        bed.knows(0, "services", |it| it["hostname"] == format!("{name}.example.com")).await;
    }
    bed.must_reach(&bed.cli, (node, 9101).into(), "outside").await;
    bed.must_reach(&bed.cli, (node, 5432).into(), "database").await;
    for port in [PORT, 5432] {
        bed.must_reach(&bed.cli, SocketAddr::new(inside.pod.ip().into(), port), "inside").await;
    }
    bed.must_reach(&bed.cli, inside.vip, "inside").await;
}

/// Case h.
async fn load_balancer(bed: &Cases) {
    let node = bed.outside(9102, "node").await;
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: balanced, namespace: shop}}\n\
         spec: {{type: LoadBalancer, selector: {{app: nobody}}, ports: [{{name: http, port: 80}}]}}\n\
         status: {{loadBalancer: {{ingress: [{{ip: {node}}}]}}}}\n"
    ))
    .await;
    bed.knows(0, "services", |it| it["hostname"] == "balanced.shop.svc.cluster.local").await;
    bed.must_reach(&bed.cli, (node, 9102).into(), "node").await;
}
