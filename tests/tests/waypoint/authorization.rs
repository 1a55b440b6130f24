//! Rules of AuthorizationPolicies as the waypoint enforces them, each request anew.

use std::net::SocketAddr;

use ambit_local::Pod;
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::bed::Waypoints;
use crate::http::{self, Client};

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("requests are denied by method, path, host and header", async |bed| denied_by(bed).await);
    trials.add("an ALLOW lets in what it names and nothing else", async |bed| allowed(bed).await);
    trials.add("no spelling of a path passes a DENY", async |bed| spellings(bed).await);
    trials.add("a policy's own spelling of a path counts", async |bed| own_spellings(bed).await);
    trials.add("who is denied does not learn which routes there are", async |bed| hidden(bed).await);
    trials.add("open connections end when a policy denies them", async |bed| open(bed).await);
    trials.add("a policy applies to the next request of a kept connection", async |bed| kept(bed).await);
    trials.add("a token that nobody verifies counts for nothing", async |bed| tokens(bed).await);
    trials.add("a dry-run policy is only counted", async |bed| dry_run(bed).await);
    trials.add("a denied gRPC call gets status 7", async |bed| grpc(bed).await);
    trials.add("a policy of the Gateway holds for all its services", async |bed| of_gateway(bed).await);
}

async fn policy(bed: &Waypoints, kind: &str, target: &str, name: &str, spec: &str) {
    let group = if kind == "Gateway" { "gateway.networking.k8s.io" } else { "''" };
    bed.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: shop}}\n\
         spec: {{targetRefs: [{{group: {group}, kind: {kind}, name: {target}}}], {spec}}}\n"
    ))
    .await;
}

async fn of_service(bed: &Waypoints, service: &str, spec: &str) {
    policy(bed, "Service", service, service, spec).await;
}

async fn remove(bed: &Waypoints, name: &str) {
    bed.cluster.delete("AuthorizationPolicy", "shop", name).await.unwrap();
}

async fn status(pod: &Pod, to: SocketAddr, method: &str, path: &str, headers: &str) -> u16 {
    http::request(pod, to, method, path, headers, "").await.unwrap().status
}

async fn denied_by(bed: &Waypoints) {
    let to = bed.service("denies").await;
    of_service(
        bed,
        "denies",
        "action: DENY, rules: [\
           {to: [{operation: {methods: [DELETE]}}, {operation: {paths: ['/admin/*', '/users/{*}/secret']}}]},\
           {to: [{operation: {hosts: ['internal.*', '*.internal']}}]},\
           {when: [{key: 'request.headers[x-role]', values: ['gue*']}]},\
           {from: [{source: {principals: ['*/sa/nobody']}}], to: [{operation: {paths: ['/nobody']}}]}]",
    )
    .await;
    bed.eventually(to, "/admin/x", "", |answer| answer.status == 403).await;
    for (method, path, headers, wanted) in [
        ("GET", "/", "", 200),
        ("DELETE", "/", "", 403),
        ("GET", "/admin", "", 200),
        ("GET", "/admin/a?b", "", 403),
        ("GET", "/users/1/secret", "", 403),
        ("GET", "/users/1/2/secret", "", 200),
        ("GET", "/", "host: Internal.example:80\r\n", 403),
        ("GET", "/", "host: a.internal\r\n", 403),
        ("GET", "/", "x-role: guest\r\n", 403),
        ("GET", "/", "x-role: admin\r\n", 200),
        ("GET", "/", "x-role: admin\r\nx-role: guest\r\n", 403),
        ("GET", "/nobody", "", 200),
    ] {
        assert_eq!(status(&bed.cli, to, method, path, headers).await, wanted, "{method} {path} {headers:?}");
    }
}

