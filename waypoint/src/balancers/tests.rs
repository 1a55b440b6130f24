//! Slots over a directory: subsets, ejection, levels, and what stays when things change.

use std::collections::{BTreeMap, BTreeSet};

use ambit_api::{l7, workload as wire};
use ambit_directory::{Directory, Reader, Update};
use prost::Message;

use super::*;
use crate::backend_tls::TlsClients;

const OWN: &str = "c//Pod/shop/waypoint";

fn pod(name: &str, last: u8, region: &str, version: &str) -> Update {
    let labels = l7::WorkloadLabels { labels: [("version".to_owned(), version.to_owned())].into() };
    let config =
        prost_types::Any { type_url: ambit_api::LABELS_TYPE_URL.to_owned(), value: labels.encode_to_vec() };
    let extension = wire::Extension { name: ambit_api::LABELS_EXTENSION.to_owned(), config: Some(config) };
    let uid = format!("c//Pod/shop/{name}");
    let workload = wire::Workload {
        uid: uid.clone(),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        cluster_id: "c".to_owned(),
        addresses: vec![vec![10, 0, 0, last].into()],
        locality: Some(wire::Locality { region: region.to_owned(), ..wire::Locality::default() }),
        services: match name {
            "waypoint" => BTreeMap::default(),
            _ => [("shop/web".to_owned(), wire::PortList::default())].into_iter().collect(),
        },
        extensions: vec![extension],
        ..wire::Workload::default()
    };
    Update::Address {
        name: uid,
        address: wire::Address { r#type: Some(wire::address::Type::Workload(workload)) },
    }
}

/// The service with these ports.
fn service(ports: &[u32]) -> Update {
    let port = |port: &u32| wire::Port { service_port: *port, target_port: 8080, ..wire::Port::default() };
    let service = wire::Service {
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "web".to_owned(),
        ports: ports.iter().map(port).collect(),
        ..wire::Service::default()
    };
    let address = wire::Address { r#type: Some(wire::address::Type::Service(service)) };
    Update::Address { name: "shop/web".to_owned(), address }
}

/// The policies of the service, with a subset.
fn policies(generation: u64, settings: l7::PortSettings) -> BackendPolicies {
    let subset = l7::Subset {
        name: "v2".to_owned(),
        labels: [("version".to_owned(), "v2".to_owned())].into(),
        settings: Vec::new(),
    };
    let policy = l7::BackendPolicy {
        object: Some(l7::ObjectName { namespace: "shop".to_owned(), ..l7::ObjectName::default() }),
        host: "web".to_owned(),
        settings: vec![settings],
        subsets: vec![subset],
        ..l7::BackendPolicy::default()
    };
    BackendPolicies::new(generation, [&policy], &TlsClients::new(None).unwrap())
}

struct World {
    directory: Directory,
    reader: Reader,
    balancers: Balancers,
    policies: BackendPolicies,
}

impl World {
    fn new(pods: impl IntoIterator<Item = Update>, settings: l7::PortSettings) -> Self {
        let (mut directory, reader) = Directory::new();
        let updates = pods.into_iter().chain([service(&[80]), pod("waypoint", 200, "here", "")]);
        assert!(directory.apply(updates).is_empty());
        let policies = policies(1, settings);
        Self { directory, reader, balancers: Balancers::default(), policies }
    }

    /// The slot of the port or a subset, and its balancer.
    fn current(&self, subset: Option<&str>) -> Result<(Arc<Slot>, Arc<Balancer>), Unresolved> {
        let snapshot = self.reader.snapshot();
        let own = snapshot.workload(OWN).unwrap();
        let sources = Sources { snapshot: &snapshot, own, policies: &self.policies };
        let host = NamespacedHost { namespace: "shop".into(), hostname: "web".into() };
        let key = SlotKey { host, port: 80, transport: Transport::Tcp, subset: subset.map(Into::into) };
        let slot = self.balancers.find(&key, &sources)?;
        let balancer = slot.current(&sources)?;
        Ok((slot, balancer))
    }

    fn choose(&self, subset: Option<&str>) -> Result<Chosen, NoEndpoint> {
        let (slot, balancer) = self.current(subset).unwrap();
        slot.choose(&balancer, &self.reader.snapshot(), &[], Wanted::default())
    }

    /// The names of those that are chosen.
    fn chosen(&self, subset: Option<&str>) -> BTreeSet<String> {
        let name = |chosen: Chosen| chosen.endpoint.workload.as_ref().unwrap().name.to_string();
        (0..200).filter_map(|_| self.choose(subset).ok()).map(name).collect()
    }

    /// Fails every request to this endpoint until it is ejected.
    fn eject(&self, name: &str) {
        for _ in 0..400 {
            let chosen = self.choose(None).unwrap();
            let is_it = *chosen.endpoint.workload.as_ref().unwrap().name == *name;
            chosen.trial.end(if is_it { Outcome::Answer(503) } else { Outcome::Answer(200) });
            if is_it {
                return;
            }
        }
        panic!("{name} is never chosen");
    }
}

/// At the first failure, all but so many per cent of the endpoints.
fn ejecting(max_ejection_percent: u32, min_health_percent: u32) -> l7::PortSettings {
    let outliers = l7::OutlierDetection {
        consecutive_5xx: 1,
        interval_nanos: 10_000_000_000,
        base_ejection_nanos: 300_000_000_000,
        max_ejection_percent,
        min_health_percent,
        ..l7::OutlierDetection::default()
    };
    let balancer = l7::LoadBalancer { algorithm: l7::Algorithm::Random.into(), ..Default::default() };
    l7::PortSettings {
        load_balancer: Some(balancer),
        outlier_detection: Some(outliers),
        ..l7::PortSettings::default()
    }
}

fn names<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

#[test]
fn a_subset_is_of_the_endpoints_with_its_labels() {
    let pods = [pod("a", 1, "here", "v1"), pod("b", 2, "here", "v2")];
    let world = World::new(pods, l7::PortSettings::default());
    assert_eq!(world.chosen(Some("v2")), names(["b"]));
    assert_eq!(world.chosen(None), names(["a", "b"]));
}

/// Another worker builds the balancer of the new state meanwhile.
#[test]
fn a_service_that_had_no_endpoint_waits_for_the_new_state() {
    let mut world = World::new([], l7::PortSettings::default());
    let (slot, before) = world.current(None).unwrap();
    assert!(before.hosts().is_empty());
    assert!(world.directory.apply([pod("a", 1, "here", "")]).is_empty());
    let building = slot.building.lock();
    std::thread::scope(|scope| {
        let (starting, started) = std::sync::mpsc::channel();
        let world = &world;
        let waiting = scope.spawn(move || {
            starting.send(()).unwrap();
            world.chosen(None)
        });
        started.recv().unwrap();
        drop(building);
        assert_eq!(waiting.join().unwrap(), names(["a"]));
    });
}

#[test]
fn an_ejected_endpoint_stays_so_when_others_come() {
    let mut world = World::new([pod("a", 1, "here", ""), pod("b", 2, "here", "")], ejecting(100, 0));
    world.chosen(None);
    world.eject("a");
    assert_eq!(world.chosen(None), names(["b"]));
    assert!(world.directory.apply([pod("c", 3, "here", "")]).is_empty());
    assert_eq!(world.chosen(None), names(["b", "c"]));
    assert_eq!((world.balancers.ejected(), world.balancers.counts.ejections.load(Ordering::Relaxed)), (1, 1));
}

/// Each host that clients ask for is an endpoint; one may always be ejected, and more as far as the policy lets them be.
#[test]
fn hosts_that_clients_ask_for_are_ejected_one_by_one() {
    let mut world = World::new([], ejecting(50, 0));
    let host = |name: &str| Arc::<str>::from(name);
    let ask = |world: &World, name: &str, status: u16| {
        let (slot, balancer) = world.current(None).unwrap();
        let chosen = slot.choose_asked(&balancer, &host(name));
        chosen.map(|(trial, _gate)| drop(trial.end(Outcome::Answer(status)))).is_some()
    };
    for name in ["a", "b", "c"] {
        assert!(ask(&world, name, 200));
    }
    assert!(ask(&world, "a", 503));
    assert!(!ask(&world, "a", 200) && ask(&world, "b", 503));
    assert!(ask(&world, "b", 200) && ask(&world, "c", 200), "more than half would be ejected");
    assert_eq!(world.balancers.ejected(), 1);
    // Other settings, another judgement.
    world.policies = policies(2, ejecting(100, 0));
    assert!(ask(&world, "a", 200));
    assert_eq!(world.balancers.ejected(), 0);
}

#[test]
fn ejections_have_a_limit_and_a_threshold() {
    let pods = || [pod("a", 1, "here", ""), pod("b", 2, "here", "")];
    let limited = World::new(pods(), ejecting(10, 0));
    limited.eject("a");
    limited.eject("b");
    assert_eq!(limited.chosen(None), names(["b"]));
    assert_eq!(limited.balancers.counts.ejections_withheld.load(Ordering::Relaxed), 1);
    let panicking = World::new(pods(), ejecting(100, 60));
    panicking.eject("a");
    assert_eq!(panicking.chosen(None), names(["a", "b"]));
    let all = World::new(pods(), ejecting(100, 0));
    all.eject("a");
    all.eject("b");
    assert_eq!(all.choose(None).map(|_| ()), Err(NoEndpoint::NoneHealthy));
}

#[test]
fn farther_endpoints_take_over_from_ejected_ones() {
    let pods = [pod("a", 1, "here", ""), pod("b", 2, "next", ""), pod("c", 3, "far", "")];
    let mut settings = ejecting(100, 0);
    let failover = [("here".to_owned(), "next".to_owned())].into();
    settings.load_balancer.as_mut().unwrap().locality =
        Some(l7::LocalityPreference { failover, ..l7::LocalityPreference::default() });
    let world = World::new(pods, settings);
    assert_eq!(world.chosen(None), names(["a"]));
    world.eject("a");
    assert_eq!(world.chosen(None), names(["b"]));
    world.eject("b");
    assert_eq!(world.chosen(None), names(["c"]));
}

#[test]
fn a_distribution_gives_each_locality_its_share() {
    let pods = [pod("a", 1, "here", ""), pod("b", 2, "next", ""), pod("c", 3, "far", "")];
    let to = [("here/*".to_owned(), 80), ("next/*".to_owned(), 20)].into();
    let distribute = vec![l7::Distribution { from: "here/*".to_owned(), to }];
    let locality = l7::LocalityPreference { distribute, ..l7::LocalityPreference::default() };
    let balancer = l7::LoadBalancer { locality: Some(locality), ..l7::LoadBalancer::default() };
    let world = World::new(pods, l7::PortSettings { load_balancer: Some(balancer), ..Default::default() });
    assert_eq!(world.chosen(None), names(["a", "b"]));
    let near = |_: &usize| {
        let chosen = world.choose(None).unwrap();
        *chosen.endpoint.workload.as_ref().unwrap().name == *"a"
    };
    let share = (0..2000).filter(near).count();
    assert!((1500..1700).contains(&share), "{share}");
}

#[test]
fn ejections_end_when_their_settings_change() {
    let pods = || [pod("a", 1, "here", ""), pod("b", 2, "here", "")];
    let looser = l7::OutlierDetection { consecutive_5xx: 100, ..ejecting(100, 0).outlier_detection.unwrap() };
    let looser = l7::PortSettings { outlier_detection: Some(looser), ..ejecting(100, 0) };
    for changed in [l7::PortSettings::default(), looser] {
        let mut world = World::new(pods(), ejecting(100, 0));
        world.eject("a");
        assert_eq!(world.chosen(None), names(["b"]));
        world.policies = policies(2, changed);
        assert_eq!(world.chosen(None), names(["a", "b"]));
        assert_eq!(world.balancers.ejected(), 0);
        // They do not come back with the settings either.
        world.policies = policies(3, ejecting(100, 0));
        assert_eq!(world.chosen(None), names(["a", "b"]));
    }
}

#[test]
fn a_request_that_outlives_the_settings_ejects_nothing() {
    let mut world = World::new([pod("a", 1, "here", ""), pod("b", 2, "here", "")], ejecting(100, 0));
    let chosen = world.choose(None).unwrap();
    world.policies = policies(2, l7::PortSettings::default());
    world.choose(None).unwrap();
    chosen.trial.end(Outcome::Answer(503));
    assert_eq!(world.balancers.ejected(), 0);
}

#[test]
fn what_is_not_the_endpoints_fault_ejects_nothing() {
    let world = World::new([pod("a", 1, "here", "")], ejecting(100, 0));
    let fail = |failure, awaited| world.choose(None).unwrap().trial.fail(&failure, awaited);
    fail(Failure::Unavailable("no certificate".to_owned()), Duration::ZERO);
    fail(Failure::RequestBody("broken".to_owned()), Duration::ZERO);
    fail(Failure::Timeout, Duration::MAX);
    assert_eq!(world.balancers.ejected(), 0);
    fail(Failure::Connect("refused".to_owned()), Duration::ZERO);
    assert_eq!(world.balancers.ejected(), 1);
}

#[test]
fn nobody_waits_while_another_request_builds_the_balancer() {
    let mut world = World::new([pod("a", 1, "here", "")], l7::PortSettings::default());
    let (slot, before) = world.current(None).unwrap();
    world.policies = policies(2, ejecting(100, 0));
    let building = slot.building.lock();
    let (_, meanwhile) = world.current(None).unwrap();
    assert!(Arc::ptr_eq(&before, &meanwhile));
    drop(building);
    let (_, after) = world.current(None).unwrap();
    assert!(after.outlier_settings().is_some());
}

#[test]
fn ejections_keep_to_their_limit_when_all_endpoints_fail_at_once() {
    const PODS: u8 = 8;
    let pods = || (1..=PODS).map(|at| pod(&format!("p{at}"), at, "here", ""));
    for _ in 0..50 {
        let world = World::new(pods(), ejecting(25, 0));
        let mut trials = BTreeMap::new();
        for _ in 0..300 {
            let chosen = world.choose(None).unwrap();
            let name = chosen.endpoint.workload.as_ref().unwrap().name.to_string();
            trials.entry(name).or_insert_with(Vec::new).push(chosen.trial);
        }
        let trials: Vec<Trial> = trials.into_values().filter_map(|mut trials| trials.pop()).collect();
        let at_once = &std::sync::Barrier::new(trials.len());
        std::thread::scope(|scope| {
            for trial in trials {
                scope.spawn(move || {
                    at_once.wait();
                    trial.end(Outcome::Answer(503));
                });
            }
        });
        assert_eq!(world.balancers.ejected(), 2);
    }
}

#[test]
fn slots_of_ports_and_subsets_that_are_gone_are_forgotten() {
    let mut world = World::new([pod("a", 1, "here", "v2")], l7::PortSettings::default());
    let keys = |world: &World| {
        world.balancers.sweep(&world.reader.snapshot(), &world.policies);
        let subset = |slot: Arc<Slot>| slot.key().subset.as_deref().map(str::to_owned);
        world.balancers.all().into_iter().map(subset).collect::<BTreeSet<_>>()
    };
    world.current(None).unwrap();
    world.current(Some("v2")).unwrap();
    assert_eq!(keys(&world), [None, Some("v2".to_owned())].into());
    world.policies = BackendPolicies::new(2, [], &TlsClients::new(None).unwrap());
    assert_eq!(keys(&world), [None].into());
    assert!(world.directory.apply([service(&[81])]).is_empty());
    assert_eq!(keys(&world), [].into());
}

/// Where it is, near or far, and what else is said of its endpoint does not count.
#[test]
fn a_session_keeps_its_endpoint_while_that_is_usable() {
    let mut world = World::new([pod("a", 1, "here", ""), pod("b", 2, "far", "")], ejecting(100, 0));
    let asked = |world: &World, tried: &[WorkloadUid], port: u16| {
        let uid = WorkloadUid::from("c//Pod/shop/b");
        let (slot, balancer) = world.current(None).unwrap();
        let session = EndpointId::new(&uid, port);
        let wanted = Wanted { key: Some(7), session: Some(&session) };
        let chosen =
            (0..50).filter_map(|_| slot.choose(&balancer, &world.reader.snapshot(), tried, wanted).ok());
        chosen.map(|it| it.endpoint.workload.as_ref().unwrap().name.to_string()).collect::<BTreeSet<_>>()
    };
    assert_eq!(asked(&world, &[], 8080), names(["b"]));
    assert_eq!(asked(&world, &["c//Pod/shop/b".into()], 8080), names(["a"]));
    assert_eq!(asked(&world, &[], 9090), names(["a"]));
    let gone = Update::AddressRemoved { name: "c//Pod/shop/b".to_owned() };
    assert!(world.directory.apply([gone]).is_empty());
    assert_eq!(asked(&world, &[], 8080), names(["a"]));
    assert!(world.directory.apply([pod("b", 2, "far", "")]).is_empty());
    world.eject("a");
    assert_eq!(asked(&world, &[], 8080), names(["b"]));
    world.eject("b");
    assert_eq!(asked(&world, &[], 8080), BTreeSet::new());
}
