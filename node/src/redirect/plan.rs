//! The plan of a pod's namespace: rules, routes and settings, from the pod's options. Pure.

use std::net::{Ipv4Addr, Ipv6Addr};

use ambit_net::{Family, PROXY_CONNMARK};
use serde::{Deserialize, Serialize};

use super::rules::{Capture, table};
use crate::nft::Table;

/// The name of our table in a pod's namespace.
pub const TABLE: &str = "ambit";
/// A chain without rules that says that tracking knew every older connection when the table was applied.
pub(super) const COMPLETE: &str = "complete";
/// Priority of the routing rules: before those that other programs give by default (32765 downwards) or choose (Cilium 9
/// to 112, AWS VPC CNI 512 to 1536, Tailscale 5210 to 5270, Istio 32764), and none of theirs.
pub const ROUTE_PRIORITY: u32 = 31;
/// The routing table of answers to the proxy: "ambt". Programs that look for a free table count from 100 (the CNI plugin
/// sbr) or use small numbers (Tailscale 52, kube-router 77 to 79, Cilium 2004 and 2005).
pub const ROUTE_TABLE: u32 = 0x616d_6274;
/// Stands for kubelet probes after translation on the host (redirection contract).
pub const PROBE_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);
/// The same for IPv6.
pub const PROBE_V6: Ipv6Addr = Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff);

/// The options of an enrolled pod, from annotations and the settings of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Options {
    /// Whether DNS is answered by the proxy (`ambient.istio.io/dns-capture`).
    pub dns_capture: bool,
    /// Whether inbound connections are captured (not `ambient.istio.io/bypass-inbound-capture`).
    pub inbound_capture: bool,
    /// Interfaces inside the pod whose incoming connections are captured as outbound ones of the pod
    /// (`istio.io/reroute-virtual-interfaces`).
    pub virtual_interfaces: Vec<String>,
    /// Whether the proxy offers SOCKS5 in the pod.
    pub socks5: bool,
    /// What becomes of packets that are neither TCP nor ICMP (`ambit.dev/other-protocols`).
    #[serde(default)]
    pub other_protocols: OtherProtocols,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dns_capture: true,
            inbound_capture: true,
            virtual_interfaces: Vec::new(),
            socks5: false,
            other_protocols: OtherProtocols::Allow,
        }
    }
}

/// What becomes of packets that no tunnel carries: UDP, SCTP and others, but not ICMP.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OtherProtocols {
    /// They pass, unencrypted and without policy.
    #[default]
    Allow,
    /// They are dropped, but for DNS through the proxy and what stays in the pod.
    Deny,
}

/// Whether a pod is enrolled or leaving.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Stage {
    /// New connections are captured.
    In,
    /// New connections are not captured. Captured ones are still translated.
    Leaving,
}

/// The planned contents of a pod's namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The packet rules.
    pub table: Table,
    /// The packet rules until connection tracking knows every connection that is older. They capture first packets only
    /// and let the middle of an unknown connection leave the pod.
    pub opening: Option<Table>,
    /// The routing rules.
    pub routes: Vec<LocalRoute>,
    /// Kernel settings.
    pub settings: &'static [Setting],
}

/// A kernel setting of the namespace (sysctl(8)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// Its name, as of sysctl(8).
    pub name: &'static str,
    /// The value that an enrolled pod needs.
    pub value: u32,
    /// The value in a new namespace.
    pub default: u32,
    /// What is no longer guaranteed without it.
    pub guarantee: &'static str,
}

/// The kernel settings of an enrolled pod.
const SETTINGS: [Setting; 4] = [
    // An accepted connection takes the mark of its first packet, so that its answers are routed to the proxy even if its
    // tracking entry is lost, and need no second look-up of their route.
    Setting {
        name: "net.ipv4.tcp_fwmark_accept",
        value: 1,
        default: 0,
        guarantee: "answers of an application stay encrypted when connection tracking loses the connection",
    },
    // A connection that has ended on one side may go on for long on the other. Without an entry it would no longer be
    // translated. An hour is what kube-proxy sets on the host; the proxy's keepalive probes are 75 s apart at most.
    Setting {
        name: "net.netfilter.nf_conntrack_tcp_timeout_close_wait",
        value: 3600,
        default: 60,
        guarantee: "a half-closed connection may be silent for more than a minute",
    },
    // Both ends are in the pod and send nothing more. Two minutes of them fill the tracking table (262,144
    // entries) at 2,200 connections a second, and it then refuses new ones.
    Setting {
        name: "net.netfilter.nf_conntrack_tcp_timeout_time_wait",
        value: 10,
        default: 120,
        guarantee: "more than 2,000 new connections a second can be tracked",
    },
    // Both ends of a captured connection are in the pod. For connections over loopback the kernel itself uses a port
    // again a second after its connection ended, where timestamps distinguish the two (RFC 7323, PAWS). Without, a client
    // has 28,000 connections a minute to one port of one server, and each beyond takes a search of a millisecond.
    Setting {
        name: "net.ipv4.tcp_tw_reuse",
        value: 1,
        default: 2,
        guarantee: "a client can open more than 28,000 connections a minute to one port of one server",
    },
];

/// Packets with a mark are delivered locally, whatever their destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalRoute {
    /// IPv4 or IPv6.
    pub family: Family,
    /// The mark, under [`ambit_net::MARK_MASK`].
    pub mark: u32,
    /// Priority of the rule.
    pub priority: u32,
    /// The routing table, which holds one route: everything is local, on `lo`.
    pub table: u32,
}

/// Decides what a pod's namespace is to contain.
pub fn plan(options: &Options, stage: Stage) -> Plan {
    let route =
        |family| LocalRoute { family, mark: PROXY_CONNMARK, priority: ROUTE_PRIORITY, table: ROUTE_TABLE };
    let (table, opening) = match stage {
        Stage::In => (table(options, Capture::Unknown), Some(table(options, Capture::First))),
        Stage::Leaving => (table(options, Capture::Nothing), None),
    };
    Plan { table, opening, routes: vec![route(Family::V4), route(Family::V6)], settings: &SETTINGS }
}

/// The routes of versions before this one, which had a table that others use too.
pub(super) fn former_routes() -> [LocalRoute; 2] {
    [Family::V4, Family::V6].map(|family| LocalRoute {
        family,
        mark: PROXY_CONNMARK,
        priority: 32764,
        table: 100,
    })
}
