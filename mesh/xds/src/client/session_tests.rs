//! What the client says on the wire, message by message.

use super::*;
use ambit_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use prost::Message;

const TYPE: &str = "type.googleapis.com/google.rpc.Status";
type Body = ambit_api::rpc::Status;

fn limits() -> session::Limits {
    session::Limits { names: 3, batch: 1 << 20 }
}

fn session(mode: Mode) -> Session {
    let handler = |batch: &mut dyn Iterator<Item = Update<Body>>| {
        let refused = batch.filter_map(|update| match update {
            Update::Upsert { name, resource } if resource.code != 0 => {
                Some(Rejected { type_url: TYPE.into(), name, reason: resource.message })
            }
            _ => None,
        });
        refused.collect()
    };
    let mut decoders = Decoders::new(handler);
    decoders.add(TYPE, |update| update);
    let subscription = session::Subscription::new(TYPE, mode);
    let node = Node { id: "me".into(), ..Node::default() };
    let mut session = Session::new(node, vec![subscription], Box::new(decoders), limits());
    session.handle_connected();
    session
}

fn resource(name: &str, version: &str, code: i32) -> Resource {
    let body = Body { code, message: "no good".into(), details: Vec::new() };
    let any = prost_types::Any { type_url: TYPE.into(), value: body.encode_to_vec() };
    Resource { name: name.into(), version: version.into(), resource: Some(any), ..Resource::default() }
}

fn answer(nonce: &str, resources: Vec<Resource>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse { type_url: TYPE.into(), nonce: nonce.into(), resources, ..Default::default() }
}

fn sent(session: &mut Session) -> Vec<DeltaDiscoveryRequest> {
    std::iter::from_fn(|| session.poll_request()).collect()
}

#[test]
fn the_first_request_names_the_node_and_subscribes_to_all() {
    let mut session = session(Mode::Wildcard);
    let requests = sent(&mut session);
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].node.as_ref().unwrap().id, "me");
    assert_eq!(requests[0].type_url, TYPE);
    assert!(requests[0].resource_names_subscribe.is_empty());
    assert!(requests[0].response_nonce.is_empty());
}

#[test]
fn on_demand_opens_as_istios_ztunnel_does() {
    let mut session = session(Mode::OnDemand(HashMap::new()));
    let requests = sent(&mut session);
    assert_eq!(requests[0].resource_names_subscribe, ["*"]);
    assert_eq!(requests[0].resource_names_unsubscribe, ["*"]);
    assert_eq!(session.handle_demand(TYPE, "/10.0.0.1"), Ok(None));
    assert_eq!(session.handle_demand(TYPE, "/10.0.0.2"), Ok(None));
    let requests = sent(&mut session);
    assert_eq!(requests.len(), 1, "demands that wait go together");
    assert_eq!(requests[0].resource_names_subscribe, ["/10.0.0.1", "/10.0.0.2"]);
}

#[test]
fn answers_are_acknowledged_and_their_versions_are_kept() {
    let mut session = session(Mode::Wildcard);
    sent(&mut session);
    session.handle_response(answer("n1", vec![resource("a", "v1", 0), resource("b", "v1", 0)]));
    let acks = sent(&mut session);
    assert_eq!(acks.len(), 1);
    assert_eq!(acks[0].response_nonce, "n1");
    assert_eq!(acks[0].error_detail, None);
    session.handle_disconnected();
    session.handle_connected();
    let requests = sent(&mut session);
    let expected = [("a".to_owned(), "v1".to_owned()), ("b".to_owned(), "v1".to_owned())];
    assert_eq!(requests[0].initial_resource_versions, expected.into());
}

