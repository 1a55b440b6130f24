//! Links, addresses and routes of sandboxes, over routing netlink.
//!
//! The fabric, nodes and pods are wired with these, and so is the test cluster of real Kubernetes nodes. No program (`ip`, `bridge`) is called.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use futures_util::TryStreamExt;
use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::route::RouteScope;
use rtnetlink::{LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::error::{Error, Result};
use crate::sandbox::Sandbox;

/// MTU of every link of the cluster, bytes.
const MTU: u32 = 1500;

/// A host route or prefix within a sandbox.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// First address of the destination.
    pub to: IpAddr,
    /// Prefix length of the destination.
    pub prefix: u8,
    /// Next hop; absent for a destination that is on the link.
    pub via: Option<IpAddr>,
    /// Interface index.
    pub link: u32,
}

/// Index of an interface by name.
///
/// # Errors
/// When the namespace has no such interface.
pub async fn index(sandbox: &Sandbox, name: &str) -> Result<u32> {
    let attempt = || format!("find interface {name} in {}", sandbox.name());
    let mut links = sandbox.netlink().link().get().match_name(name.to_owned()).execute();
    let link = links.try_next().await.map_err(Error::netlink(attempt()))?;
    link.map(|link| link.header.index)
        .ok_or_else(|| Error::Unknown(format!("interface {name} in {}", sandbox.name())))
}

/// Makes a bridge and brings it up.
///
/// # Errors
/// When the kernel refuses.
pub async fn add_bridge(sandbox: &Sandbox, name: &str) -> Result<u32> {
    let message = LinkBridge::new(name).mtu(MTU).up().build();
    sandbox
        .netlink()
        .link()
        .add(message)
        .execute()
        .await
        .map_err(Error::netlink(format!("make bridge {name} in {}", sandbox.name())))?;
    index(sandbox, name).await
}

/// The two ends of a veth pair, as interface indexes.
#[derive(Debug, Clone, Copy)]
pub struct Veth {
    /// In the first sandbox.
    pub near: u32,
    /// In the second sandbox.
    pub far: u32,
}

/// Joins two sandboxes with a veth pair; both ends are left up.
///
/// # Errors
/// When the kernel refuses, or a name is taken.
pub async fn join(near: &Sandbox, near_name: &str, far: &Sandbox, far_name: &str) -> Result<Veth> {
    let attempt = || format!("join {} ({near_name}) and {} ({far_name})", near.name(), far.name());
    // Names have at most 15 bytes and must differ within `near` until the far end has moved.
    let passing = format!("{}~", near_name.chars().take(14).collect::<String>());
    let pair = LinkVeth::new(near_name, &passing).mtu(MTU).build();
    near.netlink().link().add(pair).execute().await.map_err(Error::netlink(attempt()))?;
    let near_index = index(near, near_name).await?;
    let far_here = index(near, &passing).await?;
    set(near, LinkUnspec::new_with_index(near_index).up().build(), attempt()).await?;
    let moved =
        LinkUnspec::new_with_index(far_here).setns_by_fd(far.network().as_raw_fd()).name(far_name).build();
    set(near, moved, attempt()).await?;
    let far_index = index(far, far_name).await?;
    set(far, LinkUnspec::new_with_index(far_index).mtu(MTU).up().build(), attempt()).await?;
    Ok(Veth { near: near_index, far: far_index })
}

/// Makes an interface a port of a bridge.
///
/// # Errors
/// When the kernel refuses.
pub async fn enslave(sandbox: &Sandbox, link: u32, bridge: u32) -> Result<()> {
    let message = LinkUnspec::new_with_index(link).controller(bridge).build();
    set(sandbox, message, format!("make interface {link} a port of the bridge in {}", sandbox.name())).await
}

/// Brings an interface up or down.
///
/// # Errors
/// When the kernel refuses.
pub async fn set_up(sandbox: &Sandbox, link: u32, up: bool) -> Result<()> {
    let message = LinkUnspec::new_with_index(link);
    let message = if up { message.up() } else { message.down() }.build();
    set(sandbox, message, format!("bring interface {link} of {} up or down", sandbox.name())).await
}

async fn set(
    sandbox: &Sandbox,
    message: netlink_packet_route::link::LinkMessage,
    attempt: String,
) -> Result<()> {
    sandbox.netlink().link().set(message).execute().await.map_err(Error::netlink(attempt))
}

/// Brings the loopback interface up.
///
/// # Errors
/// When the kernel refuses.
pub async fn loopback_up(sandbox: &Sandbox) -> Result<u32> {
    let lo = index(sandbox, "lo").await?;
    set_up(sandbox, lo, true).await?;
    Ok(lo)
}

/// Gives an interface an address. IPv6 addresses are usable at once: duplicate detection is off, since the
/// plan gives every address once.
///
/// # Errors
/// When the kernel refuses, for example as IPv6 is disabled on the machine.
pub async fn add_address(sandbox: &Sandbox, link: u32, address: IpAddr, prefix: u8) -> Result<()> {
    let mut request = sandbox.netlink().address().add(link, address, prefix);
    if address.is_ipv6() {
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    request.execute().await.map_err(Error::netlink(format!(
        "give interface {link} of {} address {address}/{prefix}",
        sandbox.name()
    )))
}

/// Adds a route.
///
/// # Errors
/// When the kernel refuses.
pub async fn add_route(sandbox: &Sandbox, route: Route) -> Result<()> {
    let attempt = format!("route {}/{} in {}", route.to, route.prefix, sandbox.name());
    let message = match (route.to, route.via) {
        (IpAddr::V4(to), via) => {
            let message = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(to, route.prefix)
                .output_interface(route.link);
            match via {
                Some(IpAddr::V4(via)) => message.gateway(via).build(),
                _ => message.scope(RouteScope::Link).build(),
            }
        }
        (IpAddr::V6(to), via) => {
            let message = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(to, route.prefix)
                .output_interface(route.link);
            match via {
                Some(IpAddr::V6(via)) => message.gateway(via).build(),
                _ => message.build(),
            }
        }
    };
    sandbox.netlink().route().add(message).replace().execute().await.map_err(Error::netlink(attempt))
}
