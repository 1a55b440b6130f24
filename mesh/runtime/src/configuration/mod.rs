//! Settings of a program: one YAML file, overridden by the environment and by flags.
//!
//! The keys, their defaults and their meanings are read off the configuration's own type, so that a setting is declared
//! once: `dns.clusterDomain` of ztunnel is `ZTUNNEL_DNS_CLUSTER_DOMAIN` and `--dns-cluster-domain`, in the help and in
//! the reference page.

pub mod common;
mod span;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgMatches, Command};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub use span::{NotASpan, Span};

/// A program's configuration: a value whose fields are its settings, each with a default.
pub trait Settings: Default + Serialize + DeserializeOwned + JsonSchema {
    /// The program's name, as it is started. In capitals it begins the names of its variables.
    const PROGRAM: &'static str;
    /// What the program is, in one line of its help.
    const ABOUT: &'static str;

    /// Checks what types alone can't say.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key whose value can't work.
    fn validate(&self) -> Result<(), ConfigError>;

    /// Adds arguments beside the settings.
    fn arguments(command: Command) -> Command {
        command
    }

    /// Variables of other programs' charts that stand for settings; they override the file and are overridden by the
    /// program's own.
    ///
    /// # Errors
    /// [`ConfigError::Value`], naming the variable.
    fn foreign_variables(_: &[(String, String)]) -> Result<Vec<ForeignVariable>, ConfigError> {
        Ok(Vec::new())
    }
}

/// What a variable of another program's chart says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForeignVariable {
    /// The value of the setting of this name.
    Setting {
        /// The setting's key.
        key: &'static str,
        /// Its value.
        text: String,
        /// The variable, for errors.
        variable: &'static str,
    },
    /// An entry of the setting of this name, which holds names of the user's own.
    Entry {
        /// The setting's key.
        key: &'static str,
        /// The entry's name.
        name: String,
        /// Its value.
        text: String,
    },
}

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
pub fn from_environment<C: Settings>(
    arguments: impl IntoIterator<Item = OsString>,
) -> Result<C, ConfigError> {
    let keys = keys::<C>();
    let matches = command::<C>(&keys).try_get_matches_from(arguments)?;
    let mut tree = match matches.get_one::<PathBuf>("config") {
        Some(path) => read(path)?,
        None => Map::new(),
    };
    check_keys::<C>(&tree)?;
    let variables: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    for foreign in C::foreign_variables(&variables)? {
        apply_foreign(&mut tree, &keys, foreign)?;
    }
    for key in &keys {
        if let Some(text) = text_of(&matches, key) {
            set(&mut tree, &key.path, key.value(&text)?);
        }
    }
    typed(tree)
}

fn apply_foreign(
    tree: &mut Map<String, Value>,
    keys: &[Leaf],
    foreign: ForeignVariable,
) -> Result<(), ConfigError> {
    match foreign {
        ForeignVariable::Setting { key, text, variable } => {
            let Some(key) = keys.iter().find(|known| known.dotted() == key) else { return Ok(()) };
            let value = key.value(&text).map_err(|error| match error {
                ConfigError::Value { reason, .. } => ConfigError::Value { key: variable.to_owned(), reason },
                other => other,
            })?;
            set(tree, &key.path, value);
        }
        ForeignVariable::Entry { key, name, text } => {
            set(tree, &[key.to_owned(), name], Value::from(text));
        }
    }
    Ok(())
}

/// Builds the configuration from YAML alone.
///
/// # Errors
/// As [`from_environment`].
pub fn from_yaml<C: Settings>(text: &str) -> Result<C, ConfigError> {
    let tree = parse(text, Path::new("configuration"))?;
    check_keys::<C>(&tree)?;
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

    fn variable(&self, program: &str) -> String {
        variable(program, &self.flag())
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

/// The environment variable of a flag of a program.
fn variable(program: &str, flag: &str) -> String {
    format!("{program}_{flag}").replace('-', "_").to_uppercase()
}

fn defaults<C: Settings>() -> Map<String, Value> {
    match serde_json::to_value(C::default()) {
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
fn keys<C: Settings>() -> Vec<Leaf> {
    let schema = schemars::schema_for!(C).to_value();
    let mut keys = leaves(&defaults::<C>());
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

/// The rows of the reference page of all settings, in Markdown, below `introduction`.
pub fn reference<C: Settings>(introduction: &str) -> String {
    let mut page = format!("{introduction}\n\n| key | default | meaning |\n| --- | --- | --- |\n");
    for key in keys::<C>() {
        page.push_str(&format!(
            "| `{}` | {} | {} |\n",
            key.dotted(),
            key.shown_default(),
            key.meaning.replace('|', "\\|")
        ));
    }
    page
}

/// What is wrong with the declaration of the settings: keys without a meaning, and keys that share a flag. For a
/// program's tests.
pub fn faults<C: Settings>() -> Vec<String> {
    let keys = keys::<C>();
    command::<C>(&keys).debug_assert();
    let without_meaning = keys.iter().filter(|key| key.meaning.is_empty());
    let mut faults: Vec<String> =
        without_meaning.map(|key| format!("{} has no meaning", key.dotted())).collect();
    let mut flags: Vec<String> = keys.iter().map(Leaf::flag).collect();
    flags.sort();
    faults.extend(
        flags
            .windows(2)
            .filter(|two| two.first() == two.last())
            .flatten()
            .map(|flag| format!("two --{flag}")),
    );
    faults
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

fn command<C: Settings>(keys: &[Leaf]) -> Command {
    let base = C::arguments(Command::new(C::PROGRAM)).version(env!("CARGO_PKG_VERSION")).about(C::ABOUT).arg(
        Arg::new("config")
            .long("config")
            .env(variable(C::PROGRAM, "config"))
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("YAML file with the configuration; flags and environment override its keys"),
    );
    keys.iter().fold(base, |command, key| {
        command.arg(
            Arg::new(key.dotted())
                .long(key.flag())
                .env(key.variable(C::PROGRAM))
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
fn check_keys<C: Settings>(tree: &Map<String, Value>) -> Result<(), ConfigError> {
    let known = defaults::<C>();
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

fn typed<C: Settings>(tree: Map<String, Value>) -> Result<C, ConfigError> {
    let config: C = serde_path_to_error::deserialize(Value::Object(tree)).map_err(|error| {
        ConfigError::Value { key: error.path().to_string(), reason: format!("is wrong: {}", error.inner()) }
    })?;
    config.validate()?;
    Ok(config)
}
