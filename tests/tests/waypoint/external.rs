//! External authorizers, asked by gRPC and HTTP: real servers in pods of the mesh.

use std::net::SocketAddr;

use ambit_api::core::{HeaderValue, HeaderValueOption};
use ambit_api::external_auth::authorization_server::{Authorization, AuthorizationServer};
use ambit_api::external_auth::check_response::HttpResponse;
use ambit_api::external_auth::{CheckRequest, CheckResponse, DeniedHttpResponse, HttpStatus, OkHttpResponse};
use ambit_api::rpc::Status;
use ambit_local::PodOptions;
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Response;

use crate::bed::{PORT, Waypoints};
use crate::http;

/// What the control plane is started with.
pub(crate) const MESH_CONFIG: &str = "
extensionProviders:
- name: by-grpc
  envoyExtAuthzGrpc:
    service: shop/asked-grpc.shop.svc.cluster.local
    port: 80
    timeout: 2s
    includeRequestBodyInCheck: {maxRequestBytes: 8}
- name: by-http
  envoyExtAuthzHttp:
    service: asked-http.shop.svc.cluster.local
    port: 80
    timeout: 2s
    pathPrefix: /check
    includeRequestHeadersInCheck: [x-as*]
    includeAdditionalHeadersInCheck: {x-fixed: value}
    headersToUpstreamOnAllow: [x-from-authorizer]
    headersToDownstreamOnAllow: [x-allowed]
- name: dry
  envoyExtAuthzHttp:
    service: asked-dry.shop.svc.cluster.local
    port: 80
    timeout: 2s
    includeRequestHeadersInCheck: [x-asked]
    headersToUpstreamOnAllow: [x-from-authorizer]
- name: task
  envoyExtAuthzHttp: {service: asked-task.shop.svc.cluster.local, port: 80, timeout: 2s, includeRequestHeadersInCheck: [x-ext-authz]}
- name: silent
  envoyExtAuthzHttp: {service: silent.shop.svc.cluster.local, port: 80, timeout: 300ms, statusOnError: '503'}
- name: open
  envoyExtAuthzGrpc: {service: nowhere.shop.svc.cluster.local, port: 80, timeout: 300ms, failOpen: true}
";

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("an authorizer is asked by gRPC", async |bed| by_grpc(bed).await);
    trials.add("an authorizer is asked by HTTP", async |bed| by_http(bed).await);
    trials.add("a dry-run policy asks an authorizer and changes nothing", async |bed| dry_run(bed).await);
    trials.add("an authorizer that does not answer denies", async |bed| silent(bed).await);
}

/// Allows who has `x-ext-authz: allow`, or a body of `please`.
struct Judge;

#[tonic::async_trait]
impl Authorization for Judge {
    async fn check(
        &self,
        request: tonic::Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, tonic::Status> {
        let attributes = request.into_inner().attributes.unwrap();
        let http = attributes.request.unwrap().http.unwrap();
        let field = |key: &str, value: &str| HeaderValueOption {
            header: Some(HeaderValue {
                key: key.to_owned(),
                value: value.to_owned(),
                ..HeaderValue::default()
            }),
            ..HeaderValueOption::default()
        };
        let allows = http.headers.get("x-ext-authz").is_some_and(|value| value == "allow");
        let answer = if allows || http.body == "please" {
            let seen = format!("{} {} {}", http.method, http.path, attributes.source.unwrap().principal);
            HttpResponse::OkResponse(OkHttpResponse {
                headers: vec![field("x-seen", &seen), field("host", "elsewhere")],
                headers_to_remove: vec!["x-ext-authz".to_owned()],
                response_headers_to_add: vec![field("x-checked", "yes")],
            })
        } else {
            HttpResponse::DeniedResponse(DeniedHttpResponse {
                status: Some(HttpStatus { code: 401 }),
                headers: vec![field("x-reason", "not allowed")],
                body: "go away".to_owned(),
            })
        };
        let code = if matches!(answer, HttpResponse::OkResponse(_)) { 0 } else { 7 };
        let status = Some(Status { code, ..Status::default() });
        Ok(Response::new(CheckResponse { status, http_response: Some(answer) }))
    }
}

/// A Service that is bound to no waypoint.
pub(crate) async fn service(bed: &Waypoints, name: &str, port: &str) {
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\n\
         metadata: {{name: {name}, namespace: shop, labels: {{istio.io/use-waypoint: none}}}}\n\
         spec: {{selector: {{app: {name}}}, ports: [{{name: {port}, port: 80, targetPort: {PORT}}}]}}\n"
    ))
    .await;
}

async fn custom(bed: &Waypoints, service: &str, provider: &str, rules: &str) {
    bed.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {service}, namespace: shop}}\n\
         spec: {{targetRefs: [{{group: '', kind: Service, name: {service}}}], action: CUSTOM, \
         provider: {{name: {provider}}}, rules: {rules}}}\n"
    ))
    .await;
}

