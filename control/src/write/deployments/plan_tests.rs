use super::*;

fn gateway(infrastructure: &Value) -> WaypointGateway {
    serde_json::from_value(json!({
        "metadata": { "name": "waypoint", "namespace": "shop", "uid": "u1",
            "labels": { "istio.io/waypoint-for": "all" } },
        "spec": { "gatewayClassName": "ambit-waypoint", "infrastructure": infrastructure },
    }))
    .unwrap()
}

fn template(text: &str) -> Template {
    serde_saphyr::from_str(text).unwrap()
}

fn part(
    gateway: &WaypointGateway,
    template: &Template,
    parameters: Option<&Template>,
    part: Part,
) -> Option<Value> {
    let all = manifests(gateway, template, parameters).unwrap();
    all.into_iter().find(|(found, _)| *found == part).unwrap().1
}

#[test]
fn template_and_parameters_are_merged_in_this_order() {
    let class = template(
        "deployment: {spec: {replicas: 2, template: {spec: {containers: [{name: waypoint, image: 'w:1', \
         resources: {requests: {cpu: 100m}}}]}}}}",
    );
    let own = template(
        "deployment: {spec: {replicas: 5, template: {spec: {containers: [{name: waypoint, resources: {requests: \
         {cpu: '1'}}}]}}}}",
    );
    let deployment = part(&gateway(&json!({})), &class, Some(&own), Part::Deployment).unwrap();
    let spec = &deployment["spec"];
    let container = &spec["template"]["spec"]["containers"][0];
    assert_eq!((&spec["replicas"], &container["image"]), (&json!(5), &json!("w:1")));
    assert_eq!(container["resources"]["requests"]["cpu"], "1");
    assert_eq!(container["env"][0]["name"], "POD_NAME");
    assert_eq!(spec["template"]["spec"]["serviceAccountName"], "waypoint");
}

#[test]
fn infrastructure_is_copied_and_cannot_change_what_the_mesh_relies_on() {
    let gateway = gateway(&json!({
        "labels": { "team": "a", GATEWAY_NAME: "other", "istio.io/dataplane-mode": "ambient" },
        "annotations": { "note": "b" },
    }));
    for kind in [Part::ServiceAccount, Part::Service, Part::Deployment] {
        let object = part(&gateway, &Template::default(), None, kind).unwrap();
        let metadata = &object["metadata"];
        assert_eq!((&metadata["name"], &metadata["namespace"]), (&json!("waypoint"), &json!("shop")));
        assert_eq!(
            (&metadata["labels"]["team"], &metadata["annotations"]["note"]),
            (&json!("a"), &json!("b"))
        );
        assert_eq!(metadata["labels"][GATEWAY_NAME], "waypoint");
        assert_eq!(metadata["labels"][MANAGED.0], MANAGED.1);
        assert_eq!(metadata["labels"][WAYPOINT_FOR], "all");
        assert!(gateway.owns(&object), "{object}");
    }
    let deployment = part(&gateway, &Template::default(), None, Part::Deployment).unwrap();
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    assert_eq!(
        (&labels["istio.io/dataplane-mode"], &labels[GATEWAY_NAME]),
        (&json!("none"), &json!("waypoint"))
    );
    assert_eq!(labels["team"], "a");
}

#[test]
fn an_autoscaler_takes_over_the_number_of_pods() {
    let scaled =
        template("{deployment: {spec: {replicas: 2}}, horizontalPodAutoscaler: {spec: {maxReplicas: 4}}}");
    let gateway = gateway(&json!({}));
    let scaler = part(&gateway, &scaled, None, Part::HorizontalPodAutoscaler).unwrap();
    assert_eq!(scaler["spec"]["scaleTargetRef"]["name"], "waypoint");
    assert_eq!(part(&gateway, &scaled, None, Part::Deployment).unwrap()["spec"].get("replicas"), None);
    assert_eq!(part(&gateway, &Template::default(), None, Part::HorizontalPodAutoscaler), None);
    assert_eq!(part(&gateway, &Template::default(), None, Part::PodDisruptionBudget), None);
}

