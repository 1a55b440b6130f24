//! The program from outside: what it says of its command line.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]

use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ambit-waypoint")).args(arguments).output().unwrap()
}

#[test]
fn help_names_the_settings_and_a_wrong_one_is_an_error() {
    let help = run(&["--help"]);
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("config"), "{help:?}");
    let wrong = run(&["--no-such-setting"]);
    assert!(!wrong.status.success());
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("--no-such-setting"), "{wrong:?}");
}
