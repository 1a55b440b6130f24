//! The agent's admin interface: its own state and its pods', and the level of its log. `ambit check` and `ambit status` read it.

use ambit_telemetry::Admin;
use ambit_telemetry::http::Router;
use ambit_telemetry::logging::Logging;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::Agent;

/// The routes, for a server on the pod's loopback: whoever reaches it may set the log's level.
pub(super) fn routes(
    agent: Agent,
    installed: watch::Receiver<bool>,
    problem: watch::Receiver<String>,
    logging: &Logging,
) -> Router {
    let health = agent.clone();
    Admin::new()
        .section("health", move || serde_json::to_value(health.health()))
        .section("cni", move || Ok(cni(*installed.borrow(), &problem.borrow())))
        .section("pods", move || serde_json::to_value(agent.statuses()))
        .section("version", || Ok(json!({ "version": env!("CARGO_PKG_VERSION") })))
        .logging(logging.level.clone())
        .into_router()
}

/// Whether the plugin is installed, and why not.
fn cni(installed: bool, problem: &str) -> Value {
    let problem = Some(problem).filter(|problem| !problem.is_empty());
    json!({ "installed": installed, "problem": problem })
}
