//! YAML in, resources out: one folder a case, with `objects.yaml` and the reviewed `resources.snap`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod render;

use std::fs;
use std::path::{Path, PathBuf};

use ambit_control::index::{Index, ResourceType, Settings};
use ambit_control::object::Change;
use ambit_control::source;
use serde_json::{Map, Value, json};

fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/translation/cases");
    let mut cases: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    cases
}

/// The defaults, with what the case has a file for.
fn settings(case: &Path) -> Settings {
    let mut settings = Settings::default();
    let read = |name: &str| fs::read_to_string(case.join(name)).ok().map(|text| text.trim().to_owned());
    if let Some(trust_domain) = read("trust-domain") {
        settings.trust_domain = trust_domain.into();
    }
    if let Some(text) = read("mesh-config.yaml") {
        let mesh = ambit_control::mesh_config::parse(&text).unwrap();
        settings.gateway_topology = mesh.gateway_topology;
        (settings.authorizers, settings.telemetry) = (mesh.authorizers, mesh.telemetry);
    }
    if let Some(effect) = read("l7-deny-at-l4") {
        settings.l7_deny_at_l4 = serde_json::from_value(Value::String(effect)).unwrap();
    }
    settings
}

fn translate(case: &Path) -> Value {
    let text = fs::read_to_string(case.join("objects.yaml")).unwrap();
    let (objects, problems) = source::parse(Path::new("objects.yaml"), &text);
    let mut index = Index::new(settings(case));
    let changes = index.apply(objects.into_iter().map(Change::Apply));
    let (mut addresses, mut policies) = (Map::new(), Map::new());
    let mut waypoint_policies = Map::new();
    let mut backend_policies = Map::new();
    let mut stream_routes = Map::new();
    let (mut listeners, mut key_pairs) = (Map::new(), Map::new());
    let (mut gateways, mut routes, mut views) = (Map::new(), Map::new(), Map::new());
    for ((kind, name), resource) in index.resources() {
        let roots: Vec<&str> =
            resource.parents.iter().filter_map(|parent| parent.strip_prefix("Gateway/")).collect();
        if !roots.is_empty() {
            views.insert(name.to_string(), json!(roots));
        }
        match kind {
            ResourceType::Gateway => {
                gateways.insert(name.to_string(), render::gateway_resource(&resource.body))
            }
            ResourceType::Policy => {
                waypoint_policies.insert(name.to_string(), render::waypoint_policy(&resource.body))
            }
            ResourceType::BackendPolicy => {
                backend_policies.insert(name.to_string(), render::backend_policy(&resource.body))
            }
            ResourceType::Listener => listeners.insert(name.to_string(), render::listener(&resource.body)),
            // What is in it is nobody's business.
            ResourceType::KeyPair => key_pairs.insert(name.to_string(), json!(!resource.body.is_empty())),
            ResourceType::Route => routes.insert(name.to_string(), render::route(&resource.body)),
            ResourceType::StreamRoute => {
                stream_routes.insert(name.to_string(), render::stream_route(&resource.body))
            }
            ResourceType::Address => addresses.insert(name.to_string(), render::address(&resource.body)),
            ResourceType::Authorization => {
                policies.insert(name.to_string(), render::authorization(&resource.body))
            }
        };
    }
    // Every case has it; it is shown by its own.
    if case.file_name().unwrap() != "peer-authentication" {
        policies.remove("ambit-system/istio_converted_static_strict");
    }
    let findings = changes.findings.iter().flat_map(|(object, findings)| {
        findings
            .iter()
            .map(move |f| format!("{object}: {}={} {}: {}", f.condition, f.met, f.reason, f.message))
    });
    let mut shown = json!({
        "problems": problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "findings": findings.collect::<Vec<_>>(),
        "policies": policies,
        "addresses": addresses,
    });
    // Most cases are of L4.
    for (name, of_l7) in [
        ("gateways", gateways),
        ("keyPairs", key_pairs),
        ("listeners", listeners),
        ("waypointPolicies", waypoint_policies),
        ("backendPolicies", backend_policies),
        ("routes", routes),
        ("streamRoutes", stream_routes),
        ("views", views),
    ] {
        if routed(case) && !of_l7.is_empty() {
            shown[name] = Value::Object(of_l7);
        }
    }
    shown
}

/// Whether a case is about the configuration of waypoints.
fn routed(case: &Path) -> bool {
    case.file_name().unwrap().to_string_lossy().starts_with("l7-")
}

#[test]
fn objects_become_the_resources_that_their_snapshot_shows() {
    let cases = cases();
    assert!(cases.len() >= 10, "cases are missing: {cases:?}");
    for case in cases {
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path(&case);
        settings.set_prepend_module_to_snapshot(false);
        settings.set_omit_expression(true);
        settings.set_description(case.file_name().unwrap().to_string_lossy());
        settings.bind(|| insta::assert_yaml_snapshot!("resources", translate(&case)));
    }
}
