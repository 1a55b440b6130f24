//! Kinds of Istio's API.

pub(super) mod authentication;
pub(super) mod authorization;
pub(super) mod entry;

use super::core::{cluster, service};
use super::gateway::binding;
use super::{NamespacedName, meta};
