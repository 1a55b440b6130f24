//! Signs PodCertificateRequests of `ambit.dev/workload`: kubelet makes one for each `podCertificate` volume, and a pod gets the
//! identity of its service account as files.
//!
//! Only the holder of the lease signs. `judge` decides from the request and the live pods; this file watches and writes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use ambit_ca::Authority;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::watcher::{self, Config, watcher};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::WriteMetrics;
use super::pending_requests::PendingRequests;
use super::pod_request::{Refusal, Request, Verdict, judge};
use crate::api_server::{Backoff, CallError, FIELD_MANAGER, call, code};
use crate::kind::{KindInfo, Needed, Scope};
use crate::object::NamespacedName;
use crate::serve::live_pods::LivePods;
use crate::source::kubernetes::served_version;
use crate::write::trust_bundle::SIGNER;

/// How often the kind is looked for where the API server does not serve it.
const LOOK: Duration = Duration::from_secs(30);
/// Requests that are answered at the same time.
const CONCURRENT: usize = 8;
/// Requests that wait at the same time.
const CAPACITY: usize = 8192;
/// Part of a certificate's lifetime after which kubelet asks for the next one, with jitter.
const REFRESH: std::ops::Range<f64> = 0.5..0.6;

const KIND: KindInfo = KindInfo {
    name: "PodCertificateRequest",
    plural: "podcertificaterequests",
    group: "certificates.k8s.io",
    versions: &["v1", "v1beta1"],
    scope: Scope::Namespaced,
    needed: Needed::Everything,
};

type Events = BoxStream<'static, watcher::Result<watcher::Event<DynamicObject>>>;

/// Answers the requests.
pub(crate) struct PodCertificateSigner {
    pub(crate) client: Client,
    pub(crate) authority: Authority,
    pub(crate) live_pods: Arc<LivePods>,
    pub(crate) metrics: Arc<WriteMetrics>,
}

impl PodCertificateSigner {
    /// Signs while `leads` is true; ends with its sender.
    pub(crate) async fn run(self, mut leads: watch::Receiver<bool>) {
        while leads.wait_for(|leads| *leads).await.is_ok() {
            let mut lost = leads.clone();
            tokio::select! {
                () = self.run_as_leader() => {}
                _ = lost.wait_for(|leads| !*leads) => {}
            }
        }
    }

