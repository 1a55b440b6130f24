//! How this proxy would decide about a connection: `/explain/outbound` and `/explain/inbound` of the admin server, for `ambit why`.
//!
//! Decisions come from the functions that the data path calls; nothing is dialled, and nothing is asked of the control plane.

mod inbound;
mod outbound;

use std::sync::Arc;

use ambit_directory::Workload;
use ambit_explain::{Explanation, Workload as Named};
use ambit_telemetry::Admin;
use ambit_telemetry::http::{Query, Reply, reply, text};
use http::StatusCode;

use crate::pods::Pod;
use crate::proxy::Proxy;

/// Why nothing can be explained.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// A parameter is missing or can't be read.
    #[error("parameter {name}: {what}")]
    Parameter {
        /// Which.
        name: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// The pod is not one of this node, or has not been enrolled.
    #[error("this proxy serves no pod {0}")]
    NotServed(String),
}

/// Adds the routes.
///
/// `GET /explain/outbound?pod=NAMESPACE/NAME&to=HOST:PORT`: where a connection of a pod of this node would go.
/// `GET /explain/inbound?pod=NAMESPACE/NAME&port=PORT&from=SPIFFE_ID&source=ADDRESS`: whether a pod of this node would let it in; without
/// `from`, one in plain text.
pub fn routes(admin: Admin, proxy: &Arc<Proxy>) -> Admin {
    let (leaving, entering) = (proxy.clone(), proxy.clone());
    admin
        .get("/explain/outbound", move |query| {
            let answer = answer(outbound::explain(&leaving, &query));
            async move { answer }
        })
        .get("/explain/inbound", move |query| {
            let answer = answer(inbound::explain(&entering, &query));
            async move { answer }
        })
}

fn answer(explained: Result<Explanation, ExplainError>) -> Reply {
    let explanation = match explained {
        Ok(explanation) => explanation,
        Err(error @ ExplainError::Parameter { .. }) => {
            return text(StatusCode::BAD_REQUEST, format!("{error}\n"));
        }
        Err(error @ ExplainError::NotServed(_)) => return text(StatusCode::NOT_FOUND, format!("{error}\n")),
    };
    match serde_json::to_vec(&explanation) {
        Ok(body) => reply(StatusCode::OK, "application/json", body.into()),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn parameter<'q>(query: &'q Query, name: &'static str) -> Result<&'q str, ExplainError> {
    query.get(name).ok_or_else(|| ExplainError::Parameter { name, what: "it is missing".to_owned() })
}

fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(
    name: &'static str,
    value: &str,
) -> Result<T, ExplainError> {
    value
        .parse()
        .map_err(|error: T::Err| ExplainError::Parameter { name, what: format!("{value:?}: {error}") })
}

/// The pod of this node that `pod` names, as `NAMESPACE/NAME`; also by the name of its owner, such as its Deployment.
fn pod(proxy: &Proxy, query: &Query) -> Result<Arc<Pod>, ExplainError> {
    let wanted = parameter(query, "pod")?;
    let pods = proxy.local.all();
    let mut named = pods.iter().filter(|pod| {
        wanted.split_once('/') == Some((pod.info().namespace.as_str(), pod.info().name.as_str()))
    });
    if let Some(pod) = named.next() {
        return Ok(pod.clone());
    }
    let snapshot = proxy.directory.load();
    let mut owned = pods.iter().filter(|pod| {
        snapshot.workload(pod.workload().as_str()).is_some_and(|workload| is_of(workload, wanted))
    });
    owned.next().cloned().ok_or_else(|| ExplainError::NotServed(wanted.to_owned()))
}

/// Whether `NAMESPACE/NAME` is a workload, or its owner.
fn is_of(workload: &Workload, wanted: &str) -> bool {
    let names = [&workload.name, &workload.workload_name];
    wanted.split_once('/').is_some_and(|(namespace, name)| {
        *workload.namespace == *namespace && names.iter().any(|it| ***it == *name)
    })
}

/// The pod's own workload, or why nothing of it is let in or out.
fn workload(proxy: &Proxy, pod: &Pod) -> Result<Arc<Workload>, String> {
    if !*proxy.synced.borrow() {
        return Err(
            "the control plane has not sent its first state yet: until then nothing is let in or out"
                .to_owned(),
        );
    }
    let snapshot = proxy.directory.load();
    let own = snapshot.workload(pod.workload().as_str()).filter(|own| own.identity == *pod.identity());
    own.cloned().ok_or_else(|| format!("the control plane has not sent workload {} yet", pod.workload()))
}

/// A workload as explanations name it.
fn named(workload: &Workload) -> Named {
    Named {
        uid: workload.uid.to_string(),
        namespace: workload.namespace.to_string(),
        name: workload.name.to_string(),
        node: workload.node.to_string(),
    }
}
