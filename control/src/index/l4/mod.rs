//! Objects to the resources of node proxies, with findings for the objects' authors. Each function computes what one
//! object comes to; what it looks at it notes by the reader.

pub(super) mod authentication;
pub(super) mod authorization;
pub(super) mod endpoints;
pub(super) mod entries;
mod ownership;
pub(super) mod required;
pub(super) mod services;
pub(super) mod waypoints;
pub(super) mod wire;
pub(super) mod workloads;

use super::{Finding, L7DenyAtL4, Settings, l7, outputs, reader, store};
