//! TrafficPolicies: rate limits by key, and conditions in CEL.

use std::net::SocketAddr;

use ambit_local::Pod;
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::bed::Waypoints;
use crate::http;

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("a rate limit refuses what is over it", async |bed| limited(bed).await);
    trials.add("each key of a rate limit has its own bucket", async |bed| keyed(bed).await);
    trials.add("a rate limit of a route's rule leaves others alone", async |bed| of_rule(bed).await);
    trials.add("a gRPC call over the rate gets status 8", async |bed| grpc(bed).await);
    trials.add("conditions in CEL decide who gets in", async |bed| conditions(bed).await);
    trials.add("a policy that can't be read denies its target", async |bed| unreadable(bed).await);
    trials.add("the older of two policies for a target counts", async |bed| conflict(bed).await);
    trials
        .add("the examples of the documentation do what it says of them", async |bed| documented(bed).await);
    trials.add("bytes do not get around conditions", async |bed| bytes(bed).await);
}

async fn policy(bed: &Waypoints, name: &str, target: &str, spec: &str) {
    bed.apply(&format!(
        "apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{targetRefs: [{target}], {spec}}}\n"
    ))
    .await;
}

fn service(name: &str) -> String {
    format!("{{group: '', kind: Service, name: {name}}}")
}

async fn get(pod: &Pod, to: SocketAddr, path: &str, headers: &str) -> http::Response {
    http::get(pod, to, path, headers).await.unwrap()
}

async fn status(pod: &Pod, to: SocketAddr, path: &str, headers: &str) -> u16 {
    get(pod, to, path, headers).await.status
}

/// Asks with a header that no other request has until the answer is as wanted.
async fn in_force(bed: &Waypoints, to: SocketAddr, headers: &str, wanted: u16) {
    bed.eventually(to, "/probe", headers, |answer| answer.status == wanted).await;
}

/// How the waypoint would decide about a request of `cli`.
async fn explained(bed: &Waypoints, to: SocketAddr, path: &str) -> String {
    let pod = bed.pods().into_iter().find(Pod::is_ready).unwrap();
    let question = format!("/explain/request?from=spiffe://cluster.local/ns/shop/sa/cli&to={to}&path={path}");
    http::get(&pod, SocketAddr::from(([127, 0, 0, 1], 15000)), &question, "").await.unwrap().body
}

async fn limited(bed: &Waypoints) {
    let to = bed.service("limited").await;
    // None of it comes back within the test.
    let spec = "rateLimits: [{name: few, requests: 1, interval: 1h, burst: 3, when: \"request.path != '/probe'\"},\
         {name: probe, requests: 1, interval: 1h, when: \"request.path == '/probe'\", status: 503}]";
    policy(bed, "limited", &service("limited"), spec).await;
    in_force(bed, to, "", 503).await;
    for _ in 0..3 {
        assert_eq!(status(&bed.cli, to, "/", "").await, 200);
    }
    let refused = get(&bed.cli, to, "/", "").await;
    assert_eq!((refused.status, refused.body.as_str()), (429, "local_rate_limited\n"));
    let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((3000..=3600).contains(&seconds), "{seconds}");
    assert_eq!(status(&bed.other, to, "/", "").await, 429, "without a key all share one bucket");
    let why = explained(bed, to, "/").await;
    assert!(why.contains("over rate limit few of TrafficPolicy shop/limited"), "{why}");
    assert!(why.contains("429"), "{why}");
    let wanted = "rate limit few of TrafficPolicy shop/limited";
    let is_logged = |line: &String| line.contains(wanted) && line.contains("\"RL\"");
    wait::until("the access log says why", SOON, || async { bed.logs().iter().any(is_logged) }).await;
    let metrics = bed.metrics().await;
    let count = metrics.lines().find(|line| {
        line.starts_with("ambit_traffic_policy_refusals") && line.contains("reason=\"rate_limited\"")
    });
    let count: u64 = count.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!(count >= 3, "{count}");
    // Another edit leaves the buckets of a limit that stays as it is.
    let spec = format!("{spec}, conditions: [{{expression: \"request.path != '/closed'\"}}]");
    policy(bed, "limited", &service("limited"), &spec).await;
    bed.eventually(to, "/closed", "", |answer| answer.status == 403).await;
    assert_eq!(status(&bed.cli, to, "/", "").await, 429);
    let why = explained(bed, to, "/closed").await;
    assert!(why.contains("denied by TrafficPolicy shop/limited: condition 1 does not hold"), "{why}");
    bed.cluster.delete("TrafficPolicy", "shop", "limited").await.unwrap();
    bed.eventually(to, "/", "", |answer| answer.status == 200).await;
}

