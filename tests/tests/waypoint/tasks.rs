//! What the tasks of Istio's documentation show, as cases in folders below `tasks`: `objects.yaml` is applied, `case.yaml` has
//! the servers, the requests and their expected answers. `NODE` in the objects stands for the address of the node that servers outside
//! the mesh are on.
//!
//! The first request, and each that is for objects which come into force later, is repeated until its answer is as expected. The others
//! are sent once.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ambit_local::Pod;
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};
use parking_lot::Mutex;
use serde::Deserialize;

use crate::bed::{PORT, Waypoints};
use crate::external;
use crate::http::{self, Answer};
use crate::streams;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    servers: Vec<Server>,
    requests: Vec<Request>,
}

/// A server with a service of its name, bound to the waypoint.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Server {
    name: String,
    /// The name of the service's port, which says what is spoken there.
    #[serde(default = "http_port")]
    port: String,
    /// Statuses of its answers, in turn.
    #[serde(default)]
    statuses: Vec<String>,
    /// Milliseconds before each answer to a path that begins with `/slow`.
    #[serde(default)]
    slow: u64,
    /// Versions of it: a pod for each, labelled and named by it, in place of one without.
    #[serde(default)]
    versions: Vec<String>,
    /// The node of each version; by default the second.
    #[serde(default)]
    nodes: Vec<usize>,
    /// Versions that answer 503 to a path that begins with `/failing`.
    #[serde(default)]
    failing: Vec<String>,
    /// Whether it greets and sends back what it gets, whatever is spoken. Its port `tls` is 443, its port `tcp` 80.
    #[serde(default)]
    greets: bool,
    /// The port that it has outside the mesh, where it is no service.
    outside: Option<u16>,
    /// A line of the head without which it answers 403, as an authorizer does. Its service is bound to no waypoint.
    #[serde(default)]
    allows: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Request {
    /// The service.
    #[serde(default)]
    to: String,
    /// The address that is dialled, in place of the service's.
    at: Option<SocketAddr>,
    #[serde(default = "get")]
    method: String,
    #[serde(default = "root")]
    path: String,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    /// The name that the client's TLS asks for, in place of a request: the server greets.
    tls: Option<String>,
    /// Whether the client of namespace `other` sends it.
    #[serde(default)]
    from_other: bool,
    /// How often it is sent.
    #[serde(default = "once")]
    count: usize,
    /// Whether it is repeated until the answer is as expected, as the first one is.
    #[serde(default)]
    eventually: bool,
    /// Whether all are sent at once.
    #[serde(default)]
    together: bool,
    expect: Expected,
}

fn http_port() -> String {
    "http".to_owned()
}

fn get() -> String {
    "GET".to_owned()
}

fn root() -> String {
    "/".to_owned()
}

fn once() -> usize {
    1
}

/// What is not given is not looked at.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Expected {
    status: Option<u16>,
    /// The server that answers.
    server: Option<String>,
    /// Headers of the answer; empty: absent.
    headers: BTreeMap<String, String>,
    /// Headers of the request as the server got it; empty: absent.
    sent: BTreeMap<String, String>,
    /// The request line as the server got it.
    line: Option<String>,
    body: Option<String>,
    /// Milliseconds that it takes at least, and at most.
    at_least: Option<u64>,
    at_most: Option<u64>,
    /// Of all answers, how many come from which server, at least and at most.
    shares: BTreeMap<String, (usize, usize)>,
    /// Of all answers, how many have which status, at least and at most.
    statuses: BTreeMap<u16, (usize, usize)>,
    /// Whether the connection is closed without an answer.
    closed: bool,
    /// A server that gets a copy, with the copy's host.
    copied: Option<(String, String)>,
}

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    for folder in folders() {
        let name = folder.file_name().unwrap().to_string_lossy().replace('-', " ");
        trials.add(format!("task: {name}"), async move |bed| run(bed, &folder).await);
    }
}

fn folders() -> Vec<PathBuf> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/waypoint/tasks");
    let mut folders: Vec<PathBuf> = fs::read_dir(all).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders
}

