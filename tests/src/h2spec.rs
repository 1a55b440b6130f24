//! The suite h2spec, which sends correct and wrong HTTP/2 to a server and judges its answers by RFC 9113 and RFC 7541.
//!
//! `make cluster-programs` builds it from the module in `tests/cluster/go/h2spec`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ambit_local::{Command, Pod};

/// How long the suite may take: some cases wait for seconds whether something comes.
const LIMIT: Duration = Duration::from_secs(240);
/// Cases of the pinned version without its strict ones.
const CASES: usize = 145;

/// A case that can't pass where a port takes HTTP/1.1 too and no ALPN says which of them comes: what is not the preface of HTTP/2 is
/// answered as HTTP/1.1, with 400, and the connection is closed. RFC 9113 §3.4 allows to leave out the GOAWAY, since the peer is not using
/// HTTP/2.
pub const INVALID_PREFACE: &str = "http2/3.5: Sends invalid connection preface";

/// What became of a case: `None` if it passed, else what was wrong.
pub type Verdicts = BTreeMap<String, Option<String>>;

/// Runs the whole suite from a pod against a server at `to`, by prior knowledge or inside TLS whose certificate is not verified. The
/// verdicts are named as `SECTION: DESCRIPTION`.
///
/// # Panics
/// When the program is not there, or does not run all of its cases.
pub async fn run(pod: &Pod, to: SocketAddr, tls: bool) -> Verdicts {
    let directory = tempfile::tempdir().expect("a directory");
    let (report, output) = (directory.path().join("report.xml"), directory.path().join("output"));
    let mut command = Command::new(program()).log_file(&output);
    let (host, port) = (to.ip().to_string(), to.port().to_string());
    command =
        command.args(["--host", &host, "--port", &port, "--timeout", "5", "--junit-report"]).arg(&report);
    if tls {
        command = command.args(["--tls", "--insecure"]);
    }
    let process = pod.spawn(command).await.expect("h2spec starts");
    let ended = process.wait_within(LIMIT).await;
    let said = String::from_utf8_lossy(&std::fs::read(&output).unwrap_or_default()).into_owned();
    ended.unwrap_or_else(|error| panic!("h2spec does not end: {error}\n{said}"));
    let report =
        std::fs::read_to_string(&report).unwrap_or_else(|error| panic!("no report: {error}\n{said}"));
    let verdicts = verdicts(&report);
    assert_eq!(verdicts.len(), CASES, "cases ran\n{said}");
    verdicts
}

/// Asserts that every case passed but those of `deviations`, which are named in `docs/hardening-tests.md` with their reasons.
///
/// # Panics
/// When another case failed, or one of these passed.
pub fn assert_passed(verdicts: &Verdicts, deviations: &[&str]) {
    let failed: Vec<_> = verdicts.iter().filter_map(|(case, error)| Some((case, error.as_ref()?))).collect();
    let unknown: Vec<_> = failed.iter().filter(|(case, _)| !deviations.contains(&case.as_str())).collect();
    assert!(unknown.is_empty(), "{unknown:#?}");
    let passed: Vec<_> =
        deviations.iter().filter(|case| !failed.iter().any(|(failed, _)| failed == *case)).collect();
    assert!(passed.is_empty(), "these are no deviations: {passed:#?}");
}

fn program() -> PathBuf {
    let own = std::env::current_exe().expect("this program's file");
    // Tests lie in `target/<triple>/<profile>/deps`.
    let bins = own.ancestors().map(|directory| directory.join("cluster/bin/h2spec"));
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cluster/bin/h2spec");
    bins.chain([repository]).find(|file| file.exists()).expect("h2spec: run `make cluster-programs`")
}

/// Reads the verdicts of a JUnit report.
fn verdicts(report: &str) -> Verdicts {
    report.split("<testcase ").skip(1).map(verdict).collect()
}

fn verdict(case: &str) -> (String, Option<String>) {
    let case = case.split("</testcase>").next().unwrap_or_default();
    let (head, body) = case.split_once('>').unwrap_or((case, ""));
    let attribute = |name: &str| {
        let value = head.split_once(&format!("{name}=\"")).and_then(|(_, rest)| rest.split_once('"'));
        value.map(|(value, _)| value.replace("&#34;", "\"").replace("&amp;", "&")).unwrap_or_default()
    };
    let name = format!("{}: {}", attribute("package"), attribute("classname"));
    let is_wrong = ["<failure", "<error", "<skipped"].iter().any(|mark| body.contains(mark));
    (name, is_wrong.then(|| body.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_gives_the_verdict_of_each_case() {
        let report = r#"<testsuites><testsuite name="1. A"><testcase package="generic/1" classname="Sends a &#34;b&#34;" time="0.1"></testcase>
            <testcase package="http2/6.5" classname="Waits" time="2.0"><error>Timeout</error></testcase></testsuite></testsuites>"#;
        let verdicts = verdicts(report);
        assert_eq!(verdicts["generic/1: Sends a \"b\""], None);
        assert!(verdicts["http2/6.5: Waits"].as_ref().is_some_and(|error| error.contains("Timeout")));
    }
}
