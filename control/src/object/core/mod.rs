//! Kinds of Kubernetes itself.

pub(super) mod cluster;
pub(super) mod endpoints;
pub(super) mod ingress;
pub(super) mod pod;
pub(super) mod secret;
pub(super) mod service;

use super::gateway::binding;
use super::{NamespacedName, meta};
