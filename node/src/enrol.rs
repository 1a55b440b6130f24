//! Which pods are enrolled, and with which options: decided from labels, annotations and the runtime alone.
//!
//! Pure; the sources of pods call it for every change.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::redirect::{Options, OtherProtocols};

/// Label on pods and namespaces.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Status annotation on pods, written by the agent's caller: that of [`PodState`](crate::PodState::annotation) or of
/// [`Reason`].
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
/// Annotation that a sidecar's injector leaves on a pod.
pub const SIDECAR_STATUS: &str = "sidecar.istio.io/status";
/// Annotation of the object that a kubelet creates for a static pod.
pub const MIRROR: &str = "kubernetes.io/config.mirror";
/// Annotation: `true` leaves inbound connections alone.
pub const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
/// Annotation: `true` or `false`, over the global setting.
pub const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
/// Annotation: interfaces, separated by commas, whose traffic counts as the pod's own.
pub const VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";
/// Annotation on namespaces: what becomes of packets that no tunnel carries. `allow` or none lets them pass, any other
/// value drops them.
pub const OTHER_PROTOCOLS: &str = "ambit.dev/other-protocols";

/// The properties of a pod that the decision depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace's name.
    pub namespace: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its namespace's annotations.
    pub namespace_annotations: BTreeMap<String, String>,
    /// Whether it shares the node's network namespace.
    pub host_network: bool,
    /// The handler of its RuntimeClass, if it names one.
    pub runtime_handler: Option<String>,
}

/// The mesh's settings that the decision depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Namespaces of which no pod is ever enrolled.
    pub excluded_namespaces: BTreeSet<String>,
    /// Handlers of RuntimeClasses whose pods' packets do not pass the rules of their network namespace. A `*` at the end
    /// stands for any characters.
    pub unsupported_runtimes: BTreeSet<String>,
    /// Whether DNS is captured where a pod says nothing.
    pub dns_capture: bool,
    /// Whether the proxy offers SOCKS5 in pods.
    pub socks5: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let excluded = ["kube-system", "ambit-system"];
        // gVisor has a network stack of its own; Kata hands the interface to a virtual machine.
        let unsupported = ["runsc", "runsc-*", "gvisor", "kata", "kata-*"];
        Self {
            excluded_namespaces: excluded.into_iter().map(String::from).collect(),
            unsupported_runtimes: unsupported.into_iter().map(String::from).collect(),
            dns_capture: true,
            socks5: false,
        }
    }
}

/// Whether a pod is enrolled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Enrolled, with these options.
    In(Options),
    /// Not enrolled.
    Out(Reason),
}

/// Why a pod is not enrolled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It shares the node's network namespace.
    HostNetwork,
    /// It is a static pod, which has no service account and so no identity.
    StaticPod,
    /// It has a sidecar.
    Sidecar,
    /// Its namespace is excluded.
    ExcludedNamespace,
    /// Its own label names another mode.
    PodLabel,
    /// Neither it nor its namespace is labelled.
    NotLabelled,
    /// It is labelled, but its packets do not pass the rules of its network namespace.
    UnsupportedRuntime,
}

impl Reason {
    /// The value of the annotation [`REDIRECTION`], where the user asked for something that is not done; `None`: no
    /// annotation.
    pub fn annotation(self) -> Option<&'static str> {
        match self {
            Self::UnsupportedRuntime => Some("unsupported-runtime"),
            Self::HostNetwork
            | Self::StaticPod
            | Self::Sidecar
            | Self::ExcludedNamespace
            | Self::PodLabel
            | Self::NotLabelled => None,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HostNetwork => "it uses the host's network",
            Self::StaticPod => "it is a static pod, which has no service account",
            Self::Sidecar => "it has a sidecar",
            Self::ExcludedNamespace => "its namespace is excluded",
            Self::PodLabel => "its label istio.io/dataplane-mode says so",
            Self::NotLabelled => "neither it nor its namespace has istio.io/dataplane-mode: ambient",
            Self::UnsupportedRuntime => "packets of its container runtime do not pass its network namespace",
        })
    }
}

/// Decides about a pod.
pub fn enrolled(pod: &Pod, namespace_labels: &BTreeMap<String, String>, settings: &Settings) -> Decision {
    let Pod { namespace, labels, annotations, namespace_annotations, host_network, runtime_handler } = pod;
    if *host_network {
        return Decision::Out(Reason::HostNetwork);
    }
    if annotations.contains_key(MIRROR) {
        return Decision::Out(Reason::StaticPod);
    }
    if annotations.contains_key(SIDECAR_STATUS) {
        return Decision::Out(Reason::Sidecar);
    }
    if settings.excluded_namespaces.contains(namespace) {
        return Decision::Out(Reason::ExcludedNamespace);
    }
    match labels.get(DATAPLANE_MODE).map(String::as_str) {
        Some("ambient") => {}
        // Any other value on the pod is a choice of its own: `none`, or another mode.
        Some(word) if !word.is_empty() => return Decision::Out(Reason::PodLabel),
        _ if namespace_labels.get(DATAPLANE_MODE).is_some_and(|mode| mode == "ambient") => {}
        _ => return Decision::Out(Reason::NotLabelled),
    }
    if runtime_handler.as_deref().is_some_and(|handler| is_unsupported(handler, settings)) {
        return Decision::Out(Reason::UnsupportedRuntime);
    }
    let other_protocols = match namespace_annotations.get(OTHER_PROTOCOLS).map(|value| value.trim()) {
        None | Some("allow") => OtherProtocols::Allow,
        Some(_) => OtherProtocols::Deny,
    };
    Decision::In(Options { other_protocols, ..options(annotations, settings) })
}

