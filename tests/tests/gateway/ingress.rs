//! Ingresses of class `ambit`: the Gateway that serves them is made for them.

use std::net::{IpAddr, SocketAddr};

use ambit_local::Pod;
use ambit_tests::beds::Trials;
use ambit_tests::http::{self, Response};
use ambit_tests::wait::{self, SOON};

use crate::bed::Gateways;
use crate::tls::{self, Certificate};

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("an Ingress is served by a Gateway of its class", async |bed| served(bed).await);
}

/// Where Ingresses are served.
async fn address(bed: &Gateways) -> IpAddr {
    wait::until("the Gateway is made and serves", SOON * 3, || async {
        let key = "gateway.networking.k8s.io/gateway-name";
        bed.cluster.pods_of("ambit-system", key, "ambit-ingress").iter().any(Pod::is_ready)
    })
    .await;
    let addresses = bed.cluster.service_ips("ambit-system", "ambit-ingress");
    addresses.into_iter().find(IpAddr::is_ipv4).expect("an address")
}

async fn ingress(bed: &Gateways, name: &str, spec: &str) {
    bed.apply(&format!(
        "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {{name: {name}, namespace: edge}}\n\
         spec: {{ingressClassName: ambit, {spec}}}\n"
    ))
    .await;
}

async fn get(bed: &Gateways, to: SocketAddr, host: &str, path: &str) -> Response {
    http::get(&bed.outside, to, path, &format!("host: {host}\r\n")).await.unwrap()
}

async fn served(bed: &Gateways) {
    for name in ["in-exact", "in-long", "in-short", "in-wild", "in-default"] {
        bed.service(name).await;
    }
    let to = |service: &str| format!("{{service: {{name: {service}, port: {{number: 80}}}}}}");
    let path = |path: &str, kind: &str, service: &str| {
        format!("{{path: {path}, pathType: {kind}, backend: {}}}", to(service))
    };
    let paths = [
        path("/a", "Prefix", "in-short"),
        path("/a/b", "Prefix", "in-long"),
        path("/a/b", "Exact", "in-exact"),
        path("/c/*", "ImplementationSpecific", "in-long"),
    ];
    let certificate = Certificate::new(&["in.example", "w.in.example"]);
    bed.apply(&certificate.secret("edge", "in-cert")).await;
    ingress(
        bed,
        "in-first",
        &format!(
            "tls: [{{hosts: [in.example], secretName: in-cert}}], rules: [{{host: in.example, http: {{paths: [{}]}}}}, \
             {{host: '*.in.example', http: {{paths: [{}]}}}}]",
            paths.join(", "),
            path("/", "Prefix", "in-wild"),
        ),
    )
    .await;
    // Another one for all hosts that are nobody's, with the port by its name.
    ingress(bed, "in-rest", "defaultBackend: {service: {name: in-default, port: {name: http}}}").await;
    let at = address(bed).await;
    let http = SocketAddr::new(at, 80);
    bed.eventually(http, "x.in.example", |answer| answer.status == 200 && answer.server() == "in-wild").await;
    bed.eventually(http, "other.example", |answer| answer.status == 200).await;
    for (host, path, server) in [
        ("in.example", "/a/b", "in-exact"),
        ("in.example", "/a/b/", "in-long"),
        ("in.example", "/a/b/c", "in-long"),
        ("in.example", "/a/bc", "in-short"),
        ("IN.example:80", "/a", "in-short"),
        ("in.example", "/c/d", "in-long"),
        ("x.in.example", "/a/b", "in-wild"),
        // A wildcard stands for one label.
        ("y.x.in.example", "/", "in-default"),
        ("other.example", "/a/b", "in-default"),
    ] {
        let answer = get(bed, http, host, path).await;
        assert_eq!((answer.status, answer.server()), (200, server), "{host}{path}: {answer:?}");
        assert_eq!(answer.sent("host"), Some(host));
    }
    // TLS with the certificate of the Secret.
    let https = SocketAddr::new(at, 443);
    wait::until("TLS is served", SOON, || async {
        tls::get(bed, https, ("in.example", "in.example"), &[&certificate])
            .await
            .is_ok_and(|answer| answer.status == 404)
    })
    .await;
    let names = ("w.in.example", "w.in.example");
    assert!(tls::get(bed, https, names, &[&certificate]).await.is_err());
    // What a Resource backend is for is answered with 500, and the rest is served.
    let resource = "{path: /files, pathType: Prefix, backend: {resource: {kind: Bucket, name: b}}}";
    let rules = format!(
        "rules: [{{host: faulty.example, http: {{paths: [{resource}, {}]}}}}]",
        path("/", "Prefix", "in-long")
    );
    ingress(bed, "in-faulty", &rules).await;
    bed.eventually(http, "faulty.example", |answer| answer.status == 200 && answer.server() == "in-long")
        .await;
    assert_eq!(get(bed, http, "faulty.example", "/files").await.status, 500);
    // One that goes is served no longer.
    bed.cluster.delete("Ingress", "edge", "in-first").await.unwrap();
    bed.eventually(http, "x.in.example", |answer| answer.status == 200 && answer.server() == "in-default")
        .await;
    wait::until("TLS is served no longer", SOON, || async {
        tls::get(bed, https, ("in.example", "in.example"), &[&certificate]).await.is_err()
    })
    .await;
}
