//! The wire between the nodes, and the nodes' own namespaces.
//!
//! The fabric is one Ethernet segment (a bridge in a namespace of its own) to which every node and the control
//! plane have one uplink. A node routes between its uplink and its pods' links, as nodes of a cluster do whose
//! network plugin is "routed". Packets from a pod to another node cross the fabric
//! exactly as they left the pod's namespace. Captures read them there.

use std::net::IpAddr;

use crate::addresses::{
    Addresses, FABRIC_PREFIX_V4, FABRIC_PREFIX_V6, PODS_PREFIX_V4, PODS_PREFIX_V6, PROBE_V4, PROBE_V6, Plan,
    SERVICES_PREFIX_V4, SERVICES_PREFIX_V6, SERVICES_V4, SERVICES_V6,
};
use crate::error::Result;
use crate::link::{self, Route, Veth};
use crate::sandbox::{Overlays, Sandbox};

/// The Ethernet segment.
#[derive(Debug, Clone)]
pub(crate) struct Fabric {
    sandbox: Sandbox,
    bridge: u32,
}

/// A namespace with an uplink to the fabric.
#[derive(Debug, Clone)]
pub(crate) struct Attached {
    /// The namespace.
    pub(crate) sandbox: Sandbox,
    /// Its address on the fabric.
    pub(crate) addresses: Addresses,
    /// `near` is the port on the fabric's side, `far` the uplink inside.
    pub(crate) uplink: Veth,
}

impl Fabric {
    /// Makes the segment.
    ///
    /// # Errors
    /// When the kernel refuses a namespace or the bridge.
    pub(crate) async fn new(prefix: &str) -> Result<Self> {
        let sandbox = Sandbox::new(format!("{prefix}-fabric"), None).await?;
        let bridge = link::add_bridge(&sandbox, "fabric").await?;
        Ok(Self { sandbox, bridge })
    }

    /// The fabric's namespace, where captures listen on the ports.
    pub(crate) fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// Makes a namespace with an uplink named `eth0`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) async fn attach(
        &self,
        name: &str,
        port: &str,
        addresses: Addresses,
        overlays: Option<Overlays>,
    ) -> Result<Attached> {
        let sandbox = Sandbox::new(name, overlays).await?;
        link::loopback_up(&sandbox).await?;
        let uplink = link::join(&self.sandbox, port, &sandbox, "eth0").await?;
        link::enslave(&self.sandbox, uplink.near, self.bridge).await?;
        for address in addresses.all() {
            let prefix = if address.is_ipv4() { FABRIC_PREFIX_V4 } else { FABRIC_PREFIX_V6 };
            link::add_address(&sandbox, uplink.far, address, prefix).await?;
        }
        Ok(Attached { sandbox, addresses, uplink })
    }

    /// Cuts or mends the link of one attached namespace, as pulling its cable would.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) async fn set_link(&self, attached: &Attached, up: bool) -> Result<()> {
        link::set_up(&self.sandbox, attached.uplink.near, up).await
    }
}

impl Attached {
    /// Adds routes to the pods of node `index`, whose fabric address is `node`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) async fn route_pods_of(&self, plan: Plan, index: u8, node: Addresses) -> Result<()> {
        for (to, via) in plan.pods(index).all().into_iter().zip(node.all()) {
            let prefix = if to.is_ipv4() { PODS_PREFIX_V4 } else { PODS_PREFIX_V6 };
            let route = Route { to, prefix, via: Some(via), link: self.uplink.far };
            link::add_route(&self.sandbox, route).await?;
        }
        Ok(())
    }

    /// Turns the namespace into a node: it forwards, answers for the probes' address and has a route to the
    /// service range (routing precedes address translation, so without one a node can't dial a VIP).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) async fn become_node(&self) -> Result<()> {
        let sandbox = &self.sandbox;
        sandbox.sysctl("ipv4/ip_forward", "1").await?;
        let lo = link::index(sandbox, "lo").await?;
        link::add_address(sandbox, lo, IpAddr::V4(PROBE_V4), 32).await?;
        let mut services = vec![(IpAddr::V4(SERVICES_V4), SERVICES_PREFIX_V4)];
        if self.addresses.v6.is_some() {
            sandbox.sysctl("ipv6/conf/all/forwarding", "1").await?;
            link::add_address(sandbox, lo, IpAddr::V6(PROBE_V6), 128).await?;
            services.push((IpAddr::V6(SERVICES_V6), SERVICES_PREFIX_V6));
        }
        for (to, prefix) in services {
            link::add_route(sandbox, Route { to, prefix, via: None, link: self.uplink.far }).await?;
        }
        Ok(())
    }

    /// Links a pod's namespace to this node. Returns the pair, `near` on the node.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) async fn link_pod(
        &self,
        pod: &Sandbox,
        port: &str,
        addresses: Addresses,
        gateway: Addresses,
    ) -> Result<Veth> {
        link::loopback_up(pod).await?;
        let veth = link::join(&self.sandbox, port, pod, "eth0").await?;
        for (address, gateway) in addresses.all().into_iter().zip(gateway.all()) {
            let host = if address.is_ipv4() { 32 } else { 128 };
            let any = match address {
                IpAddr::V4(_) => IpAddr::from([0, 0, 0, 0]),
                IpAddr::V6(_) => IpAddr::from([0_u16; 8]),
            };
            link::add_address(&self.sandbox, veth.near, gateway, host).await?;
            let to_pod = Route { to: address, prefix: host, via: None, link: veth.near };
            link::add_route(&self.sandbox, to_pod).await?;
            link::add_address(pod, veth.far, address, host).await?;
            let to_node = Route { to: gateway, prefix: host, via: None, link: veth.far };
            link::add_route(pod, to_node).await?;
            let outward = Route { to: any, prefix: 0, via: Some(gateway), link: veth.far };
            link::add_route(pod, outward).await?;
        }
        Ok(veth)
    }
}
