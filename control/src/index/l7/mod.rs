//! Objects to the resources of waypoints, with findings for the objects' authors; as [`super::l4`] for node proxies.
//!
//! A waypoint sees what is below the root of its view: [`views`] says for each resource below which roots it is.

mod attachment;
mod authorization;
pub(super) mod backend_policies;
pub(super) mod backend_tls;
mod credentials;
pub(super) mod gateways;
pub(super) mod hosts;
pub(super) mod ingresses;
mod listener_filters;
pub(super) mod listener_sets;
mod listeners;
mod paths;
pub(super) mod policies;
pub(super) mod request_authentications;
pub(super) mod routes;
pub(super) mod telemetry;
pub(super) mod traffic_policies;
pub(super) mod views;
pub(super) mod virtual_services;

use super::{Finding, ListenerFacts, ListenerSetFacts, Settings, l4, outputs, reader};