async fn by_grpc(bed: &Waypoints) {
    let options =
        PodOptions::new("shop", "asked-grpc").service_account("asked-grpc").label("app", "asked-grpc");
    let pod = bed.cluster.pod(options.node(1)).await.unwrap();
    let listener = pod.listen(SocketAddr::new(pod.ip().into(), PORT)).await.unwrap();
    let judge = tonic::transport::Server::builder().add_service(AuthorizationServer::new(Judge));
    let judge = tokio::spawn(judge.serve_with_incoming(TcpListenerStream::new(listener)));
    service(bed, "asked-grpc", "grpc").await;
    let to = bed.service("asks-grpc").await;
    custom(bed, "asks-grpc", "by-grpc", "[{to: [{operation: {notPaths: [/free]}}]}]").await;

    let denied = bed.eventually(to, "/a?b", "", |answer| answer.status == 401).await;
    assert_eq!((denied.body.as_str(), denied.header("x-reason")), ("go away", Some("not allowed")));
    let allowed = http::get(&bed.cli, to, "/a?b", "x-ext-authz: allow\r\n").await.unwrap();
    assert_eq!((allowed.status, allowed.header("x-checked")), (200, Some("yes")), "{allowed:?}");
    assert_eq!(allowed.sent("x-seen"), Some("GET /a?b spiffe://cluster.local/ns/shop/sa/cli"));
    assert_eq!((allowed.sent("x-ext-authz"), allowed.sent("host")), (None, Some("app.example")));
    assert_eq!(http::get(&bed.cli, to, "/free", "").await.unwrap().status, 200);
    let posted = |body: &'static str| http::request(&bed.cli, to, "POST", "/", "", body);
    let answer = posted("please").await.unwrap();
    assert!(answer.status == 200 && answer.body.ends_with("please"), "{answer:?}");
    assert_eq!(posted("no").await.unwrap().status, 401);
    assert_eq!(posted("longer than eight").await.unwrap().status, 413);
    let call = "content-type: application/grpc\r\nte: trailers\r\n";
    let answer = http::request(&bed.cli, to, "POST", "/pkg.Service/Call", call, "").await.unwrap();
    assert_eq!((answer.status, answer.header("grpc-status")), (200, Some("7")), "{answer:?}");

    // DENY and ALLOW hold beside it.
    bed.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {name: asks-grpc-deny, namespace: shop}\n\
         spec: {targetRefs: [{group: '', kind: Service, name: asks-grpc}], action: DENY, \
         rules: [{when: [{key: 'request.headers[x-seen]', values: ['GET /secret *']}]}]}\n",
    )
    .await;
    bed.eventually(to, "/secret", "x-ext-authz: allow\r\n", |answer| answer.status == 403).await;
    assert_eq!(http::get(&bed.cli, to, "/open", "x-ext-authz: allow\r\n").await.unwrap().status, 200);
    bodies(bed, to).await;
    judge.abort();
}

/// The authorizer of `to` sees bodies.
async fn bodies(bed: &Waypoints, to: SocketAddr) {
    bed.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {name: asks-grpc-never, namespace: shop}\n\
         spec: {targetRefs: [{group: '', kind: Service, name: asks-grpc}], action: DENY, \
         rules: [{to: [{operation: {paths: [/never]}}]}]}\n",
    )
    .await;
    bed.eventually(to, "/never", "x-ext-authz: allow\r\n", |answer| answer.status == 403).await;
    // What is denied in any case is denied before its body has come.
    let head = |path: &str| format!("POST {path} HTTP/1.1\r\nhost: app.example\r\ncontent-length: 8\r\n\r\n");
    let mut client = http::Client::connect(&bed.cli, to).await.unwrap();
    assert_eq!(client.send(head("/never").as_bytes()).await.unwrap().status, 403);
    // One that comes byte by byte is never silent for long, and is late all the same.
    let mut client = http::Client::connect(&bed.cli, to).await.unwrap();
    client.write(head("/slow").as_bytes()).await.unwrap();
    let mut answer = None;
    for _ in 0..7 {
        client.write(b"a").await.unwrap();
        let next = tokio::time::timeout(std::time::Duration::from_secs(1), client.response()).await;
        if let Ok(response) = next {
            answer = Some(response.unwrap().status);
            break;
        }
    }
    assert_eq!(answer, Some(408));
}

