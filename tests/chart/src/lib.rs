//! What the tests of the chart are made of: `helm template`, its objects, and the reference page of the values.
//!
//! Helm is the one that the test bed builds (`target/cluster/bin/helm`); `AMBIT_HELM` names another.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

mod reference;

pub use reference::{Row, page, rows, schema_keys};

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new(".")).to_owned()
}

/// The chart.
pub fn chart() -> PathBuf {
    root().join("charts/ambit")
}

/// Reads a file of the repository.
///
/// # Errors
/// It can't be read.
pub fn read(path: &str) -> anyhow::Result<String> {
    std::fs::read_to_string(root().join(path)).with_context(|| format!("can't read {path}"))
}

/// The schema of the values.
///
/// # Errors
/// It can't be read, or is not JSON.
pub fn schema() -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&read("charts/ambit/values.schema.json")?)?)
}

/// The text of every Rust file below a folder of the repository.
///
/// # Errors
/// One can't be read.
pub fn sources(folder: &str) -> anyhow::Result<String> {
    let mut text = String::new();
    for entry in std::fs::read_dir(root().join(folder)).with_context(|| format!("can't list {folder}"))? {
        let entry = entry?;
        let path = format!("{folder}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            text.push_str(&sources(&path)?);
        } else if path.ends_with(".rs") {
            text.push_str(&read(&path)?);
        }
    }
    Ok(text)
}

/// An object of the rendered chart.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// As rendered, without its checksums.
    pub text: String,
    /// The same, parsed.
    pub value: Value,
}

impl Object {
    /// Kind and name, and the namespace unless it is that of the release.
    pub fn id(&self) -> String {
        let part = |pointer: &str| self.value.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        match part("/metadata/namespace") {
            "" | "ambit-system" => format!("{} {}", part("/kind"), part("/metadata/name")),
            other => format!("{} {other}/{}", part("/kind"), part("/metadata/name")),
        }
    }
}

/// Runs Helm.
///
/// # Errors
/// There is no Helm, or it refuses: with what it said.
pub fn helm(arguments: &[&str]) -> anyhow::Result<String> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let built = target.join("cluster/bin/helm");
    let program = std::env::var_os("AMBIT_HELM").map_or(built, PathBuf::from);
    ensure!(program.exists(), "there is no {}: `make cluster-programs` builds it", program.display());
    let output = Command::new(&program).args(arguments).output().context("can't run helm")?;
    if !output.status.success() {
        bail!("helm {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Renders the chart with settings as those of `helm --set`.
///
/// # Errors
/// As [`helm`].
pub fn template(settings: &[&str]) -> anyhow::Result<Vec<Object>> {
    let path = chart();
    let mut arguments = vec!["template", "ambit", path.to_str().context("the path is no text")?];
    arguments.extend(["--namespace", "ambit-system"]);
    for setting in settings {
        arguments.extend(["--set", setting]);
    }
    objects(&helm(&arguments)?)
}

/// The objects of a rendered chart.
fn objects(rendered: &str) -> anyhow::Result<Vec<Object>> {
    let mut found = Vec::new();
    for text in rendered.split("\n---\n").map(without_checksums) {
        let text = text.trim().trim_start_matches("---\n").to_owned();
        if text.lines().all(|line| line.is_empty() || line.starts_with('#')) {
            continue;
        }
        let value = serde_saphyr::from_str(&text).with_context(|| format!("not YAML: {text}"))?;
        found.push(Object { text, value });
    }
    Ok(found)
}

/// A checksum says nothing that the object which it is of doesn't.
fn without_checksums(text: &str) -> String {
    let line = |line: &str| match line.split_once("checksum/config: ") {
        Some((indent, _)) => format!("{indent}checksum/config: …\n"),
        None => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}
