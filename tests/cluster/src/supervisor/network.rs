//! The wire of a cluster: one Ethernet segment with the control plane and the nodes on it, pod ranges routed.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use ambit_local::Sandbox;
use ambit_local::link::{self, Route, Veth};

use crate::error::{Error, Result};
use crate::plan::{Plan, SEGMENT_PREFIX};

/// Name of the segment's own namespace.
pub(crate) const FABRIC: &str = "fabric";
/// Name of the control plane's namespace.
pub(crate) const CONTROL: &str = "control";

/// The segment and what is attached to it.
#[derive(Debug)]
pub(crate) struct Network {
    fabric: Sandbox,
    control: Place,
    nodes: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    sandbox: Sandbox,
    uplink: Veth,
}

impl Network {
    /// Makes the namespaces, links, addresses and routes.
    pub(crate) async fn create(cluster: &str, plan: Plan) -> Result<Self> {
        let fabric = Sandbox::bare(format!("{cluster}-{FABRIC}")).await?;
        let bridge = link::add_bridge(&fabric, FABRIC).await?;
        let control = attach(&fabric, bridge, CONTROL, plan.control()).await?;
        let mut nodes = BTreeMap::new();
        for (index, name) in (1..).zip(plan.node_names()) {
            let place = attach(&fabric, bridge, &name, plan.node(index)).await?;
            // Without a route to them, routing refuses cluster IPs before they are translated.
            route(&place, Ipv4Addr::UNSPECIFIED, 0, plan.control()).await?;
            nodes.insert(name, place);
        }
        if plan.nodes > 0 {
            // As a router would that balances over one node.
            route(&control, plan.load_balancers(), SEGMENT_PREFIX, plan.node(1)).await?;
        }
        for (index, target) in (1..).zip(plan.node_names()) {
            for (name, place) in nodes.iter().chain([(&CONTROL.to_owned(), &control)]) {
                if *name != target {
                    route(place, plan.pods(index), SEGMENT_PREFIX, plan.node(index)).await?;
                }
            }
        }
        Ok(Self { fabric, control, nodes })
    }

    /// The control plane's namespace.
    pub(crate) fn control(&self) -> &Sandbox {
        &self.control.sandbox
    }

    /// A place's namespace.
    pub(crate) fn sandbox(&self, place: &str) -> Result<&Sandbox> {
        if place == FABRIC { Ok(&self.fabric) } else { Ok(&self.place(place)?.sandbox) }
    }

    /// Cuts or mends a place's link, as pulling its cable would.
    pub(crate) async fn set_link(&self, place: &str, up: bool) -> Result<()> {
        Ok(link::set_up(&self.fabric, self.place(place)?.uplink.near, up).await?)
    }

    fn place(&self, name: &str) -> Result<&Place> {
        let place = if name == CONTROL { Some(&self.control) } else { self.nodes.get(name) };
        place.ok_or_else(|| Error::Local(ambit_local::Error::Unknown(format!("place {name}"))))
    }
}

async fn attach(fabric: &Sandbox, bridge: u32, name: &str, address: Ipv4Addr) -> Result<Place> {
    let sandbox = Sandbox::bare(name).await?;
    link::loopback_up(&sandbox).await?;
    let uplink = link::join(fabric, name, &sandbox, "eth0").await?;
    link::enslave(fabric, uplink.near, bridge).await?;
    link::add_address(&sandbox, uplink.far, IpAddr::V4(address), SEGMENT_PREFIX).await?;
    sandbox.sysctl("ipv4/ip_forward", "1").await?;
    Ok(Place { sandbox, uplink })
}

async fn route(place: &Place, to: Ipv4Addr, prefix: u8, via: Ipv4Addr) -> Result<()> {
    let route = Route { to: to.into(), prefix, via: Some(via.into()), link: place.uplink.far };
    Ok(link::add_route(&place.sandbox, route).await?)
}
