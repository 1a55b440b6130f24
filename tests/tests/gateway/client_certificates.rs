//! Certificates of clients outside the mesh: required, wished for, and not asked for.

use std::net::SocketAddr;

use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::bed::Gateways;
use crate::tls::{Certificate, get_as};

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("clients without a valid certificate are refused", async |bed| validated(bed).await);
}

async fn validated(bed: &Gateways) {
    let server = Certificate::new(&["mutual.example"]);
    let (known, unknown) = (Certificate::new(&["known"]), Certificate::new(&["unknown"]));
    bed.service("mutual").await;
    let roots = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: mutual-clients, namespace: edge}}\ndata:\n  ca.crt: |\n    {}\n",
        known.pem.replace('\n', "\n    ")
    );
    bed.apply(&format!("{}---\n{roots}", server.secret("edge", "mutual"))).await;
    let refs = "caCertificateRefs: [{group: '', kind: ConfigMap, name: mutual-clients}]";
    let listener = |name: &str, port: u16| {
        format!(
            "{{name: {name}, port: {port}, protocol: HTTPS, tls: {{certificateRefs: [{{name: mutual}}]}}}}"
        )
    };
    let spec = format!(
        "  tls:\n    frontend:\n      default: {{validation: {{{refs}}}}}\n      perPort:\n      \
         - {{port: 8443, tls: {{validation: {{mode: AllowInsecureFallback, {refs}}}}}}}\n      - {{port: 9443, tls: {{}}}}\n  \
         listeners: [{}, {}, {}]\n",
        listener("strict", 443),
        listener("fallback", 8443),
        listener("open", 9443)
    );
    let at = bed.gateway_with("mutual-gw", &spec).await;
    bed.route("mutual", "[{name: mutual-gw}]", "[]").await;
    let name = ("mutual.example", "mutual.example");
    let trusted = [&server];
    let ask = |port: u16, own| get_as(bed, SocketAddr::new(at, port), name, &trusted, own);
    for port in [443, 8443, 9443] {
        wait::until("the known client is served", SOON, || async {
            ask(port, Some(&known)).await.is_ok_and(|answer| answer.status == 200)
        })
        .await;
    }
    for (port, is_served) in [(443, false), (8443, true), (9443, true)] {
        for own in [Some(&unknown), None] {
            let served = ask(port, own).await.is_ok_and(|answer| answer.status == 200);
            assert_eq!(served, is_served, "{port} {}", own.is_some());
        }
    }
}