#[test]
fn a_nack_names_the_bad_resource_and_the_good_ones_stay() {
    let mut session = session(Mode::Wildcard);
    sent(&mut session);
    session.handle_response(answer("n1", vec![resource("a", "v1", 0), resource("b", "v1", 0)]));
    session.handle_response(answer("n2", vec![resource("a", "v2", 0), resource("b", "v2", 7)]));
    let nack = sent(&mut session).pop().unwrap();
    assert_eq!(nack.response_nonce, "n2");
    let status = nack.error_detail.unwrap();
    assert_eq!((status.code, &*status.message), (3, "b: no good"));
    session.handle_disconnected();
    session.handle_connected();
    let versions = sent(&mut session).remove(0).initial_resource_versions;
    assert_eq!(versions.get("a").map(String::as_str), Some("v2"));
    assert_eq!(versions.get("b").map(String::as_str), Some("v1"));
}

#[test]
fn undecodable_resources_are_rejected_and_heartbeats_are_not() {
    let mut session = session(Mode::Wildcard);
    let mut garbage = resource("garbage", "v1", 0);
    garbage.resource.as_mut().unwrap().value = vec![0xff; 5];
    let mut foreign = resource("foreign", "v1", 0);
    foreign.resource.as_mut().unwrap().type_url = "type.example/Other".into();
    let empty = Resource { name: "empty".into(), ..Resource::default() };
    let ttl = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let heartbeat = Resource { name: "heartbeat".into(), ttl, ..Resource::default() };
    let outcome = session.handle_response(answer("n1", vec![garbage, foreign, empty, heartbeat]));
    let names: Vec<_> = outcome.rejected.iter().map(|rejected| &*rejected.name).collect();
    assert_eq!(names, ["garbage", "foreign", "empty"]);
}

#[test]
fn an_answer_of_a_type_that_was_never_asked_for_is_refused() {
    let mut session = session(Mode::Wildcard);
    sent(&mut session);
    session
        .handle_response(DeltaDiscoveryResponse { type_url: "type.example/T".into(), ..Default::default() });
    assert!(sent(&mut session)[0].error_detail.is_some());
    assert!(!session.is_ready());
}

#[test]
fn acks_coalesce_but_every_nack_is_sent() {
    let mut session = session(Mode::Wildcard);
    for number in 0..10_000 {
        let code = i32::from(number == 5);
        session.handle_response(answer(&number.to_string(), vec![resource("a", "v", code)]));
    }
    let requests = sent(&mut session);
    assert!(requests.len() < 50, "{} requests wait", requests.len());
    assert_eq!(requests.iter().filter(|request| request.error_detail.is_some()).count(), 1);
    assert_eq!(requests.last().unwrap().response_nonce, "9999");
}

#[test]
fn a_nack_for_thousands_stays_short() {
    let mut session = session(Mode::Wildcard);
    sent(&mut session);
    let many = (0..5_000).map(|number| resource(&format!("resource-{number}"), "v", 1)).collect();
    session.handle_response(answer("n", many));
    let status = sent(&mut session).remove(0).error_detail.unwrap();
    assert!(status.message.len() < 5_000);
    assert!(status.message.ends_with("more"));
}

#[test]
fn demands_are_limited_and_need_an_on_demand_type() {
    let mut wildcard = session(Mode::Wildcard);
    assert!(matches!(wildcard.handle_demand(TYPE, "a"), Err(DemandError::NotOnDemand { .. })));
    let mut session = session(Mode::OnDemand(HashMap::new()));
    for name in ["a", "b", "c"] {
        assert_eq!(session.handle_demand(TYPE, name), Ok(None));
    }
    assert!(matches!(session.handle_demand(TYPE, "d"), Err(DemandError::TooMany { .. })));
    session.handle_response(answer("n", vec![resource("a", "v", 0)]));
    assert_eq!(session.handle_demand(TYPE, "a"), Ok(Some(Found::Present)));
}

