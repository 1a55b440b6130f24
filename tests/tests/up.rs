//! `ambit up` on the demo's manifests leaves this machine as it was, however it ends, and names what is wrong with
//! a manifest. Needs root; fails without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use ambit_tests::wait;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout, Command};

/// How long the whole demo may take on a machine that does other things too.
const LIMIT: Duration = Duration::from_secs(120);
/// An environment variable that every process of one `ambit up` inherits, by which they are found.
const MARK: &str = "AMBIT_UP_TEST";
const KINDS: [&str; 4] = ["net", "mnt", "pid", "user"];

fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/bookinfo/manifests")
}

/// The demo's manifests with one of them changed.
fn changed(file: &str, from: &str, to: &str) -> (tempfile::TempDir, usize) {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(manifests()).unwrap().flatten() {
        fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    let path = directory.path().join(file);
    let text = fs::read_to_string(&path).unwrap();
    let at = text.find(from).expect("the demo has it");
    fs::write(&path, text.replacen(from, to, 1)).unwrap();
    (directory, text[..at].lines().count())
}

/// One run of `ambit up`, as the leader of a process group as a shell makes it.
struct Up {
    child: Child,
    output: Lines<BufReader<ChildStdout>>,
    mark: String,
    temporary: tempfile::TempDir,
    before: Machine,
}

/// What of the machine outlasts a process.
#[derive(Debug, PartialEq, Eq)]
struct Machine {
    links: BTreeSet<String>,
    named_namespaces: BTreeSet<String>,
    mounts: BTreeSet<String>,
    shared_memory: bool,
    sockets: bool,
}

impl Machine {
    fn now() -> Self {
        let names = |path: &str| -> BTreeSet<String> {
            let entries = fs::read_dir(path).into_iter().flatten().flatten();
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        };
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        // The identifiers before the fourth field are given anew to mounts that come and go.
        let place = |line: &str| line.splitn(4, ' ').nth(3).unwrap_or_default().to_owned();
        Self {
            links: names("/sys/class/net"),
            named_namespaces: names("/run/netns"),
            mounts: mounts.lines().map(place).collect(),
            shared_memory: Path::new(ambit_local::isolate::DIRECTORY).exists(),
            sockets: Path::new("/run/ztunnel").exists(),
        }
    }
}

impl Up {
    fn start(directory: &Path, once: bool) -> Self {
        Self::start_with(directory, if once { &["--open", "0", "--once"] } else { &["--open", "0"] })
    }

    fn start_with(directory: &Path, args: &[&str]) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mark = format!("{}-{number}", std::process::id());
        let temporary = tempfile::tempdir().unwrap();
        let before = Machine::now();
        let mut beside = std::env::current_exe().unwrap();
        beside.pop();
        beside.pop();
        let mut command = Command::new(beside.join("ambit"));
        command.arg("up").arg(directory).args(args);
        command.env(MARK, &mark).env("TMPDIR", temporary.path()).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).kill_on_drop(true);
        let mut child = command.spawn().expect("the programs are built beside the tests");
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, output, mark, temporary, before }
    }

    /// Reads on until a line satisfies `wanted`; all that was read, that line last.
    async fn read_until(&mut self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let mut lines = Vec::new();
        let reading = async {
            while let Some(line) = self.output.next_line().await.unwrap() {
                let found = wanted(&line);
                lines.push(line);
                if found {
                    return true;
                }
            }
            false
        };
        let found = tokio::time::timeout(LIMIT, reading).await;
        assert!(matches!(found, Ok(true)), "what was waited for is not among {lines:#?}");
        lines
    }

    /// Reads to the end; the exit code and all lines.
    async fn end(&mut self) -> (Option<i32>, Vec<String>) {
        let mut lines = Vec::new();
        let reading = async {
            while let Some(line) = self.output.next_line().await.unwrap() {
                lines.push(line);
            }
            self.child.wait().await.unwrap()
        };
        let status = tokio::time::timeout(LIMIT, reading).await;
        (status.unwrap_or_else(|_| panic!("it does not end: {lines:#?}")).code(), lines)
    }

    /// Ctrl-C: the terminal sends the signal to every process of the group.
    fn interrupt(&self) {
        let group = Pid::from_raw(i32::try_from(self.child.id().unwrap()).unwrap());
        killpg(group, Signal::SIGINT).unwrap();
    }

    /// Its processes, in whichever namespaces.
    fn processes(&self) -> BTreeSet<u32> {
        let variable = format!("{MARK}={}", self.mark);
        let is_ours = |pid: &u32| {
            let variables = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            variables.split(|byte| *byte == 0).any(|given| given == variable.as_bytes())
        };
        pids().filter(is_ours).collect()
    }

    /// The namespaces that its processes are in and this one is not.
    fn namespaces(&self) -> BTreeSet<u64> {
        let of = |path: &str| {
            let found = KINDS.iter().map(|kind| fs::metadata(format!("{path}/ns/{kind}")));
            found.flatten().map(|namespace| namespace.ino()).collect::<BTreeSet<_>>()
        };
        let own = of("/proc/self");
        let all = self.processes().into_iter().flat_map(|pid| {
            let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            threads.flat_map(|thread| of(thread.path().to_str().unwrap())).collect::<Vec<_>>()
        });
        all.filter(|namespace| !own.contains(namespace)).collect()
    }

    /// Demands that nothing is left of it: no process, no file, no link, and nobody who holds one of `namespaces`.
    async fn assert_gone(&self, namespaces: &BTreeSet<u64>) {
        wait::until("its processes are gone", wait::SOON, || async { self.processes().is_empty() }).await;
        wait::until("its namespaces are gone", 4 * wait::SOON, || async { held().is_disjoint(namespaces) })
            .await;
        let files: Vec<_> = fs::read_dir(self.temporary.path()).unwrap().flatten().collect();
        assert!(files.is_empty(), "files are left: {files:?}");
        assert_eq!(Machine::now(), self.before);
    }
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Every namespace of this machine that a thread is in or a process has open.
fn held() -> BTreeSet<u64> {
    let mut held = BTreeSet::new();
    for pid in pids() {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        for thread in threads {
            let found = KINDS.iter().map(|kind| fs::metadata(thread.path().join("ns").join(kind)));
            held.extend(found.flatten().map(|namespace| namespace.ino()));
        }
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        held.extend(open.filter_map(|file| {
            let target = fs::read_link(file.path()).ok()?;
            let (kind, number) = target.to_str()?.split_once(":[")?;
            let number: u64 = number.trim_end_matches(']').parse().ok()?;
            KINDS.contains(&kind).then_some(number)
        }));
    }
    held
}

