//! The configuration dump in the shape that `istioctl ztunnel-config` reads.
//!
//! The directory's own form is a superset but for some fields, which are put into the tool's form here. Fields that the
//! tool does not know stay, as it passes over them.

use std::collections::HashMap;

use ambit_identity::{CertificateState, SpiffeId};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Workloads, as the directory serializes them.
pub(super) fn workloads(mut workloads: Value) -> Value {
    objects(&mut workloads).for_each(|workload| {
        if let Some(identity) = text(workload, "identity").and_then(|text| text.parse::<SpiffeId>().ok()) {
            workload.insert("trustDomain".to_owned(), json!(identity.trust_domain()));
            workload.insert("serviceAccount".to_owned(), json!(identity.service_account()));
        }
        for gateway in ["waypoint", "networkGateway"] {
            flatten_gateway(workload, gateway);
        }
        let tunnel = workload.get("applicationTunnel").and_then(Value::as_object);
        let protocol = if tunnel.is_some_and(|tunnel| tunnel.get("proxy") == Some(&json!(true))) {
            "PROXY"
        } else {
            "NONE"
        };
        let port = tunnel.and_then(|tunnel| tunnel.get("port").cloned());
        workload.insert("applicationTunnel".to_owned(), json!({ "protocol": protocol, "port": port }));
    });
    workloads
}

/// Services with their endpoints, whose ports are those of the workloads' memberships.
pub(super) fn services(mut services: Value, workloads: &Value) -> Value {
    let by_uid: HashMap<&str, &Value> = workloads
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|workload| Some((workload.get("uid")?.as_str()?, workload)))
        .collect();
    objects(&mut services).for_each(|service| {
        let name = format!(
            "{}/{}",
            text(service, "namespace").unwrap_or_default(),
            text(service, "hostname").unwrap_or_default()
        );
        let uids = service.remove("endpoints").unwrap_or_default();
        let endpoints: Map<String, Value> = uids
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(|uid| {
                let port = by_uid.get(uid).and_then(|workload| membership(workload, &name)).map(ports);
                (
                    uid.to_owned(),
                    json!({ "workloadUid": uid, "service": name, "port": port.unwrap_or_default() }),
                )
            })
            .collect();
        service.insert("endpoints".to_owned(), Value::Object(endpoints));
        let mapping = service.get("ports").map(ports).unwrap_or_default();
        service.insert("ports".to_owned(), mapping);
        flatten_gateway(service, "waypoint");
        if let Some(balancing) = service.remove("loadBalancing") {
            let shape = json!({
                "mode": balancing["mode"],
                "routingPreferences": balancing["preference"],
                "healthPolicy": balancing["health"],
            });
            service.insert("loadBalancer".to_owned(), shape);
        }
    });
    services
}

/// Policies: names without their namespace, matches as the tool's variants.
pub(super) fn policies(mut policies: Value) -> Value {
    objects(&mut policies).for_each(|policy| {
        if let Some(name) = text(policy, "name").and_then(|name| name.rsplit('/').next().map(str::to_owned)) {
            policy.insert("name".to_owned(), json!(name));
        }
        let rules = policy.get_mut("rules").and_then(Value::as_array_mut).into_iter().flatten();
        let clauses = rules.filter_map(Value::as_array_mut).flatten();
        let matches = clauses.filter_map(Value::as_array_mut).flatten().filter_map(Value::as_object_mut);
        matches.for_each(|one| {
            for field in ["namespaces", "notNamespaces", "principals", "notPrincipals"] {
                if let Some(texts) = one.remove(field) {
                    one.insert(field.to_owned(), string_matches(&texts));
                }
            }
        });
    });
    policies
}

/// `{"exact": [...], "patterns": [{"prefix": ...}, "presence"]}` as a list of `{"Exact": ...}`, `{"Prefix": ...}` and so on.
fn string_matches(texts: &Value) -> Value {
    let exact = texts["exact"].as_array().into_iter().flatten().map(|text| json!({ "Exact": text }));
    let patterns = texts["patterns"].as_array().into_iter().flatten().map(|pattern| match pattern {
        Value::Object(pattern) if pattern.contains_key("prefix") => json!({ "Prefix": pattern["prefix"] }),
        Value::Object(pattern) if pattern.contains_key("suffix") => json!({ "Suffix": pattern["suffix"] }),
        _ => json!({ "Presence": {} }),
    });
    exact.chain(patterns).collect()
}