/// A session over two types whose handler notes what each batch holds.
fn two_types() -> (Session, Arc<parking_lot::Mutex<Vec<Vec<String>>>>) {
    let batches = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let noted = Arc::clone(&batches);
    let handler = move |batch: &mut dyn Iterator<Item = String>| {
        noted.lock().push(batch.collect());
        Vec::new()
    };
    let named = |type_url: &'static str| {
        move |update: Update<Body>| match update {
            Update::Upsert { name, .. } => format!("{type_url}+{name}"),
            Update::Remove { name } => format!("{type_url}-{name}"),
        }
    };
    let mut decoders = Decoders::new(handler);
    decoders.add("p", named("p"));
    decoders.add("a", named("a"));
    let types = vec![
        session::Subscription::new("p", Mode::Wildcard),
        session::Subscription::new("a", Mode::Wildcard),
    ];
    let mut session = Session::new(Node::default(), types, Box::new(decoders), limits());
    session.handle_connected();
    (session, batches)
}

fn of_type(type_url: &str, version: &str, names: &[&str]) -> DeltaDiscoveryResponse {
    let body = prost_types::Any { type_url: type_url.into(), value: Body::default().encode_to_vec() };
    let resource = |name: &&str| Resource {
        name: (*name).into(),
        version: version.into(),
        resource: Some(body.clone()),
        ..Resource::default()
    };
    DeltaDiscoveryResponse {
        type_url: type_url.into(),
        system_version_info: version.into(),
        nonce: format!("{type_url}{version}"),
        resources: names.iter().map(resource).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}

#[test]
fn answers_of_one_batch_are_applied_together() {
    let (mut session, batches) = two_types();
    session.handle_response(of_type("p", "1+", &["old"]));
    session.handle_response(of_type("a", "1", &["pod"]));
    assert!(session.is_ready());
    sent(&mut session);
    batches.lock().clear();

    session.handle_response(of_type("p", "2+", &["new"]));
    assert!(batches.lock().is_empty(), "the rest of the batch is to come");
    assert!(sent(&mut session).is_empty(), "nothing is acknowledged before it is applied");
    session.handle_response(of_type("a", "2", &["pod"]));
    assert_eq!(*batches.lock(), [["p+new", "a+pod"]]);
    assert_eq!(sent(&mut session).len(), 2);
}

#[test]
fn a_new_stream_is_one_batch_over_all_types() {
    let (mut session, batches) = two_types();
    session.handle_response(of_type("p", "1", &["old"]));
    session.handle_response(of_type("a", "1", &["pod"]));
    session.handle_disconnected();
    session.handle_connected();
    batches.lock().clear();
    // The server answers the first type before it has read that there is a second one.
    session.handle_response(of_type("p", "9", &["new"]));
    assert!(batches.lock().is_empty());
    session.handle_response(of_type("a", "9", &["pod"]));
    assert_eq!(*batches.lock(), [["p+new", "a+pod"]]);
}

#[test]
fn a_server_without_batches_is_applied_answer_by_answer() {
    let (mut session, batches) = two_types();
    session.handle_response(of_type("p", "2026-11-27T21:00:00Z/7", &["old"]));
    assert_eq!(batches.lock().len(), 1);
    session.handle_response(of_type("a", "2026-11-27T21:00:00Z/7", &["pod"]));
    assert!(session.is_ready());
    session.handle_disconnected();
    session.handle_connected();
    session.handle_response(of_type("p", "2026-11-27T21:00:00Z/8", &["new"]));
    assert_eq!(batches.lock().len(), 3);
}

#[test]
fn a_batch_that_never_ends_is_applied_in_parts() {
    let (mut session, batches) = two_types();
    session.handle_response(of_type("p", "1", &[]));
    session.handle_response(of_type("a", "1", &[]));
    let long = "x".repeat(600 << 10);
    assert!(!session.handle_response(of_type("p", "2+", &[&long])).split);
    assert!(session.handle_response(of_type("p", "2+", &[&long])).split);
    assert_eq!(batches.lock().last().map(Vec::len), Some(2));
    // The stream breaks: what waited is asked for again.
    session.handle_response(of_type("p", "2+", &["lost"]));
    session.handle_disconnected();
    session.handle_connected();
    let versions = sent(&mut session).remove(0).initial_resource_versions;
    assert_eq!(versions.keys().map(String::as_str).collect::<Vec<_>>(), [long.as_str()]);
}

/// Drops the resource of the name that is given up, unless `kept` is subscribed.
struct Dropping(Arc<parking_lot::Mutex<Vec<String>>>);

impl Handler<Update<Body>> for Dropping {
    fn handle(&mut self, batch: &mut dyn Iterator<Item = Update<Body>>) -> Vec<Rejected> {
        batch.for_each(drop);
        Vec::new()
    }

    fn release(&mut self, _: &str, name: &str, is_subscribed: &dyn Fn(&str) -> bool) -> Vec<String> {
        if is_subscribed(name) || is_subscribed("kept") {
            return Vec::new();
        }
        self.0.lock().push(name.to_owned());
        vec![name.to_owned()]
    }
}

fn dropping() -> (Session, Arc<parking_lot::Mutex<Vec<String>>>) {
    let dropped = Arc::<parking_lot::Mutex<Vec<String>>>::default();
    let mut decoders = Decoders::new(Dropping(dropped.clone()));
    decoders.add(TYPE, |update| update);
    let types = vec![session::Subscription::new(TYPE, Mode::OnDemand(HashMap::new()))];
    let mut session = Session::new(Node::default(), types, Box::new(decoders), limits());
    session.handle_connected();
    sent(&mut session);
    (session, dropped)
}

#[test]
fn a_name_given_up_is_unsubscribed_and_its_resource_dropped() {
    let (mut session, dropped) = dropping();
    session.handle_demand(TYPE, "a").unwrap();
    sent(&mut session);
    session.handle_response(answer("n1", vec![resource("a", "v1", 0)]));
    sent(&mut session);
    session.handle_release(TYPE, "a");
    let requests = sent(&mut session);
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].resource_names_unsubscribe, ["a"]);
    assert!(requests[0].resource_names_subscribe.is_empty());
    assert_eq!(*dropped.lock(), ["a"]);
    session.handle_disconnected();
    session.handle_connected();
    let opening = &sent(&mut session)[0];
    assert!(opening.initial_resource_versions.is_empty(), "what was dropped is not held");
    assert!(!opening.resource_names_subscribe.contains(&"a".to_owned()));
    session.handle_demand(TYPE, "b").unwrap();
    session.handle_demand(TYPE, "c").unwrap();
    assert_eq!(
        session.handle_demand(TYPE, "a"),
        Ok(None),
        "there is room for another, and it is asked for anew"
    );
}

