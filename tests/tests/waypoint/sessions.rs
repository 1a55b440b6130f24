//! Session persistence: clients that bring a token back keep their endpoint while it can be used.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::bed::Waypoints;
use crate::http;

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("a cookie keeps a client on its endpoint while it is there", async |bed| cookies(bed).await);
    trials.add("a session keeps its backend whatever the weights are", async |bed| splits(bed).await);
    trials.add("a session's header leads to no endpoint of others", async |bed| foreign_tokens(bed).await);
}

/// What a client brings back of an answer, as a line of a header.
fn brought_back(answer: &http::Response) -> Option<String> {
    let pair = answer.header("set-cookie")?.split(';').next()?;
    Some(format!("cookie: a=b; {pair}\r\n"))
}

async fn servers(bed: &Waypoints, to: SocketAddr, headers: &str) -> BTreeSet<String> {
    let mut servers = BTreeSet::new();
    for _ in 0..30 {
        let answer = http::get(&bed.cli, to, "/cart/1", headers).await.unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        servers.insert(answer.server().to_owned());
    }
    servers
}

async fn cookies(bed: &Waypoints) {
    let mut pods = Vec::new();
    for version in ["a", "b", "c"] {
        pods.push(bed.version("sess", version, 1, http::mirror()).await);
    }
    let to = bed.bind("sess", "http").await;
    bed.route(
        "sess",
        "  - matches: [{path: {type: PathPrefix, value: /cart}}]\n    \
             backendRefs: [{name: sess, port: 80}]\n    sessionPersistence: {sessionName: cart}\n",
    )
    .await;
    let first = bed.eventually(to, "/cart/1", "", |answer| answer.header("set-cookie").is_some()).await;
    let cookie = first.header("set-cookie").unwrap();
    assert!(cookie.starts_with("cart=") && cookie.contains("; Path=/cart; HttpOnly"), "{cookie}");
    let headers = brought_back(&first).unwrap();
    let server = first.server().to_owned();
    assert_eq!(servers(bed, to, &headers).await, BTreeSet::from([server.clone()]));
    assert!(servers(bed, to, "").await.len() > 1);
    explains(bed, to, &headers, &server).await;
    // A client that has its token gets no other.
    let again = http::get(&bed.cli, to, "/cart/1", &headers).await.unwrap();
    assert_eq!((again.server(), again.header("set-cookie")), (&*server, None));
    // One that a client has changed is none, though backend and endpoint are right.
    let (before, token) = headers.trim_end().rsplit_once('=').unwrap();
    let last = if token.ends_with('A') { "B" } else { "A" };
    let changed = format!("{before}={}{last}\r\n", &token[..token.len() - 1]);
    let answer = http::get(&bed.cli, to, "/cart/1", &changed).await.unwrap();
    assert!(answer.header("set-cookie").is_some(), "{answer:?}");
    let pod = pods.iter().find(|pod| pod.name() == server).unwrap();
    bed.cluster.delete_pod(pod).await.unwrap();
    let moved = bed
        .eventually(to, "/cart/1", &headers, |answer| answer.status == 200 && answer.server() != server)
        .await;
    let headers = brought_back(&moved).unwrap();
    assert_eq!(servers(bed, to, &headers).await, BTreeSet::from([moved.server().to_owned()]));
    assert!(http::metric(&bed.metrics().await, "ambit_sessions_moved_total ") > 0);
}

/// What `ambit why` learns of a request with a token: where that leads.
async fn explains(bed: &Waypoints, to: SocketAddr, token: &str, server: &str) {
    let asked = async |headers: &str| {
        let headers: String = headers.trim().bytes().map(|byte| format!("%{byte:02X}")).collect();
        let path = format!(
            "/explain/request?from=spiffe://cluster.local/ns/shop/sa/cli&to={to}&path=/cart/1&headers={headers}"
        );
        let pod = bed.pods().into_iter().find(ambit_local::Pod::is_ready).unwrap();
        let (status, body) = bed.cluster.waypoint_admin(&pod, &path).await.unwrap();
        assert_eq!(status, 200, "{body}");
        body
    };
    let kept = asked(token).await;
    assert!(
        kept.contains("the session's token names") && kept.contains("the client's session is there"),
        "{kept}"
    );
    let explained: serde_json::Value = serde_json::from_str(&kept).unwrap();
    assert_eq!(explained["next"]["workload"]["name"], server, "{kept}");
    let new = asked("").await;
    assert!(new.contains("the request has no token of a session"), "{new}");
}

async fn splits(bed: &Waypoints) {
    for version in ["v1", "v2"] {
        bed.service(&format!("sp-{version}")).await;
    }
    let to = bed.service("sp").await;
    let route = async |first: u32, second: u32| {
        bed.route(
            "sp",
            &format!(
                "  - backendRefs: [{{name: sp-v1, port: 80, weight: {first}}}, {{name: sp-v2, port: 80, weight: {second}}}]\n    \
                     sessionPersistence: {{absoluteTimeout: 1h, cookieConfig: {{lifetimeType: Permanent}}}}\n"
            ),
        )
        .await;
    };
    route(1, 1).await;
    let on_second =
        |answer: &http::Response| answer.server() == "sp-v2" && answer.header("set-cookie").is_some();
    let first = bed.eventually(to, "/", "", on_second).await;
    assert!(first.header("set-cookie").unwrap().contains("; Max-Age=3600"), "{first:?}");
    let headers = brought_back(&first).unwrap();
    assert_eq!(servers(bed, to, &headers).await, BTreeSet::from(["sp-v2".to_owned()]));
    // No new session goes there; those that began do.
    route(1, 0).await;
    wait::until("the new weights are in force", SOON, || async {
        servers(bed, to, "").await == BTreeSet::from(["sp-v1".to_owned()])
    })
    .await;
    assert_eq!(servers(bed, to, &headers).await, BTreeSet::from(["sp-v2".to_owned()]));
}

async fn foreign_tokens(bed: &Waypoints) {
    let rules = |service: &str| {
        format!(
            "  - backendRefs: [{{name: {service}, port: 80}}]\n    \
                 sessionPersistence: {{type: Header, sessionName: x-place, idleTimeout: 1h}}\n"
        )
    };
    let mut tokens = Vec::new();
    for service in ["mine", "yours"] {
        let to = bed.service(service).await;
        bed.route(service, &rules(service)).await;
        let answer = bed.eventually(to, "/", "", |answer| answer.header("x-place").is_some()).await;
        tokens.push((to, answer.header("x-place").unwrap().to_owned()));
    }
    let (mine, own) = &tokens[0];
    let (_, foreign) = &tokens[1];
    let forged = "A".repeat(own.len());
    for token in [own, foreign, &forged, "10.0.0.1:8080", "%"] {
        let answer = http::get(&bed.cli, *mine, "/", &format!("x-place: {token}\r\n")).await.unwrap();
        assert_eq!((answer.status, answer.server()), (200, "mine"), "{token}");
        assert!(answer.header("x-place").is_some_and(|token| token.len() == own.len()), "{answer:?}");
    }
}
