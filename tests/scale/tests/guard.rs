//! Hot functions stay within their counts of instructions.
//!
//! `ambit-guard` runs each under callgrind, which counts what the processor would execute: the same on every machine of the kind, whatever else
//! runs. The limits are for the profile `ci`, in which the crates of the hot functions are optimised; with another profile that one is built.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on says where and ends")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Instructions by function.
type Counts = BTreeMap<String, u64>;

/// A count above its limit by more than this share fails: seeds of hash maps and the C library's copies make some difference.
const TOLERANCE: f64 = 0.05;

#[test]
fn hot_functions_take_no_more_instructions_than_their_limits() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("guard/limits.json");
    let text = std::fs::read_to_string(&file).unwrap();
    let limits: Counts = serde_json::from_str(&text).unwrap();
    let program = program();
    let counts: Counts = limits.keys().map(|name| (name.clone(), count(&program, name))).collect();
    for (name, count) in &counts {
        let share = *count as f64 / limits[name] as f64 - 1.0;
        println!("{name}: {count} instructions, {:+.1} % of the limit", share * 100.0);
    }
    if std::env::var_os("AMBIT_GUARD_WRITE").is_some() {
        std::fs::write(&file, serde_json::to_string_pretty(&counts).unwrap() + "\n").unwrap();
        return;
    }
    let above: Vec<String> = counts
        .iter()
        .filter(|(name, count)| **count as f64 > limits[*name] as f64 * (1.0 + TOLERANCE))
        .map(|(name, count)| format!("{name}: {count} instructions, the limit is {}", limits[name]))
        .collect();
    assert!(
        above.is_empty(),
        "slower than before:\n{}\nIf that is meant, set the limits anew: AMBIT_GUARD_WRITE=1 make guard",
        above.join("\n")
    );
}

/// The program of profile `ci`.
fn program() -> PathBuf {
    let built = PathBuf::from(env!("CARGO_BIN_EXE_ambit-guard"));
    let profile = built.parent().unwrap();
    if profile.ends_with("ci") {
        return built;
    }
    // `target/<triple>/<profile>`
    let triple = profile.parent().unwrap();
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--profile", "ci", "--package", "ambit-scale", "--bin", "ambit-guard"])
        .env("CARGO_TARGET_DIR", triple.parent().unwrap())
        .status()
        .expect("cargo runs");
    assert!(built.success(), "ambit-guard could not be built");
    triple.join("ci/ambit-guard")
}

fn count(program: &Path, name: &str) -> u64 {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("callgrind.out");
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--toggle-collect=*::guarded_*", "--dump-line=no"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(program)
        .arg(name)
        .output()
        .expect("valgrind must be installed (tests/packages.sh does it)");
    assert!(run.status.success(), "{name}: {}", String::from_utf8_lossy(&run.stderr));
    let text = std::fs::read_to_string(&out).unwrap();
    let total = text.lines().find_map(|line| line.strip_prefix("totals: ")).expect("callgrind's totals");
    let total = total.trim().parse().unwrap();
    assert!(total > 0, "{name}: callgrind counted nothing; is the function inlined?");
    total
}