async fn open(line: &str) -> String {
    let address = line.strip_prefix("open http://").unwrap();
    let (address, path) = address.split_once('/').unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET /{path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn once_ends_with_zero_and_leaves_nothing_behind() {
    let mut up = Up::start(&manifests(), true);
    let mut lines = up.read_until(|line| line.starts_with("open http://")).await;
    let namespaces = up.namespaces();
    assert!(namespaces.len() > 10 && up.processes().len() > 3, "nothing was made that could be left");
    let (code, rest) = up.end().await;
    lines.extend(rest);
    assert_eq!(code, Some(0), "{lines:#?}");
    up.assert_gone(&namespaces).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_what_runs_with_zero_and_leaves_nothing_behind() {
    let mut up = Up::start(&manifests(), false);
    let opened = up.read_until(|line| line.starts_with("open http://")).await.pop().unwrap();
    up.read_until(|line| line.contains("no program of the mesh has ended")).await;
    assert!(open(&opened).await.starts_with("HTTP/1.1 200"), "the page can be opened from this machine");
    let namespaces = up.namespaces();
    up.interrupt();
    let (code, lines) = up.end().await;
    assert_eq!(code, Some(0), "{lines:#?}");
    up.assert_gone(&namespaces).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_while_the_mesh_starts_leaves_nothing_behind() {
    let mut up = Up::start(&manifests(), false);
    wait::until("some programs run", LIMIT, || async { up.processes().len() > 4 }).await;
    let namespaces = up.namespaces();
    up.interrupt();
    up.end().await;
    up.assert_gone(&namespaces).await;
}

/// Runs the demo once with a fault in it, which must be named with its file, its field and, if `by_line`, its line.
async fn is_named(file: &str, from: &str, to: &str, field: &str, by_line: bool) {
    let (directory, line) = changed(file, from, to);
    let mut up = Up::start(directory.path(), true);
    let (code, lines) = up.end().await;
    assert_ne!(code, Some(0), "{lines:#?}");
    let line = if by_line { format!(":{line}") } else { String::new() };
    let place = format!("! {}{line}: ", directory.path().join(file).display());
    assert!(
        lines.iter().any(|line| line.starts_with(&place) && line.contains(field)),
        "{place}{field}: {lines:#?}"
    );
    up.assert_gone(&BTreeSet::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_field_of_the_wrong_type_is_reported() {
    is_named("reviews.yaml", "1\n  selector", "many\n  selector", "spec.replicas", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_faulty_policy_is_reported_with_its_field_and_fails() {
    is_named("policies.yaml", "ALLOW", "PERHAPS", "spec.action", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_yaml_is_reported_with_its_line_also_while_running() {
    let (directory, line) =
        changed("reviews.yaml", "labels: {app: reviews, service", "labels: {app: reviews, [service");
    let file = directory.path().join("reviews.yaml");
    let broken = fs::read_to_string(&file).unwrap();
    fs::copy(manifests().join("reviews.yaml"), &file).unwrap();
    let mut up = Up::start(directory.path(), false);
    up.read_until(|line| line.contains("no program of the mesh has ended")).await;
    fs::write(&file, broken).unwrap();
    let lines = up.read_until(|text| text.starts_with(&format!("! {}:{line}: ", file.display()))).await;
    up.interrupt();
    assert_eq!(up.end().await.0, Some(0), "{lines:#?}");
    up.assert_gone(&BTreeSet::new()).await;
}

/// Runs `ambit` with arguments against the mesh of `up`; its exit code and standard output.
async fn ambit(up: &Up, args: &[&str], input: &str) -> (Option<i32>, String) {
    let mut beside = std::env::current_exe().unwrap();
    beside.pop();
    beside.pop();
    let mut command = Command::new(beside.join("ambit"));
    command.args(args).env("TMPDIR", up.temporary.path()).env_remove("XDG_RUNTIME_DIR");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).await.unwrap();
    drop(stdin);
    let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await.unwrap().unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_logs_and_dump_reach_a_running_mesh() {
    let mut up = Up::start(&manifests(), false);
    up.read_until(|line| line.contains("no program of the mesh has ended")).await;
    let shell = "echo \"$(hostname -I) $SERVICE_VERSION\"; cat; exit 7";
    let (code, text) =
        ambit(&up, &["exec", "bookinfo/reviews-v1", "--", "/bin/sh", "-c", shell], "from outside\n").await;
    assert_eq!((code, text.lines().nth(1)), (Some(7), Some("from outside")), "{text}");
    assert!(text.starts_with("10."), "the pod's own address: {text}");
    let (code, text) = ambit(&up, &["logs", "-n", "bookinfo", "reviews-v1"], "").await;
    assert_eq!(code, Some(0), "{text}");
    let (code, text) = ambit(&up, &["dump", "node-1"], "").await;
    assert_eq!(code, Some(0));
    let dump: serde_json::Value = serde_json::from_str(&text).expect("a dump is JSON");
    assert!(dump.get("workloads").is_some());
    assert_eq!(ambit(&up, &["logs", "nobody"], "").await.0, Some(1));
    up.interrupt();
    assert_eq!(up.end().await.0, Some(0));
    up.assert_gone(&BTreeSet::new()).await;
    assert_eq!(ambit(&up, &["dump", "node-1"], "").await.0, Some(1), "no mesh runs");
}

/// Asks `ambit why` of the mesh of `up`, and demands a line that has every one of `wanted`.
async fn explains(up: &Up, args: &[&str], code: i32, wanted: &[&[&str]]) {
    let args = [&["why", "--local", "-n", "bookinfo"], args].concat();
    let (ended, text) = ambit(up, &args, "").await;
    assert_eq!(ended, Some(code), "{args:?}: {text}");
    for parts in wanted {
        let is_wanted = |line: &str| parts.iter().all(|part| line.contains(part));
        assert!(text.lines().any(is_wanted), "{args:?}: {parts:?} is not in one line of\n{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn why_leads_to_each_planted_fault() {
    // A route that takes jason's requests before the one that is meant for them, and a waypoint without pods.
    let (directory, _) = changed("routes.yaml", "value: jason", "value: jason");
    let shadow = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: a-shadow, namespace: bookinfo}\n\
                  spec:\n  parentRefs: [{group: '', kind: Service, name: reviews, port: 9080}]\n  rules:\n  \
                  - matches: [{headers: [{name: end-user, value: jason}]}]\n    \
                  backendRefs: [{name: reviews-v1, port: 9080}]\n";
    fs::write(directory.path().join("shadow.yaml"), shadow).unwrap();
    let file = directory.path().join("ratings.yaml");
    let ratings = fs::read_to_string(&file).unwrap();
    fs::write(&file, ratings.replace("use-waypoint: waypoint", "use-waypoint: absent")).unwrap();
    let waypoint = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: absent, namespace: bookinfo,\
                    \n  annotations: {local.ambit.dev/replicas: '0'}}\nspec: {gatewayClassName: ambit-waypoint,\
                    \n  listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n";
    fs::write(directory.path().join("absent.yaml"), waypoint).unwrap();
    let mut up = Up::start(directory.path(), false);
    up.read_until(|line| line.contains("no program of the mesh has ended")).await;
    let passes: &[&[&str]] = &[
        &["✓ bookinfo/reviews-v", "port 9080 gets it, encrypted and authenticated"],
        &["→ HTTPRoute/bookinfo/a-shadow, rule 1: matches and comes first"],
        &["· HTTPRoute/bookinfo/reviews, rule 1: matches too, and comes later"],
        &["→ AuthorizationPolicy/bookinfo/reviews-viewer (ALLOW): matches and decides"],
        &["→ policy bookinfo/only-through-the-waypoint (ALLOW): matches and decides"],
    ];
    explains(&up, &["productpage-v1", "http://reviews:9080/reviews/0", "-H", "end-user: jason"], 0, passes)
        .await;
    let denied: &[&[&str]] = &[
        &["✗ waypoint bookinfo/waypoint", "answers 403"],
        &["· AuthorizationPolicy/bookinfo/reviews-viewer (ALLOW): does not match: methods"],
    ];
    explains(&up, &["productpage-v1", "http://reviews:9080/reviews/0", "-X", "DELETE"], 1, denied).await;
    let missing: &[&[&str]] = &[&[
        "✗ node proxy of bookinfo/reviews-v1",
        "refuses it (resolve): waypoint bookinfo/absent",
        "is missing",
    ]];
    explains(&up, &["reviews-v1", "http://ratings:9080/ratings/0"], 1, missing).await;
    // The same by what happens: who was denied, what failed, and the route that a request followed.
    let denied = tap(&["--denied", "-X", "DELETE", "--why"]);
    let denied = ambit_during(&up, &denied, PRODUCTPAGE, "DELETE /reviews/0").await;
    assert!(denied.contains("403 denied") && denied.contains("none matches"), "{denied}");
    let failed = tap(&["--status", "failed", "--source", "bookinfo/reviews-v2", "--why"]);
    let failed = ambit_during(&up, &failed, PRODUCTPAGE, "GET /reviews/0").await;
    assert!(failed.contains("why: no route to") && failed.contains("no endpoint is known"), "{failed}");
    let followed = tap(&["--path", "/reviews/1", "-o", "json"]);
    let request = "GET /reviews/1 HTTP/1.1\\r\\nend-user: jason\\r\\nx-rest:";
    let followed = ambit_during(&up, &followed, PRODUCTPAGE, request).await;
    let followed: serde_json::Value = serde_json::from_str(&followed).expect("one record");
    assert_eq!(followed["route"], "HTTPRoute/bookinfo/a-shadow", "{followed}");
    // Past the waypoint, by the Service of one version.
    let direct: &[&[&str]] =
        &[&["refuses it (authorize)", "denied: policies that allow apply, and none matches"]];
    explains(&up, &["productpage-v1", "reviews-v1:9080"], 1, direct).await;
    up.interrupt();
    assert_eq!(up.end().await.0, Some(0));
    up.assert_gone(&BTreeSet::new()).await;
}

const PRODUCTPAGE: &str = "bookinfo/productpage-v1";

/// The arguments of `ambit tap` for one record.
fn tap<'a>(filter: &[&'a str]) -> Vec<&'a str> {
    [&["tap", "--local", "--count", "1", "--for", "60s"], filter].concat()
}

/// Runs `ambit` with arguments while a pod sends a request again and again; its output.
async fn ambit_during(up: &Up, args: &[&str], pod: &str, request: &str) -> String {
    let script = format!(
        "exec 3<>/dev/tcp/reviews/9080; printf '{request} HTTP/1.1\\r\\nhost: reviews\\r\\nconnection: close\\r\\n\\r\\n' >&3; cat <&3"
    );
    let sending = async {
        loop {
            ambit(up, &["exec", pod, "--", "/bin/bash", "-c", &script], "").await;
        }
    };
    tokio::select! {
        (code, text) = ambit(up, args, "") => {
            assert_eq!(code, Some(0), "{args:?}: {text}");
            text
        }
        () = sending => unreachable!("it sends until the other ends"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tap_follows_live_requests_and_says_why_one_is_denied() {
    let mut up = Up::start(&manifests(), false);
    up.read_until(|line| line.contains("no program of the mesh has ended")).await;
    let pod = PRODUCTPAGE;
    let args = [
        "tap", "--local", "--path", "/reviews", "--status", "ok", "--count", "3", "--for", "60s", "-o",
        "json",
    ];
    let seen = ambit_during(&up, &args, pod, "GET /reviews/0").await;
    let seen: Vec<serde_json::Value> =
        seen.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    assert_eq!(seen.len(), 3, "{seen:?}");
    for record in &seen {
        assert_eq!(record["response_code"], 200, "{record}");
        assert!(record["proxy"].as_str().unwrap().starts_with("waypoint bookinfo/waypoint"), "{record}");
        assert_eq!(record["src.identity"].as_str().unwrap().rsplit('/').next(), Some("bookinfo-productpage"));
    }
    let args = ["tap", "--local", "--denied", "-X", "DELETE", "--why", "--count", "1", "--for", "60s"];
    let denied = ambit_during(&up, &args, pod, "DELETE /reviews/0").await;
    for wanted in
        ["DELETE http://reviews/reviews/0", "403 denied", "why: ", "none matches", "ambit why -X DELETE"]
    {
        assert!(denied.contains(wanted), "{wanted} is not in\n{denied}");
    }
    let args = [
        "tap",
        "--local",
        "--direction",
        "inbound",
        "--destination",
        "bookinfo/reviews-v1",
        "--count",
        "1",
        "--for",
        "60s",
    ];
    let inbound = ambit_during(&up, &args, pod, "GET /reviews/0").await;
    assert!(inbound.contains("inbound") && inbound.contains("node node-"), "{inbound}");
    let (code, _) = ambit(&up, &["tap", "--local", "--code", "9xx"], "").await;
    assert_eq!(code, Some(1), "a filter that can't be read ends it");
    up.interrupt();
    assert_eq!(up.end().await.0, Some(0));
    up.assert_gone(&BTreeSet::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_are_suggested_and_judged_by_what_was_observed() {
    let mut up = Up::start(&manifests(), false);
    up.read_until(|line| line.contains("no program of the mesh has ended")).await;
    let suggest = ["authz", "suggest", "bookinfo", "--local", "--enforce"];
    wait::until("the demo's requests are among the flows", LIMIT, || async {
        let (_, text) = ambit(&up, &suggest, "").await;
        ["allow-reviews-requests", "allow-ratings-requests", "allow-details-requests"]
            .iter()
            .all(|name| text.contains(name))
    })
    .await;
    let (code, suggested) = ambit(&up, &suggest, "").await;
    assert_eq!(code, Some(0), "{suggested}");
    for wanted in [
        "kind: Service",
        "cluster.local/ns/bookinfo/sa/bookinfo-productpage",
        "/reviews/{*}",
        "GET",
        "cluster.local/ns/bookinfo/sa/waypoint",
        "matchLabels",
    ] {
        assert!(suggested.contains(wanted), "{wanted} is not in\n{suggested}");
    }
    assert!(!suggested.contains("sa/bookinfo-intruder"), "who was denied is not allowed: {suggested}");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("policies.yaml");
    fs::write(&file, &suggested).unwrap();
    let diff = ["authz", "diff", "--local", "-n", "bookinfo", "-f", file.to_str().unwrap()];
    let (code, text) = ambit(&up, &diff, "").await;
    assert_eq!(code, Some(0), "beside the demo's own policies they deny nothing: {text}");
    let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-ratings, namespace: bookinfo}\n\
                spec:\n  targetRefs: [{group: '', kind: Service, name: ratings}]\n  action: DENY\n\
                \x20 rules: [{to: [{operation: {methods: [GET]}}]}]\n";
    fs::write(&file, deny).unwrap();
    let (code, text) = ambit(&up, &diff, "").await;
    assert_eq!(code, Some(1), "{text}");
    let parts = ["bookinfo/reviews-v", "GET ratings.bookinfo.svc", "denied by policy bookinfo/no-ratings"];
    assert!(text.lines().any(|line| parts.iter().all(|part| line.contains(part))), "{text}");
    up.interrupt();
    assert_eq!(up.end().await.0, Some(0));
    up.assert_gone(&BTreeSet::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_of_the_mesh_that_die_are_restarted() {
    let mut up = Up::start(&manifests(), false);
    let opened = up.read_until(|line| line.starts_with("open http://")).await.pop().unwrap();
    up.read_until(|line| line.contains("no program of the mesh has ended")).await;
    for program in ["ztunnel", "ambit-control"] {
        let named = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == program)
        };
        let victim = up.processes().into_iter().find(named).expect("it runs");
        let victim = Pid::from_raw(i32::try_from(victim).unwrap());
        nix::sys::signal::kill(victim, Signal::SIGKILL).unwrap();
        let wanted =
            |line: &str| line.starts_with("! ") && line.contains(program) && line.contains("restarted");
        up.read_until(wanted).await;
    }
    wait::until("the page opens again", LIMIT, || async { open(&opened).await.contains(" 200") }).await;
    up.interrupt();
    assert_eq!(up.end().await.0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_mesh_is_reported_as_not_shown() {
    let directory = tempfile::tempdir().unwrap();
    let pod = |name: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: idle}}\nspec: {{containers: [{{name: c, command: [/bin/sleep, '1000']}}]}}\n"
        )
    };
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: idle, labels: {istio.io/dataplane-mode: ambient}}\n";
    let ignored = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: net, namespace: idle}\nspec: {podSelector: {}}\n";
    let text = format!("{namespace}{}{}{ignored}", pod("a"), pod("b"));
    fs::write(directory.path().join("idle.yaml"), text).unwrap();
    let mut up = Up::start_with(directory.path(), &["--once"]);
    let (code, lines) = up.end().await;
    assert_eq!(code, Some(0), "{lines:#?}");
    for wanted in [
        "– no payload is readable on the wire between the nodes: not shown: no traffic",
        "– every connection is authenticated on both sides: not shown: no traffic",
        "note: kind NetworkPolicy has no effect in a local cluster (NetworkPolicy idle/net)",
    ] {
        assert_eq!(lines.iter().filter(|line| line.starts_with(wanted)).count(), 1, "{wanted}: {lines:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn findings_of_the_control_plane_appear_and_go_when_mended() {
    let directory = tempfile::tempdir().unwrap();
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}\n";
    let policy = |rules: &str| {
        format!(
            "{namespace}---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: {{action: DENY, rules: {rules}}}\n"
        )
    };
    let file = directory.path().join("shop.yaml");
    fs::write(
        &file,
        policy(
            "[{when: [{key: 'request.auth.claims[iss]', notValues: ['*']}], to: [{operation: {methods: [GET]}}]}]",
        ),
    )
    .unwrap();
    let mut up = Up::start_with(directory.path(), &[]);
    let place = format!("{}: AuthorizationPolicy shop/p: ", file.display());
    let found = up.read_until(|line| line.starts_with(&format!("! {place}"))).await.pop().unwrap();
    fs::write(&file, policy("[{from: [{source: {namespaces: [plain]}}]}]")).unwrap();
    up.read_until(|line| line == found.replacen('!', "mended:", 1)).await;
    up.interrupt();
    assert_eq!(up.end().await.0, Some(0));
}
