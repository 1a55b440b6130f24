//! The plugin's entry in a network configuration list: put in and taken out. Pure: text in, text out.

use serde_json::{Map, Value, json};

use super::PLUGIN;
use super::spec::{PLUGINS, VERSION, VERSIONS};

/// Why a file is no network configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// It is no JSON object.
    #[error("it is no JSON object: {0}")]
    Json(String),
    /// It lacks a key.
    #[error("it has no {0}")]
    Missing(&'static str),
    /// The plugin speaks none of its versions.
    #[error("its {VERSION} {named} is not supported; supported: {}", VERSIONS.join(", "))]
    Version {
        /// The version that it names.
        named: Value,
    },
}

/// The plugin's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The agent's socket, as the host sees it.
    pub socket: String,
    /// Namespaces whose pods never wait for the agent.
    pub excluded_namespaces: Vec<String>,
}

impl Entry {
    fn to_json(&self) -> Value {
        json!({ "type": PLUGIN, "socket": self.socket, "excludedNamespaces": self.excluded_namespaces })
    }

    /// A configuration of its own, for a meta plugin that calls it beside others.
    pub fn standalone(&self) -> String {
        let mut config = self.to_json();
        config["cniVersion"] = "1.0.0".into();
        config["name"] = PLUGIN.into();
        render(&config)
    }
}

/// The configuration list with the plugin last, with the settings of `entry`. A single plugin's configuration becomes a
/// list. Anything else in it stays as it is.
///
/// # Errors
/// [`ConfigError`] when the text is no network configuration.
pub fn chain(text: &str, entry: &Entry) -> Result<String, ConfigError> {
    let mut list = as_list(parse(text)?)?;
    let plugins = plugins(&mut list)?;
    plugins.retain(|plugin| !is_ours(plugin));
    plugins.push(entry.to_json());
    check_version(&list)?;
    Ok(render(&Value::Object(list)))
}

/// The configuration list without the plugin; `None` if it is not in it.
///
/// # Errors
/// [`ConfigError`] when the text is no network configuration.
pub fn unchain(text: &str) -> Result<Option<String>, ConfigError> {
    let mut list = parse(text)?;
    if !list.contains_key(PLUGINS) {
        return Ok(None);
    }
    let plugins = plugins(&mut list)?;
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    let found = plugins.len() != before;
    Ok(found.then(|| render(&Value::Object(list))))
}

/// Whether the two texts say the same.
pub fn same(one: &str, other: &str) -> bool {
    let parsed = |text| serde_json::from_str::<Value>(text).ok();
    parsed(one).is_some_and(|one| parsed(other) == Some(one))
}

/// Whether the text is the plugin's configuration of its own.
pub fn is_standalone(text: &str) -> bool {
    serde_json::from_str::<Value>(text).is_ok_and(|config| is_ours(&config))
}

/// Whether the text is a configuration list.
pub fn is_list(text: &str) -> bool {
    parse(text).is_ok_and(|config| config.contains_key(PLUGINS))
}

fn parse(text: &str) -> Result<Map<String, Value>, ConfigError> {
    serde_json::from_str(text).map_err(|e| ConfigError::Json(e.to_string()))
}

fn as_list(config: Map<String, Value>) -> Result<Map<String, Value>, ConfigError> {
    if config.contains_key(PLUGINS) {
        return Ok(config);
    }
    if !config.get("type").is_some_and(Value::is_string) {
        return Err(ConfigError::Missing("type"));
    }
    let name = config.get("name").cloned().ok_or(ConfigError::Missing("name"))?;
    // A plugin without a version is of the first (CNI specification, section 1), whose lists need one of their own.
    let version = config.get(VERSION).cloned().unwrap_or_else(|| "0.3.1".into());
    let mut plugin = config;
    plugin.remove("name");
    plugin.remove(VERSION);
    let list = json!({ "name": name, VERSION: version, PLUGINS: [plugin] });
    match list {
        Value::Object(list) => Ok(list),
        _ => Err(ConfigError::Missing("plugins")),
    }
}

fn plugins(list: &mut Map<String, Value>) -> Result<&mut Vec<Value>, ConfigError> {
    let plugins =
        list.get_mut(PLUGINS).and_then(Value::as_array_mut).ok_or(ConfigError::Missing("plugins"))?;
    if plugins.iter().all(is_ours) {
        return Err(ConfigError::Missing("plugin beside ours"));
    }
    Ok(plugins)
}

