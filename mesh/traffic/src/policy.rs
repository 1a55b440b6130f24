//! A compiled TrafficPolicy, and what it says of a request.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use ambit_api::l7;
use ambit_api::l7::limit_key;
use http::{HeaderName, StatusCode};

use crate::buckets::{Buckets, Id, Rate, Taken};
use crate::expression::{Expression, ExpressionError};
use crate::facts::{Facts, RouteId};

/// A TrafficPolicy in the form in which it is enforced.
#[derive(Debug)]
pub struct TrafficPolicy {
    name: Arc<str>,
    conditions: Box<[Condition]>,
    limits: Box<[Limit]>,
    /// Why it can't be enforced: it denies everything.
    closed: Option<Arc<str>>,
}

/// What must hold for a request.
#[derive(Debug)]
pub struct Condition {
    /// Its name, or its number.
    pub name: Box<str>,
    /// The expression.
    pub expression: Expression,
}

/// A rate limit.
#[derive(Debug)]
pub struct Limit {
    /// Its name.
    pub name: Box<str>,
    source: l7::RateLimit,
    keys: Box<[Key]>,
    when: Option<Expression>,
    status: StatusCode,
    buckets: Arc<Buckets>,
}

#[derive(Debug)]
enum Key {
    Route,
    ClientIdentity,
    RemoteAddress,
    Header(HeaderName),
}

/// A request that a policy denies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// The policy, `<namespace>/<name>`.
    pub policy: Arc<str>,
    /// Why.
    pub reason: String,
    /// Whether something went wrong, rather than a condition not holding.
    pub failed: bool,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "denied by TrafficPolicy {}: {}", self.policy, self.reason)
    }
}

/// A request that a rate limit refuses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The policy, `<namespace>/<name>`.
    pub policy: Arc<str>,
    /// The limit's name.
    pub limit: Box<str>,
    /// The answer's status.
    pub status: StatusCode,
    /// How long until another may come.
    pub retry_after: Duration,
    /// Why.
    pub reason: RefusalReason,
}

/// Why a rate limit refuses a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalReason {
    /// There were too many.
    TooMany,
    /// There is no room for another bucket.
    Full,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, limit, reason, .. } = self;
        match reason {
            RefusalReason::TooMany => write!(f, "over rate limit {limit} of TrafficPolicy {policy}"),
            RefusalReason::Full => {
                write!(f, "rate limit {limit} of TrafficPolicy {policy} has no room for another client")
            }
        }
    }
}

impl TrafficPolicy {
    /// Compiles a policy. What can't be compiled denies everything. A rate limit that is as it was in `before` keeps its buckets.
    pub fn compile(name: Arc<str>, source: &l7::Traffic, before: Option<&TrafficPolicy>) -> Self {
        if !source.invalid.is_empty() {
            return Self::closed(name, &source.invalid);
        }
        let conditions: Result<Vec<_>, _> = source.conditions.iter().map(Condition::compile).collect();
        let limits: Result<Vec<_>, _> =
            source.rate_limits.iter().map(|limit| Limit::compile(limit, before)).collect();
        match (conditions, limits) {
            (Ok(conditions), Ok(limits)) => {
                Self { name, conditions: conditions.into(), limits: limits.into(), closed: None }
            }
            (Err(reason), _) | (_, Err(reason)) => Self::closed(name, &reason),
        }
    }

    fn closed(name: Arc<str>, reason: &str) -> Self {
        let (conditions, limits) = Default::default();
        Self { name, conditions, limits, closed: Some(reason.into()) }
    }

    /// `<namespace>/<name>`.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Its conditions.
    pub fn conditions(&self) -> &[Condition] {
        &self.conditions
    }

    /// Why it can't be enforced, and denies everything; `None` if it can.
    pub fn closed_reason(&self) -> Option<&str> {
        self.closed.as_deref()
    }

    /// Its rate limits.
    pub fn limits(&self) -> &[Limit] {
        &self.limits
    }

    /// Whether the conditions hold for a request or connection.
    ///
    /// # Errors
    /// The first that does not hold, or has no truth value.
    pub fn check(&self, facts: &Facts<'_>) -> Result<(), Denial> {
        if let Some(reason) = &self.closed {
            return Err(self.denial(format!("it can't be enforced: {reason}"), true));
        }
        for Condition { name, expression } in &self.conditions {
            match expression.holds(facts) {
                Ok(true) => {}
                Ok(false) => return Err(self.denial(format!("condition {name} does not hold"), false)),
                Err(error) => return Err(self.denial(format!("condition {name}: {error}"), true)),
            }
        }
        Ok(())
    }

    fn denial(&self, reason: String, failed: bool) -> Denial {
        Denial { policy: self.name.clone(), reason, failed }
    }

    /// Whether a rate limit is for a request.
    ///
    /// # Errors
    /// Where that can't be said.
    pub fn concerns(&self, limit: &Limit, facts: &Facts<'_>) -> Result<bool, Denial> {
        let Some(when) = &limit.when else { return Ok(true) };
        when.holds(facts).map_err(|error| self.denial(format!("rate limit {}: {error}", limit.name), true))
    }

