//! From discovery to the directory and the table of routes: each batch of the control plane is applied as one switch.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::l7;
use ambit_api::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, GATEWAY_TYPE_URL, POLICY_TYPE_URL, ROUTE_TYPE_URL,
};
use ambit_directory::{Directory, GatewayDestination, NamespacedHost, NetworkAddress};
use ambit_identity::ControlPlane;
use ambit_route::Table;
use ambit_runtime::feed::{Credentialed, address, policy, rejected};
use ambit_xds::{Client, ClientConfig, Handler, Rejected, Update};
use arc_swap::ArcSwap;

use crate::config::Config;
use crate::dump;
use crate::policies::Policies;
use crate::proxy::Published;

/// One change from the control plane.
enum Change {
    Directory(Box<ambit_directory::Update>),
    Gateway(Update<l7::Gateway>),
    Policy(Update<l7::Policy>),
    Route(Update<l7::Route>),
}

/// The client of the control plane's discovery service, and the future that drives it.
pub fn subscribe(
    config: &Config,
    directory: Directory,
    published: Arc<ArcSwap<Published>>,
    control_plane: ControlPlane,
) -> (Client, impl Future<Output = ()> + Send + 'static) {
    let proxy = &config.proxy;
    let node = ambit_xds::waypoint_node(
        proxy.instance_ip,
        &proxy.pod_name,
        &proxy.pod_namespace,
        proxy.node_metadata(),
    );
    let applier = Applier {
        directory,
        published,
        gateways: BTreeMap::new(),
        policies: BTreeMap::new(),
        routes: BTreeMap::new(),
    };
    let in_directory = |change| Change::Directory(Box::new(change));
    let builder = Client::builder(ClientConfig::new(node), applier)
        .wildcard(AUTHORIZATION_TYPE_URL, move |update| in_directory(policy(update)))
        .wildcard(ADDRESS_TYPE_URL, move |update| in_directory(address(update)))
        .wildcard(GATEWAY_TYPE_URL, Change::Gateway)
        .wildcard(POLICY_TYPE_URL, Change::Policy)
        .wildcard(ROUTE_TYPE_URL, Change::Route);
    let (client, driver) = builder.build(Credentialed(control_plane));
    (client, async move {
        driver.run().await;
    })
}

/// Applies batches. The directory is published before the routes that refer to it.
struct Applier {
    directory: Directory,
    published: Arc<ArcSwap<Published>>,
    gateways: BTreeMap<String, l7::Gateway>,
    policies: BTreeMap<String, l7::Policy>,
    routes: BTreeMap<String, l7::Route>,
}

impl Handler<Change> for Applier {
    fn handle(&mut self, batch: &mut dyn Iterator<Item = Change>) -> Vec<Rejected> {
        let (gateways, policies, routes) = (&mut self.gateways, &mut self.policies, &mut self.routes);
        let mut changed = false;
        let updates = batch.filter_map(|change| match change {
            Change::Directory(update) => Some(*update),
            Change::Gateway(update) => {
                changed |= apply(gateways, update);
                None
            }
            Change::Policy(update) => {
                changed |= apply(policies, update);
                None
            }
            Change::Route(update) => {
                changed |= apply(routes, update);
                None
            }
        });
        let rejections = self.directory.apply(updates);
        if changed {
            self.published.store(Arc::new(Published {
                addresses: self
                    .gateways
                    .values()
                    .flat_map(|gateway| &gateway.addresses)
                    .filter_map(destination)
                    .collect(),
                policies: Policies::new(&self.policies, |gateway| self.gateways.contains_key(gateway)),
                routes: Table::new(self.routes.values()),
                routes_dump: dump::routes(self.routes.values()),
            }));
        }
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