/// Refuses a list in whose versions every call of the plugin would fail.
fn check_version(list: &Map<String, Value>) -> Result<(), ConfigError> {
    // CNI specification 1.1.0, section 1: the runtime chooses among all that are named.
    let others = list.get("cniVersions").and_then(Value::as_array).into_iter().flatten();
    let is_spoken = |version: &Value| version.as_str().is_some_and(|version| VERSIONS.contains(&version));
    if list.get(VERSION).into_iter().chain(others).any(is_spoken) {
        return Ok(());
    }
    Err(ConfigError::Version { named: list.get(VERSION).cloned().unwrap_or_default() })
}

fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").and_then(Value::as_str) == Some(PLUGIN)
}

fn render(config: &Value) -> String {
    format!("{config:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry { socket: "/run/cni.sock".into(), excluded_namespaces: vec!["kube-system".into()] }
    }

    const LIST: &str = r#"{ "cniVersion": "1.0.0", "name": "net", "disableCheck": true,
        "plugins": [{ "type": "bridge", "vendor": [1] }, { "type": "portmap" }] }"#;

    #[test]
    fn the_plugin_is_chained_last_and_taken_out_again() {
        let chained = chain(LIST, &entry()).unwrap();
        let value: Value = serde_json::from_str(&chained).unwrap();
        assert_eq!(value["plugins"][2]["type"], PLUGIN);
        assert_eq!(value["plugins"][2]["excludedNamespaces"], json!(["kube-system"]));
        assert!(same(&unchain(&chained).unwrap().unwrap(), LIST));
        assert_eq!(unchain(LIST), Ok(None));
    }

    #[test]
    fn chaining_again_replaces_the_entry_and_moves_it_last() {
        let older = Entry { socket: "/old".into(), ..entry() };
        let mut value: Value = serde_json::from_str(&chain(LIST, &older).unwrap()).unwrap();
        value["plugins"].as_array_mut().unwrap().push(json!({ "type": "bandwidth" }));
        let chained = chain(&value.to_string(), &entry()).unwrap();
        let again: Value = serde_json::from_str(&chained).unwrap();
        let types: Vec<_> = again["plugins"].as_array().unwrap().iter().map(|p| &p["type"]).collect();
        assert_eq!(types, ["bridge", "portmap", "bandwidth", PLUGIN]);
        assert!(same(&chain(&chained, &entry()).unwrap(), &chained));
    }

    #[test]
    fn a_single_plugin_becomes_a_list() {
        let single =
            r#"{ "cniVersion": "0.4.0", "name": "net", "type": "bridge", "ipam": { "type": "host-local" } }"#;
        let chained: Value = serde_json::from_str(&chain(single, &entry()).unwrap()).unwrap();
        assert_eq!((&chained["name"], &chained["cniVersion"]), (&json!("net"), &json!("0.4.0")));
        assert_eq!(chained["plugins"][0], json!({ "type": "bridge", "ipam": { "type": "host-local" } }));
        assert_eq!(chained["plugins"][1]["type"], PLUGIN);
    }

    #[test]
    fn a_list_of_an_unknown_version_is_refused() {
        for version in ["0.2.0", "2.0.0"] {
            let list = LIST.replace("1.0.0", version);
            assert_eq!(chain(&list, &entry()), Err(ConfigError::Version { named: version.into() }));
            let several = list.replace("\"name\"", r#""cniVersions": ["1.0.0"], "name""#);
            chain(&several, &entry()).unwrap();
        }
        let without = LIST.replace(r#""cniVersion": "1.0.0","#, "");
        assert_eq!(chain(&without, &entry()), Err(ConfigError::Version { named: Value::Null }));
    }

    #[test]
    fn what_is_no_configuration_is_refused() {
        for text in ["", "[]", "{", r#"{ "name": "a" }"#, r#"{ "type": "a" }"#, r#"{ "plugins": [] }"#] {
            assert!(chain(text, &entry()).is_err(), "{text:?}");
        }
        assert!(is_standalone(&entry().standalone()));
        assert!(chain(&entry().standalone(), &entry()).is_err());
        assert!(!is_standalone(LIST));
    }
}
