//! Words and names that the code does not use: a reader would have to learn what they mean here.
//!
//! This test reads the source of the whole workspace. New words go into the tables below, with the word to use instead.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on says so and ends")]

use std::fs;
use std::path::{Path, PathBuf};

/// Not used anywhere, in code, comments or documentation, however they begin, nor as a part of a name.
const WORDS: [(&str, &str); 5] = [
    ("told", "reported, logged, configured, asked"),
    ("tell", "report, distinguish"),
    ("tells", "reports, says, distinguishes"),
    ("telling", "reporting"),
    ("untold", "unreported"),
];

/// Not used as names in code. In prose, these are ordinary words.
const NAMES: [(&str, &str); 33] = [
    ("Story", "AccessRecord"),
    ("Telling", "ConnectionReport"),
    ("Flight", "Dial"),
    ("Ticket", "DialPermit"),
    ("Landing", "an enum of the outcome"),
    ("Departure", "an enum of the outcome"),
    ("Asked", "OutboundRequest"),
    ("Missed", "ConnectFailure"),
    ("Reached", "Upstream"),
    ("Seat", "PodPlacement"),
    ("Census", "NodePods"),
    ("Looker", "Watcher"),
    ("Keeper", "what it holds or does"),
    ("keeper", "what it holds or does"),
    ("seat", "index, worker"),
    ("flight", "dial, requests"),
    ("lead", "run_as_leader"),
    ("Brake", "WriteBackoff"),
    ("Demander", "OnDemandClient"),
    ("DeathNotice", "ExitGuard"),
    ("Losses", "LostClaims"),
    ("News", "Messages"),
    ("Shelf", "FreeList"),
    ("Standing", "a state of what it is about"),
    ("Surroundings", "PodContext"),
    ("Upkeep", "Maintenance"),
    ("Whose", "the kind of what is asked"),
    ("Insistent", "RetryingClient"),
    ("take_off", "start_dial"),
    ("courtesies", "what it holds"),
    ("ear", "listener, receiver"),
    ("way", "route, tunnel, target"),
    ("ways", "routes, tunnels, targets"),
];

/// Longest name of a test, in bytes. A longer sentence goes into its doc comment.
const LONGEST_TEST: usize = 70;

/// This file, which contains all the words.
const OWN: &str = "tests/tests/words.rs";

#[test]
fn sources_use_none_of_the_words_that_we_avoid() {
    let mut found = Vec::new();
    for (path, text) in files(&["rs", "md", "proto", "toml", "tpl", "sh", "Dockerfile", "Makefile"]) {
        for (number, line) in text.lines().enumerate() {
            let names = if path.ends_with(".rs") { code(line) } else { String::new() };
            let prose = line.to_lowercase().replace('_', " ");
            let words = matches(&prose, &WORDS).chain(matches(&names, &NAMES));
            found.extend(words.map(|(word, instead)| format!("{path}:{}: {word}: {instead}", number + 1)));
        }
    }
    assert!(found.is_empty(), "say instead:\n{}", found.join("\n"));
}

#[test]
fn names_of_tests_are_short() {
    let mut found = Vec::new();
    for (path, text) in files(&["rs"]) {
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                is_test = true;
            } else if let Some((_, rest)) =
                line.split_once("fn ").filter(|_| is_test && !line.starts_with("//"))
            {
                is_test = false;
                let name = rest.split(|letter: char| !is_letter(letter)).next().unwrap_or_default();
                if name.len() > LONGEST_TEST {
                    found.push(format!("{path}: {name} has {} letters", name.len()));
                }
            }
        }
    }
    assert!(found.is_empty(), "at most {LONGEST_TEST} letters:\n{}", found.join("\n"));
}

fn is_letter(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

/// The words of `line` that are in `table`.
fn matches(
    line: &str,
    table: &'static [(&'static str, &'static str)],
) -> impl Iterator<Item = (&'static str, &'static str)> {
    let words = line.split(|letter: char| !is_letter(letter));
    words.filter_map(|word| table.iter().find(|(avoided, _)| *avoided == word).copied())
}

/// A line without its comment and without the contents of its string literals.
fn code(line: &str) -> String {
    let (mut kept, mut letters, mut is_text) = (String::new(), line.chars().peekable(), false);
    while let Some(letter) = letters.next() {
        match letter {
            '\\' if is_text => drop(letters.next()),
            '"' => is_text = !is_text,
            '/' if !is_text && letters.peek() == Some(&'/') => break,
            letter if !is_text => kept.push(letter),
            _ => {}
        }
    }
    kept
}

/// The files of the workspace with one of these extensions or names: paths from its root, and contents.
fn files(extensions: &[&str]) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let (mut found, mut directories) = (Vec::new(), vec![root.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_symlink() || name.starts_with('.') || name == "target" {
                continue;
            }
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let shown = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            let kind = path.extension().or(path.file_name()).unwrap();
            if shown != OWN && extensions.iter().any(|end| kind == *end) {
                found.push((shown, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(found.len() > 100, "the sources are in {}", root.display());
    found
}

#[test]
fn comments_and_string_literals_are_not_code() {
    assert_eq!(code(r#"let a = "way \" way"; // way"#), "let a = ; ");
}
