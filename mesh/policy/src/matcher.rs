//! The value sets that a match is made of: texts, service accounts, networks and ports.
//!
//! A set matches when one of its values does (xDS contract: values of a field are OR'ed). Whether an empty set means
//! "any" or "none" is the match's business, not the set's.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;

/// A text that is compared other than whole.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Pattern {
    /// The value begins so.
    Prefix(Box<str>),
    /// The value ends so.
    Suffix(Box<str>),
    /// There is a value.
    Presence,
}

impl Pattern {
    fn matches(&self, value: &str) -> bool {
        match self {
            Self::Prefix(prefix) => value.starts_with(&**prefix),
            Self::Suffix(suffix) => value.ends_with(&**suffix),
            Self::Presence => true,
        }
    }
}

/// Texts of a principal or namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Texts {
    /// Whole texts, sorted.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub(crate) exact: Box<[Box<str>]>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub(crate) patterns: Box<[Pattern]>,
}

impl Texts {
    pub(crate) fn new(mut exact: Vec<Box<str>>, mut patterns: Vec<Pattern>) -> Self {
        exact.sort_unstable();
        exact.dedup();
        patterns.sort_unstable();
        patterns.dedup();
        Self { exact: exact.into(), patterns: patterns.into() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.patterns.is_empty()
    }

    /// Whether a value of the set matches; without an authenticated peer there is no value, and nothing matches.
    pub(crate) fn matches(&self, value: Option<&str>) -> bool {
        value.is_some_and(|value| {
            self.exact.binary_search_by(|text| (**text).cmp(value)).is_ok()
                || self.patterns.iter().any(|pattern| pattern.matches(value))
        })
    }
}

/// One service account of one namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServiceAccount {
    pub(crate) namespace: Box<str>,
    pub(crate) service_account: Box<str>,
}

/// Service accounts, sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(crate) struct ServiceAccounts(pub(crate) Box<[ServiceAccount]>);

impl ServiceAccounts {
    pub(crate) fn new(mut accounts: Vec<ServiceAccount>) -> Self {
        accounts.sort_unstable();
        accounts.dedup();
        Self(accounts.into())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn matches(&self, peer: Option<(&str, &str)>) -> bool {
        peer.is_some_and(|peer| {
            self.0
                .binary_search_by(|account| (&*account.namespace, &*account.service_account).cmp(&peer))
                .is_ok()
        })
    }
}

/// Networks, disjoint and sorted; a single address is a network of full length.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(crate) struct Nets(pub(crate) Box<[IpNet]>);

impl Nets {
    pub(crate) fn new(nets: &[IpNet]) -> Self {
        let mut nets = IpNet::aggregate(&nets.to_vec());
        nets.sort_unstable_by_key(IpNet::network);
        Self(nets.into())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn matches(&self, address: IpAddr) -> bool {
        // Disjoint and sorted: only the last network that begins at or before the address can hold it.
        let after = self.0.partition_point(|net| net.network() <= address);
        after.checked_sub(1).and_then(|at| self.0.get(at)).is_some_and(|net| net.contains(&address))
    }
}

/// Ports, sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(crate) struct Ports(pub(crate) Box<[u16]>);

impl Ports {
    pub(crate) fn new(mut ports: Vec<u16>) -> Self {
        ports.sort_unstable();
        ports.dedup();
        Self(ports.into())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn matches(&self, port: u16) -> bool {
        self.0.binary_search(&port).is_ok()
    }
}