    async fn run_as_leader(&self) {
        let mut backoff = Backoff::default();
        loop {
            match served_version(&self.client, &KIND).await {
                Ok(Some(version)) => {
                    self.follow(version).await;
                    tokio::time::sleep(backoff.pause()).await;
                }
                Ok(None) => {
                    backoff.reset();
                    tokio::time::sleep(LOOK).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "the API server does not say whether it serves PodCertificateRequests");
                    tokio::time::sleep(backoff.pause()).await;
                }
            }
        }
    }

    /// Answers what is asked for, until the kind is not served in this version any more.
    async fn follow(&self, version: &str) {
        let gvk = GroupVersionKind::gvk(KIND.group, version, KIND.name);
        let resource = ApiResource::from_gvk_with_plural(&gvk, KIND.plural);
        let mut events = events_of(&self.client, &resource);
        let (mut pending, mut backoff) = (PendingRequests::new(CAPACITY), Backoff::default());
        loop {
            let (due, list_due) = (at(pending.next_turn()), at(pending.list_due()));
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        backoff.reset();
                        pending.handle_event(event, Instant::now());
                    }
                    Some(Err(error)) if is_not_served(&error) => return,
                    Some(Err(error)) => {
                        tracing::warn!(%error, "PodCertificateRequests cannot be watched; trying again");
                        tokio::time::sleep(backoff.pause()).await;
                    }
                    None => return,
                },
                () = due => self.answer(&mut pending, &resource).await,
                () = list_due => {
                    events = events_of(&self.client, &resource);
                    pending.handle_event(watcher::Event::Init, Instant::now());
                }
            }
        }
    }

    /// Answers the requests that are due.
    async fn answer(&self, pending: &mut PendingRequests, resource: &ApiResource) {
        let due = pending.due(Instant::now(), CONCURRENT);
        let answer = |(name, request): (NamespacedName, Request)| {
            async move { (self.answer_one(&name, &request, resource).await, name) }.boxed()
        };
        let answers: Vec<BoxFuture<'_, (Result<bool, CallError>, NamespacedName)>> =
            due.into_iter().map(answer).collect();
        let answers: Vec<_> = stream::iter(answers).buffer_unordered(CONCURRENT).collect().await;
        for (outcome, name) in answers {
            match outcome {
                Ok(true) => pending.remove(&name),
                Ok(false) => pending.put_off(&name, Instant::now()),
                Err(error) => {
                    self.metrics.failed.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(request = %name, %error, "PodCertificateRequest not answered");
                    if error.is_unavailable() || error.is_conflict() {
                        pending.put_off(&name, Instant::now());
                    } else {
                        // It is gone, has an answer, or the API server refuses ours, as it would again.
                        pending.remove(&name);
                    }
                }
            }
        }
    }

    /// Answers one request; false if it must wait.
    async fn answer_one(
        &self,
        name: &NamespacedName,
        request: &Request,
        resource: &ApiResource,
    ) -> Result<bool, CallError> {
        let placement = self.live_pods.placement(&name.namespace, &request.pod_name);
        let trust_domain = self.authority.trust_domain();
        let verdict = judge(request, &name.namespace, placement.as_ref(), trust_domain, SystemTime::now());
        let (status, counter) = match self.sign(request, verdict) {
            Verdict::Wait => return Ok(false),
            Verdict::Refuse(refusal) => {
                tracing::warn!(request = %name, reason = refusal.reason, "{}", refusal.message);
                (refused(&refusal), &self.metrics.certificates_refused)
            }
            Verdict::Sign(status) => (status, &self.metrics.certificates_issued),
        };
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &name.namespace, resource);
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        // The uid keeps an answer from a request of the same name that came after.
        let patch = json!({ "metadata": { "uid": request.uid }, "status": status });
        call(api.patch_status(&name.name, &parameters, &Patch::Merge(patch))).await?;
        self.metrics.written.fetch_add(1, Ordering::Relaxed);
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    /// The status with the certificate, where one may be signed.
    fn sign(&self, request: &Request, verdict: Verdict<ambit_identity::SpiffeId>) -> Verdict<Value> {
        let identity = match verdict {
            Verdict::Sign(identity) => identity,
            Verdict::Wait => return Verdict::Wait,
            Verdict::Refuse(refusal) => return Verdict::Refuse(refusal),
        };
        // The time from begin to end may not exceed what was asked for.
        let lifetime = Some(request.max_lifetime.saturating_sub(self.authority.backdating()));
        let issued = match (&request.signing_request, &request.verified_key) {
            (Some(der), _) => self.authority.sign_der(der, &identity, lifetime),
            (None, Some(der)) => self.authority.sign_verified_key(der, &identity, lifetime),
            (None, None) => return Verdict::Refuse(Refusal::without_key()),
        };
        match issued {
            Ok(issued) => match status(&issued) {
                Some(status) => Verdict::Sign(status),
                None => Verdict::Refuse(Refusal::too_short()),
            },
            Err(error) => Verdict::Refuse(Refusal::of(&error)),
        }
    }
}

/// Waits until then; for ever where there is no such time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The status of an answered request; `None` if the certificate is shorter than the API takes.
fn status(issued: &ambit_ca::Issued) -> Option<Value> {
    const SHORTEST: Duration = Duration::from_secs(3600);
    // Certificates have whole seconds.
    let seconds = |time: SystemTime| {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        i64::try_from(since.as_secs()).ok()
    };
    let (begin, end) = (seconds(issued.not_before)?, seconds(issued.not_after)?);
    let lifetime = u64::try_from(end - begin).ok().map(Duration::from_secs)?;
    if lifetime < SHORTEST {
        return None;
    }
    let refresh = lifetime.mul_f64(rand::random_range(REFRESH)).as_secs();
    let text = |seconds: i64| Timestamp::from_second(seconds).ok().map(|time| time.to_string());
    // Roots are not part of the chain: they come with the ClusterTrustBundle.
    let chain = issued.chain.split_last().map(|(_, chain)| chain.concat())?;
    Some(json!({
        "conditions": [condition("Issued", "Signed", "signed by the mesh's certificate authority")],
        "certificateChain": chain,
        "notBefore": text(begin)?,
        "beginRefreshAt": text(begin.checked_add_unsigned(refresh)?)?,
        "notAfter": text(end)?,
    }))
}

fn refused(refusal: &Refusal) -> Value {
    json!({ "conditions": [condition(refusal.condition, refusal.reason, &refusal.message)] })
}

fn condition(kind: &str, reason: &str, message: &str) -> Value {
    let now = Timestamp::now().round(k8s_openapi::jiff::Unit::Second).unwrap_or_default().to_string();
    json!({ "type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now })
}

fn is_not_served(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => code(error) == Some(404),
        watcher::Error::WatchError(status) => status.code == 404,
        watcher::Error::NoResourceVersion => false,
    }
}

fn events_of(client: &Client, resource: &ApiResource) -> Events {
    let ours = Config::default().fields(&format!("spec.signerName={SIGNER}"));
    watcher(Api::<DynamicObject>::all_with(client.clone(), resource), ours).boxed()
}
