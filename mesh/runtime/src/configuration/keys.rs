//! The keys of a configuration, read off its type: names, kinds, defaults and meanings.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::{Map, Value};

use super::tree::defaults;
use super::{ConfigError, Settings};

/// The name in a field's schema that gives the flag, where it is not that of the key:
/// `#[schemars(extend("x-flag" = "source"))]`.
const FLAG: &str = "x-flag";

/// A key that holds a value, as opposed to one that holds keys.
pub(super) struct Key {
    pub(super) path: Vec<String>,
    pub(super) default: Value,
    kind: Kind,
    /// The doc comment of the field.
    meaning: String,
    /// The flag, where it is not that of the path.
    own_flag: Option<String>,
}

/// How the text of a flag or variable becomes a value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bool,
    Number,
    /// Items, separated by commas; the flag may be repeated.
    List,
    /// Pairs `NAME=VALUE`, separated by commas.
    Map,
    Text,
}

impl Kind {
    fn of_value(value: &Value) -> Self {
        match value {
            Value::Bool(_) => Self::Bool,
            Value::Number(_) => Self::Number,
            Value::Array(_) => Self::List,
            Value::Object(_) => Self::Map,
            Value::Null | Value::String(_) => Self::Text,
        }
    }

    /// The kind of a setting that has no default, from its schema.
    fn of_schema(property: &Value) -> Self {
        let types = match &property["type"] {
            Value::Array(types) => types.as_slice(),
            one => std::slice::from_ref(one),
        };
        let kind = |name: &Value| match name.as_str() {
            Some("boolean") => Some(Self::Bool),
            Some("integer") => Some(Self::Number),
            Some("array") => Some(Self::List),
            _ => None,
        };
        types.iter().find_map(kind).unwrap_or(Self::Text)
    }
}

impl Key {
    pub(super) fn dotted(&self) -> String {
        self.path.join(".")
    }

    fn flag(&self) -> String {
        let of_path = || self.path.iter().map(|part| words(part, '-')).collect::<Vec<_>>().join("-");
        self.own_flag.clone().unwrap_or_else(of_path)
    }

    fn variable(&self, program: &str) -> String {
        variable(program, &self.flag())
    }

    fn shown_default(&self) -> String {
        match &self.default {
            Value::Null | Value::Object(_) => "none".to_owned(),
            Value::String(text) if text.is_empty() => "none".to_owned(),
            Value::Array(items) if items.is_empty() => "none".to_owned(),
            Value::String(text) => text.clone(),
            Value::Array(items) if items.iter().all(Value::is_string) => {
                items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")
            }
            other => other.to_string(),
        }
    }

    /// Reads a flag's or variable's text as the kind of value that the key has.
    pub(super) fn value(&self, text: &str) -> Result<Value, ConfigError> {
        let wrong = |what: &str| ConfigError::Value {
            key: self.dotted(),
            reason: format!("is `{text}`, not {what}"),
        };
        let items = || text.split(',').map(str::trim).filter(|item| !item.is_empty());
        Ok(match self.kind {
            _ if self.default.is_null() && text.is_empty() => Value::Null,
            Kind::Bool => Value::Bool(text.parse().map_err(|_| wrong("true or false"))?),
            Kind::Number => Value::from(text.parse::<u64>().map_err(|_| wrong("a whole number"))?),
            Kind::List => items().collect(),
            Kind::Map => {
                let pairs = items().map(|pair| pair.split_once('=').ok_or_else(|| wrong("NAME=VALUE pairs")));
                let owned = |(name, value): (&str, &str)| (name.to_owned(), Value::from(value));
                Value::Object(pairs.map(|pair| pair.map(owned)).collect::<Result<_, _>>()?)
            }
            Kind::Text => Value::from(text),
        })
    }

    /// What the command line or the environment gives for the key.
    pub(super) fn given(&self, matches: &ArgMatches) -> Option<String> {
        let values = matches.get_many::<String>(&self.dotted())?;
        Some(values.map(String::as_str).collect::<Vec<_>>().join(","))
    }

