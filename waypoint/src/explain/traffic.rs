//! What TrafficPolicies say of a request that is explained. No token is taken.

use ambit_explain::{Considered, Explanation, Next};
use ambit_policy::Token;
use ambit_route::Rule;
use ambit_traffic::{Facts, SourceFacts};
use http::request::Parts;

use super::Seen;
use crate::authorize::Head;
use crate::failure::Failure;
use crate::proxy::Published;
use crate::traffic::{self, Applied, RequestView};

/// The policies that apply to a request, and what they see of it.
pub(super) struct Applying<'a> {
    policies: Vec<&'a Applied>,
    facts: Facts<'a>,
    rule: Option<&'a Rule>,
}

impl<'a> Applying<'a> {
    pub(super) fn find(
        seen: &Seen<'a>,
        parts: &'a Parts,
        token: Option<&'a Token>,
        rule: Option<&'a Rule>,
    ) -> Self {
        let Seen { published, destination, client, source, sane } = *seen;
        let published: &Published = published;
        let listener = traffic::listener(published, destination, Some(&sane.host));
        let policies = published.policies.traffic().applying(destination, listener, rule).collect();
        let client = SourceFacts {
            identity: Some(client.as_str()),
            namespace: Some(client.namespace()),
            address: Some(source),
            peer_address: source,
        };
        let asked = RequestView { sane, head: Head::of(parts), token, rule };
        Self { policies, facts: traffic::facts(client, destination, Some(asked)), rule }
    }

    /// The conditions.
    pub(super) fn conditions(&self, mut explanation: Explanation) -> Explanation {
        let mut considered = Vec::new();
        for Applied { policy, .. } in &self.policies {
            let name = format!("TrafficPolicy/{}", policy.name());
            if let Err(denial) = policy.check(&self.facts) {
                considered.push(Considered::counts(name, denial.reason.clone()));
                return refused(explanation, "authorize", &Failure::Denied(denial.to_string()), considered);
            }
            if !policy.conditions().is_empty() {
                considered.push(Considered::passed_over(name, "its conditions hold"));
            }
        }
        if !considered.is_empty() {
            explanation.passes("authorize", "the conditions of TrafficPolicies hold", considered);
        }
        explanation
    }

    /// The rate limits, as their buckets are now.
    pub(super) fn limits(&self, mut explanation: Explanation) -> Explanation {
        let route = self.rule.map(traffic::route_id);
        let now = traffic::now();
        let mut considered = Vec::new();
        for Applied { policy, target } in &self.policies {
            for limit in policy.limits() {
                let name = format!("TrafficPolicy/{}, rate limit {}", policy.name(), limit.name);
                match policy.concerns(limit, &self.facts) {
                    Ok(true) => {}
                    Ok(false) => {
                        considered.push(Considered::passed_over(name, "does not concern the request"));
                        continue;
                    }
                    Err(denial) => {
                        considered.push(Considered::counts(name, denial.reason.clone()));
                        let failure = Failure::Denied(denial.to_string());
                        return refused(explanation, "filters", &failure, considered);
                    }
                }
                let taken = limit.peek(&self.facts, route.as_ref(), *target, now);
                match policy.granted(limit, taken) {
                    Ok(left) => considered.push(Considered::passed_over(
                        name,
                        format!("not reached: {left} more may follow at once, at this replica"),
                    )),
                    Err(refusal) => {
                        let wait = refusal.retry_after.as_secs_f64();
                        considered.push(Considered::counts(name, format!("reached for another {wait:.1} s")));
                        let failure = Failure::RateLimited(Box::new(refusal));
                        return refused(explanation, "filters", &failure, considered);
                    }
                }
            }
        }
        if !considered.is_empty() {
            explanation.passes("filters", "no rate limit is reached", considered);
        }
        explanation
    }
}

fn refused(
    explanation: Explanation,
    step: &str,
    failure: &Failure,
    considered: Vec<Considered>,
) -> Explanation {
    let next = Next::Answer { status: failure.status().as_u16() };
    explanation.refuses(step, failure.to_string(), considered).goes(next)
}
