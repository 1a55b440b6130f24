//! Routing rules and tables of a pod's namespace, over netlink.

use std::net::{Ipv4Addr, Ipv6Addr};

use ambit_net::{Family, MARK_MASK, Netns, NetnsError};
use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::LinkFlags;
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder};

use super::plan::LocalRoute;

/// Why routing could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum RoutingError {
    /// The namespace could not be entered.
    #[error("routing: {0}")]
    Namespace(#[from] NetnsError),
    /// No netlink socket could be opened.
    #[error("routing: open a netlink socket: {0}")]
    Open(std::io::Error),
    /// The kernel refused.
    #[error("routing: {attempt}: {source}")]
    Refused {
        /// The operation, as a verb phrase.
        attempt: &'static str,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
}

/// A netlink connection to one namespace. Dropping it ends its driver.
pub(crate) struct Routing {
    handle: Handle,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Routing {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Routing {
    pub(crate) async fn open(inside: &Netns) -> Result<Self, RoutingError> {
        let runtime = tokio::runtime::Handle::current();
        let opened = inside.run(move || {
            let _registered_with = runtime.enter();
            rtnetlink::new_connection()
        });
        let (driver, handle, _) = opened.await?.map_err(RoutingError::Open)?;
        Ok(Self { handle, driver: tokio::spawn(driver) })
    }

    /// Brings the loopback device up, and returns whether it was down.
    pub(crate) async fn loopback_up(&self) -> Result<bool, RoutingError> {
        let link = self
            .handle
            .link()
            .get()
            .match_index(LOOPBACK_INDEX)
            .execute()
            .try_next()
            .await
            .map_err(refused("read the loopback device"))?;
        if link.is_some_and(|link| link.header.flags.contains(LinkFlags::Up)) {
            return Ok(false);
        }
        let up = LinkUnspec::new_with_index(LOOPBACK_INDEX).up().build();
        self.handle.link().set(up).execute().await.map_err(refused("bring the loopback device up"))?;
        Ok(true)
    }

    /// Adds the rule and the route if they are missing, and returns whether one was.
    pub(crate) async fn ensure(&self, wanted: LocalRoute) -> Result<bool, RoutingError> {
        let mut changed = false;
        if self.rules(wanted).await?.is_empty() {
            let mut add = self.handle.rule().add();
            *add.message_mut() = rule_message(wanted);
            match add.execute().await {
                Err(error) if is_absent_family(wanted.family, &error) => return Ok(false),
                other => other.map_err(refused("add the routing rule"))?,
            }
            changed = true;
        }
        if self.routes(wanted).await?.is_empty() {
            match self.handle.route().add(route_message(wanted)).execute().await {
                Err(error) if is_absent_family(wanted.family, &error) => return Ok(changed),
                other => other.map_err(refused("add the local route"))?,
            }
            changed = true;
        }
        Ok(changed)
    }

    /// Whether rule and route of `wanted` are there. They count as
    /// present for a family that the namespace does not have.
    pub(crate) async fn holds(&self, wanted: LocalRoute) -> Result<bool, RoutingError> {
        if !self.rules(wanted).await?.is_empty() && !self.routes(wanted).await?.is_empty() {
            return Ok(true);
        }
        Ok(wanted.family == Family::V6 && !self.has_addresses(Family::V6).await?)
    }

    /// Removes rule and route.
    pub(crate) async fn remove(&self, unwanted: LocalRoute) -> Result<(), RoutingError> {
        for rule in self.rules(unwanted).await? {
            self.handle.rule().del(rule).execute().await.map_err(refused("remove the routing rule"))?;
        }
        for route in self.routes(unwanted).await? {
            self.handle.route().del(route).execute().await.map_err(refused("remove the local route"))?;
        }
        Ok(())
    }

    /// The addresses of the namespace's interfaces.
    pub(crate) async fn addresses(&self) -> Result<Vec<std::net::IpAddr>, RoutingError> {
        use netlink_packet_route::address::AddressAttribute;
        let messages: Vec<_> =
            self.handle.address().get().execute().try_collect().await.map_err(refused("read addresses"))?;
        let mut found = Vec::new();
        for message in messages {
            let local = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            });
            let address = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            });
            found.extend(local.or(address));
        }
        Ok(found)
    }

    async fn has_addresses(&self, family: Family) -> Result<bool, RoutingError> {
        Ok(self.addresses().await?.iter().any(|address| Family::of(*address) == family))
    }

    async fn rules(&self, like: LocalRoute) -> Result<Vec<RuleMessage>, RoutingError> {
        let version = match like.family {
            Family::V4 => IpVersion::V4,
            Family::V6 => IpVersion::V6,
        };
        let listed: Result<Vec<RuleMessage>, _> =
            self.handle.rule().get(version).execute().try_collect().await;
        match listed {
            Err(error) if is_absent_family(like.family, &error) => Ok(Vec::new()),
            other => Ok(other
                .map_err(refused("list routing rules"))?
                .into_iter()
                .filter(|rule| is_rule(rule, like))
                .collect()),
        }
    }

    async fn routes(&self, like: LocalRoute) -> Result<Vec<RouteMessage>, RoutingError> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family_of(like.family);
        filter.header.kind = RouteType::Unspec;
        let listed: Result<Vec<RouteMessage>, _> =
            self.handle.route().get(filter).execute().try_collect().await;
        match listed {
            Err(error) if is_absent_family(like.family, &error) => Ok(Vec::new()),
            other => Ok(other
                .map_err(refused("list routes"))?
                .into_iter()
                .filter(|route| is_route(route, like))
                .collect()),
        }
    }
}

