//! Settings of a program: one YAML file, and flags or environment variables over its keys.
//!
//! A program declares each setting once, as an optional field of a struct that is its flags (clap), its variables (clap)
//! and the keys of its file (serde, camel case). An unknown key is an error that names the nearest known one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file cannot be understood.
    #[error("configuration {}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, with its line.
        reason: String,
    },
    /// The file has a key that there is not.
    #[error("configuration {}: unknown key {key:?}{suggestion}", path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The nearest key that there is.
        suggestion: String,
    },
    /// A value is missing.
    #[error("{0} must be given")]
    Missing(&'static str),
    /// A value is not valid.
    #[error("{key}: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// The settings of `file` with those of `flags` over them, key by key.
pub fn resolve<S>(file: Option<&Path>, flags: &S) -> Result<S, SettingsError>
where
    S: Default + Serialize + DeserializeOwned,
{
    let mut settings = match file {
        Some(path) => given(&read_file::<S>(path)?),
        None => Map::new(),
    };
    settings.extend(given(flags));
    serde_json::from_value(Value::Object(settings))
        .map_err(|error| SettingsError::Value { key: "settings", reason: error.to_string() })
}

/// The keys that have a value.
fn given<S: Serialize>(settings: &S) -> Map<String, Value> {
    match serde_json::to_value(settings) {
        Ok(Value::Object(keys)) => keys.into_iter().filter(|(_, value)| !value.is_null()).collect(),
        _ => Map::new(),
    }
}

fn read_file<S>(path: &Path) -> Result<S, SettingsError>
where
    S: Default + Serialize + DeserializeOwned,
{
    let text = std::fs::read_to_string(path)
        .map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
    let parse = |error: serde_saphyr::Error| SettingsError::Parse {
        path: path.to_owned(),
        reason: error.without_snippet().to_string(),
    };
    let keys: BTreeMap<String, Value> = serde_saphyr::from_str(&text).map_err(parse)?;
    let known = known_keys::<S>();
    if let Some(key) = keys.keys().find(|key| !known.contains(key)) {
        return Err(SettingsError::UnknownKey {
            path: path.to_owned(),
            suggestion: nearest(&known, key),
            key: key.clone(),
        });
    }
    serde_saphyr::from_str(&text).map_err(parse)
}

/// The keys of the file.
fn known_keys<S: Default + Serialize>() -> Vec<String> {
    match serde_json::to_value(S::default()) {
        Ok(Value::Object(keys)) => keys.into_iter().map(|(key, _)| key).collect(),
        _ => Vec::new(),
    }
}

fn nearest(known: &[String], key: &str) -> String {
    let near = known.iter().map(|known| (strsim::damerau_levenshtein(known, key), known)).min();
    near.map(|(_, known)| format!(", did you mean {known:?}?")).unwrap_or_default()
}

/// A table of all settings, in Markdown: key, flag, variable and meaning of each argument that has a variable.
pub fn table(command: &clap::Command) -> String {
    let mut table = String::from("| key | flag | variable | meaning |\n| --- | --- | --- | --- |\n");
    for argument in command.get_arguments().filter(|argument| argument.get_env().is_some()) {
        let key = camel_case(argument.get_id().as_str());
        let flag = argument.get_long().unwrap_or_default();
        let variable = argument.get_env().map(|name| name.to_string_lossy()).unwrap_or_default();
        let meaning = argument.get_help().map(ToString::to_string).unwrap_or_default();
        table.push_str(&format!("| `{key}` | `--{flag}` | `{variable}` | {meaning} |\n"));
    }
    table
}

/// A field's name as its key in the file.
fn camel_case(field: &str) -> String {
    let mut words = field.split('_');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |key, word| {
        let (head, tail) = word.split_at(word.len().min(1));
        key + &head.to_uppercase() + tail
    })
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields, default)]
    struct Example {
        node_name: Option<String>,
        workers: Option<u16>,
    }

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.yaml");
        std::fs::write(&path, text).unwrap();
        (directory, path)
    }

    #[test]
    fn flags_override_the_file_key_by_key() {
        let (_directory, path) = file("nodeName: a\nworkers: 3\n");
        let flags = Example { node_name: Some("b".into()), workers: None };
        let resolved = resolve(Some(&path), &flags).unwrap();
        assert_eq!(resolved, Example { node_name: Some("b".into()), workers: Some(3) });
    }

    #[test]
    fn an_unknown_key_names_the_nearest_known_one() {
        let (_directory, path) = file("nodename: a\n");
        let error = resolve(Some(&path), &Example::default()).unwrap_err();
        assert!(error.to_string().contains("did you mean \"nodeName\"?"), "{error}");
    }
}