async fn keyed(bed: &Waypoints) {
    let to = bed.service("keyed").await;
    let limit = |name: &str, path: &str, key: &str| {
        format!(
            "{{name: {name}, requests: 1, interval: 1h, key: [{key}], when: \"request.path == '{path}'\"}}"
        )
    };
    let limits = [
        limit("client", "/client", "{type: ClientIdentity}"),
        limit("address", "/address", "{type: RemoteAddress}"),
        limit("header", "/header", "{type: Header, header: X-User}"),
        limit("both", "/both", "{type: ClientIdentity}, {type: Header, header: x-user}"),
        limit("probe", "/probe", ""),
    ];
    policy(bed, "keyed", &service("keyed"), &format!("rateLimits: [{}]", limits.join(", "))).await;
    in_force(bed, to, "", 429).await;
    let (cli, other) = (&bed.cli, &bed.other);
    for (pod, path, headers, wanted) in [
        (cli, "/client", "", 200),
        (cli, "/client", "x-user: b\r\n", 429),
        (other, "/client", "", 200),
        (other, "/client", "", 429),
        (cli, "/address", "", 200),
        (cli, "/address", "x-forwarded-for: 192.0.2.1\r\n", 429),
        (other, "/address", "", 200),
        (cli, "/header", "x-user: a\r\n", 200),
        (other, "/header", "x-user: a\r\n", 429),
        (cli, "/header", "x-user: b\r\n", 200),
        (cli, "/header", "x-user: a\r\nx-user: b\r\n", 200),
        (cli, "/header", "", 200),
        (cli, "/header", "", 429),
        (cli, "/both", "x-user: a\r\n", 200),
        (other, "/both", "x-user: a\r\n", 200),
        (cli, "/both", "x-user: b\r\n", 200),
        (cli, "/both", "x-user: b\r\n", 429),
        (cli, "/free", "", 200),
        (cli, "/free", "", 200),
    ] {
        assert_eq!(status(pod, to, path, headers).await, wanted, "{path} {headers:?}");
    }
}

async fn of_rule(bed: &Waypoints) {
    let to = bed.service("ruled").await;
    bed.route(
        "ruled",
        "  - {name: narrow, matches: [{path: {type: PathPrefix, value: /narrow}}], backendRefs: [{name: ruled, port: 80}]}\n  \
         - {name: wide, backendRefs: [{name: ruled, port: 80}]}\n",
    )
    .await;
    let route = "{group: gateway.networking.k8s.io, kind: HTTPRoute, name: ruled";
    let spec = "rateLimits: [{name: one, requests: 1, interval: 1h}]";
    policy(bed, "ruled", &format!("{route}, sectionName: narrow}}"), spec).await;
    bed.eventually(to, "/narrow", "", |answer| answer.status == 429).await;
    for _ in 0..3 {
        assert_eq!(status(&bed.cli, to, "/wide", "").await, 200);
    }
    // By route: each rule has its own.
    let key = "rateLimits: [{name: one, requests: 1, interval: 1h, key: [{type: Route}]}]";
    policy(bed, "ruled-too", &format!("{route}}}"), key).await;
    bed.eventually(to, "/wide", "", |answer| answer.status == 429).await;
    bed.cluster.delete("TrafficPolicy", "shop", "ruled").await.unwrap();
    bed.eventually(to, "/narrow", "", |answer| answer.status == 200).await;
    assert_eq!(status(&bed.cli, to, "/narrow/again", "").await, 429);
}