fn is_unsupported(handler: &str, settings: &Settings) -> bool {
    settings.unsupported_runtimes.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(prefix) => handler.starts_with(prefix),
        None => handler == pattern,
    })
}

fn options(annotations: &BTreeMap<String, String>, settings: &Settings) -> Options {
    let flag = |name: &str| match annotations.get(name).map(|value| value.trim()) {
        Some("true") => Some(true),
        Some("false") => Some(false),
        _ => None,
    };
    let interfaces = annotations.get(VIRTUAL_INTERFACES).map(String::as_str).unwrap_or_default();
    Options {
        dns_capture: flag(DNS_CAPTURE).unwrap_or(settings.dns_capture),
        inbound_capture: flag(BYPASS_INBOUND) != Some(true),
        virtual_interfaces: interfaces
            .split(',')
            .map(str::trim)
            // netdevice(7): a name is at most 15 bytes; a longer one can't exist.
            .filter(|name| !name.is_empty() && name.len() < libc::IFNAMSIZ)
            .map(String::from)
            .collect(),
        socks5: settings.socks5,
        other_protocols: OtherProtocols::Allow,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn decide(pod: &[(&str, &str)], namespace: &[(&str, &str)], annotations: &[(&str, &str)]) -> Decision {
        let pod = Pod {
            namespace: "shop".into(),
            labels: map(pod),
            annotations: map(annotations),
            ..Pod::default()
        };
        enrolled(&pod, &map(namespace), &Settings::default())
    }

    const AMBIENT: (&str, &str) = (DATAPLANE_MODE, "ambient");
    const NONE: (&str, &str) = (DATAPLANE_MODE, "none");

    #[test]
    fn the_pods_label_wins_over_its_namespaces() {
        assert_eq!(decide(&[AMBIENT], &[], &[]), Decision::In(Options::default()));
        assert_eq!(decide(&[], &[AMBIENT], &[]), Decision::In(Options::default()));
        assert_eq!(decide(&[AMBIENT], &[NONE], &[]), Decision::In(Options::default()));
        assert_eq!(decide(&[NONE], &[AMBIENT], &[]), Decision::Out(Reason::PodLabel));
        assert_eq!(decide(&[], &[], &[]), Decision::Out(Reason::NotLabelled));
    }

    #[test]
    fn host_network_sidecars_and_excluded_namespaces_stay_out() {
        let mut pod = Pod { namespace: "kube-system".into(), labels: map(&[AMBIENT]), ..Pod::default() };
        let settings = Settings::default();
        assert_eq!(enrolled(&pod, &map(&[AMBIENT]), &settings), Decision::Out(Reason::ExcludedNamespace));
        pod.namespace = "shop".into();
        pod.host_network = true;
        assert_eq!(enrolled(&pod, &map(&[AMBIENT]), &settings), Decision::Out(Reason::HostNetwork));
        let sidecar = [(SIDECAR_STATUS, "{}")];
        assert_eq!(decide(&[AMBIENT], &[], &sidecar), Decision::Out(Reason::Sidecar));
    }

    #[test]
    fn pods_of_gvisor_and_kata_are_not_enrolled_and_say_so() {
        let with = |handler: &str, labels| Pod {
            namespace: "shop".into(),
            labels,
            runtime_handler: Some(handler.into()),
            ..Pod::default()
        };
        let settings = Settings::default();
        for handler in ["runsc", "gvisor", "kata", "kata-qemu"] {
            let decision = enrolled(&with(handler, map(&[AMBIENT])), &map(&[]), &settings);
            assert_eq!(decision, Decision::Out(Reason::UnsupportedRuntime), "{handler}");
            let unlabelled = enrolled(&with(handler, map(&[])), &map(&[]), &settings);
            assert_eq!(unlabelled, Decision::Out(Reason::NotLabelled), "{handler}");
        }
        let runc = enrolled(&with("runc", map(&[AMBIENT])), &map(&[]), &settings);
        assert_eq!(runc, Decision::In(Options::default()));
        assert_eq!(Reason::UnsupportedRuntime.annotation(), Some("unsupported-runtime"));
        assert_eq!(Reason::NotLabelled.annotation(), None);
    }

    #[test]
    fn annotations_set_the_options() {
        let annotations =
            [(BYPASS_INBOUND, "true"), (DNS_CAPTURE, "false"), (VIRTUAL_INTERFACES, "k6t-0, tap1,")];
        let wanted = Options {
            dns_capture: false,
            inbound_capture: false,
            virtual_interfaces: vec!["k6t-0".into(), "tap1".into()],
            ..Options::default()
        };
        assert_eq!(decide(&[AMBIENT], &[], &annotations), Decision::In(wanted));
        let unreadable = [(BYPASS_INBOUND, "yes"), (DNS_CAPTURE, "maybe")];
        assert_eq!(decide(&[AMBIENT], &[], &unreadable), Decision::In(Options::default()));
    }

    #[test]
    fn a_namespaces_annotation_denies_other_protocols() {
        let with = |value: &str| {
            let namespace_annotations = map(&[(OTHER_PROTOCOLS, value)]);
            let pod = Pod { namespace: "shop".into(), namespace_annotations, ..Pod::default() };
            match enrolled(&pod, &map(&[AMBIENT]), &Settings::default()) {
                Decision::In(options) => options.other_protocols,
                Decision::Out(reason) => panic!("{reason}"),
            }
        };
        assert_eq!(with("deny"), OtherProtocols::Deny);
        assert_eq!(with("allow"), OtherProtocols::Allow);
        assert_eq!(with("dney"), OtherProtocols::Deny);
    }
}