#[test]
fn a_number_that_an_autoscaler_takes_over_is_handed_on() {
    let present = |manager: &str| {
        json!({
            "metadata": { "name": "w", "namespace": "shop", "uid": "u2", "managedFields": [
                { "manager": manager, "operation": "Apply", "fieldsV1": { "f:spec": { "f:replicas": {} } } }] },
            "spec": { "replicas": 5 },
        })
    };
    let without = json!({ "apiVersion": "apps/v1", "kind": "Deployment", "spec": {} });
    let kept = kept_replicas(&present(FIELD_MANAGER), &without).unwrap();
    assert_eq!((&kept["spec"], &kept["metadata"]["uid"]), (&json!({ "replicas": 5 }), &json!("u2")));
    // An autoscaler's number stays by itself, and one that the manifest names is meant to change.
    assert_eq!(kept_replicas(&present("autoscaler"), &without), None);
    let with = json!({ "apiVersion": "apps/v1", "kind": "Deployment", "spec": { "replicas": 2 } });
    assert_eq!(kept_replicas(&present(FIELD_MANAGER), &with), None);
}

#[test]
fn a_waypoint_drains_within_its_pods_grace_period() {
    let drain = |class: &str, own: Option<&str>| {
        let pod = |text: &str| format!("deployment: {{spec: {{template: {{spec: {{{text}}}}}}}}}");
        let own = own.map(|text| template(&pod(text)));
        let found = part(&gateway(&json!({})), &template(&pod(class)), own.as_ref(), Part::Deployment);
        let found = found.unwrap();
        let env = found["spec"]["template"]["spec"]["containers"][0]["env"].as_array().unwrap().clone();
        let values: Vec<_> = env.iter().filter(|variable| variable["name"] == DRAIN_TIMEOUT).collect();
        assert_eq!(values.len(), 1, "{env:?}");
        values[0]["value"].as_str().unwrap().to_owned()
    };
    let grace = |seconds: u64| format!("terminationGracePeriodSeconds: {seconds}");
    assert_eq!(drain("", None), "25s", "Kubernetes' own default");
    assert_eq!(drain(&grace(90), None), "85s");
    assert_eq!(drain(&grace(90), Some(&grace(600))), "595s");
    assert_eq!(drain(&grace(90), Some(&grace(2))), "1s");
    let set = "containers: [{name: waypoint, env: [{name: AMBIT_WAYPOINT_DRAIN_TIMEOUT, value: 10s}]}]";
    assert_eq!(drain(set, None), "10s", "the installation's own setting");
    assert_eq!(drain(set, Some(&grace(60))), "55s");
}

#[test]
fn only_what_this_control_plane_made_is_left_behind() {
    let classes = [Arc::from("ambit-waypoint")];
    let gateway = gateway(&json!({}));
    let ours = part(&gateway, &Template::default(), None, Part::Service).unwrap();
    assert!(gateway.is_left(&ours, &classes));
    let mut others = ours.clone();
    others["metadata"]["labels"][GATEWAY_CLASS] = "istio-waypoint".into();
    assert!(!gateway.is_left(&others, &classes), "taken over for another class");
    let mut others = ours.clone();
    others["metadata"]["annotations"] = json!({});
    assert!(!gateway.is_left(&others, &classes), "made by another controller");
    let mut others = ours;
    others["metadata"]["ownerReferences"][0]["uid"] = "u2".into();
    assert!(!gateway.is_left(&others, &classes), "of another Gateway");
}

#[test]
fn an_object_with_defaults_has_all_of_its_manifest() {
    let manifest = part(&gateway(&json!({})), &Template::default(), None, Part::Service).unwrap();
    let mut object = manifest.clone();
    object["spec"]["clusterIP"] = "10.0.0.1".into();
    object["spec"]["ports"][0]["protocol"] = "TCP".into();
    assert!(has_all_of(&object, &manifest));
    object["spec"]["ports"][0]["port"] = 1.into();
    assert!(!has_all_of(&object, &manifest));
    let changed = gateway(&json!({ "annotations": { "new": "" } }));
    let changed = part(&changed, &Template::default(), None, Part::Service).unwrap();
    assert_ne!(
        changed["metadata"]["annotations"][MANIFEST_HASH],
        manifest["metadata"]["annotations"][MANIFEST_HASH]
    );
}

