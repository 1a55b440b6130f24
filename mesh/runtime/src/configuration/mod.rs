//! Settings of a program: one YAML file, overridden by the environment and by flags.
//!
//! The keys, their defaults and their meanings are read off the configuration's own type, so that a setting is declared
//! once: `dns.clusterDomain` of ztunnel is `ZTUNNEL_DNS_CLUSTER_DOMAIN` and `--dns-cluster-domain`, in the help and in
//! the reference page.

pub mod common;
pub mod flows;
mod keys;
pub mod proxy;
mod span;
mod tree;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{ArgMatches, Command};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub use keys::{faults, reference, with_flags};
pub use span::{NotASpan, Span};

use keys::Key;

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

impl ConfigError {
    /// A key whose value can't be; `reason` ends a sentence that begins with the key.
    pub fn value(key: &str, reason: impl Into<String>) -> Self {
        Self::Value { key: key.to_owned(), reason: reason.into() }
    }
}

/// Builds the configuration from the program's arguments and environment.
///
/// # Errors
/// [`ConfigError`], naming the key or file at fault. [`ConfigError::Arguments`] is also how `--help`
/// and `--version` end; `clap::Error::exit` prints and exits as they should.
pub fn from_environment<C: Settings>(
    arguments: impl IntoIterator<Item = OsString>,
) -> Result<C, ConfigError> {
    let command = Command::new(C::PROGRAM).version(env!("CARGO_PKG_VERSION")).about(C::ABOUT);
    let command = with_flags::<C>(C::arguments(command));
    from_matches(&command.try_get_matches_from(arguments)?)
}

/// Builds the configuration from arguments that were parsed by a command with the flags of [`with_flags`], and from the
/// environment.
///
/// # Errors
/// [`ConfigError`], naming the key or file at fault.
pub fn from_matches<C: Settings>(matches: &ArgMatches) -> Result<C, ConfigError> {
    let keys = keys::keys::<C>();
    let mut given = match matches.get_one::<PathBuf>("config") {
        Some(path) => tree::read(path)?,
        None => Map::new(),
    };
    tree::check_keys::<C>(&given)?;
    let variables: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    for foreign in C::foreign_variables(&variables)? {
        apply_foreign(&mut given, &keys, foreign)?;
    }
    for key in &keys {
        if let Some(text) = key.given(matches) {
            tree::set(&mut given, &key.path, key.value(&text)?);
        }
    }
    tree::typed(&given)
}

fn apply_foreign(
    given: &mut Map<String, Value>,
    keys: &[Key],
    foreign: ForeignVariable,
) -> Result<(), ConfigError> {
    match foreign {
        ForeignVariable::Setting { key, text, variable } => {
            let Some(key) = keys.iter().find(|known| known.dotted() == key) else { return Ok(()) };
            let value = key.value(&text).map_err(|error| match error {
                ConfigError::Value { reason, .. } => ConfigError::Value { key: variable.to_owned(), reason },
                other => other,
            })?;
            tree::set(given, &key.path, value);
        }
        ForeignVariable::Entry { key, name, text } => {
            tree::set(given, &[key.to_owned(), name], Value::from(text));
        }
    }
    Ok(())
}

/// Builds the configuration from YAML alone.
///
/// # Errors
/// As [`from_environment`].
pub fn from_yaml<C: Settings>(text: &str) -> Result<C, ConfigError> {
    let given = tree::parse(text, Path::new("configuration"))?;
    tree::check_keys::<C>(&given)?;
    tree::typed(&given)
}