/// Heads of the requests that servers got, by their names.
type Got = Arc<Mutex<Vec<(String, String)>>>;

async fn run(bed: &Waypoints, folder: &Path) {
    let case = fs::read_to_string(folder.join("case.yaml")).unwrap();
    let case: Case =
        serde_saphyr::from_str(&case).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let objects = fs::read_to_string(folder.join("objects.yaml")).unwrap();
    let got = Got::default();
    let (mut services, mut greeting) = (BTreeMap::new(), Vec::new());
    for server in case.servers {
        let answer = answering(&server, &got);
        if let Some(port) = server.outside {
            bed.outside(port, &server.name, answer).await;
            continue;
        }
        if server.greets {
            greeting.extend(streams::servers(bed, &[&server.name]).await);
            let port = if server.port == "tls" { 443 } else { 80 };
            services.insert(server.name.clone(), SocketAddr::new(streams::vip(bed, &server.name), port));
            continue;
        }
        if !server.allows.is_empty() {
            bed.server(&server.name, &server.name, answer).await;
            external::service(bed, &server.name, "http").await;
            continue;
        }
        for (at, version) in server.versions.iter().enumerate() {
            let node = server.nodes.get(at).copied().unwrap_or(1);
            bed.version(&server.name, version, node, answer.clone()).await;
        }
        let address = match server.port.as_str() {
            "http" if !server.versions.is_empty() => bed.bind(&server.name, "http").await,
            "http" => bed.service_with(&server.name, answer).await,
            port => unread(bed, &server.name, port, answer).await,
        };
        services.insert(server.name, address);
    }
    bed.apply(&objects.replace("NODE", &bed.node_address().to_string())).await;
    for (at, request) in case.requests.iter().enumerate() {
        let to = request.at.unwrap_or_else(|| services[&request.to]);
        let last = Mutex::new(String::new());
        let sent = async || match send(bed, to, request, &got).await {
            Ok(()) => true,
            Err(problem) => {
                *last.lock() = problem;
                false
            }
        };
        let fine = match at == 0 || request.eventually {
            true => {
                let limit = tokio::time::timeout(SOON * 2, async {
                    while !sent().await {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                });
                limit.await.is_ok()
            }
            false => sent().await,
        };
        assert!(fine, "{}: request {at}, {request:?}: {}\n{:?}", folder.display(), last.lock(), bed.logs());
    }
}

/// A service whose connections the waypoint passes on unread.
async fn unread(bed: &Waypoints, name: &str, port: &str, answer: Answer) -> SocketAddr {
    bed.server(name, name, answer).await;
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\n\
         metadata: {{name: {name}, namespace: shop, labels: {{istio.io/use-waypoint: waypoint}}}}\n\
         spec: {{selector: {{app: {name}}}, ports: [{{name: {port}, port: 80, targetPort: {PORT}}}]}}\n"
    ))
    .await;
    let vips = bed.cluster.service_ips("shop", name);
    SocketAddr::new(vips.into_iter().find(IpAddr::is_ipv4).unwrap(), 80)
}

fn answering(server: &Server, got: &Got) -> Answer {
    let (statuses, slow, got) = (server.statuses.clone(), Duration::from_millis(server.slow), got.clone());
    let turn = AtomicUsize::new(0);
    let allows = server.allows.clone();
    let failing: Vec<String> =
        server.failing.iter().map(|version| format!("{}-{version}", server.name)).collect();
    Arc::new(move |name, head, body| {
        got.lock().push((name.to_owned(), head.to_owned()));
        if !allows.is_empty() && !head.lines().any(|line| line == allows) {
            return http::answer("403 Forbidden", "", "not allowed\n");
        }
        if head.contains(" /slow") {
            std::thread::sleep(slow);
        }
        if head.contains(" /failing") && failing.iter().any(|failing| failing == name) {
            return http::answer("503 Answer", "", &format!("server: {name}\n"));
        }
        let turn = turn.fetch_add(1, Ordering::Relaxed);
        match statuses.get(turn % statuses.len().max(1)).filter(|status| *status != "200") {
            Some(status) => http::answer(&format!("{status} Answer"), "", &format!("server: {name}\n")),
            None => http::mirror()(name, head, body),
        }
    })
}