async fn by_http(bed: &Waypoints) {
    let judge: http::Answer = std::sync::Arc::new(|_, head, _| {
        let line = head.lines().next().unwrap_or_default();
        let is_right = http::header(head, "x-fixed") == Some("value")
            && http::header(head, "x-other").is_none()
            && http::header(head, "host") == Some("app.example")
            && line == "GET /check/a?b HTTP/1.1";
        match (is_right, http::header(head, "x-asked")) {
            (true, Some("allow")) => {
                http::answer("200 OK", "x-from-authorizer: me\r\nx-allowed: yes\r\nx-kept: back\r\n", "")
            }
            (true, Some("allow nobody in particular")) => http::answer("200 OK", "", ""),
            (true, Some("switch")) => {
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n".to_vec()
            }
            (true, _) => http::answer("302 Found", "location: /login\r\n", "log in"),
            (false, _) => http::answer("400 Bad", "", head),
        }
    });
    bed.server("asked-http", "asked-http", judge).await;
    service(bed, "asked-http", "http").await;
    let to = bed.service("asks-http").await;
    custom(bed, "asks-http", "by-http", "[{}]").await;

    let denied = bed.eventually(to, "/a?b", "x-other: a\r\n", |answer| answer.status == 302).await;
    assert_eq!((denied.body.as_str(), denied.header("location")), ("log in", Some("/login")));
    let headers = "x-asked: allow\r\nx-from-authorizer: client\r\n";
    let allowed = http::get(&bed.cli, to, "/a?b", headers).await.unwrap();
    assert_eq!((allowed.status, allowed.sent("x-from-authorizer")), (200, Some("me")), "{allowed:?}");
    assert_eq!((allowed.header("x-allowed"), allowed.header("x-kept")), (Some("yes"), None));
    assert_eq!(allowed.sent("x-kept"), None);

    // What only the authorizer writes, no client does: not in the header, nor in trailers.
    let headers = "x-asked: allow nobody in particular\r\nx-from-authorizer: client\r\n";
    let allowed = http::get(&bed.cli, to, "/a?b", headers).await.unwrap();
    assert_eq!((allowed.status, allowed.sent("x-from-authorizer")), (200, None), "{allowed:?}");
    let headers = "x-asked: allow nobody in particular\r\ntransfer-encoding: chunked\r\n\
                   trailer: x-from-authorizer, x-sum\r\n";
    let chunks = "GET /a?b HTTP/1.1\r\nhost: app.example\r\n".to_owned()
        + headers
        + "\r\n1\r\na\r\n0\r\nx-from-authorizer: client\r\nx-sum: 1\r\n\r\n";
    let mut client = http::Client::connect(&bed.cli, to).await.unwrap();
    let allowed = client.send(chunks.as_bytes()).await.unwrap();
    assert_eq!((allowed.status, allowed.sent("x-from-authorizer")), (200, None), "{allowed:?}");
    assert_eq!(allowed.sent("x-sum"), Some("1"), "{allowed:?}");

    // An authorizer cannot make a tunnel of the client's connection.
    let switched = http::get(&bed.cli, to, "/a?b", "x-asked: switch\r\n").await.unwrap();
    assert_eq!((switched.status, switched.header("upgrade")), (403, None), "{switched:?}");
}

async fn dry_run(bed: &Waypoints) {
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = asked.clone();
    let judge: http::Answer = std::sync::Arc::new(move |_, head, _| {
        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        match http::header(head, "x-asked") {
            Some("allow") => http::answer("200 OK", "x-from-authorizer: me\r\n", ""),
            _ => http::answer("403 Forbidden", "", "no"),
        }
    });
    bed.server("asked-dry", "asked-dry", judge).await;
    service(bed, "asked-dry", "http").await;
    let to = bed.service("asks-dry").await;
    bed.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {name: asks-dry, namespace: shop, annotations: {istio.io/dry-run: 'true'}}\n\
         spec: {targetRefs: [{group: '', kind: Service, name: asks-dry}], action: CUSTOM, \
         provider: {name: dry}, rules: [{}]}\n",
    )
    .await;
    let differs = async || http::metric(&bed.metrics().await, "ambit_policy_dry_run_differs_total ");
    let before = differs().await;
    wait::until("a refusal is counted", SOON, || async {
        let answer = http::get(&bed.cli, to, "/", "").await.unwrap();
        assert_eq!((answer.status, answer.server()), (200, "asks-dry"), "{answer:?}");
        differs().await > before
    })
    .await;
    // What it allows it does not change either.
    let before = asked.load(std::sync::atomic::Ordering::Relaxed);
    let answer = http::get(&bed.cli, to, "/", "x-asked: allow\r\n").await.unwrap();
    assert_eq!((answer.status, answer.sent("x-from-authorizer")), (200, None), "{answer:?}");
    wait::until("it is asked", SOON, || async { asked.load(std::sync::atomic::Ordering::Relaxed) > before })
        .await;
}

async fn silent(bed: &Waypoints) {
    bed.server("silent", "silent", std::sync::Arc::new(|_, _, _| http::answer("500 Broken", "", ""))).await;
    service(bed, "silent", "http").await;
    let (closed, open) = (bed.service("asks-silent").await, bed.service("asks-open").await);
    custom(bed, "asks-silent", "silent", "[{}]").await;
    custom(bed, "asks-open", "open", "[{}]").await;
    bed.eventually(closed, "/", "", |answer| answer.status == 503).await;
    wait::until("failures are counted", SOON, || async {
        assert_eq!(http::get(&bed.cli, open, "/", "").await.unwrap().status, 200);
        http::metric(&bed.metrics().await, "ambit_external_authorizations_total{outcome=\"failed\"}") >= 2
    })
    .await;
}
