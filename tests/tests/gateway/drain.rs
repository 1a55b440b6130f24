//! Changes under load from outside: a gateway's pods are replaced, and its listeners and certificates change, while requests go on.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ambit_local::Pod;
use ambit_tests::beds::Trials;
use ambit_tests::load::{Load, Shape, Tally};
use ambit_tests::wait::{self, SOON};
use rustls::pki_types::ServerName;

use crate::bed::{GATEWAY_NAME, Gateways};
use crate::tls::{Certificate, client_config, get_as};

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("replacing a gateway's pods loses no request from outside", async |bed| replaced(bed).await);
    trials.add("listeners that come, change and go cost no request", async |bed| relistened(bed).await);
    trials.add("certificates that change cost no request", async |bed| recertified(bed).await);
}

/// A gateway of two pods in front of a server, reached in the clear at port 80 and inside TLS at port 443.
struct Busy<'a> {
    bed: &'a Gateways,
    name: &'static str,
    host: String,
    at: IpAddr,
}

/// Its load: 100 requests a second in the clear, and as many inside TLS, half of them on new connections.
struct Loads {
    plain: Load,
    tls: Load,
}

impl<'a> Busy<'a> {
    async fn start(bed: &'a Gateways, name: &'static str, certificate: &Certificate) -> Self {
        let host = format!("{name}.example");
        bed.service(name).await;
        bed.apply(&certificate.secret("edge", name)).await;
        bed.route(name, &format!("[{{name: {name}-gw}}]"), "[]").await;
        let mut busy = Self { bed, name, host, at: IpAddr::from([0, 0, 0, 0]) };
        busy.listen("").await;
        let at = bed.cluster.service_ips("edge", &format!("{name}-gw"));
        busy.at = at.into_iter().find(IpAddr::is_ipv4).expect("an address");
        busy.ready().await;
        let name = (busy.host.as_str(), busy.host.as_str());
        bed.eventually(SocketAddr::new(busy.at, 80), &busy.host, |answer| answer.status == 200).await;
        wait::until("requests inside TLS are served", SOON, || async {
            let answer = get_as(bed, SocketAddr::new(busy.at, 443), name, &[certificate], None).await;
            answer.is_ok_and(|answer| answer.status == 200)
        })
        .await;
        busy
    }

    /// Gives it further listeners beside its two.
    async fn listen(&self, more: &str) {
        let name = self.name;
        self.bed
            .apply(&format!(
                "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
                 metadata: {{name: {name}-gw, namespace: edge, annotations: {{local.ambit.dev/replicas: '2'}}}}\n\
                 spec:\n  gatewayClassName: ambit\n  listeners:\n  - {{name: http, port: 80, protocol: HTTP}}\n  \
                 - {{name: https, port: 443, protocol: HTTPS, tls: {{certificateRefs: [{{name: {name}}}]}}}}\n{more}"
            ))
            .await;
    }

    fn pods(&self) -> Vec<Pod> {
        self.bed.cluster.pods_of("edge", GATEWAY_NAME, &format!("{}-gw", self.name))
    }

    async fn ready(&self) {
        wait::until("both of its pods are ready", Duration::from_secs(60), || async {
            self.pods().iter().filter(|pod| pod.is_ready()).count() == 2
        })
        .await;
    }

    async fn load(&self, trusted: &[&Certificate]) -> Loads {
        let half = Shape { new_per_second: 50, kept_per_second: 50, kept_connections: 5, ..Shape::default() };
        let name = ServerName::try_from(self.host.clone()).expect("a name");
        let config = client_config(trusted, &[b"http/1.1"], None).expect("certificates");
        let inside = Shape { tls: Some((Arc::new(config), name)), ..half.clone() };
        let start = async |port: u16, shape: &Shape| {
            Load::start(&self.bed.outside, SocketAddr::new(self.at, port), shape).await.expect("connections")
        };
        Loads { plain: start(80, &half).await, tls: start(443, &inside).await }
    }
}

impl Loads {
    async fn more(&self, count: u64) {
        tokio::join!(self.plain.more(count), self.tls.more(count));
    }

    /// Both have ended without a failure.
    async fn finish(self) -> [Tally; 2] {
        let tallies: [Tally; 2] = tokio::join!(self.plain.finish(), self.tls.finish()).into();
        tallies.iter().for_each(Tally::assert_all_answered);
        tallies
    }
}

/// Kept connections end with an answer that says so: none is cut between two requests.
async fn replaced(bed: &Gateways) {
    let certificate = Certificate::new(&["rolled.example"]);
    let busy = Busy::start(bed, "rolled", &certificate).await;
    let loads = busy.load(&[&certificate]).await;
    loads.more(100).await;
    for old in busy.pods() {
        bed.cluster.delete_pod(&old).await.expect("its end");
        busy.ready().await;
        loads.more(100).await;
    }
    for tally in loads.finish().await {
        assert_eq!(tally.kept_reopened, 0, "{tally:?}");
        assert!(tally.kept_renewed > 0, "{tally:?}");
    }
}

async fn relistened(bed: &Gateways) {
    let certificate = Certificate::new(&["relisten.example"]);
    let busy = Busy::start(bed, "relisten", &certificate).await;
    let loads = busy.load(&[&certificate]).await;
    let other = SocketAddr::new(busy.at, 8081);
    for round in 0..3 {
        // Another port, another host on the same ports, and a TLS listener with a host.
        busy.listen(&format!(
            "  - {{name: other, port: 8081, protocol: HTTP}}\n  \
             - {{name: host, port: 80, protocol: HTTP, hostname: round-{round}.example}}\n  \
             - {{name: tls, port: 443, protocol: HTTPS, hostname: round-{round}.example, tls: {{certificateRefs: [{{name: relisten}}]}}}}\n"
        ))
        .await;
        bed.eventually(other, &busy.host, |answer| answer.status == 200).await;
        loads.more(50).await;
        busy.listen("").await;
        wait::until("its port is closed", SOON, || async { bed.outside.connect(other).await.is_err() }).await;
        loads.more(50).await;
    }
    for tally in loads.finish().await {
        assert_eq!((tally.kept_reopened, tally.kept_renewed), (0, 0), "connections were closed: {tally:?}");
    }
}

async fn recertified(bed: &Gateways) {
    let certificates = [0, 1, 2, 3].map(|_| Certificate::new(&["recertify.example"]));
    let busy = Busy::start(bed, "recertify", &certificates[0]).await;
    let loads = busy.load(&certificates.each_ref()).await;
    let (to, name) = (SocketAddr::new(busy.at, 443), (busy.host.as_str(), busy.host.as_str()));
    for certificate in &certificates[1..] {
        bed.apply(&certificate.secret("edge", "recertify")).await;
        // Ten times in a row: both pods have it.
        wait::until("the new certificate is shown", SOON, || async {
            for _ in 0..10 {
                let answer = get_as(bed, to, name, &[certificate], None).await;
                if !answer.is_ok_and(|answer| answer.status == 200) {
                    return false;
                }
            }
            true
        })
        .await;
        loads.more(50).await;
    }
    for tally in loads.finish().await {
        assert_eq!((tally.kept_reopened, tally.kept_renewed), (0, 0), "connections were closed: {tally:?}");
    }
}
