//! Rules for HTTP of a VirtualService, and what a waypoint makes of one.
//!
//! Where Envoy and Gateway API differ, these mean what they mean to Envoy: prefixes end anywhere, rewrites replace letters,
//! what the rule says of headers counts after what a destination says.
//!
//! [`matches`] chooses requests, [`actions`] and [`headers`] are what happens to them.

mod actions;
mod headers;
mod matches;

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::l7;
use ambit_api::l7::filter::Kind;
use serde::Deserialize;
use serde_json::Value;

pub(super) use self::actions::duration;
use self::actions::{Cors, DirectResponse, Fault, Percent, Redirect, Retries, Rewrite, share};
use self::headers::Headers;
pub(super) use self::matches::{Match, Text};
use super::NamespacedName;
use super::virtual_service::{Destination, is_for_mesh};

/// A rule as written.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Http {
    pub(super) name: String,
    #[serde(rename = "match")]
    pub(super) matches: Vec<Match>,
    pub(super) route: Vec<Share>,
    pub(super) redirect: Option<Redirect>,
    pub(super) direct_response: Option<DirectResponse>,
    pub(super) delegate: Option<Delegate>,
    pub(super) rewrite: Option<Rewrite>,
    pub(super) timeout: Option<String>,
    pub(super) retries: Option<Retries>,
    pub(super) fault: Option<Fault>,
    pub(super) mirror: Option<Destination>,
    pub(super) mirrors: Vec<Mirror>,
    #[serde(alias = "mirror_percent")]
    pub(super) mirror_percent: Option<u32>,
    pub(super) mirror_percentage: Option<Percent>,
    pub(super) cors_policy: Option<Cors>,
    pub(super) headers: Option<Headers>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Share {
    pub(super) destination: Destination,
    #[serde(default)]
    pub(super) weight: u32,
    #[serde(default)]
    pub(super) headers: Option<Headers>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Delegate {
    name: String,
    #[serde(default)]
    namespace: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Mirror {
    destination: Destination,
    #[serde(default)]
    percentage: Option<Percent>,
}

/// What a rule refers to, as the index knows it.
pub trait Referents {
    /// The backend that a destination is, or one with the reason why it is none.
    fn backend(&self, destination: &Destination) -> l7::Backend;

    /// The clients with these labels, in a namespace or (empty) in all.
    ///
    /// # Errors
    /// Why they can't be listed.
    fn clients(&self, labels: &BTreeMap<String, String>, namespace: &str) -> Result<l7::Clients, String>;
}

/// A percentage in millionths.
const MILLION: u32 = 1_000_000;

impl Http {
    /// The matches of a rule of which something else can't be read; all requests if they can't be read either.
    pub(super) fn with_matches_of(value: &Value) -> Http {
        let matches = value.get("match").cloned().and_then(|matches| serde_json::from_value(matches).ok());
        Http { matches: matches.unwrap_or_default(), ..Http::default() }
    }

    /// Every destination that it names.
    pub fn destinations(&self) -> impl Iterator<Item = &Destination> {
        let shares = self.route.iter().map(|share| &share.destination);
        shares.chain(&self.mirror).chain(self.mirrors.iter().map(|mirror| &mirror.destination))
    }

    /// The VirtualService whose rules it takes over.
    pub fn delegate(&self, own: &Arc<str>) -> Option<NamespacedName> {
        let Delegate { name, namespace } = self.delegate.as_ref()?;
        let namespace = if namespace.is_empty() { own.clone() } else { namespace.as_str().into() };
        Some(NamespacedName::new(namespace, name.as_str()))
    }

    /// Whether it is for clients in the mesh.
    pub fn is_for_mesh(&self) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|one| is_for_mesh(&one.gateways))
    }

    /// Fields that are read and change nothing.
    pub(super) fn without_effect(&self) -> impl Iterator<Item = String> {
        let stat_prefix = |(at, one): (usize, &Match)| {
            let reason =
                format!("match[{at}].statPrefix has no effect: requests are counted by service and client");
            (!one.stat_prefix.is_empty()).then_some(reason)
        };
        let mut found: Vec<String> = self.matches.iter().enumerate().filter_map(stat_prefix).collect();
        found.extend(self.fault.iter().flat_map(Fault::without_effect));
        found.extend(self.retries.iter().flat_map(Retries::without_effect));
        found.into_iter()
    }

    /// The rule as a waypoint follows it; `port` is the port of the service that it is for, or 0 for all of them. A part
    /// that can't be followed makes it answer 500.
    pub fn lower(&self, port: u16, referents: &dyn Referents) -> l7::Rule {
        let own = self.try_lower(port, referents);
        let mut rule = own.unwrap_or_else(|reason| l7::Rule {
            name: self.name.clone(),
            // Its requests are still its own.
            matches: self.matches(port, referents, &mut Vec::new()),
            invalid: reason,
            ..l7::Rule::default()
        });
        if rule.invalid.is_empty() {
            rule.invalid = ambit_route::fault(&rule).unwrap_or_default();
        }
        rule
    }

    fn try_lower(&self, port: u16, referents: &dyn Referents) -> Result<l7::Rule, String> {
        let mut faults = Vec::new();
        let matches = self.matches(port, referents, &mut faults);
        if let Some(fault) = faults.into_iter().next() {
            return Err(fault);
        }
        let headers = self.headers.as_ref().map(Headers::lower).transpose()?.unwrap_or_default();
        let by_destination = self.route.iter().any(|share| share.headers.is_some());
        let filters = self.filters(&headers, by_destination, referents)?;
        let (timeouts, retry) = self.resilience()?;
        Ok(l7::Rule {
            name: self.name.clone(),
            matches,
            filters,
            backends: self.backends(&headers, by_destination, referents)?,
            timeouts: Some(timeouts),
            retry,
            invalid: String::new(),
            session: None,
        })
    }

    fn matches(&self, port: u16, referents: &dyn Referents, faults: &mut Vec<String>) -> Vec<l7::Match> {
        let mut matches: Vec<l7::Match> = Vec::new();
        for one in self.matches.iter().filter(|one| is_for_mesh(&one.gateways)) {
            if port == 0 || one.port == 0 || one.port == u32::from(port) {
                let mut lowered = one.lower(referents, faults);
                if port != 0 {
                    lowered.port = port.into();
                }
                matches.push(lowered);
            }
        }
        if self.matches.is_empty() && port != 0 {
            matches.push(l7::Match { port: port.into(), ..l7::Match::default() });
        }
        matches
    }

    /// Whether requests to a port of a service can match at all.
    pub fn is_for_port(&self, port: u16) -> bool {
        let fits = |one: &Match| one.port == 0 || one.port == u32::from(port);
        self.matches.is_empty() || self.matches.iter().any(|one| is_for_mesh(&one.gateways) && fits(one))
    }

    /// In the order of a request: what answers, then what changes it.
    fn filters(
        &self,
        headers: &[Kind],
        by_destination: bool,
        referents: &dyn Referents,
    ) -> Result<Vec<l7::Filter>, String> {
        let actions = [
            !self.route.is_empty(),
            self.redirect.is_some(),
            self.direct_response.is_some(),
            self.delegate.is_some(),
        ];
        if actions.iter().filter(|given| **given).count() != 1 {
            return Err(
                "one of `route`, `redirect`, `directResponse` and `delegate` must be given".to_owned()
            );
        }
        let mut filters = Vec::new();
        filters.extend(self.fault.as_ref().map(Fault::lower).transpose()?.flatten());
        filters.extend(self.cors_policy.as_ref().map(Cors::lower).transpose()?);
        for kind in headers {
            // With destinations that change headers too, the rule's own changes come after theirs.
            if !by_destination || matches!(kind, Kind::ResponseHeaders(_)) {
                filters.push(kind.clone());
            }
        }
        filters.extend(self.redirect.as_ref().map(|redirect| redirect.lower(self)).transpose()?);
        filters.extend(self.direct_response.as_ref().map(DirectResponse::lower).transpose()?);
        filters.extend(self.rewrite.as_ref().map(Rewrite::lower).transpose()?.flatten());
        if self.rewrite.is_some() && self.route.is_empty() {
            return Err("`rewrite` goes with `route` only".to_owned());
        }
        filters.extend(self.mirrors(referents)?);
        Ok(filters.into_iter().map(|kind| l7::Filter { kind: Some(kind) }).collect())
    }

    fn mirrors(&self, referents: &dyn Referents) -> Result<Vec<Kind>, String> {
        let whole = self.mirror_percent.map(|percent| Percent { value: percent.into() });
        let first = self.mirror.iter().map(|destination| (destination, self.mirror_percentage.or(whole)));
        let more = self.mirrors.iter().map(|mirror| (&mirror.destination, mirror.percentage));
        let lower = |(destination, percentage): (&Destination, Option<Percent>)| {
            Ok(Kind::Mirror(l7::Mirror {
                backend: Some(l7::Backend { weight: 1, ..referents.backend(destination) }),
                denominator: MILLION,
                // Istio, HTTPRoute.mirrorPercentage: without one all requests.
                numerator: share(
                    "the percentage of a mirror",
                    percentage.unwrap_or(Percent { value: 100.0 }),
                )?,
                // As Envoy marks copies.
                shadow_host: true,
            }))
        };
        first.chain(more).map(lower).collect()
    }

    fn backends(
        &self,
        headers: &[Kind],
        by_destination: bool,
        referents: &dyn Referents,
    ) -> Result<Vec<l7::Backend>, String> {
        let lower = |one: &Share| {
            let mut filters = one.headers.as_ref().map(Headers::lower).transpose()?.unwrap_or_default();
            if by_destination {
                let of_requests = |kind: &&Kind| matches!(kind, Kind::RequestHeaders(_));
                filters.extend(headers.iter().filter(of_requests).cloned());
            }
            Ok(l7::Backend {
                // Istio, HTTPRouteDestination.weight: a sole destination gets everything.
                weight: if self.route.len() == 1 { 1 } else { one.weight },
                filters: filters.into_iter().map(|kind| l7::Filter { kind: Some(kind) }).collect(),
                ..referents.backend(&one.destination)
            })
        };
        let backends: Vec<l7::Backend> = self.route.iter().map(lower).collect::<Result<_, String>>()?;
        if !backends.is_empty() && backends.iter().all(|backend| backend.weight == 0) {
            return Err("no destination has a weight".to_owned());
        }
        Ok(backends)
    }

    fn resilience(&self) -> Result<(l7::Timeouts, Option<l7::Retry>), String> {
        let request_nanos = self.timeout.as_deref().map_or(Ok(0), |text| duration("timeout", text))?;
        let of_try = self.retries.as_ref().and_then(|retries| retries.per_try_timeout.as_deref());
        let backend_nanos = of_try.map_or(Ok(0), |text| duration("retries.perTryTimeout", text))?;
        let retry = self.retries.as_ref().map(Retries::lower).transpose()?;
        Ok((l7::Timeouts { request_nanos, backend_nanos, hedge_nanos: 0 }, retry))
    }
}
