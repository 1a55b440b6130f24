use super::*;
use crate::index::{CONTROLLER, ListenerFacts};

fn gateway(protocol: &str, status: &Value) -> Value {
    json!({
        "metadata": { "generation": 2 },
        "spec": { "listeners": [{ "name": "mesh", "protocol": protocol, "port": 15008 }] },
        "status": status,
    })
}

fn deployed(address: Option<&str>, serves: bool) -> DeploymentState {
    let addresses = address.map(Into::into).into_iter().collect();
    DeploymentState::Deployed { addresses, withheld: None, serves }
}

fn plan(gateway: &Value, state: &DeploymentState, now: &str) -> Option<Value> {
    super::plan(gateway, Role::Waypoint, state, &[], now)
}

#[test]
fn listeners_of_a_gateway_say_what_the_index_found() {
    let facts =
        |name: &str, attached| ListenerFacts { name: name.into(), kinds: vec![Kind::HttpRoute], attached };
    let finding = |name: &str, condition, met, reason| Finding {
        condition,
        met,
        reason,
        message: "because".to_owned(),
        parent: None,
        parent_ref: None,
        listener: Some(facts(name, 3)),
        listener_sets: None,
        addresses: Vec::new(),
        controller: CONTROLLER,
    };
    let findings = [
        finding("good", "Accepted", true, "Accepted"),
        finding("good", "ResolvedRefs", true, "ResolvedRefs"),
        finding("good", "Programmed", true, "Programmed"),
        finding("bad", "Accepted", false, "HostnameConflict"),
        finding("bad", "Programmed", false, "Invalid"),
        finding("bad", "Conflicted", true, "HostnameConflict"),
    ];
    let gateway = json!({
        "metadata": { "generation": 2 },
        "spec": { "listeners": [{ "name": "good" }, { "name": "bad" }] },
    });
    let of = |status: &Value, at: usize, condition: &str| reason(&status["listeners"][at], condition);
    let waiting = deployed(Some("10.0.0.1"), false);
    let status = super::plan(&gateway, Role::Gateway, &waiting, &findings, "t").unwrap();
    assert_eq!(reason(&status, "Accepted"), "True ListenersNotValid");
    assert_eq!(of(&status, 0, "Programmed"), "False Pending");
    let serving = DeploymentState::Deployed {
        addresses: vec!["10.0.0.1".into(), "lb.example".into()],
        withheld: None,
        serves: true,
    };
    let status = super::plan(&gateway, Role::Gateway, &serving, &findings, "t").unwrap();
    assert_eq!(status["addresses"][1], json!({ "type": "Hostname", "value": "lb.example" }));
    assert_eq!(
        (&status["listeners"][0]["attachedRoutes"], of(&status, 0, "Programmed")),
        (&json!(3), "True Programmed".into())
    );
    assert_eq!(status["listeners"][0]["supportedKinds"][0]["kind"], "HTTPRoute");
    assert_eq!(of(&status, 0, "Conflicted"), "False NoConflicts");
    assert_eq!(of(&status, 1, "Accepted"), "False HostnameConflict");
    assert_eq!(
        (of(&status, 1, "Programmed"), of(&status, 1, "Conflicted")),
        ("False Invalid".into(), "True HostnameConflict".into())
    );
    let none = super::plan(&gateway, Role::Gateway, &serving, &findings[3..], "t").unwrap();
    assert_eq!(
        (reason(&none, "Accepted"), &none["addresses"]),
        ("False ListenersNotValid".into(), &json!([]))
    );
}

fn reason(status: &Value, condition: &str) -> String {
    let conditions = status["conditions"].as_array().unwrap();
    let found = conditions.iter().find(|found| found["type"] == condition).unwrap();
    assert_eq!(found["observedGeneration"], 2);
    format!("{} {}", found["status"].as_str().unwrap(), found["reason"].as_str().unwrap())
}