/// The loopback device is the first of every namespace.
const LOOPBACK_INDEX: u32 = 1;

fn refused(attempt: &'static str) -> impl Fn(rtnetlink::Error) -> RoutingError {
    move |source| RoutingError::Refused { attempt, source }
}

/// Whether the error says that IPv6 is missing from the kernel or switched off in the namespace.
fn is_absent_family(family: Family, error: &rtnetlink::Error) -> bool {
    let rtnetlink::Error::NetlinkError(message) = error else { return false };
    family == Family::V6
        && matches!(-message.raw_code(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EACCES)
}

fn family_of(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn rule_message(wanted: LocalRoute) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family_of(wanted.family);
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(wanted.priority),
        RuleAttribute::FwMark(wanted.mark),
        RuleAttribute::FwMask(MARK_MASK),
        RuleAttribute::Table(wanted.table),
    ];
    message
}

fn is_rule(rule: &RuleMessage, like: LocalRoute) -> bool {
    let has = |wanted: RuleAttribute| rule.attributes.contains(&wanted);
    let to_table = u32::from(rule.header.table) == like.table || has(RuleAttribute::Table(like.table));
    rule.header.action == RuleAction::ToTable
        && to_table
        && has(RuleAttribute::Priority(like.priority))
        && has(RuleAttribute::FwMark(like.mark))
        && has(RuleAttribute::FwMask(MARK_MASK))
}

fn route_message(wanted: LocalRoute) -> RouteMessage {
    match wanted.family {
        Family::V4 => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
            .output_interface(LOOPBACK_INDEX)
            .table_id(wanted.table)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .build(),
        Family::V6 => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(Ipv6Addr::UNSPECIFIED, 0)
            .output_interface(LOOPBACK_INDEX)
            .table_id(wanted.table)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .build(),
    }
}

fn is_route(route: &RouteMessage, like: LocalRoute) -> bool {
    let in_table = u32::from(route.header.table) == like.table
        || route.attributes.contains(&RouteAttribute::Table(like.table));
    in_table
        && route.header.kind == RouteType::Local
        && route.header.destination_prefix_length == 0
        && route.attributes.contains(&RouteAttribute::Oif(LOOPBACK_INDEX))
}
