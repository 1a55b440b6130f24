//! The tree of keys and values that the file, the environment and flags give, before it becomes a configuration.

use std::path::Path;

use serde_json::{Map, Value};

use super::keys::{Key, keys_of};
use super::{ConfigError, Settings};

pub(super) fn read(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(&text, path)
}

pub(super) fn parse(text: &str, path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let syntax = |reason: String| ConfigError::Syntax { path: path.to_owned(), reason };
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(Map::new());
    }
    // YAML 1.2 §10.3.2: `n` and `off` are text, as the name of a node or network may be.
    let options = serde_saphyr::options! { strict_booleans: true };
    match serde_saphyr::from_str_with_options::<Value>(text, options).map_err(|e| syntax(e.to_string()))? {
        Value::Object(map) => Ok(map),
        Value::Null => Ok(Map::new()),
        _ => Err(syntax("it holds a single value or a list".to_owned())),
    }
}

/// Refuses keys that the configuration doesn't have, naming the one that was likely meant.
pub(super) fn check_keys<C: Settings>(tree: &Map<String, Value>) -> Result<(), ConfigError> {
    let known = defaults::<C>();
    check_level(tree, &known, "", &keys_of(&known))
}

fn check_level(
    tree: &Map<String, Value>,
    known: &Map<String, Value>,
    prefix: &str,
    everywhere: &[Key],
) -> Result<(), ConfigError> {
    for (name, value) in tree {
        let path = format!("{prefix}{name}");
        match (known.get(name), value) {
            (None, _) => {
                return Err(ConfigError::UnknownKey {
                    nearest: nearest(&path, known, prefix, everywhere),
                    key: path,
                });
            }
            // A setting that holds names of the user's own.
            (Some(Value::Object(inner)), Value::Object(_)) if inner.is_empty() => {}
            (Some(Value::Object(inner)), Value::Object(given)) => {
                check_level(given, inner, &format!("{path}."), everywhere)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// The known key that looks most like `path`: a sibling by preference, else any key by its full name.
fn nearest(path: &str, siblings: &Map<String, Value>, prefix: &str, everywhere: &[Key]) -> Option<String> {
    let siblings = siblings.keys().map(|name| format!("{prefix}{name}"));
    let wanted = path.to_lowercase();
    let last = wanted.rsplit('.').next().unwrap_or(&wanted).to_owned();
    let score = |candidate: &str| {
        let candidate = candidate.to_lowercase();
        let tail = candidate.rsplit('.').next().unwrap_or(&candidate).to_owned();
        strsim::jaro_winkler(&wanted, &candidate).max(strsim::jaro_winkler(&last, &tail))
    };
    siblings
        .chain(everywhere.iter().map(Key::dotted))
        .map(|candidate| (score(&candidate), candidate))
        .filter(|(score, _)| *score > 0.7)
        .reduce(|best, next| if next.0 > best.0 { next } else { best })
        .map(|(_, candidate)| candidate)
}

pub(super) fn set(tree: &mut Map<String, Value>, path: &[String], value: Value) {
    match path {
        [] => {}
        [name] => {
            tree.insert(name.clone(), value);
        }
        [name, rest @ ..] => {
            let inner = tree.entry(name.clone()).or_insert_with(|| Value::Object(Map::new()));
            if !inner.is_object() {
                *inner = Value::Object(Map::new());
            }
            if let Value::Object(inner) = inner {
                set(inner, rest, value);
            }
        }
    }
}

/// The configuration of a tree; what the tree leaves out has its default.
///
/// # Errors
/// [`ConfigError::Value`], naming the key whose value is wrong.
pub(super) fn typed<C: Settings>(given: &Map<String, Value>) -> Result<C, ConfigError> {
    let config: C = deserialize(given).map_err(|error| wrong_value::<C>(given, &error))?;
    config.validate()?;
    Ok(config)
}

fn deserialize<C: Settings>(given: &Map<String, Value>) -> Result<C, serde_json::Error> {
    let mut tree = defaults::<C>();
    merge(&mut tree, given);
    serde_json::from_value(Value::Object(tree))
}

/// Finds the value that cannot be deserialized: the first one that fails beside defaults alone.
fn wrong_value<C: Settings>(given: &Map<String, Value>, error: &serde_json::Error) -> ConfigError {
    let wrong = keys_of(given).into_iter().find_map(|key| {
        let mut alone = Map::new();
        set(&mut alone, &key.path, key.default.clone());
        Some((key.dotted(), deserialize::<C>(&alone).err()?.to_string()))
    });
    let (key, reason) = wrong.unwrap_or_else(|| ("settings".to_owned(), error.to_string()));
    ConfigError::Value { key, reason: format!("is wrong: {reason}") }
}

/// Overrides values of `tree` with those of `given`, key by key.
fn merge(tree: &mut Map<String, Value>, given: &Map<String, Value>) {
    for (name, value) in given {
        match (tree.get_mut(name), value) {
            (Some(Value::Object(inner)), Value::Object(given)) => merge(inner, given),
            _ => drop(tree.insert(name.clone(), value.clone())),
        }
    }
}

/// The defaults of all settings.
pub(super) fn defaults<C: Settings>() -> Map<String, Value> {
    match serde_json::to_value(C::default()) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}