#[test]
fn the_address_comes_with_the_first_pod_and_stays() {
    let plan_of = |status: &Value, state| plan(&gateway("HBONE", status), &state, "t");
    let waiting = plan_of(&json!({}), deployed(Some("10.0.0.1"), false)).unwrap();
    assert_eq!(
        (reason(&waiting, "Programmed"), &waiting["addresses"]),
        ("False Pending".to_owned(), &json!([]))
    );
    let serving = plan_of(&waiting, deployed(Some("10.0.0.1"), true)).unwrap();
    assert_eq!(reason(&serving, "Programmed"), "True Programmed");
    assert_eq!(serving["addresses"][0]["value"], "10.0.0.1");
    assert_eq!(plan_of(&serving, deployed(Some("10.0.0.1"), true)), None);
    let away = plan_of(&serving, deployed(Some("10.0.0.1"), false)).unwrap();
    assert_eq!(
        (reason(&away, "Programmed"), &away["addresses"]),
        ("False Pending".to_owned(), &serving["addresses"])
    );
}

#[test]
fn each_state_has_its_conditions() {
    let withheld = DeploymentState::Deployed {
        addresses: Vec::new(),
        withheld: Some("192.0.2.1".to_owned()),
        serves: false,
    };
    for (protocol, state, accepted, programmed) in [
        ("HBONE", deployed(None, false), "True Accepted", "False AddressNotAssigned"),
        ("HBONE", DeploymentState::Refused("r".to_owned()), "True Accepted", "False Invalid"),
        ("HBONE", DeploymentState::Invalid("i".to_owned()), "False InvalidParameters", "False Invalid"),
        (
            "HBONE",
            DeploymentState::Unaddressable("u".to_owned()),
            "False UnsupportedAddress",
            "False Invalid",
        ),
        ("HBONE", withheld, "True Accepted", "False AddressNotUsable"),
        ("HTTP", deployed(Some("10.0.0.1"), true), "False ListenersNotValid", "False Invalid"),
    ] {
        let status = plan(&gateway(protocol, &json!({})), &state, "t").unwrap();
        assert_eq!(reason(&status, "Accepted"), accepted, "{state:?}");
        assert_eq!(reason(&status, "Programmed"), programmed, "{state:?}");
        assert_eq!(status["addresses"], json!([]), "{state:?}");
    }
}

#[test]
fn a_gateway_that_is_not_ours_any_more_keeps_what_others_wrote() {
    let mut left = gateway("HBONE", &json!({}));
    left["status"] = plan(&left, &deployed(Some("10.0.0.1"), true), "t").unwrap();
    assert_eq!(without_ours(&left, "t2"), None, "nothing says that it is ours");
    left["metadata"]["managedFields"] = json!([{
        "manager": FIELD_MANAGER, "operation": "Update", "subresource": "status",
        "fieldsV1": { "f:status": {
            "f:addresses": {}, "f:listeners": { "k:{\"name\":\"mesh\"}": {} },
            "f:conditions": { "k:{\"type\":\"Programmed\"}": {} },
        } },
    }]);
    let status = without_ours(&left, "t2").unwrap();
    assert_eq!((&status["addresses"], &status["listeners"]), (&json!([]), &json!([])));
    let conditions = status["conditions"].as_array().unwrap();
    assert_eq!(conditions[0]["status"], "True", "another controller accepts it");
    assert_eq!((&conditions[1]["status"], &conditions[1]["reason"]), (&json!("Unknown"), &json!("Pending")));
    left["status"] = status;
    assert_eq!(without_ours(&left, "t3"), None, "once");
}

#[test]
fn conditions_of_others_stay_and_those_of_the_definition_are_replaced() {
    let foreign = json!({ "type": "Other", "status": "True" });
    let initial = json!({ "type": "Accepted", "status": "Unknown", "reason": "Pending" });
    let status = json!({ "conditions": [initial, foreign] });
    let status = plan(&gateway("HBONE", &status), &deployed(None, false), "t").unwrap();
    assert_eq!(status["conditions"][1], foreign);
    assert_eq!(status["conditions"].as_array().unwrap().len(), 3);
    assert_eq!(reason(&status, "Accepted"), "True Accepted");
}