/// Certificates with their chains.
pub(super) fn certificates(states: &[CertificateState]) -> Value {
    let shape = |state: &CertificateState| {
        let condition = match (&state.certificate, state.is_valid) {
            (_, true) => "Available",
            (Some(_), false) => "Unavailable: expired",
            (None, false) if state.last_error.is_some() => "Unavailable",
            (None, false) => "Initializing",
        };
        let chain = state.certificate.as_ref().map(|it| it.chain().iter().filter_map(|der| certificate(der)));
        let roots = state.certificate.as_ref().map(|it| it.roots().iter().filter_map(|der| certificate(der)));
        json!({
            "identity": state.identity.as_str(),
            "state": condition,
            "certChain": chain.into_iter().flatten().collect::<Value>(),
            "rootCerts": roots.into_iter().flatten().collect::<Value>(),
            "failures": state.failures,
            "lastError": state.last_error.as_ref().map(ToString::to_string),
        })
    };
    states.iter().map(shape).collect()
}

fn certificate(der: &[u8]) -> Option<Value> {
    let (_, parsed) = X509Certificate::from_der(der).ok()?;
    let validity = parsed.validity();
    let time = |seconds: i64| {
        let time = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        time.format(&Rfc3339).unwrap_or_default()
    };
    Some(json!({
        "pem": pem::encode(&pem::Pem::new("CERTIFICATE", der)),
        // The tool reads a decimal number.
        "serialNumber": parsed.tbs_certificate.serial.to_string(),
        "validFrom": time(validity.not_before.timestamp()),
        "expirationTime": time(validity.not_after.timestamp()),
    }))
}

fn objects(list: &mut Value) -> impl Iterator<Item = &mut Map<String, Value>> {
    list.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut)
}

fn text<'a>(object: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    object.get(key).and_then(Value::as_str)
}

/// `{"destination": {"hostname": "ns/host"}}` as `{"destination": "ns/host"}`.
fn flatten_gateway(object: &mut Map<String, Value>, key: &str) {
    let Some(destination) = object.get_mut(key).and_then(|gateway| gateway.get_mut("destination")) else {
        return;
    };
    let inner = destination.as_object().and_then(|variant| variant.values().next().cloned());
    if let Some(inner) = inner {
        *destination = inner;
    }
}

fn membership<'a>(workload: &'a Value, service: &str) -> Option<&'a Value> {
    let all = workload["services"].as_array()?;
    all.iter().find(|membership| membership["host"] == service).map(|membership| &membership["ports"])
}

/// Port mappings as `{"80": 8080}`.
fn ports(mappings: &Value) -> Value {
    let pair =
        |mapping: &Value| Some((mapping["servicePort"].to_string(), mapping.get("targetPort")?.clone()));
    Value::Object(mappings.as_array().into_iter().flatten().filter_map(pair).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_has_the_tools_fields() {
        let ours = json!([{
            "uid": "u", "identity": "spiffe://td/ns/a/sa/b", "applicationTunnel": null,
            "waypoint": { "destination": { "hostname": "a/w.a.svc" }, "hbonePort": 15008 },
        }]);
        let shape = workloads(ours);
        assert_eq!((&shape[0]["trustDomain"], &shape[0]["serviceAccount"]), (&json!("td"), &json!("b")));
        assert_eq!(shape[0]["waypoint"]["destination"], "a/w.a.svc");
        assert_eq!(shape[0]["applicationTunnel"]["protocol"], "NONE");
    }

    #[test]
    fn a_service_has_maps_of_ports_and_endpoints() {
        let port = json!([{ "servicePort": 80, "targetPort": 8080 }]);
        let workload = json!([{ "uid": "u", "services": [{ "host": "a/s.a.svc", "ports": port }] }]);
        let service = json!([{
            "namespace": "a", "hostname": "s.a.svc", "endpoints": ["u"], "ports": port,
            "loadBalancing": { "mode": "Strict", "preference": ["Node"], "health": "AllowAll" },
        }]);
        let shape = services(service, &workload);
        assert_eq!(shape[0]["ports"], json!({ "80": 8080 }));
        assert_eq!(shape[0]["endpoints"]["u"]["port"], json!({ "80": 8080 }));
        assert_eq!(shape[0]["endpoints"]["u"]["service"], "a/s.a.svc");
        assert_eq!(shape[0]["loadBalancer"]["routingPreferences"], json!(["Node"]));
    }

    #[test]
    fn a_policy_has_the_tools_matches() {
        let one = json!({ "principals": { "exact": ["x"], "patterns": [{ "suffix": "y" }, "presence"] } });
        let shape = policies(json!([{ "name": "ns/p", "namespace": "ns", "rules": [[[one]]] }]));
        assert_eq!(shape[0]["name"], "p");
        let expected = json!([{ "Exact": "x" }, { "Suffix": "y" }, { "Presence": {} }]);
        assert_eq!(shape[0]["rules"][0][0][0]["principals"], expected);
    }
}