async fn allowed(bed: &Waypoints) {
    let to = bed.service("allows").await;
    of_service(
        bed,
        "allows",
        "action: ALLOW, rules: [{from: [{source: {principals: ['cluster.local/ns/shop/sa/cli']}}],\
           to: [{operation: {methods: [GET], paths: ['/open*']}}]},\
           {from: [{source: {namespaces: [other]}}], to: [{operation: {paths: ['/other']}}]}]",
    )
    .await;
    bed.eventually(to, "/", "", |answer| answer.status == 403).await;
    for (pod, method, path, wanted) in [
        (&bed.cli, "GET", "/open/a", 200),
        (&bed.cli, "POST", "/open/a", 403),
        (&bed.cli, "GET", "/other", 403),
        (&bed.other, "GET", "/other", 200),
        (&bed.other, "GET", "/open/a", 403),
    ] {
        assert_eq!(status(pod, to, method, path, "").await, wanted, "{method} {path}");
    }
}

async fn spellings(bed: &Waypoints) {
    let to = bed.service("spelled").await;
    of_service(
        bed,
        "spelled",
        "action: DENY, rules: [{to: [{operation: {paths: ['/secret', '/secret/*']}}]}]",
    )
    .await;
    bed.eventually(to, "/secret", "", |answer| answer.status == 403).await;
    for path in [
        "/secret?x",
        "//secret",
        "/./secret",
        "/a/../secret",
        "/%73ecret",
        "/a/%2e%2e/secret",
        "/secret/",
        "/secret//x",
        "http://spelled/secret",
    ] {
        assert_eq!(status(&bed.cli, to, "GET", path, "").await, 403, "{path}");
    }
    assert_eq!(status(&bed.cli, to, "GET", "/secrets", "").await, 200);
}

async fn own_spellings(bed: &Waypoints) {
    let to = bed.service("ownspelling").await;
    let paths = "['/a//b', '/%7Efoo', '/x/../y', '/p//q*', '*//end']";
    of_service(
        bed,
        "ownspelling",
        &format!("action: DENY, rules: [{{to: [{{operation: {{paths: {paths}}}}}]}}]"),
    )
    .await;
    bed.eventually(to, "/a/b", "", |answer| answer.status == 403).await;
    for (path, wanted) in
        [("/~foo", 403), ("/%7efoo", 403), ("/y", 403), ("/p/queue", 403), ("/the/end", 403), ("/x", 200)]
    {
        assert_eq!(status(&bed.cli, to, "GET", path, "").await, wanted, "{path}");
    }
    // No request has such a path: what was meant is not known, so the rule is for all paths.
    of_service(
        bed,
        "ownspelling",
        "action: DENY, rules: [{to: [{operation: {methods: [GET], paths: ['/../up']}}]}]",
    )
    .await;
    bed.eventually(to, "/x", "", |answer| answer.status == 403).await;
    assert_eq!(status(&bed.cli, to, "DELETE", "/x", "").await, 200);
}

async fn hidden(bed: &Waypoints) {
    let to = bed.service("hidden").await;
    bed.route(
        "hidden",
        "  - matches: [{path: {type: Exact, value: /known}}]\n    backendRefs: [{name: hidden, port: 80}]\n",
    )
    .await;
    bed.eventually(to, "/unknown", "", |answer| answer.status == 404).await;
    of_service(bed, "hidden", "action: DENY, rules: [{to: [{operation: {notPaths: ['/open']}}]}]").await;
    bed.eventually(to, "/known", "", |answer| answer.status == 403).await;
    assert_eq!(status(&bed.cli, to, "GET", "/unknown", "").await, 403);
    assert_eq!(status(&bed.cli, to, "GET", "/open", "").await, 404);
}

async fn open(bed: &Waypoints) {
    let answer: http::Answer = std::sync::Arc::new(|name, head, body| match http::header(head, "upgrade") {
        Some(_) => {
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\nready".to_vec()
        }
        None => http::mirror()(name, head, body),
    });
    let to = bed.service_with("opened", answer).await;
    let upgraded = async |path: &str| {
        let mut client = Client::connect(&bed.cli, to).await.unwrap();
        let asked = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: echo\r\n\r\n");
        assert_eq!(client.send(asked.as_bytes()).await.unwrap().status, 101);
        assert_eq!(client.bytes(5).await.unwrap(), b"ready");
        client
    };
    let (mut denied, mut allowed) = (upgraded("/secret").await, upgraded("/public").await);
    // A filter's path is not what policies are asked about.
    of_service(bed, "opened", "action: DENY, rules: [{to: [{operation: {paths: ['/secret']}}]}]").await;
    assert!(denied.is_closed().await, "an upgraded connection outlives a policy that denies it");
    bed.eventually(to, "/secret", "", |answer| answer.status == 403).await;
    allowed.write(b"still here").await.unwrap();
    let open = tokio::time::timeout(std::time::Duration::from_secs(1), allowed.bytes(1)).await;
    assert!(open.is_err(), "another upgraded connection was closed too");
    of_service(bed, "opened", "action: DENY, rules: [{}]").await;
    assert!(allowed.is_closed().await);
    remove(bed, "opened").await;
}