#[test]
fn an_answer_that_crossed_an_unsubscribe_is_dropped_again() {
    let (mut session, dropped) = dropping();
    session.handle_demand(TYPE, "a").unwrap();
    session.handle_response(answer("n1", vec![resource("a", "v1", 0)]));
    session.handle_release(TYPE, "a");
    session.handle_response(answer("n2", vec![resource("a", "v2", 0)]));
    assert_eq!(*dropped.lock(), ["a", "a"]);
    session.handle_demand(TYPE, "kept").unwrap();
    session.handle_response(answer("n3", vec![resource("a", "v3", 0)]));
    assert_eq!(dropped.lock().len(), 2, "another name covers it by now");
}

#[test]
fn names_demanded_and_released_offline_leave_one_small_request() {
    let (mut session, _) = dropping();
    session.handle_demand(TYPE, "a").unwrap();
    sent(&mut session);
    for number in 0..1_000 {
        let name = number.to_string();
        session.handle_demand(TYPE, &name).unwrap();
        session.handle_release(TYPE, &name);
    }
    session.handle_release(TYPE, "a");
    session.handle_demand(TYPE, "a").unwrap();
    session.handle_demand(TYPE, "b").unwrap();
    let requests = sent(&mut session);
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].resource_names_subscribe, ["a", "b"], "asked again, so answered again");
    assert!(requests[0].resource_names_unsubscribe.is_empty());
}