    /// What taking a token of a rate limit comes to.
    ///
    /// # Errors
    /// Why the request is refused.
    pub fn granted(&self, limit: &Limit, taken: Taken) -> Result<u64, Refusal> {
        let (reason, retry_after) = match taken {
            Taken::Granted { remaining } => return Ok(remaining),
            Taken::Refused { retry_after } => (RefusalReason::TooMany, retry_after),
            Taken::Full => (RefusalReason::Full, Duration::from_secs(1)),
        };
        let (policy, limit, status) = (self.name.clone(), limit.name.clone(), limit.status);
        Err(Refusal { policy, limit, status, retry_after, reason })
    }
}

impl Condition {
    fn compile(source: &l7::Condition) -> Result<Self, String> {
        let expression = Expression::compile(&source.expression);
        let expression = expression.map_err(|error| format!("condition {}: {error}", source.name))?;
        Ok(Self { name: source.name.as_str().into(), expression })
    }
}

impl Limit {
    fn compile(source: &l7::RateLimit, before: Option<&TrafficPolicy>) -> Result<Self, String> {
        let wrong = |what: &str| format!("rate limit {}: {what}", source.name);
        let when = (!source.when.is_empty()).then(|| Expression::compile(&source.when)).transpose();
        let when = when.map_err(|error: ExpressionError| wrong(&error.to_string()))?;
        let keys: Option<Vec<Key>> = source.keys.iter().map(Key::read).collect();
        let keys = keys.ok_or_else(|| wrong("a key is not known"))?;
        let status = u16::try_from(source.status).ok().and_then(|status| StatusCode::from_u16(status).ok());
        let status = status.ok_or_else(|| wrong("the status is none"))?;
        if source.requests == 0 || source.interval_nanos == 0 {
            return Err(wrong("it allows nothing"));
        }
        let interval = Duration::from_nanos(source.interval_nanos);
        let rate = Rate::new(source.requests.into(), interval, source.burst.into());
        let known = before.and_then(|before| before.limits.iter().find(|limit| limit.source == *source));
        let buckets = known.map_or_else(|| Arc::new(Buckets::new(rate)), |known| known.buckets.clone());
        let name = source.name.as_str().into();
        Ok(Self { name, source: source.clone(), keys: keys.into(), when, status, buckets })
    }

    /// Takes a token for a request at `now`, in nanoseconds since a moment that is always the same. Each `target` of the policy, by
    /// its number, has its own buckets.
    pub fn take(&self, facts: &Facts<'_>, route: Option<&RouteId<'_>>, target: u32, now: u64) -> Taken {
        self.buckets.take(self.id(facts, route, target), owner(facts), now)
    }

    /// What [`take`](Self::take) would say, without taking anything.
    pub fn peek(&self, facts: &Facts<'_>, route: Option<&RouteId<'_>>, target: u32, now: u64) -> Taken {
        self.buckets.peek(self.id(facts, route, target), owner(facts), now)
    }

    fn id(&self, facts: &Facts<'_>, route: Option<&RouteId<'_>>, target: u32) -> Id {
        Id::of(|mut hasher| {
            target.hash(&mut hasher);
            for key in &self.keys {
                key.hash(facts, route, hasher);
            }
        })
    }
}

impl Key {
    fn read(source: &l7::LimitKey) -> Option<Self> {
        Some(match source.kind.as_ref()? {
            limit_key::Kind::Route(_) => Self::Route,
            limit_key::Kind::ClientIdentity(_) => Self::ClientIdentity,
            limit_key::Kind::RemoteAddress(_) => Self::RemoteAddress,
            limit_key::Kind::Header(name) => Self::Header(HeaderName::from_bytes(name.as_bytes()).ok()?),
        })
    }

    fn hash(&self, facts: &Facts<'_>, route: Option<&RouteId<'_>>, mut hasher: &mut dyn Hasher) {
        match self {
            Self::Route => route.hash(&mut hasher),
            Self::ClientIdentity => facts.source.identity.hash(&mut hasher),
            Self::RemoteAddress => address(facts).hash(&mut hasher),
            Self::Header(name) => {
                let values = facts.request.iter().flat_map(|request| request.headers.get_all(name));
                // Their number is part of it: a list of values is not its values in a row.
                let mut count = 0_u32;
                for value in values {
                    value.as_bytes().hash(&mut hasher);
                    count += 1;
                }
                count.hash(&mut hasher);
            }
        }
    }
}

fn address(facts: &Facts<'_>) -> IpAddr {
    facts.source.address.unwrap_or(facts.source.peer_address).to_canonical()
}

/// Whose a bucket is: a client by its identity, else by its address. One without identity may have all addresses of a network of
/// IPv6.
fn owner(facts: &Facts<'_>) -> Id {
    match (facts.source.identity, address(facts)) {
        (Some(identity), _) => Id::of_value(identity),
        (None, IpAddr::V4(address)) => Id::of_value(&address),
        (None, IpAddr::V6(address)) => {
            let [a, b, c, d, ..] = address.segments();
            Id::of_value(&Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}