async fn send(bed: &Waypoints, to: SocketAddr, request: &Request, got: &Got) -> Result<(), String> {
    let client = if request.from_other { &bed.other } else { &bed.cli };
    let headers: String =
        request.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let (mut servers, mut statuses) = (BTreeMap::new(), BTreeMap::new());
    let expected = &request.expect;
    let sent = async |_: usize| {
        let before = Instant::now();
        let answer = match &request.tls {
            Some(name) => greeting(client, to, name).await,
            None => http::request(client, to, &request.method, &request.path, &headers, "").await,
        };
        (answer, before.elapsed())
    };
    let mut all = VecDeque::new();
    if request.together {
        all.extend(futures_util::future::join_all((0..request.count).map(sent)).await);
    }
    for at in 0..request.count {
        let (answer, took) = match all.pop_front() {
            Some(answered) => answered,
            None => sent(at).await,
        };
        let answer = match answer {
            Err(_) if expected.closed => continue,
            Ok(answer) if expected.closed => return Err(format!("an answer: {answer:?}")),
            answer => answer.map_err(|error| error.to_string())?,
        };
        check(expected, &answer, took).map_err(|problem| format!("{problem}: {answer:?}"))?;
        *servers.entry(answer.server().to_owned()).or_insert(0) += 1;
        *statuses.entry(answer.status).or_insert(0) += 1;
    }
    between(&servers, &expected.shares)?;
    between(&statuses, &expected.statuses)?;
    if let Some((server, host)) = &expected.copied {
        let line = format!("{} {} ", request.method, request.path);
        wait::until("a copy", SOON, || async {
            got.lock().iter().any(|(name, head)| {
                name == server && head.starts_with(&line) && http::header(head, "host") == Some(host)
            })
        })
        .await;
    }
    Ok(())
}

/// The greeting of a server, as the answer of one.
async fn greeting(client: &Pod, to: SocketAddr, name: &str) -> io::Result<http::Response> {
    let server = streams::greeted(client, to, &streams::hello(name)).await;
    let server = server.ok_or(io::ErrorKind::ConnectionReset)?;
    let (head, trailers) = Default::default();
    Ok(http::Response { status: 200, head, body: format!("server: {server}\n"), trailers })
}

fn check(expected: &Expected, answer: &http::Response, took: Duration) -> Result<(), String> {
    let same = |what: &str, wanted: Option<&str>, found: Option<&str>| match wanted {
        Some(wanted) if Some(wanted).filter(|wanted| !wanted.is_empty()) != found => {
            Err(format!("{what} is not {wanted:?} but {found:?}"))
        }
        _ => Ok(()),
    };
    let status = expected.status.map(|status| status.to_string());
    same("the status", status.as_deref(), Some(&answer.status.to_string()))?;
    same("the server", expected.server.as_deref(), Some(answer.server()))?;
    same("the request line", expected.line.as_deref(), Some(answer.request_line()))?;
    same("the body", expected.body.as_deref(), Some(&answer.body))?;
    for (name, wanted) in &expected.headers {
        same(name, Some(wanted), answer.header(name))?;
    }
    for (name, wanted) in &expected.sent {
        same(name, Some(wanted), answer.sent(name))?;
    }
    if expected.at_least.is_some_and(|least| took < Duration::from_millis(least))
        || expected.at_most.is_some_and(|most| took > Duration::from_millis(most))
    {
        return Err(format!("it took {took:?}"));
    }
    Ok(())
}

fn between<K: Ord + std::fmt::Debug>(
    counts: &BTreeMap<K, usize>,
    wanted: &BTreeMap<K, (usize, usize)>,
) -> Result<(), String> {
    let fits = |(key, (least, most)): (&K, &(usize, usize))| {
        (least..=most).contains(&&counts.get(key).copied().unwrap_or_default())
    };
    if wanted.iter().all(fits) { Ok(()) } else { Err(format!("{counts:?}")) }
}
