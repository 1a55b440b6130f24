//! The suite h2spec against a gateway, from outside the mesh: HTTP/2 by prior knowledge, and inside TLS.

use std::net::SocketAddr;

use ambit_tests::beds::Trials;
use ambit_tests::h2spec;
use ambit_tests::wait::{self, SOON};

use crate::bed::Gateways;
use crate::tls::{Certificate, get_as};

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("HTTP/2 of a gateway is as RFC 9113 asks", async |bed| conforms(bed).await);
}

async fn conforms(bed: &Gateways) {
    let certificate = Certificate::new(&["h2spec.example"]);
    bed.service("h2spec").await;
    bed.apply(&certificate.secret("edge", "h2spec")).await;
    let listeners = "[{name: http, port: 80, protocol: HTTP}, \
                     {name: https, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: h2spec}]}}]";
    let at = bed.gateway("h2spec-gw", listeners).await;
    // The suite names the gateway by its address.
    bed.route("h2spec", "[{name: h2spec-gw}]", "[]").await;
    let (plain, tls) = (SocketAddr::new(at, 80), SocketAddr::new(at, 443));
    bed.eventually(plain, "h2spec.example", |answer| answer.status == 200).await;
    wait::until("the certificate is shown", SOON, || async {
        let name = ("h2spec.example", "h2spec.example");
        get_as(bed, tls, name, &[&certificate], None).await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
    let by_prior_knowledge = h2spec::run(&bed.outside, plain, false).await;
    h2spec::assert_passed(&by_prior_knowledge, &[h2spec::INVALID_PREFACE]);
    h2spec::assert_passed(&h2spec::run(&bed.outside, tls, true).await, &[]);
}
