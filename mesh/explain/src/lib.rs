//! How a proxy would decide about a connection or a request, step by step, as values.
//!
//! Node proxies and waypoints answer with an [`Explanation`] at `/explain/…` of their admin servers; `ambit why` asks one proxy after the
//! other and shows the answers. Nothing here decides: the proxies fill it in by the functions that their data paths call.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// What one proxy would do, in the order in which it would do it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// Who asks, as far as the proxy of its node is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<Client>,
    /// The steps up to the one that decides.
    pub steps: Vec<Step>,
    /// Where the connection or request goes then.
    pub next: Next,
}

/// A client, as other proxies see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Client {
    /// Namespace and name of its pod.
    pub name: String,
    /// Its SPIFFE id; none outside the mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// The address that it dials from.
    pub address: IpAddr,
}

/// One step of a decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Its name: `resolve`, `match`, `authorize` and so on.
    pub step: String,
    /// What it comes to.
    pub effect: Effect,
    /// The reason, for people.
    pub text: String,
    /// The objects that were looked at, in the order that counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub considered: Vec<Considered>,
}

/// What a step comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Effect {
    /// The next step follows.
    Passes,
    /// The next step follows, and something deserves a look.
    Warns,
    /// The connection or request ends here.
    Refuses,
}

/// An object that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Considered {
    /// The object: kind, namespace and name, and the rule where it has several.
    pub object: String,
    /// Whether it is the one that counts.
    pub counts: bool,
    /// Why it counts or is passed over.
    pub text: String,
}

/// Where a connection or request goes after a proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "to")]
pub enum Next {
    /// Nowhere.
    Nowhere,
    /// To a waypoint, through a tunnel.
    Waypoint {
        /// The waypoint's pod.
        pod: Workload,
        /// What is asked of it: `HOST:PORT` or `ADDRESS:PORT`.
        authority: String,
    },
    /// To a workload; of several the one that would be chosen now.
    Workload {
        /// The workload.
        workload: Workload,
        /// Its address and port.
        address: SocketAddr,
        /// Whether it is reached through a tunnel: encrypted and authenticated.
        tunnel: bool,
        /// The identity that the connection has there, as its SPIFFE id; none in plain text.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        identity: Option<String>,
    },
    /// To an address that is outside the mesh, in plain text.
    Outside {
        /// The address or `HOST:PORT`.
        address: String,
    },
    /// Back to the client with an answer of the proxy's own.
    Answer {
        /// The status code.
        status: u16,
    },
}

/// A workload by its names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Uid.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Node; empty if it has none.
    pub node: String,
}

impl Explanation {
    /// Of no steps yet.
    pub fn begin() -> Self {
        Self { client: None, steps: Vec::new(), next: Next::Nowhere }
    }

    /// Adds a step after which the next follows.
    pub fn passes(&mut self, step: &str, text: impl Into<String>, considered: Vec<Considered>) {
        self.push(step, Effect::Passes, text.into(), considered);
    }

    /// Adds a step that deserves a look.
    pub fn warns(&mut self, step: &str, text: impl Into<String>, considered: Vec<Considered>) {
        self.push(step, Effect::Warns, text.into(), considered);
    }

    /// Adds the step that ends the connection or request.
    #[must_use]
    pub fn refuses(mut self, step: &str, text: impl Into<String>, considered: Vec<Considered>) -> Self {
        self.push(step, Effect::Refuses, text.into(), considered);
        self
    }

    /// Says where it goes.
    #[must_use]
    pub fn goes(mut self, next: Next) -> Self {
        self.next = next;
        self
    }

    /// The step that refuses, if one does.
    pub fn refusal(&self) -> Option<&Step> {
        self.steps.iter().find(|step| step.effect == Effect::Refuses)
    }

    fn push(&mut self, step: &str, effect: Effect, text: String, considered: Vec<Considered>) {
        self.steps.push(Step { step: step.to_owned(), effect, text, considered });
    }
}

impl Considered {
    /// The object that counts.
    pub fn counts(object: impl Into<String>, text: impl Into<String>) -> Self {
        Self { object: object.into(), counts: true, text: text.into() }
    }

    /// An object that is passed over.
    pub fn passed_over(object: impl Into<String>, text: impl Into<String>) -> Self {
        Self { object: object.into(), counts: false, text: text.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_explanation_reads_back_as_it_was_written() -> serde_json::Result<()> {
        let mut explanation = Explanation::begin();
        explanation.passes("resolve", "service web", vec![Considered::counts("Service shop/web", "port 80")]);
        let refused =
            explanation.refuses("authorize", "denied", Vec::new()).goes(Next::Answer { status: 403 });
        let text = serde_json::to_string(&refused)?;
        let read: Explanation = serde_json::from_str(&text)?;
        assert_eq!(read, refused);
        assert_eq!(read.refusal().map(|step| step.step.as_str()), Some("authorize"));
        assert!(text.contains(r#""next":{"to":"answer","status":403}"#), "{text}");
        Ok(())
    }
}
