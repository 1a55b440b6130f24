//! What a PodCertificateRequest asks for, and whether it may have it. No I/O.
//!
//! The API server vouches for a request: it admits one only from the kubelet of the pod's node, for a pod that is bound to that node.
//! It is compared with the pods that the control plane sees all the same.

use std::time::{Duration, SystemTime};

use ambit_ca::{RequestError, SignError};
use ambit_identity::{SpiffeId, TrustDomain};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use kube::api::DynamicObject;
use serde_json::Value;

use crate::index::PodPlacement;
use crate::object::NamespacedName;

/// How long a pod may be unknown: the watch of pods may be behind that of requests. A denial is final, and Kubernetes removes
/// a request without an answer after 15 minutes.
const PATIENCE: Duration = Duration::from_secs(600);
/// What the API server takes for a request that names no longest lifetime.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// A request, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) uid: String,
    pub(super) created: Option<SystemTime>,
    pub(super) signer: String,
    pub(super) pod_name: String,
    pub(super) pod_uid: String,
    pub(super) service_account: String,
    pub(super) node: String,
    /// Longest time from begin to end of validity.
    pub(super) max_lifetime: Duration,
    /// PKCS #10, DER.
    pub(super) signing_request: Option<Vec<u8>>,
    /// SubjectPublicKeyInfo, DER, of which the API server has verified that the pod's kubelet holds the private key (v1beta1).
    pub(super) verified_key: Option<Vec<u8>>,
    /// Keys of what the pod's author passes on to the signer.
    pub(super) user_annotations: Vec<String>,
    /// Whether it was issued, denied or failed.
    pub(super) is_answered: bool,
}

/// What is done with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict<T> {
    /// Its certificate is signed.
    Sign(T),
    /// It never gets one.
    Refuse(Refusal),
    /// It is looked at again.
    Wait,
}

/// Why a request gets no certificate, as a condition of its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    /// `Denied`, or `Failed` where the fault is ours.
    pub(super) condition: &'static str,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

impl Refusal {
    fn denied(reason: &'static str, message: impl Into<String>) -> Self {
        Self { condition: "Denied", reason, message: message.into() }
    }

    pub(super) fn without_key() -> Self {
        Self::denied("MalformedRequest", "it has neither a signing request nor a public key")
    }

    pub(super) fn too_short() -> Self {
        let message = "the control plane's maxCertificateLifetime, or what its own certificate has left, is less than the hour \
                       that the API demands";
        Self { condition: "Failed", reason: "LifetimeTooShort", message: message.to_owned() }
    }

    /// Why the authority did not sign.
    pub(super) fn of(error: &SignError) -> Self {
        match error {
            SignError::Request(RequestError::Key) => {
                Self::denied("UnsupportedKeyType", "use keyType ECDSAP256 or ECDSAP384")
            }
            SignError::Request(error) => Self::denied("MalformedRequest", error.to_string()),
            SignError::Expired | SignError::Library { .. } => {
                Self { condition: "Failed", reason: "SigningFailed", message: error.to_string() }
            }
        }
    }
}

impl Request {
    /// Reads an object of the API server; `None` if it has no name.
    pub(super) fn read(object: DynamicObject) -> Option<(NamespacedName, Self)> {
        let DynamicObject { metadata, data, .. } = object;
        let name = NamespacedName::new(metadata.namespace?, metadata.name?);
        let spec = &data["spec"];
        let text = |key: &str| spec[key].as_str().unwrap_or_default().to_owned();
        let bytes = |key: &str| {
            let encoded = spec[key].as_str().filter(|text| !text.is_empty())?;
            BASE64_STANDARD.decode(encoded).ok()
        };
        let conditions = data["status"]["conditions"].as_array();
        let is_terminal =
            |condition: &Value| matches!(condition["type"].as_str(), Some("Issued" | "Denied" | "Failed"));
        let request = Self {
            uid: metadata.uid.unwrap_or_default(),
            created: metadata.creation_timestamp.map(|time| time.0.into()),
            signer: text("signerName"),
            pod_name: text("podName"),
            pod_uid: text("podUID"),
            service_account: text("serviceAccountName"),
            node: text("nodeName"),
            max_lifetime: spec["maxExpirationSeconds"].as_u64().map_or(DEFAULT_LIFETIME, Duration::from_secs),
            signing_request: bytes("stubPKCS10Request"),
            verified_key: bytes("pkixPublicKey"),
            user_annotations: spec["unverifiedUserAnnotations"]
                .as_object()
                .map(|annotations| annotations.keys().cloned().collect())
                .unwrap_or_default(),
            is_answered: conditions.is_some_and(|conditions| conditions.iter().any(is_terminal)),
        };
        Some((name, request))
    }
}

