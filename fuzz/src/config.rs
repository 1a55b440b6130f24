//! The node proxy's configuration file, and the parameters of its admin server.

use ambit_telemetry::http::Query;
use ztunnel::config::load::from_yaml;

/// What was accepted can work, and means the same when it is written and read again.
pub(crate) fn ztunnel(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(config) = from_yaml(text) else { return };
    assert!(config.validate().is_ok());
    let written = serde_json::to_string(&config).expect("JSON");
    assert_eq!(from_yaml(&written).expect("its own form"), config, "{written}");
}

/// Any text is read; what is plain comes out as it is.
pub(crate) fn admin_query(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let query = Query::parse(text);
    let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    for pair in text.rsplit('&').take(8) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if plain(name) && plain(value) && !name.is_empty() && text.matches(name).count() == 1 {
            assert_eq!(query.get(name), Some(value));
        }
    }
}
