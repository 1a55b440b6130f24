//! From discovery to the directory: what the control plane sends is applied as it comes.
//!
//! Runs on the control runtime; readers see whole snapshots and are never held up.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::security::Authorization;
use ambit_api::workload::Address;
use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_directory::{Directory, Update as Change};
use ambit_identity::{ControlPlane, Credentials};
use ambit_xds::{BoxError, Client, ClientConfig, Connector, Handler, Rejected, Update};
use parking_lot::Mutex;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use crate::config::Config;

/// The writer, shared by the two handlers; they are called one at a time by one task.
type Writer = Arc<Mutex<Directory>>;

/// The client of the control plane's discovery service, and the future that drives it.
pub fn subscribe(
    config: &Config,
    directory: Directory,
    control_plane: ControlPlane,
) -> (Client, impl Future<Output = ()> + Send + 'static) {
    let writer: Writer = Arc::new(Mutex::new(directory));
    let metadata = BTreeMap::from([
        ("NAMESPACE".to_owned(), config.pod_namespace.clone()),
        ("NODE_NAME".to_owned(), config.node.clone()),
        ("CLUSTER_ID".to_owned(), config.cluster_id.clone()),
        ("NETWORK".to_owned(), config.network.clone()),
    ]);
    let node = ambit_xds::ztunnel_node(config.instance_ip, &config.pod_name, &config.pod_namespace, metadata);
    // Policies first: no address is known before what protects it.
    let policies = policy_handler(writer.clone());
    let builder = Client::builder(ClientConfig::new(node)).wildcard(AUTHORIZATION_TYPE_URL, policies);
    let addresses = Addresses(writer);
    let builder = if config.xds.on_demand {
        builder.on_demand(ADDRESS_TYPE_URL, addresses)
    } else {
        builder.wildcard(ADDRESS_TYPE_URL, addresses)
    };
    let (client, driver) = builder.build(Credentialed(control_plane));
    (client, async move {
        driver.run().await;
    })
}

/// The control plane's channel, with our credentials on every call.
struct Credentialed(ControlPlane);

impl Connector for Credentialed {
    type Service = InterceptedService<Channel, Credentials>;

    async fn connect(&mut self) -> Result<Self::Service, BoxError> {
        Ok(InterceptedService::new(self.0.channel(), self.0.credentials()))
    }
}

/// Workloads and services.
struct Addresses(Writer);

impl Handler<Address> for Addresses {
    fn handle(&mut self, updates: Vec<Update<Address>>) -> Vec<Rejected> {
        apply(&self.0, updates, |update| match update {
            Update::Upsert { name, resource } => Change::Address { name, address: resource },
            Update::Remove { name } => Change::AddressRemoved { name },
        })
    }

    fn release(&mut self, name: &str, is_subscribed: &dyn Fn(&str) -> bool) -> Vec<String> {
        self.0.lock().release(name, is_subscribed)
    }
}

fn policy_handler(
    writer: Writer,
) -> impl FnMut(Vec<Update<Authorization>>) -> Vec<Rejected> + Send + 'static {
    move |updates| {
        apply(&writer, updates, |update| match update {
            Update::Upsert { name, resource } => Change::Policy { name, policy: resource },
            Update::Remove { name } => Change::PolicyRemoved { name },
        })
    }
}

fn apply<M>(writer: &Writer, updates: Vec<Update<M>>, change: impl Fn(Update<M>) -> Change) -> Vec<Rejected> {
    let rejected = writer.lock().apply(updates.into_iter().map(change));
    rejected
        .into_iter()
        .map(|rejected| {
            tracing::warn!(%rejected, "a resource of the control plane was rejected");
            Rejected { reason: rejected.error.to_string(), name: rejected.name }
        })
        .collect()
}
