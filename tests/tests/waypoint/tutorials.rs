//! Manifests of old tutorials (`examples/old-tutorials`): what can apply applies, what can't is named and changes nothing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::bed::Waypoints;
use crate::http;

/// Requests that shares are counted over.
const MANY: usize = 400;

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("old tutorials split traffic, and their other fields are named", async |bed| {
        traffic(bed).await;
    });
    trials.add("kinds of old tutorials that are gone limit nobody", async |bed| gone(bed).await);
}

/// A file, for services of the test's own.
fn tutorial(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/old-tutorials");
    let text = std::fs::read_to_string(folder.join(name)).unwrap();
    text.replace("reviews", "oldreviews").replace("ratings", "oldratings").replace("bookinfo", "shop")
}

/// How many of [`MANY`] requests which server answers.
async fn shares(bed: &Waypoints, to: SocketAddr) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..MANY {
        let answer = http::get(&bed.cli, to, "/", "").await.unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        *shares.entry(answer.server().to_owned()).or_default() += 1;
    }
    shares
}

async fn service(bed: &Waypoints, name: &str) -> SocketAddr {
    for version in ["v1", "v2", "v3"] {
        bed.version(name, version, 1, http::mirror()).await;
    }
    bed.bind(name, "http").await
}

async fn traffic(bed: &Waypoints) {
    let (reviews, ratings) = (service(bed, "oldreviews").await, service(bed, "oldratings").await);
    bed.apply(&tutorial("traffic.yaml")).await;
    let in_force = async |to: SocketAddr| {
        let mut servers = Vec::new();
        for _ in 0..20 {
            servers.push(http::get(&bed.cli, to, "/", "").await.map(|answer| answer.server().to_owned()));
        }
        servers.iter().all(|server| server.as_ref().is_ok_and(|server| !server.ends_with("-v3")))
    };
    wait::until("the rules are in force", SOON, async || in_force(reviews).await && in_force(ratings).await)
        .await;
    for (to, first, second, share) in
        [(reviews, "oldreviews-v1", "oldreviews-v2", 75), (ratings, "oldratings-v1", "oldratings-v2", 50)]
    {
        let shares = shares(bed, to).await;
        let percent = shares[first] * 100 / MANY;
        assert!((share - 9..=share + 9).contains(&percent), "{first}: {shares:?}");
        assert_eq!(shares[first] + shares[second], MANY, "{shares:?}");
    }
    // The older form of `percentage`.
    let failed = http::get(&bed.cli, ratings, "/", "end-user: jason\r\n").await.unwrap();
    assert_eq!(failed.status, 500);
    // A header that was to be appended is not, and the finding says how it would be.
    let answer = http::get(&bed.cli, reviews, "/", "").await.unwrap();
    assert_eq!(answer.sent("x-version"), None);
    let findings = async || bed.cluster.findings().await.join("\n");
    wait::until("the fields are named", SOON, async || findings().await.contains("retryPolicy")).await;
    let findings = findings().await;
    for field in [
        "retryPolicy",
        "appendHeaders",
        "connectionPool.http.connectTimeout",
        "circuitBreaker",
        "httpReqTimeout",
        "match[0].source",
    ] {
        assert!(findings.contains(field), "{field}: {findings}");
    }
}

async fn gone(bed: &Waypoints) {
    let to = bed.service("oldpolicies").await;
    for name in ["policies.yaml", "mixer.yaml", "linkerd.yaml"] {
        bed.apply(&tutorial(name).replace("oldreviews", "oldpolicies")).await;
    }
    // Whether they would take effect is known once the control plane has read what came after them.
    bed.route(
        "oldpolicies",
        "  - matches: [{path: {value: /after}}]\n    backendRefs: [{name: oldpolicies, port: 80}]\n",
    )
    .await;
    bed.eventually(to, "/other", "", |answer| answer.status == 404).await;
    let answer = http::request(&bed.cli, to, "DELETE", "/after", "", "").await.unwrap();
    assert_eq!((answer.status, answer.server()), (200, "oldpolicies"));
}