#[test]
fn a_listener_set_says_what_the_index_found_and_waits_for_its_gateway() {
    let of = |listener: Option<&str>, condition, met, reason| Finding {
        condition,
        met,
        reason,
        message: "because".to_owned(),
        parent: None,
        parent_ref: None,
        listener: listener.map(|name| ListenerFacts {
            name: name.into(),
            kinds: vec![Kind::HttpRoute],
            attached: 1,
        }),
        listener_sets: None,
        addresses: Vec::new(),
        controller: CONTROLLER,
    };
    let mut set = json!({
        "metadata": { "generation": 2 },
        "spec": { "listeners": [{ "name": "good" }, { "name": "bad" }] },
    });
    let served = [
        of(Some("good"), "Accepted", true, "Accepted"),
        of(Some("good"), "Programmed", true, "Programmed"),
        of(Some("bad"), "Accepted", false, "HostnameConflict"),
        of(Some("bad"), "Programmed", false, "HostnameConflict"),
        of(None, "Accepted", true, "Accepted"),
    ];
    let gateway =
        |status: &str| json!({ "status": { "conditions": [{ "type": "Programmed", "status": status }] } });
    let waiting = of_set(&set, &served, &is_programmed(&gateway("False")), "t").unwrap();
    assert_eq!(reason(&waiting, "Accepted"), "True Accepted");
    assert_eq!(reason(&waiting, "Programmed"), "False ParentNotProgrammed");
    assert_eq!(reason(&waiting["listeners"][0], "Programmed"), "False Pending");
    let programmed = is_programmed(&gateway("True"));
    let serving = of_set(&set, &served, &programmed, "t").unwrap();
    assert_eq!(reason(&serving, "Programmed"), "True Programmed");
    assert_eq!(
        (reason(&serving["listeners"][0], "Programmed"), &serving["listeners"][0]["attachedRoutes"]),
        ("True Programmed".to_owned(), &json!(1))
    );
    assert_eq!(reason(&serving["listeners"][1], "Programmed"), "False HostnameConflict");
    set["status"] = serving;
    assert_eq!(of_set(&set, &served, &programmed, "t2"), None);
    let refused = [of(None, "Accepted", false, "NotAllowed")];
    let status = of_set(&set, &refused, &programmed, "t3").unwrap();
    assert_eq!(reason(&status, "Programmed"), "False NotAllowed");
    assert_eq!(status["listeners"], json!([]));
}

#[test]
fn a_gateway_counts_its_listener_sets_and_says_what_concerns_all_of_it() {
    let finding = |condition, met, reason| Finding {
        condition,
        met,
        reason,
        message: "because".to_owned(),
        parent: None,
        parent_ref: None,
        listener: None,
        listener_sets: None,
        addresses: Vec::new(),
        controller: CONTROLLER,
    };
    let mut findings = vec![
        finding("ResolvedRefs", false, "InvalidClientCertificateRef"),
        finding("InsecureFrontendValidationMode", true, "ConfigurationChanged"),
        Finding {
            listener_sets: Some(crate::index::ListenerSetFacts { attached: 2, ..Default::default() }),
            addresses: Vec::new(),
            ..finding("ListenerSets", true, "Attached")
        },
    ];
    let mut gateway = gateway("HTTP", &json!({}));
    let serving = deployed(Some("10.0.0.1"), true);
    let status = super::plan(&gateway, Role::Gateway, &serving, &findings, "t").unwrap();
    assert_eq!(reason(&status, "ResolvedRefs"), "False InvalidClientCertificateRef");
    assert_eq!(reason(&status, "InsecureFrontendValidationMode"), "True ConfigurationChanged");
    assert_eq!(status["attachedListenerSets"], 2);
    gateway["status"] = status;
    assert_eq!(super::plan(&gateway, Role::Gateway, &serving, &findings, "t2"), None);
    // What nothing speaks for any more goes.
    findings.clear();
    let status = super::plan(&gateway, Role::Gateway, &serving, &findings, "t3").unwrap();
    assert_eq!(
        (status["conditions"].as_array().unwrap().len(), &status["attachedListenerSets"]),
        (2, &json!(0))
    );
}

#[test]
fn a_cluster_ip_is_an_address_where_it_is_asked_for() {
    let service = json!({
        "spec": { "type": "LoadBalancer", "clusterIP": "10.96.0.7" },
        "status": { "loadBalancer": { "ingress": [{ "ip": "192.0.2.1" }] } },
    });
    let shown = |in_cluster| addresses(&service, in_cluster).iter().map(address_status).collect::<Vec<_>>();
    let balanced = json!({ "type": "IPAddress", "value": "192.0.2.1" });
    assert_eq!(shown(false), std::slice::from_ref(&balanced));
    let own = json!({ "type": "IPAddress", "value": "10.96.0.7", "routability": "Cluster" });
    assert_eq!(shown(true), [balanced, own]);
}
