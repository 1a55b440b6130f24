//! Manifests: text into objects, objects into resources, resources into the directory of a node proxy.

use std::path::Path;

use ambit_api::l7;
use ambit_api::security::Authorization;
use ambit_api::workload::{Address, address};
use ambit_control::index::{Index, Resource, ResourceType, Settings};
use ambit_control::object::{Change, Object};
use ambit_control::source::parse;
use ambit_directory::{Directory, Update};
use prost::Message;

use crate::directory::{decides_naively, is_consistent, leads_somewhere};

/// Any text. What became of it is understood by node proxies, is the same in whatever order the objects come, and goes
/// with them.
pub(crate) fn objects(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (objects, problems) = parse(Path::new("manifest.yaml"), text);
    for problem in &problems {
        let lines = text.lines().count() as u64 + 1;
        assert!(problem.line.is_none_or(|line| (1..=lines).contains(&line)), "{problem}");
        assert!(!problem.message.is_empty());
    }
    if objects.is_empty() {
        return;
    }
    let apply = |object: &Object| Change::Apply(object.clone());
    let mut index = Index::new(Settings::default());
    index.apply(objects.iter().map(apply));
    let resources = index.resources();
    is_understood(resources.iter().map(|((kind, name), resource)| (*kind, &**name, resource)));

    let mut other = Index::new(Settings::default());
    for object in objects.iter().rev() {
        other.apply([apply(object)]);
    }
    assert_eq!(other.resources(), resources, "the order of the objects matters");

    index.apply(objects.iter().map(|object| Change::Delete(object.reference())));
    let mut empty = Index::new(Settings::default());
    empty.apply([]);
    assert_eq!(index.resources(), empty.resources(), "something is left");
}

fn is_understood<'a>(resources: impl Iterator<Item = (ResourceType, &'a str, &'a Resource)>) {
    let (mut directory, reader) = Directory::new();
    for (kind, name, resource) in resources {
        assert_eq!(*resource.name, *name);
        let body = resource.body.as_ref();
        let (own_name, update) = match kind {
            ResourceType::Authorization => {
                let policy = Authorization::decode(body).expect("a policy");
                let own_name = format!("{}/{}", policy.namespace, policy.name);
                (own_name, Update::Policy { name: name.to_owned(), policy })
            }
            ResourceType::Gateway => {
                let object = l7::Gateway::decode(body).expect("a gateway").object.expect("its name");
                assert_eq!(format!("{}/{}", object.namespace, object.name), name);
                continue;
            }
            ResourceType::Policy => {
                let object = l7::Policy::decode(body).expect("a policy").object.expect("its name");
                let kind = match object.kind.as_str() {
                    "AuthorizationPolicy" => String::new(),
                    other => format!("{other}/"),
                };
                assert_eq!(format!("{kind}{}/{}", object.namespace, object.name), name);
                continue;
            }
            ResourceType::BackendPolicy => {
                let policy = l7::BackendPolicy::decode(body).expect("a policy");
                let object = policy.object.expect("its name");
                assert_eq!(format!("{}/{}/{}", object.kind, object.namespace, object.name), name);
                continue;
            }
            ResourceType::Listener => {
                let listener = l7::Listener::decode(body).expect("a listener");
                assert!(name.starts_with(&format!("{}/", listener.gateway)), "{name}");
                continue;
            }
            ResourceType::KeyPair => {
                let pair = l7::KeyPair::decode(body).expect("a key pair");
                let object = pair.object.expect("its name");
                assert!(name.ends_with(&format!("/{}/{}", object.namespace, object.name)), "{name}");
                continue;
            }
            ResourceType::Route => {
                let route = l7::Route::decode(body).expect("a route");
                // Whatever was written, the table can be made of it.
                ambit_route::Table::new([&route]);
                continue;
            }
            ResourceType::StreamRoute => {
                let route = l7::StreamRoute::decode(body).expect("a route");
                ambit_route::StreamTable::new([&route]);
                continue;
            }
            ResourceType::Address => {
                let address = Address::decode(body).expect("an address");
                let own_name = match address.r#type.as_ref().expect("a workload or service") {
                    address::Type::Workload(workload) => workload.uid.clone(),
                    address::Type::Service(service) => format!("{}/{}", service.namespace, service.hostname),
                };
                (own_name, Update::Address { name: name.to_owned(), address })
            }
        };
        assert_eq!(own_name, name);
        let rejected = directory.apply([update]);
        assert!(rejected.is_empty(), "node proxies reject it: {rejected:?}");
    }
    let snapshot = reader.snapshot();
    is_consistent(&snapshot);
    leads_somewhere(&snapshot, &[]);
    decides_naively(&snapshot);
}