    fn argument(&self, program: &str) -> Arg {
        let (meaning, key, default) = (&self.meaning, self.dotted(), self.shown_default());
        let action = if self.kind == Kind::List { ArgAction::Append } else { ArgAction::Set };
        Arg::new(key.clone())
            .long(self.flag())
            .env(self.variable(program))
            .value_name("VALUE")
            .action(action)
            .hide_env_values(true)
            .help(format!("{meaning} [key: {key}] [default: {default}]"))
    }

    /// The key's row of the reference page.
    fn row(&self, program: &str) -> String {
        let meaning = self.meaning.replace('|', "\\|");
        let own_flag = self
            .own_flag
            .as_ref()
            .map(|flag| format!(" Flag `--{flag}`, may be repeated; variable `{}`.", self.variable(program)));
        let own_flag = own_flag.unwrap_or_default();
        format!("| `{}` | {} | {meaning}{own_flag} |\n", self.dotted(), self.shown_default())
    }
}

/// The environment variable of a flag of a program.
fn variable(program: &str, flag: &str) -> String {
    format!("{program}_{flag}").replace('-', "_").to_uppercase()
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
pub(super) fn keys<C: Settings>() -> Vec<Key> {
    let schema = schemars::schema_for!(C).to_value();
    let mut keys = keys_of(&defaults::<C>());
    for key in &mut keys {
        let property = property(&schema, &key.path);
        let description = property["description"].as_str().unwrap_or_default();
        key.meaning = description.split_whitespace().collect::<Vec<_>>().join(" ");
        key.own_flag = property[FLAG].as_str().map(str::to_owned);
        if key.default.is_null() {
            key.kind = Kind::of_schema(property);
        }
    }
    keys
}

/// The schema of a field.
fn property<'a>(schema: &'a Value, path: &[String]) -> &'a Value {
    let (mut object, mut found) = (schema, &Value::Null);
    for part in path {
        found = &object["properties"][part];
        let definition = found["$ref"].as_str().and_then(|reference| reference.strip_prefix('#'));
        object = definition.and_then(|pointer| schema.pointer(pointer)).unwrap_or(found);
    }
    found
}

/// The keys of a tree that hold values.
pub(super) fn keys_of(tree: &Map<String, Value>) -> Vec<Key> {
    let mut found = Vec::new();
    for (name, value) in tree {
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                found.extend(keys_of(inner).into_iter().map(|mut key| {
                    key.path.insert(0, name.clone());
                    key
                }));
            }
            other => found.push(Key {
                path: vec![name.clone()],
                default: other.clone(),
                kind: Kind::of_value(other),
                meaning: String::new(),
                own_flag: None,
            }),
        }
    }
    found
}

/// Adds `--config` and a flag for each setting to a command of the program.
pub fn with_flags<C: Settings>(command: Command) -> Command {
    let file = Arg::new("config")
        .long("config")
        .env(variable(C::PROGRAM, "config"))
        .value_name("FILE")
        .value_parser(clap::value_parser!(PathBuf))
        .help("YAML file with the configuration; flags and environment override its keys");
    keys::<C>().iter().fold(command.arg(file), |command, key| command.arg(key.argument(C::PROGRAM)))
}

/// The rows of the reference page of all settings, in Markdown, below `introduction`.
pub fn reference<C: Settings>(introduction: &str) -> String {
    let page = format!("{introduction}\n\n| key | default | meaning |\n| --- | --- | --- |\n");
    keys::<C>().iter().fold(page, |page, key| page + &key.row(C::PROGRAM))
}

/// What is wrong with the declaration of the settings: keys without a meaning, and keys that share a flag. For a
/// program's tests.
pub fn faults<C: Settings>() -> Vec<String> {
    let keys = keys::<C>();
    with_flags::<C>(Command::new(C::PROGRAM)).debug_assert();
    let without_meaning = keys.iter().filter(|key| key.meaning.is_empty());
    let mut faults: Vec<String> =
        without_meaning.map(|key| format!("{} has no meaning", key.dotted())).collect();
    let mut flags: Vec<String> = keys.iter().map(Key::flag).collect();
    flags.sort();
    let shared = flags.windows(2).filter(|two| two.first() == two.last()).flatten();
    faults.extend(shared.map(|flag| format!("two --{flag}")));
    faults
}