async fn grpc(bed: &Waypoints) {
    let to = bed.service("limited-calls").await;
    policy(
        bed,
        "limited-calls",
        &service("limited-calls"),
        "rateLimits: [{name: one, requests: 1, interval: 1h}]",
    )
    .await;
    bed.eventually(to, "/", "", |answer| answer.status == 429).await;
    let call = http::request(&bed.cli, to, "POST", "/a.B/C", "content-type: application/grpc\r\n", "").await;
    let call = call.unwrap();
    assert_eq!((call.status, call.header("grpc-status")), (200, Some("8")));
    assert!(call.header("retry-after").is_some());
}

async fn conditions(bed: &Waypoints) {
    let to = bed.service("conditions").await;
    let spec = "conditions: [\
        {name: readers, expression: \"request.method in ['GET', 'HEAD'] || source.namespace == 'other'\"},\
        {expression: \"!request.path.startsWith('/admin') || ('x-role' in request.headers && request.headers['x-role'] == 'admin')\"},\
        {expression: \"request.path != '/query' || request.query['a'] == '1'\"},\
        {expression: \"request.path != '/mine' || source.identity == 'spiffe://cluster.local/ns/shop/sa/cli'\"},\
        {expression: \"request.path != '/token' || request.auth.claims.sub == 'anna'\"},\
        {expression: \"destination.host == 'conditions.shop.svc.cluster.local' && destination.port == 80\"}]";
    policy(bed, "conditions", &service("conditions"), spec).await;
    bed.eventually(to, "/admin", "", |answer| answer.status == 403).await;
    let (cli, other) = (&bed.cli, &bed.other);
    for (pod, method, path, headers, wanted) in [
        (cli, "GET", "/", "", 200),
        (cli, "POST", "/", "", 403),
        (other, "POST", "/", "", 200),
        (cli, "GET", "/admin/x", "x-role: admin\r\n", 200),
        (cli, "GET", "/admin/x", "x-role: admin\r\nx-role: guest\r\n", 403),
        (cli, "GET", "/a/../admin", "", 403),
        (cli, "GET", "/query?a=1", "", 200),
        (cli, "GET", "/query?a=1&a=2", "", 403),
        (cli, "GET", "/query", "", 403),
        (cli, "GET", "/mine", "", 200),
        (other, "GET", "/mine", "", 403),
        (cli, "GET", "/token", "", 403),
    ] {
        let answer = http::request(pod, to, method, path, headers, "").await.unwrap();
        assert_eq!(answer.status, wanted, "{method} {path} {headers:?}");
    }
    let reasons = ["condition readers does not hold", "condition 5: sub is not there"];
    let are_logged = || {
        let logs = bed.logs();
        reasons.iter().all(|reason| logs.iter().any(|line| line.contains(reason)))
    };
    wait::until("the access log says why", SOON, || async { are_logged() }).await;
}

async fn unreadable(bed: &Waypoints) {
    let to = bed.service("unreadable").await;
    let bad = "conditions: [{expression: 'request.pth == 1'}]";
    let manifest = |target: &str, spec: &str| {
        format!(
            "apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: unreadable, namespace: shop}}\n\
             spec: {{targetRefs: [{target}], {spec}}}\n"
        )
    };
    bed.apply(&manifest(&service("unreadable"), bad)).await;
    bed.eventually(to, "/", "", |answer| answer.status == 403).await;
    let says_why = |line: &String| line.contains("request.pth is not known");
    wait::until("the access log says why", SOON, || async { bed.logs().iter().any(says_why) }).await;
    bed.apply(&manifest(&service("unreadable"), "conditions: [{expression: 'true'}]")).await;
    bed.eventually(to, "/", "", |answer| answer.status == 200).await;
}