/// Decides whose certificate is signed. `placement` is where the pod of that name is, if it is alive.
pub(super) fn judge(
    request: &Request,
    namespace: &str,
    placement: Option<&PodPlacement>,
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Verdict<SpiffeId> {
    if let Some(key) = request.user_annotations.first() {
        let message = format!("no annotation has a meaning to this signer; there is {key:?}");
        return Verdict::Refuse(Refusal::denied("InvalidUnverifiedUserAnnotations", message));
    }
    let is_it = |placement: &&PodPlacement| !placement.uid.is_empty() && *placement.uid == *request.pod_uid;
    let Some(placement) = placement.filter(is_it) else {
        let age = request.created.and_then(|created| now.duration_since(created).ok()).unwrap_or_default();
        if age < PATIENCE {
            return Verdict::Wait;
        }
        let message = "no live pod has this name and uid; static pods have no identity";
        return Verdict::Refuse(Refusal::denied("PodNotFound", message));
    };
    if *placement.service_account != *request.service_account || *placement.node != *request.node {
        let message = "the pod has another service account, or runs on another node";
        return Verdict::Refuse(Refusal::denied("PodMismatch", message));
    }
    match SpiffeId::new(trust_domain.as_str(), namespace, &placement.service_account) {
        Ok(identity) => Verdict::Sign(identity),
        Err(error) => Verdict::Refuse(Refusal::denied("NoIdentity", error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(spec: &Value) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "certificates.k8s.io/v1", "kind": "PodCertificateRequest",
            "metadata": { "name": "r", "namespace": "shop", "uid": "1", "creationTimestamp": "2026-01-01T00:00:00Z" },
            "spec": spec,
        }))
        .unwrap()
    }

    fn spec() -> Value {
        json!({
            "signerName": "ambit.dev/workload", "podName": "reviews-1", "podUID": "p1", "serviceAccountName": "reviews",
            "serviceAccountUID": "s1", "nodeName": "n1", "nodeUID": "u1", "maxExpirationSeconds": 7200,
            "stubPKCS10Request": BASE64_STANDARD.encode("request"),
        })
    }

    fn verdict(spec: &Value, placement: Option<(&str, &str, &str)>, age: u64) -> Verdict<SpiffeId> {
        let (name, request) = Request::read(object(spec)).unwrap();
        let placement = placement.map(|(uid, account, node)| PodPlacement {
            node: node.into(),
            service_account: account.into(),
            uid: uid.into(),
        });
        let now = request.created.unwrap() + Duration::from_secs(age);
        judge(&request, &name.namespace, placement.as_ref(), &TrustDomain::new("td.example").unwrap(), now)
    }

    fn reason(verdict: Verdict<SpiffeId>) -> &'static str {
        match verdict {
            Verdict::Refuse(refusal) => refusal.reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_live_pod_gets_the_identity_of_its_account() {
        let Verdict::Sign(identity) = verdict(&spec(), Some(("p1", "reviews", "n1")), 0) else {
            panic!("not signed")
        };
        assert_eq!(identity.as_str(), "spiffe://td.example/ns/shop/sa/reviews");
    }

    #[test]
    fn a_pod_that_is_not_what_the_request_says_gets_nothing() {
        assert_eq!(reason(verdict(&spec(), Some(("p1", "other", "n1")), 0)), "PodMismatch");
        assert_eq!(reason(verdict(&spec(), Some(("p1", "reviews", "n2")), 0)), "PodMismatch");
        for unknown in [None, Some(("p2", "reviews", "n1")), Some(("", "reviews", "n1"))] {
            assert_eq!(verdict(&spec(), unknown, 599), Verdict::Wait, "its event may be late");
            assert_eq!(reason(verdict(&spec(), unknown, 601)), "PodNotFound");
        }
    }

    #[test]
    fn annotations_without_a_meaning_are_refused() {
        let mut with = spec();
        with["unverifiedUserAnnotations"] = json!({ "example.com/dns-name": "x" });
        let verdict = verdict(&with, Some(("p1", "reviews", "n1")), 0);
        assert_eq!(reason(verdict), "InvalidUnverifiedUserAnnotations");
    }

    #[test]
    fn an_answered_request_is_recognised() {
        let mut answered = object(&spec());
        answered.data["status"] = json!({ "conditions": [{ "type": "Denied", "status": "True" }] });
        assert!(Request::read(answered).unwrap().1.is_answered);
        let (_, request) = Request::read(object(&spec())).unwrap();
        assert!(!request.is_answered);
        assert_eq!((request.signing_request.as_deref(), request.verified_key), (Some(&b"request"[..]), None));
        assert_eq!(request.max_lifetime, Duration::from_secs(7200));
    }

    #[test]
    fn an_unsupported_key_names_the_supported_ones() {
        let refusal = Refusal::of(&SignError::Request(RequestError::Key));
        assert_eq!((refusal.condition, refusal.reason), ("Denied", "UnsupportedKeyType"));
        assert!(refusal.message.contains("ECDSAP256"));
        assert_eq!(Refusal::of(&SignError::Expired).condition, "Failed");
    }
}
