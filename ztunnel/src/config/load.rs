//! Where configuration comes from: one YAML file, overridden by the environment of Istio's chart, by variables of our
//! own, and by flags.
//!
//! The keys, their defaults and their meanings are read off the configuration's own type, so that a setting is declared
//! once: `dns.clusterDomain` is `ZTUNNEL_DNS_CLUSTER_DOMAIN` and `--dns-cluster-domain`, in the help and in the reference page.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgMatches, Command};
use serde_json::{Map, Value};

use super::{Config, istio};

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read the configuration file {path}")]
    Read {
        /// The file that was named.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no YAML mapping.
    #[error("{path} is not a YAML mapping: {reason}")]
    Syntax {
        /// The file that was named.
        path: PathBuf,
        /// The parser's message, with line and column.
        reason: String,
    },
    /// A key that nobody reads.
    #[error("unknown key `{key}`{}", nearest.as_ref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default())]
    UnknownKey {
        /// The key as written, with its path.
        key: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
    },
    /// A key with a value that can't be.
    #[error("`{key}` {reason}")]
    Value {
        /// The key, with its path.
        key: String,
        /// What is wrong, as the end of a sentence that begins with the key.
        reason: String,
    },
    /// The command line can't be understood, or asked for help.
    #[error("{0}")]
    Arguments(#[from] clap::Error),
}

/// Builds the configuration from the program's arguments and environment.
///
/// # Errors
/// [`ConfigError`], naming the key or file at fault. [`ConfigError::Arguments`] is also how `--help`
/// and `--version` end; `clap::Error::exit` prints and exits as they should.
pub fn from_environment(arguments: impl IntoIterator<Item = OsString>) -> Result<Config, ConfigError> {
    let keys = keys();
    let matches = command(&keys).try_get_matches_from(arguments)?;
    let mut tree = match matches.get_one::<PathBuf>("config") {
        Some(path) => read(path)?,
        None => Map::new(),
    };
    check_keys(&tree)?;
    let variables: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let without_effect = apply_istio(&mut tree, &keys, &variables)?;
    for key in &keys {
        if let Some(text) = text_of(&matches, key) {
            set(&mut tree, &key.path, key.value(&text)?);
        }
    }
    Ok(Config { without_effect, ..typed(tree)? })
}

/// Sets what the environment of Istio's chart says; returns the variables without effect.
fn apply_istio(
    tree: &mut Map<String, Value>,
    keys: &[Leaf],
    variables: &[(String, String)],
) -> Result<Vec<String>, ConfigError> {
    let istio::Environment { settings, metadata, without_effect } = istio::read(variables)?;
    for (path, text, variable) in settings {
        let Some(key) = keys.iter().find(|key| key.dotted() == path) else { continue };
        let value = key.value(&text).map_err(|error| match error {
            ConfigError::Value { reason, .. } => ConfigError::Value { key: variable.to_owned(), reason },
            other => other,
        })?;
        set(tree, &key.path, value);
    }
    for (name, value) in metadata {
        set(tree, &["nodeMetadata".to_owned(), name], Value::from(value));
    }
    Ok(without_effect)
}

/// Builds the configuration from YAML alone.
///
/// # Errors
/// As [`from_environment`].
pub fn from_yaml(text: &str) -> Result<Config, ConfigError> {
    let tree = parse(text, Path::new("configuration"))?;
    check_keys(&tree)?;
    typed(tree)
}

/// A key that holds a value, as opposed to one that holds keys.
struct Leaf {
    path: Vec<String>,
    default: Value,
    /// The doc comment of the field.
    meaning: String,
}

impl Leaf {
    fn dotted(&self) -> String {
        self.path.join(".")
    }

    fn flag(&self) -> String {
        self.path.iter().map(|part| words(part, '-')).collect::<Vec<_>>().join("-")
    }

    fn variable(&self) -> String {
        format!("ZTUNNEL_{}", self.flag().replace('-', "_").to_uppercase())
    }

    fn shown_default(&self) -> String {
        match &self.default {
            Value::Null => "none".to_owned(),
            Value::String(text) if text.is_empty() => "none".to_owned(),
            Value::Array(items) if items.is_empty() => "none".to_owned(),
            Value::Object(_) => "none".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }
    }

    /// Reads a flag's or variable's text as the kind of value that the key has.
    fn value(&self, text: &str) -> Result<Value, ConfigError> {
        let wrong = |what: &str| ConfigError::Value {
            key: self.dotted(),
            reason: format!("is `{text}`, not {what}"),
        };
        Ok(match &self.default {
            Value::Bool(_) => Value::Bool(text.parse().map_err(|_| wrong("true or false"))?),
            Value::Number(_) => Value::from(text.parse::<u64>().map_err(|_| wrong("a whole number"))?),
            Value::Array(_) => text.split(',').map(str::trim).filter(|item| !item.is_empty()).collect(),
            Value::Null if text.is_empty() => Value::Null,
            Value::Object(_) => {
                let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
                let pairs = pairs.map(|pair| pair.split_once('=').ok_or_else(|| wrong("NAME=VALUE pairs")));
                let own = |(name, value): (&str, &str)| (name.to_owned(), Value::from(value));
                Value::Object(pairs.map(|pair| pair.map(own)).collect::<Result<_, _>>()?)
            }
            _ => Value::from(text),
        })
    }
}

fn defaults() -> Map<String, Value> {
    match serde_json::to_value(Config::default()) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// `camelCase` as lower-case words.
fn words(name: &str, separator: char) -> String {
    let mut out = String::with_capacity(name.len() + 4);
    for c in name.chars() {
        if c.is_ascii_uppercase() {
            out.push(separator);
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

/// Every setting.
fn keys() -> Vec<Leaf> {
    let schema = schemars::schema_for!(Config).to_value();
    let mut keys = leaves(&defaults());
    for key in &mut keys {
        key.meaning = meaning(&schema, &key.path);
    }
    keys
}

/// The description of a field in a schema, in one line.
fn meaning(schema: &Value, path: &[String]) -> String {
    let mut object = schema;
    let mut description = "";
    for part in path {
        let property = &object["properties"][part];
        description = property["description"].as_str().unwrap_or_default();
        let definition = property["$ref"].as_str().and_then(|reference| reference.strip_prefix('#'));
        object = definition.and_then(|pointer| schema.pointer(pointer)).unwrap_or(property);
    }
    description.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The reference page of all settings, in Markdown.
pub fn reference() -> String {
    let mut page = String::from(
        "# Settings of ztunnel\n\nWritten from the program; `AMBIT_WRITE_DOCS=1 cargo test -p ztunnel reference` writes it anew. \
         [Configure ztunnel](ztunnel.md) explains how to set them.\n\n| key | default | meaning |\n| --- | --- | --- |\n",
    );
    for key in keys() {
        page.push_str(&format!(
            "| `{}` | {} | {} |\n",
            key.dotted(),
            key.shown_default(),
            key.meaning.replace('|', "\\|")
        ));
    }
    page
}

fn leaves(tree: &Map<String, Value>) -> Vec<Leaf> {
    let mut found = Vec::new();
    for (name, value) in tree {
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                found.extend(leaves(inner).into_iter().map(|mut leaf| {
                    leaf.path.insert(0, name.clone());
                    leaf
                }));
            }
            other => {
                found.push(Leaf { path: vec![name.clone()], default: other.clone(), meaning: String::new() });
            }
        }
    }
    found
}

fn command(keys: &[Leaf]) -> Command {
    let base = Command::new("ztunnel")
        .version(env!("CARGO_PKG_VERSION"))
        .about("The node proxy: identity, mutual TLS, policy and balancing at L4")
        .arg(
            Arg::new("config")
                .long("config")
                .env("ZTUNNEL_CONFIG")
                .value_name("FILE")
                .value_parser(clap::value_parser!(PathBuf))
                .help("YAML file with the configuration; flags and environment override its keys"),
        )
        // Istio's chart starts the program as `ztunnel proxy ztunnel`.
        .arg(Arg::new("role").hide(true).num_args(0..=2).value_parser(["proxy", "ztunnel"]));
    keys.iter().fold(base, |command, key| {
        command.arg(
            Arg::new(key.dotted())
                .long(key.flag())
                .env(key.variable())
                .value_name("VALUE")
                .hide_env_values(true)
                .help(format!("{} [key: {}] [default: {}]", key.meaning, key.dotted(), key.shown_default())),
        )
    })
}

fn text_of(matches: &ArgMatches, key: &Leaf) -> Option<String> {
    matches.get_one::<String>(&key.dotted()).cloned()
}

fn read(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(&text, path)
}

fn parse(text: &str, path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let syntax = |reason: String| ConfigError::Syntax { path: path.to_owned(), reason };
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(Map::new());
    }
    match serde_saphyr::from_str::<Value>(text).map_err(|e| syntax(e.to_string()))? {
        Value::Object(map) => Ok(map),
        Value::Null => Ok(Map::new()),
        _ => Err(syntax("it holds a single value or a list".to_owned())),
    }
}

/// Refuses keys that the configuration doesn't have, naming the one that was likely meant.
fn check_keys(tree: &Map<String, Value>) -> Result<(), ConfigError> {
    let known = defaults();
    check_level(tree, &known, "", &leaves(&known))
}

fn check_level(
    tree: &Map<String, Value>,
    known: &Map<String, Value>,
    prefix: &str,
    everywhere: &[Leaf],
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
fn nearest(path: &str, siblings: &Map<String, Value>, prefix: &str, everywhere: &[Leaf]) -> Option<String> {
    let siblings = siblings.keys().map(|name| format!("{prefix}{name}"));
    let wanted = path.to_lowercase();
    let last = wanted.rsplit('.').next().unwrap_or(&wanted).to_owned();
    let score = |candidate: &str| {
        let candidate = candidate.to_lowercase();
        let tail = candidate.rsplit('.').next().unwrap_or(&candidate).to_owned();
        strsim::jaro_winkler(&wanted, &candidate).max(strsim::jaro_winkler(&last, &tail))
    };
    siblings
        .chain(everywhere.iter().map(Leaf::dotted))
        .map(|candidate| (score(&candidate), candidate))
        .filter(|(score, _)| *score > 0.7)
        .reduce(|best, next| if next.0 > best.0 { next } else { best })
        .map(|(_, candidate)| candidate)
}

fn set(tree: &mut Map<String, Value>, path: &[String], value: Value) {
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

fn typed(tree: Map<String, Value>) -> Result<Config, ConfigError> {
    let config: Config = serde_path_to_error::deserialize(Value::Object(tree)).map_err(|error| {
        ConfigError::Value { key: error.path().to_string(), reason: format!("is wrong: {}", error.inner()) }
    })?;
    config.validate()?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{SameNode, Span};

    #[test]
    fn an_unknown_key_is_an_error_that_names_the_nearest_known_one() {
        for (yaml, key, near) in [
            ("node: a\ndrainTimout: 5s", "drainTimout", "drainTimeout"),
            ("node: a\ndns: {upstream: []}", "dns.upstream", "dns.upstreams"),
            ("node: a\ncluster-id: x", "cluster-id", "clusterId"),
            ("node: a\nconnectTimeout: 1s", "connectTimeout", "limits.connectTimeout"),
        ] {
            match from_yaml(yaml) {
                Err(ConfigError::UnknownKey { key: got, nearest }) => {
                    assert_eq!(got, key);
                    assert_eq!(nearest.as_deref(), Some(near));
                }
                other => panic!("{yaml}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_wrong_value_is_reported_with_the_path_of_its_key() {
        for (yaml, path) in [
            ("node: a\nlimits: {connectAttempts: many}", "limits.connectAttempts"),
            ("node: a\ndrainTimeout: 10", "drainTimeout"),
            ("node: a\nsameNode: maybe", "sameNode"),
            ("node: a\ncertificates: {lifetime: 5s}", "certificates.lifetime"),
            ("workers: 2", "node"),
        ] {
            match from_yaml(yaml) {
                Err(ConfigError::Value { key, .. }) => assert_eq!(key, path),
                other => panic!("{yaml}: {other:?}"),
            }
        }
    }

    #[test]
    fn flags_override_single_keys_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ztunnel.yaml");
        std::fs::write(&path, "node: a\ndns: {enabled: true, upstreams: [10.0.0.1:53]}\nsameNode: tunnel\n")
            .unwrap();
        let arguments = [
            "ztunnel",
            "--config",
            path.to_str().unwrap(),
            "--dns-enabled",
            "false",
            "--drain-timeout",
            "5s",
            "--trust-domain-aliases",
            "old.local, older.local",
            "--limits-connect-attempts",
            "7",
            "--node",
            "123",
        ];
        let config = from_environment(arguments.map(OsString::from)).unwrap();
        assert_eq!(config.node, "123");
        assert!(!config.dns.enabled);
        assert_eq!(config.dns.upstreams.len(), 1);
        assert_eq!(config.same_node, SameNode::Tunnel);
        assert_eq!(config.drain_timeout, Span::from_secs(5));
        assert_eq!(config.trust_domain_aliases, ["old.local", "older.local"]);
        assert_eq!(config.limits.connect_attempts, 7);
    }

    #[test]
    fn the_reference_page_is_that_of_the_program() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/ztunnel-settings.md");
        if std::env::var_os("AMBIT_WRITE_DOCS").is_some() {
            std::fs::write(path, reference()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), reference());
    }

    #[test]
    fn every_setting_has_a_meaning() {
        let without: Vec<String> =
            keys().iter().filter(|key| key.meaning.is_empty()).map(Leaf::dotted).collect();
        assert!(without.is_empty(), "{without:?}");
    }

    #[test]
    fn every_key_has_one_flag_and_one_variable_of_its_own() {
        let keys = keys();
        let mut flags: Vec<_> = keys.iter().map(Leaf::flag).collect();
        flags.sort();
        flags.dedup();
        assert_eq!(flags.len(), keys.len());
        assert!(keys.iter().any(|k| k.variable() == "ZTUNNEL_DNS_CLUSTER_DOMAIN"));
        command(&keys).debug_assert();
    }

    #[test]
    fn an_empty_file_only_lacks_the_node() {
        assert!(matches!(from_yaml("# nothing\n"), Err(ConfigError::Value { key, .. }) if key == "node"));
    }
}