async fn conflict(bed: &Waypoints) {
    let to = bed.service("conflict").await;
    let deny = |path: &str| format!("conditions: [{{expression: \"request.path != '{path}'\"}}]");
    policy(bed, "conflict-a", &service("conflict"), &deny("/a")).await;
    bed.eventually(to, "/a", "", |answer| answer.status == 403).await;
    // Of one age, by name.
    policy(bed, "conflict-b", &service("conflict"), &deny("/b")).await;
    let of_port = "{group: '', kind: Service, name: conflict, sectionName: http}";
    policy(bed, "conflict-c", of_port, &deny("/c")).await;
    bed.eventually(to, "/c", "", |answer| answer.status == 403).await;
    assert_eq!(status(&bed.cli, to, "/a", "").await, 403);
    assert_eq!(status(&bed.cli, to, "/b", "").await, 200);
    bed.cluster.delete("TrafficPolicy", "shop", "conflict-a").await.unwrap();
    bed.eventually(to, "/b", "", |answer| answer.status == 403).await;
    assert_eq!(status(&bed.cli, to, "/a", "").await, 200);
}

/// A client that begins with something else than a request.
async fn bytes(bed: &Waypoints) {
    bed.by_hand("raw-bytes", |mut stream| async move { stream.write_all(b"hello\n").await }).await;
    let to = bed.expose("raw-bytes", "tcp").await;
    let hears = || async {
        let mut stream = bed.cli.connect(to).await.ok()?;
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.ok()?;
        Some(heard)
    };
    let is_heard = || async { hears().await.is_some_and(|heard| heard == b"hello\n") };
    wait::until("the server is heard", SOON, &is_heard).await;
    policy(
        bed,
        "raw-bytes",
        &service("raw-bytes"),
        "conditions: [{expression: \"request.method != 'POST'\"}]",
    )
    .await;
    let is_silent = || async { hears().await.is_none_or(|heard| heard != b"hello\n") };
    wait::until("the connection is denied", SOON, &is_silent).await;
    policy(
        bed,
        "raw-bytes",
        &service("raw-bytes"),
        "conditions: [{expression: \"source.namespace == 'shop'\"}]",
    )
    .await;
    wait::until("the server is heard again", SOON, &is_heard).await;
}

/// The YAML of a page, block by block, for a Service and a route of another name.
fn examples(page: &str, name: &str) -> Vec<String> {
    let blocks = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let renamed = |block: &str| {
        let block = block.replace("name: reviews}", &format!("name: {name}}}"));
        block.replace("name: reviews,", &format!("name: {name},")).replace("bookinfo", "shop")
    };
    blocks.map(renamed).collect()
}

async fn documented(bed: &Waypoints) {
    let to = bed.service("documented").await;
    bed.route("documented", "  - {name: search, backendRefs: [{name: documented, port: 80}]}\n").await;
    let page = include_str!("../../../docs/traffic-policy.md");
    let [first, per_user, admins] = examples(page, "documented").try_into().unwrap();
    bed.apply(&first).await;
    let post = async |pod: &Pod| http::request(pod, to, "POST", "/", "", "").await.unwrap().status;
    let denied = || async { post(&bed.other).await == 403 };
    wait::until("others may only read", SOON, &denied).await;
    assert_eq!(post(&bed.cli).await, 200);
    bed.apply(&admins).await;
    bed.eventually(to, "/admin/x", "", |answer| answer.status == 403).await;
    assert_eq!(status(&bed.cli, to, "/admin", "").await, 200);
    // Faster than a bucket is filled: twenty at once, ten a second.
    let many = futures_util::future::join_all((0..60).map(|_| status(&bed.cli, to, "/", ""))).await;
    assert!(many.contains(&200) && many.contains(&429), "{many:?}");
    bed.cluster.delete("TrafficPolicy", "shop", "documented").await.unwrap();
    bed.apply(&per_user).await;
    let user = "x-user: documented\r\n";
    let searches = || async {
        futures_util::future::join_all((0..40).map(|_| status(&bed.cli, to, "/", user))).await.contains(&429)
    };
    wait::until("a user's searches are used up", SOON, &searches).await;
    assert_eq!(status(&bed.cli, to, "/", "x-user: another\r\n").await, 200);
}
