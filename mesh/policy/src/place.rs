//! Reading the values of a rule: each error names the policy, the rule and the field.

use std::net::{IpAddr, Ipv6Addr};

use ambit_api::security;
use ipnet::IpNet;

use crate::compile::{Action, CompileError, Field, Layer};
use crate::matcher::{Nets, Pattern, Ports, Texts};
use crate::name::PolicyName;

/// Where in which policy something is read.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) policy: &'a PolicyName,
    pub(crate) rule: usize,
    pub(crate) action: Action,
    pub(crate) layer: Layer,
}

impl Place<'_> {
    pub(crate) fn extension(self, what: &str) -> CompileError {
        CompileError::Extension { policy: self.policy.clone(), rule: self.rule, what: what.to_owned() }
    }

    pub(crate) fn texts(self, source: &[security::StringMatch], field: Field) -> Result<Texts, CompileError> {
        use security::string_match::MatchType;
        // xDS contract: principals compare without `spiffe://`.
        let plain = |text: &str| -> Box<str> {
            match field {
                Field::Principals => text.strip_prefix("spiffe://").unwrap_or(text).into(),
                Field::Hosts => text.to_ascii_lowercase().into(),
                _ => text.into(),
            }
        };
        let (mut exact, mut patterns) = (Vec::new(), Vec::new());
        for value in source {
            match &value.match_type {
                Some(MatchType::Exact(text)) => exact.push(plain(text)),
                Some(MatchType::Prefix(text)) => patterns.push(Pattern::Prefix(plain(text))),
                Some(MatchType::Suffix(text)) if field == Field::Hosts => {
                    patterns.push(Pattern::Suffix(plain(text)));
                }
                Some(MatchType::Suffix(text)) => patterns.push(Pattern::Suffix(text.as_str().into())),
                Some(MatchType::Presence(())) => patterns.push(Pattern::Presence),
                None => {
                    return Err(CompileError::Comparison {
                        policy: self.policy.clone(),
                        rule: self.rule,
                        field,
                    });
                }
            }
        }
        Ok(Texts::new(exact, patterns))
    }

    pub(crate) fn nets(self, source: &[security::Address], field: Field) -> Result<Nets, CompileError> {
        let nets = source.iter().map(|address| {
            net(&address.address, address.length).ok_or_else(|| CompileError::Address {
                policy: self.policy.clone(),
                rule: self.rule,
                field,
                bytes: address.address.len(),
                length: address.length,
            })
        });
        Ok(Nets::new(&nets.collect::<Result<Vec<_>, _>>()?))
    }

    pub(crate) fn ports(self, source: &[u32]) -> Result<Ports, CompileError> {
        let ports = source.iter().map(|&port| {
            u16::try_from(port).map_err(|_| CompileError::Port {
                policy: self.policy.clone(),
                rule: self.rule,
                field: Field::DestinationPorts,
                port,
            })
        });
        Ok(Ports::new(ports.collect::<Result<_, _>>()?))
    }
}

/// The network of an address of 4 or 16 bytes; one mapped into IPv6 becomes the IPv4 network, as requests are.
fn net(bytes: &[u8], length: u32) -> Option<IpNet> {
    let mut length = u8::try_from(length).ok()?;
    let address = if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        IpAddr::from(v4)
    } else {
        let v6 = Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?);
        match (v6.to_ipv4_mapped(), length.checked_sub(96)) {
            (Some(v4), Some(within_v4)) => {
                length = within_v4;
                v4.into()
            }
            _ => v6.into(),
        }
    };
    Some(IpNet::new(address, length).ok()?.trunc())
}
