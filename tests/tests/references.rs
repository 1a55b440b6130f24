//! The pages that name tests name tests that there are.

#![allow(clippy::unwrap_used, reason = "a test that can't go on says so and ends")]

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Pages whose tables say which test holds what.
const PAGES: [&str; 2] = ["docs/contract-tests.md", "docs/hardening-tests.md"];

#[test]
fn pages_name_tests_and_files_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let known = names(root);
    let mut missing = Vec::new();
    for page in PAGES {
        let text = fs::read_to_string(root.join(page)).unwrap();
        let rows = text.lines().filter(|line| line.starts_with('|'));
        // The second column has the tests.
        for quoted in rows.filter_map(|row| row.split('|').nth(2)).flat_map(quoted) {
            let name = quoted.rsplit("::").next().unwrap_or(quoted);
            let is_test = name.contains('_') && !name.contains(['/', ' ', '.', '{']);
            let is_file = name.contains('/') && !name.contains([' ', '{']);
            if is_test && !known.contains(name)
                || is_file && !root.join(name).exists() && !is_module(root, name)
            {
                missing.push(format!("{page}: {quoted}"));
            }
        }
    }
    assert!(missing.is_empty(), "there is no\n{}", missing.join("\n"));
}

fn is_module(root: &Path, name: &str) -> bool {
    root.join(name).with_extension("rs").exists()
}

/// What stands between backticks.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// Names of functions, and of trials that are added by name.
fn names(root: &Path) -> HashSet<String> {
    let (mut found, mut directories) = (HashSet::new(), vec![root.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_symlink() || name.starts_with('.') || name == "target" {
                continue;
            }
            if path.is_dir() {
                directories.push(path);
            } else if name.ends_with(".rs") {
                let text = fs::read_to_string(&path).unwrap();
                let word = |rest: &str| {
                    rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().map(str::to_owned)
                };
                found.extend(text.split("fn ").skip(1).filter_map(word));
                found.extend(text.split(".add(\"").skip(1).filter_map(word));
            }
        }
    }
    found
}
