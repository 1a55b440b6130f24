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
