//! `ambit up` as a user runs it: with the demo's manifests, to its end and to its death.
//!
//! The programs of the mesh and of the demo must be built, and the tests need root or unprivileged user namespaces.

#![allow(clippy::expect_used, reason = "a test says what it needs and fails without it")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(90);

fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/bookinfo/manifests")
}

fn ambit(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ambit"));
    command.arg("up").arg(manifests()).args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A process and its descendants, found by their parents' ids; none when it is gone.
fn family(of: u32) -> BTreeSet<u32> {
    let mut family: BTreeSet<u32> = [of].into();
    loop {
        let before = family.len();
        for process in std::fs::read_dir("/proc").expect("a /proc").flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let stat = std::fs::read_to_string(process.path().join("stat")).unwrap_or_default();
            // After the name, which may contain anything: state, then the parent's id.
            let parent =
                stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
            if parent.is_some_and(|parent: u32| family.contains(&parent)) {
                family.insert(pid);
            }
        }
        if family.len() == before {
            return family;
        }
    }
}

fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next().map(str::to_owned));
    state.is_some_and(|state| state != "Z" && state != "X")
}

/// Starts the demo and waits until all checks are shown.
fn shown() -> (Child, Vec<String>) {
    let mut child = ambit(&["--open", "0"]).spawn().expect("ambit is built");
    let output = child.stdout.take().expect("a pipe");
    let mut lines = Vec::new();
    for line in BufReader::new(output).lines() {
        let line = line.expect("text");
        let last = line.contains("no program of the mesh has ended");
        lines.push(line);
        if last {
            break;
        }
    }
    (child, lines)
}

/// Waits until none of the processes is left.
fn assert_gone(processes: &BTreeSet<u32>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while processes.iter().any(|pid| is_alive(*pid)) {
        assert!(Instant::now() < deadline, "some of {processes:?} are left");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn send(signal: &str, pid: u32) {
    let sent = Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill");
    assert!(sent.success());
}

#[test]
fn once_checks_all_promises_and_reports_them_by_its_exit_code() {
    let began = Instant::now();
    let output = ambit(&["--once", "--open", "0"]).output().expect("ambit is built");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(!text.contains('✗'), "{text}");
    for claim in [
        "every workload is ready and captured",
        "no payload is readable on the wire",
        "traffic to reviews reaches every workload",
        "intruder-v1 is refused by",
        "stranger-v1 is refused by",
        "is answered with 200 by 90 % reviews-v1, 10 % reviews-v2",
        "(end-user: jason) is answered with 200 by reviews-v3",
        "http://details:9080/details/1 is answered with 504 within 3 s",
        "http://ratings:9080/ratings/0 is answered with 200, some after a retry",
        "POST http://ratings:9080/ratings/0 is answered with 403",
        "authenticated on both sides",
        "the page opens from this machine",
    ] {
        assert!(text.lines().any(|line| line.starts_with('✓') && line.contains(claim)), "{claim}: {text}");
    }
    assert!(began.elapsed() < LIMIT);
}

#[test]
fn once_fails_when_something_does_not_hold() {
    let directory = own_directory("unpoliced");
    copy_manifests(&directory);
    // Without the policies the intruders are not refused.
    std::fs::remove_file(directory.join("policies.yaml")).expect("the policies' file");
    let output = Command::new(env!("CARGO_BIN_EXE_ambit"))
        .arg("up")
        .arg(&directory)
        .args(["--once", "--open", "0"])
        .output()
        .expect("ambit is built");
    std::fs::remove_dir_all(&directory).expect("the copy goes");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("✗ intruder-v1 is refused by"), "{text}");
}

/// A directory of this test's own.
fn own_directory(test: &str) -> PathBuf {
    let directory = std::env::temp_dir().join(format!("ambit-up-{test}-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    directory
}

fn copy_manifests(to: &Path) {
    for file in std::fs::read_dir(manifests()).expect("the demo's manifests").flatten() {
        std::fs::copy(file.path(), to.join(file.file_name())).expect("a copy");
    }
}

/// Needs root to become somebody else, and a machine that lets everybody make user namespaces.
#[test]
fn a_user_without_privileges_sees_the_same() {
    let directory = own_directory("unprivileged");
    let (programs, copied) = (directory.join("bin"), directory.join("manifests"));
    for part in [&programs, &copied] {
        std::fs::create_dir_all(part).expect("a directory");
    }
    copy_manifests(&copied);
    // Other users may not be able to enter the build directory.
    let built = Path::new(env!("CARGO_BIN_EXE_ambit")).parent().expect("a directory");
    for name in ["ambit", "ambit-control", "ambit-waypoint", "ztunnel", "bookinfo"] {
        let (from, to) = (built.join(name), programs.join(name));
        if std::fs::hard_link(&from, &to).is_err() {
            std::fs::copy(&from, &to).expect("the programs of the mesh and of the demo are built");
        }
    }
    let output = Command::new(programs.join("ambit"))
        .arg("up")
        .arg(&copied)
        .args(["--once", "--open", "0"])
        .current_dir("/")
        .gid(65534)
        .uid(65534)
        .output()
        .expect("root may become nobody");
    std::fs::remove_dir_all(&directory).expect("the copies go");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
}

#[test]
fn nothing_is_left_after_a_kill() {
    let (mut child, lines) = shown();
    let processes = family(child.id());
    assert!(processes.len() > 10, "the demo runs: {lines:?}");
    send("-KILL", child.id());
    child.wait().expect("it ends");
    assert_gone(&processes);
    assert!(!Path::new("/dev/shm/ambit").exists(), "files are left");
}
