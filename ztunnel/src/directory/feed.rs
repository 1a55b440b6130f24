//! From discovery to the directory: each batch of the control plane is applied as one snapshot.
//!
//! Runs on the control runtime; readers see whole snapshots and are never held up.

use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_directory::{Directory, Update as Change};
use ambit_identity::ControlPlane;
use ambit_runtime::feed::{Credentialed, address, policy, rejected};
use ambit_xds::{Client, ClientConfig, Handler, Rejected};

use crate::config::Config;

/// The client of the control plane's discovery service, and the future that drives it.
pub fn subscribe(
    config: &Config,
    directory: Directory,
    control_plane: ControlPlane,
) -> (Client, impl Future<Output = ()> + Send + 'static) {
    let proxy = &config.proxy;
    let mut metadata = config.node_metadata.clone();
    metadata.extend(proxy.node_metadata());
    metadata.insert("NODE_NAME".to_owned(), config.node.clone());
    let node = ambit_xds::ztunnel_node(proxy.instance_ip, &proxy.pod_name, &proxy.pod_namespace, metadata);
    let builder = Client::builder(ClientConfig::new(node), Applier(directory));
    // Policies first: no address is known before what protects it.
    let builder = builder.wildcard(AUTHORIZATION_TYPE_URL, policy);
    let builder = if config.xds.on_demand {
        builder.on_demand(ADDRESS_TYPE_URL, address)
    } else {
        builder.wildcard(ADDRESS_TYPE_URL, address)
    };
    let (client, driver) = builder.build(Credentialed(control_plane));
    (client, async move {
        driver.run().await;
    })
}

/// Applies batches to the directory; each becomes at most one snapshot.
struct Applier(Directory);

impl Handler<Change> for Applier {
    fn handle(&mut self, batch: &mut dyn Iterator<Item = Change>) -> Vec<Rejected> {
        self.0.apply(batch).into_iter().map(rejected).collect()
    }

    fn release(&mut self, _: &str, name: &str, is_subscribed: &dyn Fn(&str) -> bool) -> Vec<String> {
        // Only addresses are on demand.
        self.0.release(name, is_subscribed)
    }
}
