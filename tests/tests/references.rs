//! The pages that name tests name tests that there are.

#![allow(clippy::unwrap_used, reason = "a test that can't go on says so and ends")]

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Pages whose tables say which test holds what.
const PAGES: [&str; 3] = ["docs/contract-tests.md", "docs/hardening-tests.md", "docs/kubernetes-tests.md"];

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

/// Groups of labels and annotations.
const GROUPS: [&str; 3] = ["istio.io/", "ambit.dev/", "gateway.networking.k8s.io/"];
/// Names between Ambit's own programs, and of what is no label.
const INTERNAL: [&str; 8] = [
    "ambit.dev/dynamic-host",
    "ambit.dev/labels",
    "ambit.dev/load-balancer",
    "ambit.dev/mesh-controller",
    "ambit.dev/session-affinity",
    "ambit.dev/waypoint-failure-open",
    "ambit_control",
    "ambit_waypoint",
];

/// String literals of programs that begin like the name of a metric, a label or an annotation.
#[test]
fn every_metric_label_and_annotation_is_in_the_docs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let docs: String = files(&root.join("docs"), ".md").values().cloned().collect();
    let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-./".contains(c);
    let is_name = |text: &str| {
        let group = text.find('/').and_then(|at| text.get(..=at)).unwrap_or_default();
        let is_label = text.matches('/').count() == 1
            && !text.ends_with('/')
            && GROUPS.iter().any(|of| group == *of || group.ends_with(&format!(".{of}")));
        let is_metric = text.starts_with("ambit_") && !text.ends_with('_') && !text.contains(['/', '.', '-']);
        text.chars().all(is_part) && (is_label || is_metric)
    };
    let mut missing = Vec::new();
    for program in ["control/src", "node/src", "ztunnel/src", "waypoint/src", "ca/src", "mesh"] {
        for (path, text) in files(&root.join(program), ".rs") {
            if path.to_string_lossy().contains("tests") {
                continue;
            }
            let text = text.split("#[cfg(test)]").next().unwrap_or_default();
            let literals = text.split('"').skip(1).step_by(2).filter(|literal| is_name(literal));
            let unknown = literals.filter(|name| !docs.contains(name) && !INTERNAL.contains(name));
            missing.extend(unknown.map(|name| format!("{name} ({})", path.display())));
        }
    }
    assert!(missing.is_empty(), "the docs do not name\n{}", missing.join("\n"));
}

/// The text of every file below a directory whose name ends so.
fn files(directory: &Path, ending: &str) -> BTreeMap<PathBuf, String> {
    let (mut found, mut directories) = (BTreeMap::new(), vec![directory.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                found.insert(path.clone(), fs::read_to_string(&path).unwrap());
            }
        }
    }
    found
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
                let staged = text.split(".add_to(Stage::").skip(1).filter_map(|rest| rest.split('"').nth(1));
                found.extend(staged.map(str::to_owned));
            }
        }
    }
    found
}
