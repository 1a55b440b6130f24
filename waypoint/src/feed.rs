//! From discovery to the directory and the table of routes: each batch of the control plane is applied as one switch.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::l7;
use ambit_api::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, BACKEND_POLICY_TYPE_URL, GATEWAY_TYPE_URL, KEY_PAIR_TYPE_URL,
    LISTENER_TYPE_URL, POLICY_TYPE_URL, ROUTE_TYPE_URL, STREAM_ROUTE_TYPE_URL,
};
use ambit_directory::{Directory, GatewayDestination, NamespacedHost, NetworkAddress, Reader};
use ambit_identity::ControlPlane;
use ambit_route::{StreamTable, Table};
use ambit_runtime::feed::{Credentialed, address, policy, rejected};
use ambit_xds::{Client, ClientConfig, Handler, Rejected, Update};

use crate::backend_policies::{BackendPolicies, TLS_POLICY};
use crate::backend_tls::TlsClients;
use crate::config::Config;
use crate::dump;
use crate::listeners::Listeners;
use crate::policies::Policies;
use crate::proxy::{Publication, Published};
use crate::telemetry::{Exports, TelemetryTable};
use crate::trusted_proxies::TrustedProxies;

/// One change from the control plane.
enum Change {
    Backend(Update<l7::BackendPolicy>),
    Directory(Box<ambit_directory::Update>),
    Gateway(Box<Update<l7::Gateway>>),
    KeyPair(Update<l7::KeyPair>),
    Listener(Update<l7::Listener>),
    Policy(Box<Update<l7::Policy>>),
    Route(Update<l7::Route>),
    StreamRoute(Update<l7::StreamRoute>),
}

/// The client of the control plane's discovery service, and the future that drives it.
pub fn subscribe(
    config: &Config,
    directory: Directory,
    reader: Reader,
    published: Arc<Publication>,
    tls: Arc<TlsClients>,
    exports: Exports,
    control_plane: ControlPlane,
) -> (Client, impl Future<Output = ()> + Send + 'static) {
    let proxy = &config.proxy;
    let node = ambit_xds::waypoint_node(
        proxy.instance_ip,
        &proxy.pod_name,
        &proxy.pod_namespace,
        proxy.node_metadata(),
    );
    let applier = Applier::new(directory, reader, published, tls, exports);
    let in_directory = |change| Change::Directory(Box::new(change));
    let builder = Client::builder(ClientConfig::new(node), applier)
        .wildcard(AUTHORIZATION_TYPE_URL, move |update| in_directory(policy(update)))
        .wildcard(BACKEND_POLICY_TYPE_URL, Change::Backend)
        .wildcard(ADDRESS_TYPE_URL, move |update| in_directory(address(update)))
        .wildcard(GATEWAY_TYPE_URL, |update| Change::Gateway(Box::new(update)))
        .wildcard(KEY_PAIR_TYPE_URL, Change::KeyPair)
        .wildcard(LISTENER_TYPE_URL, Change::Listener)
        .wildcard(POLICY_TYPE_URL, |update| Change::Policy(Box::new(update)))
        .wildcard(ROUTE_TYPE_URL, Change::Route)
        .wildcard(STREAM_ROUTE_TYPE_URL, Change::StreamRoute);
    let (client, driver) = builder.build(Credentialed(control_plane));
    (client, async move {
        driver.run().await;
    })
}

/// Applies batches: what a batch changes is seen together.
struct Applier {
    directory: Directory,
    reader: Reader,
    published: Arc<Publication>,
    /// Clients of the TLS that policies demand.
    tls: Arc<TlsClients>,
    exports: Exports,
    backends: BTreeMap<String, l7::BackendPolicy>,
    gateways: BTreeMap<String, l7::Gateway>,
    key_pairs: BTreeMap<String, l7::KeyPair>,
    listeners: BTreeMap<String, l7::Listener>,
    policies: BTreeMap<String, l7::Policy>,
    /// What of the routes a change does not concern is shared with the published one.
    routes: Table,
    stream_routes: BTreeMap<String, l7::StreamRoute>,
}

impl Applier {
    fn new(
        directory: Directory,
        reader: Reader,
        published: Arc<Publication>,
        tls: Arc<TlsClients>,
        exports: Exports,
    ) -> Self {
        let (backends, gateways, key_pairs, listeners) = Default::default();
        let (policies, routes, stream_routes) = Default::default();
        Self {
            directory,
            reader,
            published,
            tls,
            exports,
            backends,
            gateways,
            key_pairs,
            listeners,
            policies,
            routes,
            stream_routes,
        }
    }