#[test]
fn a_gateway_whose_name_no_service_can_have_is_refused() {
    let mut long = gateway(&json!({}));
    long.metadata.name = "w".repeat(64);
    assert!(manifests(&long, &Template::default(), None).is_err());
}

#[test]
fn parameters_come_from_config_maps_alone() {
    let named = |kind: &str| {
        let gateway = gateway(&json!({ "parametersRef": { "group": "", "kind": kind, "name": "p" } }));
        gateway.config_map().map(|name| name.map(str::to_owned))
    };
    assert_eq!(named("ConfigMap"), Ok(Some("p".to_owned())));
    assert!(named("Secret").is_err());
}

#[test]
fn a_gateway_asks_its_load_balancer_for_the_first_of_its_addresses() {
    let service = |annotations: &Value, addresses: &Value| {
        let gateway = json!({
            "metadata": { "name": "web", "namespace": "edge", "uid": "u1", "annotations": annotations },
            "spec": { "gatewayClassName": "ambit", "listeners": [{ "port": 80 }, { "port": 53, "protocol": "UDP" }], "addresses": addresses },
        });
        let gateway = serde_json::from_value::<WaypointGateway>(gateway).unwrap().with_role(Role::Gateway);
        let gateway = gateway.with_added_ports(BTreeSet::from([
            (80, Transport::Tcp),
            (8080, Transport::Tcp),
            (53, Transport::Tcp),
        ]));
        gateway.wanted_addresses()?;
        Ok::<_, String>(part(&gateway, &Template::default(), None, Part::Service).unwrap()["spec"].clone())
    };
    let ip = |value: &str| json!({ "type": "IPAddress", "value": value });
    let both = service(&json!({}), &json!([ip("192.0.2.1"), ip("192.0.2.2")])).unwrap();
    assert_eq!(both["loadBalancerIP"], "192.0.2.1");
    let ports = both["ports"].as_array().unwrap().iter();
    let ports: Vec<_> =
        ports.map(|port| format!("{} {} {}", port["name"], port["port"], port["protocol"])).collect();
    let wanted = [
        r#""port-53" 53 "TCP""#,
        r#""port-53-udp" 53 "UDP""#,
        r#""port-80" 80 "TCP""#,
        r#""port-8080" 8080 "TCP""#,
    ];
    assert_eq!(ports, wanted, "with those of ListenerSets");
    // An address without a value leaves the choice to the load balancer (GatewayAddressEmpty).
    assert!(service(&json!({}), &json!([{ "type": "IPAddress" }])).unwrap()["loadBalancerIP"].is_null());
    assert!(service(&json!({}), &json!([{ "type": "example.com/odd", "value": "x" }])).is_err());
    assert!(service(&json!({ SERVICE_TYPE: "ClusterIP" }), &json!([ip("192.0.2.1")])).is_err());
    // GatewayAddressRoutability.
    let of = |value: &str, routability: &str| json!({ "value": value, "routability": routability });
    let spec = |addresses: Value| {
        let spec = service(&json!({}), &addresses)?;
        Ok::<_, String>((spec["type"].clone(), spec["clusterIP"].clone(), spec["loadBalancerIP"].clone()))
    };
    let none = Value::Null;
    assert_eq!(spec(json!([of("", "Cluster")])), Ok((json!("ClusterIP"), none.clone(), none)));
    let both = spec(json!([of("10.96.0.7", "Cluster"), ip("192.0.2.1")]));
    assert_eq!(both, Ok((json!("LoadBalancer"), json!("10.96.0.7"), json!("192.0.2.1"))));
    assert!(spec(json!([of("", "example.com/near")])).is_err());
    assert!(spec(json!([{ "type": "Hostname", "routability": "Cluster" }])).is_err());
}
