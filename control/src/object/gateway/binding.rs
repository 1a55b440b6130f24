//! Which waypoint an object asks for, from its labels and annotations.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::object::NamespacedName;
use crate::object::meta::{Labels, annotation};

const USE_WAYPOINT: &str = "istio.io/use-waypoint";
const USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
const CANARY: &str = "istio.io/use-waypoint-canary";
const CANARY_NAMESPACE: &str = "istio.io/use-waypoint-canary-namespace";
pub(crate) const CANARY_WEIGHT: &str = "istio.io/use-waypoint-canary-weight";
const INGRESS: &str = "istio.io/ingress-use-waypoint";
const REQUIRE: &str = "ambit.dev/require-waypoint";
const FAILURE: &str = "ambit.dev/waypoint-failure";

/// What `istio.io/use-waypoint` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// `none`: no waypoint, whatever the namespace says.
    OptOut,
    /// This gateway.
    Named(NamespacedName),
}

/// A second waypoint that gets a part of the connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canary {
    /// The gateway.
    pub gateway: NamespacedName,
    /// Its share in per cent, 0 to 100; `None` where none that can be was given.
    pub weight: Option<u32>,
}

/// Everything that an object says about its waypoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WaypointBinding {
    /// The waypoint; `None` leaves it to the namespace.
    pub choice: Option<Choice>,
    /// A canary beside it.
    pub canary: Option<Canary>,
    /// Whether ingress goes through it too; `None` leaves it to the namespace.
    pub ingress: Option<bool>,
    /// Whether connections may go directly when the waypoint is missing.
    pub failure_open: bool,
    /// Whether pods accept connections through the waypoint only; `None` leaves it to the namespace.
    pub required: Option<bool>,
    /// Whether what says so is neither `true` nor `false`.
    pub required_unreadable: bool,
}

impl WaypointBinding {
    /// The waypoints that it names.
    pub fn names(&self) -> impl Iterator<Item = &NamespacedName> {
        let primary = self.choice.iter().filter_map(|choice| match choice {
            Choice::Named(name) => Some(name),
            Choice::OptOut => None,
        });
        primary.chain(self.canary.iter().map(|canary| &canary.gateway))
    }

    /// The binding of something that has labels in `namespace` and is no object of its own.
    pub fn of_labels(labels: &Labels, namespace: &Arc<str>) -> WaypointBinding {
        WaypointBinding::read(labels, &ObjectMeta::default(), namespace)
    }

    /// Reads the binding of an object that lives in, or is, `namespace`.
    pub fn read(labels: &Labels, meta: &ObjectMeta, namespace: &Arc<str>) -> WaypointBinding {
        let gateway = |name: &str, of: Option<&str>| {
            let namespace = of.filter(|n| !n.is_empty()).map_or_else(|| namespace.clone(), Arc::from);
            NamespacedName::new(namespace, name)
        };
        let choice = match labels.get(USE_WAYPOINT) {
            None | Some("") => None,
            Some("none") => Some(Choice::OptOut),
            Some(name) => Some(Choice::Named(gateway(name, labels.get(USE_WAYPOINT_NAMESPACE)))),
        };
        let canary = match labels.get(CANARY) {
            None | Some("" | "none") => None,
            Some(name) => Some(Canary {
                gateway: gateway(name, labels.get(CANARY_NAMESPACE)),
                weight: annotation(meta, CANARY_WEIGHT)
                    .and_then(|weight| weight.parse().ok())
                    .filter(|weight| *weight <= 100),
            }),
        };
        // As a label or as an annotation: one that is overlooked would leave a way open.
        let required = labels.get(REQUIRE).or_else(|| annotation(meta, REQUIRE));
        WaypointBinding {
            required: required.map(|value| value != "false"),
            required_unreadable: required.is_some_and(|value| !matches!(value, "true" | "false")),
            choice,
            canary,
            ingress: labels.get(INGRESS).map(|v| v == "true"),
            failure_open: annotation(meta, FAILURE) == Some("open"),
        }
    }
}