async fn kept(bed: &Waypoints) {
    let to = bed.service("kept").await;
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: kept\r\n\r\n";
    assert_eq!(client.send(request).await.unwrap().status, 200);
    of_service(bed, "kept", "action: DENY, rules: [{}]").await;
    bed.eventually(to, "/", "", |answer| answer.status == 403).await;
    assert_eq!(client.send(request).await.unwrap().status, 403);
    remove(bed, "kept").await;
    bed.eventually(to, "/", "", |answer| answer.status == 200).await;
    assert_eq!(client.send(request).await.unwrap().status, 200);
}

async fn tokens(bed: &Waypoints) {
    let to = bed.service("tokens").await;
    let no_token = "action: DENY, rules: [{from: [{source: {notRequestPrincipals: ['*']}}]}]";
    of_service(bed, "tokens", no_token).await;
    bed.eventually(to, "/", "", |answer| answer.status == 403).await;
    let claim = "action: ALLOW, rules: [{when: [{key: 'request.auth.claims[group]', values: [a]}]},\
                 {to: [{operation: {paths: ['/open']}}]}]";
    of_service(bed, "tokens", claim).await;
    bed.eventually(to, "/open", "", |answer| answer.status == 200).await;
    assert_eq!(status(&bed.cli, to, "GET", "/", "authorization: Bearer a.b.c\r\n").await, 403);
}

async fn dry_run(bed: &Waypoints) {
    let to = bed.service("dry").await;
    bed.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {name: dry, namespace: shop, annotations: {istio.io/dry-run: 'true'}}\n\
         spec: {targetRefs: [{group: '', kind: Service, name: dry}], action: DENY, rules: [{}]}\n",
    )
    .await;
    wait::until("a dry-run denial is counted", SOON, || async {
        assert_eq!(status(&bed.cli, to, "GET", "/", "").await, 200);
        let metrics = bed.metrics().await;
        let counts =
            metrics.lines().find_map(|line| line.strip_prefix("ambit_policy_dry_run_differs_total "));
        counts.is_some_and(|count| count != "0")
    })
    .await;
}

async fn grpc(bed: &Waypoints) {
    let to = bed.service("grpc-denied").await;
    of_service(
        bed,
        "grpc-denied",
        "action: DENY, rules: [{to: [{operation: {paths: ['/pkg.Service/Call']}}]}]",
    )
    .await;
    bed.eventually(to, "/pkg.Service/Call", "", |answer| answer.status == 403).await;
    let headers = "content-type: application/grpc\r\nte: trailers\r\n";
    let answer = http::request(&bed.cli, to, "POST", "/pkg.Service/Call", headers, "").await.unwrap();
    assert_eq!((answer.status, http::header(&answer.head, "grpc-status")), (200, Some("7")), "{answer:?}");
}

async fn of_gateway(bed: &Waypoints) {
    let (to, beside) = (bed.service("gated").await, bed.service("gated-too").await);
    let spec = "action: DENY, rules: [{to: [{operation: {paths: ['/of-gateway']}}]}]";
    policy(bed, "Gateway", "waypoint", "of-gateway", spec).await;
    for to in [to, beside] {
        bed.eventually(to, "/of-gateway", "", |answer| answer.status == 403).await;
        assert_eq!(status(&bed.cli, to, "GET", "/", "").await, 200);
    }
    remove(bed, "of-gateway").await;
    bed.eventually(to, "/of-gateway", "", |answer| answer.status == 200).await;
}