    /// What the gateway shows to endpoints.
    fn client_certificate(&self) -> Option<l7::ClientCertificate> {
        let pair = self.gateways.values().find_map(|gateway| self.key_pairs.get(&gateway.client_key_pair))?;
        Some(l7::ClientCertificate {
            chain: pair.certificates.clone(),
            key: pair.private_key.clone(),
            ..l7::ClientCertificate::default()
        })
    }

    /// What is in force now, with what a batch did to it.
    fn publish(&self, changed: Changed) {
        let mut next = Published::clone(&self.published.load());
        next.directory = self.reader.snapshot();
        if changed.gateways {
            let addresses = self.gateways.values().flat_map(|gateway| &gateway.addresses);
            next.addresses = addresses.filter_map(destination).collect();
            next.forwards_client_identity =
                self.gateways.values().any(|gateway| gateway.forwards_client_identity);
            let key =
                self.gateways.values().map(|gateway| &gateway.session_key[..]).find(|key| !key.is_empty());
            if let Some(key) = key {
                next.session_keys = Arc::new(next.session_keys.renewed(key));
            }
            let trusted = self.gateways.values().find_map(|gateway| gateway.trusted_proxies.as_ref());
            next.trusted_proxies = Arc::new(trusted.map(TrustedProxies::new).unwrap_or_default());
            let forwarders = self.gateways.values().flat_map(|gateway| &gateway.trusted_forwarders);
            next.trusted_forwarders = forwarders.cloned().collect();
            let telemetry = TelemetryTable::new(self.gateways.values(), &next.telemetry, &self.exports);
            next.telemetry = Arc::new(telemetry);
        }
        if changed.listeners {
            next.listeners = Arc::new(Listeners::new(&self.listeners, &self.key_pairs));
        }
        if changed.gateways || changed.policies {
            let is_own = |gateway: &str| self.gateways.contains_key(gateway);
            next.policies = Arc::new(Policies::new(&self.policies, &next.policies, is_own));
        }
        let shown = self.client_certificate();
        if changed.backends || changed.gateways || (changed.listeners && shown.is_some()) {
            let generation = next.backends.generation() + 1;
            let sources: Vec<_> =
                self.backends.values().map(|policy| with_certificate(policy, shown.as_ref())).collect();
            next.backends =
                Arc::new(BackendPolicies::new(generation, sources.iter().map(AsRef::as_ref), &self.tls));
        }
        if changed.routes {
            next.routes = Arc::new(self.routes.clone());
        }
        if changed.stream_routes {
            next.streams = Arc::new(StreamTable::new(self.stream_routes.values()));
            next.streams_dump = dump::stream_routes(self.stream_routes.values()).into();
        }
        self.published.publish(next, changed.gateways || changed.policies);
    }
}

/// A policy with what the gateway shows to endpoints, where the policy is a BackendTLSPolicy.
fn with_certificate<'p>(
    policy: &'p l7::BackendPolicy,
    certificate: Option<&l7::ClientCertificate>,
) -> Cow<'p, l7::BackendPolicy> {
    let is_tls = policy.object.as_ref().is_some_and(|object| object.kind == TLS_POLICY);
    let Some(certificate) = certificate.filter(|_| is_tls) else { return Cow::Borrowed(policy) };
    let mut policy = policy.clone();
    for tls in policy.settings.iter_mut().filter_map(|settings| settings.tls.as_mut()) {
        tls.certificate.get_or_insert_with(|| certificate.clone());
    }
    Cow::Owned(policy)
}

/// What a batch has changed beside the directory.
#[derive(Debug, Clone, Copy, Default)]
struct Changed {
    backends: bool,
    gateways: bool,
    listeners: bool,
    policies: bool,
    routes: bool,
    stream_routes: bool,
}

impl Handler<Change> for Applier {
    fn handle(&mut self, batch: &mut dyn Iterator<Item = Change>) -> Vec<Rejected> {
        let Self { directory, backends, gateways, key_pairs, listeners, policies, routes, .. } = self;
        let stream_routes = &mut self.stream_routes;
        let mut changed = Changed::default();
        let updates = batch.filter_map(|change| match change {
            Change::Directory(update) => Some(*update),
            Change::Backend(update) => {
                changed.backends |= apply(backends, update);
                None
            }
            Change::Gateway(update) => {
                changed.gateways |= apply(gateways, *update);
                None
            }
            Change::KeyPair(update) => {
                changed.listeners |= apply(key_pairs, update);
                None
            }
            Change::Listener(update) => {
                changed.listeners |= apply(listeners, update);
                None
            }
            Change::Policy(update) => {
                changed.policies |= apply(policies, *update);
                None
            }
            Change::Route(update) => {
                match update {
                    Update::Upsert { name, resource } => routes.insert(&name, &resource),
                    Update::Remove { name } => routes.remove(&name),
                }
                changed.routes = true;
                None
            }
            Change::StreamRoute(update) => {
                changed.stream_routes |= apply(stream_routes, update);
                None
            }
        });
        let rejections = directory.apply(updates);
        self.publish(changed);
        rejections.into_iter().map(rejected).collect()
    }
}

