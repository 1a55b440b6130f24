//! Alerts and dashboards ask for metrics that the programs have.

use std::collections::BTreeSet;

use ambit_chart::{read, sources};
use serde_json::Value;

/// Prefixes of metrics of ours; what else stands in an expression is a function, a label or a word.
const PREFIXES: [&str; 4] = ["ambit_", "istio_", "pilot_", "workload_manager_"];

/// The boards of the chart.
const BOARDS: [&str; 4] = ["control", "ztunnel", "node", "waypoint"];

#[test]
fn every_metric_that_is_asked_for_is_one_of_the_programs() {
    let programs = ["mesh", "ztunnel/src", "control/src", "node/src", "waypoint/src", "ca/src"];
    let programs: String = programs.iter().map(|folder| sources(folder).unwrap()).collect();
    let mut asked: BTreeSet<String> = metrics(&read("charts/ambit/files/alerts.yaml").unwrap());
    for board in BOARDS {
        asked.extend(metrics(&read(&format!("charts/ambit/files/dashboards/{board}.json")).unwrap()));
    }
    assert!(asked.len() > 40, "{asked:?}");
    let unknown: Vec<&String> = asked.iter().filter(|name| !is_registered(&programs, name)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

/// A counter's name is registered without `_total`, and those of the control plane without their prefix.
fn is_registered(programs: &str, name: &str) -> bool {
    let base = name.strip_suffix("_total").or(name.strip_suffix("_bucket")).unwrap_or(name);
    let quoted = |name: &str| programs.contains(&format!("\"{name}\""));
    quoted(base)
        || base.strip_prefix("ambit_control_").is_some_and(quoted)
        || base.strip_prefix("istio_tcp_").is_some_and(quoted)
}

fn metrics(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| PREFIXES.iter().any(|prefix| word.starts_with(prefix))).map(str::to_owned).collect()
}

#[test]
fn prometheus_reads_the_alerts() {
    let alerts = ambit_chart::chart().join("files/alerts.yaml");
    let checked = std::process::Command::new("promtool").arg("check").arg("rules").arg(alerts).output();
    let checked = checked.expect("promtool, of the Debian package prometheus");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn dashboards_fit_grafana() {
    let mut uids = BTreeSet::new();
    for board in BOARDS {
        let text = read(&format!("charts/ambit/files/dashboards/{board}.json")).unwrap();
        let board: Value = serde_json::from_str(&text).unwrap();
        assert!(uids.insert(board["uid"].as_str().unwrap().to_owned()));
        let mut ids = BTreeSet::new();
        for panel in board["panels"].as_array().unwrap() {
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
            assert!(
                panel["gridPos"]["x"].as_u64().unwrap() + panel["gridPos"]["w"].as_u64().unwrap() <= 24,
                "{panel}"
            );
            for target in panel["targets"].as_array().into_iter().flatten() {
                assert_eq!(target["datasource"]["uid"], "${datasource}", "{panel}");
            }
        }
    }
}
