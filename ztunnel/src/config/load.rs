//! Where configuration comes from: the file, the environment of Istio's chart, our own variables, and flags
//! ([`ambit_runtime::configuration`]).

use std::ffi::OsString;

use ambit_runtime::configuration::{self, ForeignVariable, Settings};
use clap::{Arg, Command};

pub use ambit_runtime::configuration::ConfigError;

use super::{Config, istio};

impl Settings for Config {
    const PROGRAM: &'static str = "ztunnel";
    const ABOUT: &'static str = "The node proxy: identity, mutual TLS, policy and balancing at L4";

    fn validate(&self) -> Result<(), ConfigError> {
        Config::validate(self)
    }

    fn arguments(command: Command) -> Command {
        // Istio's chart starts the program as `ztunnel proxy ztunnel`.
        command.arg(Arg::new("role").hide(true).num_args(0..=2).value_parser(["proxy", "ztunnel"]))
    }

    fn foreign_variables(variables: &[(String, String)]) -> Result<Vec<ForeignVariable>, ConfigError> {
        let istio::Environment { settings, metadata, without_effect: _ } = istio::read(variables)?;
        let settings = settings.into_iter().map(|(key, text, variable)| ForeignVariable::Setting {
            key,
            text,
            variable,
        });
        let entry = |(name, text)| ForeignVariable::Entry { key: "nodeMetadata", name, text };
        Ok(settings.chain(metadata.into_iter().map(entry)).collect())
    }
}

/// Builds the configuration from the program's arguments and environment.
///
/// # Errors
/// [`ConfigError`], naming the key or file at fault. [`ConfigError::Arguments`] is also how `--help`
/// and `--version` end; `clap::Error::exit` prints and exits as they should.
pub fn from_environment(arguments: impl IntoIterator<Item = OsString>) -> Result<Config, ConfigError> {
    let config: Config = configuration::from_environment(arguments)?;
    let variables: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    Ok(Config { without_effect: istio::read(&variables)?.without_effect, ..config })
}

/// Builds the configuration from YAML alone.
///
/// # Errors
/// As [`from_environment`].
pub fn from_yaml(text: &str) -> Result<Config, ConfigError> {
    configuration::from_yaml(text)
}

/// The reference page of all settings, in Markdown.
pub fn reference() -> String {
    configuration::reference::<Config>(
        "# Settings of ztunnel\n\nWritten from the program; `AMBIT_WRITE_DOCS=1 cargo test -p ztunnel reference` writes it anew. \
         [Configure ztunnel](ztunnel.md) explains how to set them.",
    )
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
        assert_eq!(config.proxy.drain_timeout, Span::from_secs(5));
        assert_eq!(config.proxy.trust_domain_aliases, ["old.local", "older.local"]);
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
    fn every_setting_has_a_meaning_and_a_flag_of_its_own() {
        assert_eq!(configuration::faults::<Config>(), Vec::<String>::new());
    }

    #[test]
    fn an_empty_file_only_lacks_the_node() {
        assert!(matches!(from_yaml("# nothing\n"), Err(ConfigError::Value { key, .. }) if key == "node"));
    }
}