fn apply<M: PartialEq>(all: &mut BTreeMap<String, M>, update: Update<M>) -> bool {
    match update {
        Update::Upsert { name, resource } => {
            let differs = all.get(&name) != Some(&resource);
            all.insert(name, resource);
            differs
        }
        Update::Remove { name } => all.remove(&name).is_some(),
    }
}

fn destination(address: &l7::GatewayAddress) -> Option<GatewayDestination> {
    let ip = match <[u8; 4]>::try_from(&address.ip[..]) {
        Ok(v4) => Some(IpAddr::from(v4)),
        Err(_) => <[u8; 16]>::try_from(&address.ip[..]).ok().map(IpAddr::from),
    };
    match ip {
        Some(ip) => Some(GatewayDestination::Address(NetworkAddress {
            network: address.network.as_str().into(),
            address: ip.to_canonical(),
        })),
        None if address.hostname.is_empty() => None,
        None => {
            let namespace = address.namespace.as_str().into();
            let hostname = address.hostname.to_ascii_lowercase().into();
            Some(GatewayDestination::Hostname(NamespacedHost { namespace, hostname }))
        }
    }
}

#[cfg(test)]
mod tests {
    use ambit_api::workload as wire;

    use super::*;

    fn service() -> Change {
        let name = "shop/web.shop.svc.cluster.local".to_owned();
        let service = wire::Service {
            name: "web".to_owned(),
            namespace: "shop".to_owned(),
            hostname: "web.shop.svc.cluster.local".to_owned(),
            ..wire::Service::default()
        };
        let address = wire::Address { r#type: Some(wire::address::Type::Service(service)) };
        Change::Directory(Box::new(ambit_directory::Update::Address { name, address }))
    }

    fn policy() -> Change {
        let resource = l7::Policy { gateways: vec!["shop/waypoint".to_owned()], ..l7::Policy::default() };
        Change::Policy(Box::new(Update::Upsert { name: "shop/deny".to_owned(), resource }))
    }

    fn gateway() -> Change {
        let resource = l7::Gateway::default();
        Change::Gateway(Box::new(Update::Upsert { name: "shop/waypoint".to_owned(), resource }))
    }

    fn tls() -> Arc<TlsClients> {
        Arc::new(TlsClients::new(None).unwrap())
    }

    fn is_known(published: &Published) -> bool {
        let host = ambit_directory::HostRef { namespace: "shop", hostname: "web.shop.svc.cluster.local" };
        published.directory.service(host).is_some()
    }

    #[test]
    fn a_service_is_seen_with_the_policies_of_its_batch() {
        let (directory, reader) = Directory::new();
        let published = Arc::new(Publication::default());
        let mut applier = Applier::new(directory, reader, published.clone(), tls(), Exports::new(1));
        let changes = published.changes();
        let before = published.load_full();
        assert!(applier.handle(&mut [service(), gateway(), policy()].into_iter()).is_empty());
        // The directory alone is newer than what decisions see until the whole batch is there.
        assert!(!is_known(&before));
        assert!(before.policies.is_empty());
        let after = published.load_full();
        assert!(is_known(&after));
        assert!(!after.policies.is_empty());
        assert!(changes.has_changed().unwrap());
    }

    #[test]
    fn open_connections_are_asked_again_for_policies_only() {
        let (directory, reader) = Directory::new();
        let published = Arc::new(Publication::default());
        let mut applier = Applier::new(directory, reader, published.clone(), tls(), Exports::new(1));
        let mut changes = published.changes();
        assert!(applier.handle(&mut [service()].into_iter()).is_empty());
        assert!(!changes.has_changed().unwrap());
        assert!(applier.handle(&mut [policy()].into_iter()).is_empty());
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        assert!(applier.handle(&mut [policy()].into_iter()).is_empty());
        assert!(!changes.has_changed().unwrap());
    }
}
