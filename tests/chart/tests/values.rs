//! The chart's values: their schema, their reference page, and what a wrong one comes to.

use std::collections::BTreeSet;

use ambit_chart::{chart, helm, page, read, rows, schema, schema_keys, template};
use serde_json::Value;

#[test]
fn an_unknown_key_is_refused_with_its_path() {
    for (setting, at, key) in [
        ("replicas=3", "''", "replicas"),
        ("control.replica=3", "/control", "replica"),
        ("node.cni.binDirectory=/opt", "/node/cni", "binDirectory"),
        ("ztunnel.image.name=x", "/ztunnel/image", "name"),
        ("ztunnel.resources.limit.cpu=1", "/ztunnel/resources", "limit"),
        ("ztunnel.config.drainTimout=5s", "/ztunnel/config", "drainTimout"),
        ("ztunnel.config.limits.poolIddle=5s", "/ztunnel/config/limits", "poolIddle"),
        ("control.config.jwkz=x", "/control/config", "jwkz"),
        ("node.config.dnsCaptur=true", "/node/config", "dnsCaptur"),
        ("monitoring.alert=true", "/monitoring", "alert"),
    ] {
        let error = template(&[setting]).unwrap_err().to_string();
        assert!(error.contains(at) && error.contains(&format!("'{key}' not allowed")), "{setting}: {error}");
    }
}

#[test]
fn a_wrong_value_is_refused_with_its_path() {
    for (setting, at) in [
        ("platform=gkee", "/platform"),
        ("control.replicas=0", "/control/replicas"),
        ("control.image.digest=sha256:12", "/control/image/digest"),
        ("node.cni.confDir=etc/cni", "/node/cni/confDir"),
        ("ztunnel.config.workers=many", "/ztunnel/config/workers"),
        ("crds.istio=perhaps", "/crds/istio"),
    ] {
        let error = template(&[setting]).unwrap_err().to_string();
        assert!(error.contains(at), "{setting}: {error}");
    }
}

#[test]
fn helm_lint_finds_nothing() {
    helm(&["lint", "--strict", chart().to_str().unwrap()]).unwrap();
}

#[test]
fn every_value_has_a_meaning_and_is_in_the_schema() {
    let rows = rows(&read("charts/ambit/values.yaml").unwrap()).unwrap();
    let without: Vec<&String> = rows
        .iter()
        .filter(|row| row.default.is_some() && row.meaning.is_empty())
        .map(|row| &row.key)
        .collect();
    assert!(without.is_empty(), "without a comment: {without:?}");
    let values: BTreeSet<String> = rows.into_iter().map(|row| row.key).collect();
    let schema: BTreeSet<String> = schema_keys(&schema().unwrap()).unwrap().into_iter().collect();
    assert_eq!(values.difference(&schema).collect::<Vec<_>>(), Vec::<&String>::new(), "not in the schema");
    assert_eq!(schema.difference(&values).collect::<Vec<_>>(), Vec::<&String>::new(), "not in values.yaml");
}

/// What the chart itself sets is not to be set again.
#[test]
fn further_settings_are_those_of_the_programs() {
    for (page, definition, by_the_chart) in [
        (
            "docs/ztunnel-settings.md",
            "ztunnelConfig",
            &[
                "clusterId",
                "controlPlane",
                "controlPlaneRoot",
                "controlPlaneServerName",
                "dns.clusterDomain",
                "drainTimeout",
                "instanceIp",
                "metricsAddress",
                "network",
                "node",
                "podName",
                "podNamespace",
                "readinessAddress",
                "tokenFile",
                "trustDomain",
                "trustDomainAliases",
                "xds.localFile",
                "zdsSocket",
            ][..],
        ),
        (
            "docs/node-settings.md",
            "nodeConfig",
            &[
                "chained",
                "cniBinDir",
                "cniConfDir",
                "cniProgram",
                "cniSocket",
                "excludeNamespaces",
                "metrics",
                "nodeName",
                "ownList",
                "readiness",
                "registry",
                "removeTaint",
                "systemNamespace",
                "zdsSocket",
            ][..],
        ),
        (
            "docs/control-settings.md",
            "controlConfig",
            &[
                "admin",
                "clusterDomain",
                "clusterId",
                "commands",
                "deployedWaypointClasses",
                "gatewayClasses",
                "keySetBlockedCidrs",
                "listen",
                "meshConfig",
                "metrics",
                "network",
                "readiness",
                "rootNamespace",
                "sources",
                "systemNamespace",
                "trustDomain",
                "waypointTemplate",
            ][..],
        ),
    ] {
        let known: BTreeSet<String> = settings(&read(page).unwrap())
            .into_iter()
            .filter(|key| !by_the_chart.contains(&key.as_str()))
            .collect();
        let mut listed = BTreeSet::new();
        leaves(&schema().unwrap()["$defs"][definition], "", &mut listed);
        assert_eq!(listed, known, "{definition} in values.schema.json beside {page}");
    }
}

/// First column of a settings page.
fn settings(page: &str) -> Vec<String> {
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    rows.map(|(key, _)| key.to_owned()).collect()
}

fn leaves(node: &Value, prefix: &str, found: &mut BTreeSet<String>) {
    let Some(properties) = node["properties"].as_object() else {
        found.insert(prefix.to_owned());
        return;
    };
    for (name, property) in properties {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        leaves(property, &key, found);
    }
}

#[test]
fn the_reference_page_is_that_of_the_values() {
    let reference = page(&rows(&read("charts/ambit/values.yaml").unwrap()).unwrap());
    if std::env::var_os("AMBIT_WRITE_DOCS").is_some() {
        std::fs::write(ambit_chart::root().join("docs/chart-values.md"), &reference).unwrap();
    }
    assert_eq!(read("docs/chart-values.md").unwrap(), reference);
}
