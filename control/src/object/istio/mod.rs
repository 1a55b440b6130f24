//! Kinds of Istio's API.

pub(super) mod authentication;
pub(super) mod authorization;
pub(super) mod condition;
pub(super) mod destination_rule;
pub(super) mod entry;
mod fields;
pub(super) mod request_authentication;
pub(super) mod telemetry;
pub(super) mod virtual_service;
pub(super) mod virtual_service_delegate;
mod virtual_service_fields;
pub(super) mod virtual_service_http;
pub(super) mod virtual_service_tcp;

use super::core::{cluster, service};
use super::gateway::binding;
use super::{NamespacedName, meta};
