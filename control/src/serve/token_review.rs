//! Callers authenticated by the API server: it reviews their service account tokens (certificate contract).
//!
//! Answers are kept for a while, so that a proxy that asks for the certificates of all its pods is reviewed once. While
//! the API server is away, a token that it accepted before stays accepted until it expires. What cannot be a token for us
//! is refused without asking: strangers must not make work for the API server.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use ambit_ca::{AuthenticationError, Authenticator, Caller, Credentials, NodePods, PodRef};
use ambit_identity::{SpiffeId, TrustDomain};
use async_trait::async_trait;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo};
use kube::api::PostParams;
use kube::{Api, Client};
use parking_lot::Mutex;

use super::review_cache::{Known, ReviewCache, TokenId, UnverifiedClaims};
use super::review_turns::Turns;
use crate::api_server::{CallError, call};

/// How long a caller waits for its turn.
const PATIENCE: Duration = Duration::from_secs(5);
/// What a service account's user name begins with.
const USER_PREFIX: &str = "system:serviceaccount:";

/// Settings of reviews.
#[derive(Debug, Clone)]
pub struct ReviewConfig {
    /// Audiences of which a token must be for one.
    pub audiences: Vec<String>,
    /// Trust domain of the identities that tokens prove.
    pub trust_domain: TrustDomain,
    /// Callers that name another cluster are refused.
    pub cluster_id: String,
}

/// Counters of reviews.
#[derive(Debug, Default)]
pub struct ReviewMetrics {
    /// Tokens that the API server was asked about.
    pub(crate) asked: AtomicU64,
    /// Reviews that got no answer.
    pub(crate) failed: AtomicU64,
    /// Callers admitted by an older answer while the API server was away.
    pub(crate) stale: AtomicU64,
}

/// Asks the API server who shows a token.
#[derive(Clone)]
pub struct TokenReviewer {
    reviews: Api<TokenReview>,
    config: Arc<ReviewConfig>,
    /// Guards the answers alone; never held across an await.
    cache: Arc<Mutex<ReviewCache<Identified>>>,
    turns: Arc<Turns>,
    /// By which an older answer counts only while its pod lives.
    pods: Arc<dyn NodePods>,
    metrics: Arc<ReviewMetrics>,
}

/// Whom a token proves.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identified {
    identity: SpiffeId,
    pod: Option<PodRef>,
    node: Option<String>,
}

impl Identified {
    /// Whether the pod that the token is bound to may still live. A token that is bound to no pod outlives none.
    fn is_alive(&self, pods: &dyn NodePods) -> bool {
        let Some(pod) = self.pod.as_ref().filter(|_| pods.is_complete()) else { return true };
        pods.node_of(self.identity.namespace(), pod).is_some()
    }

    fn into_caller(self, credentials: &Credentials) -> Caller {
        let Identified { identity, pod, node } = self;
        Caller { identity, pod, node, cluster_id: credentials.cluster_id().to_owned() }
    }
}

impl TokenReviewer {
    /// Reviews by this client.
    pub fn new(client: Client, config: ReviewConfig, pods: Arc<dyn NodePods>) -> Self {
        Self {
            reviews: Api::all(client),
            config: Arc::new(config),
            cache: Arc::default(),
            turns: Arc::default(),
            pods,
            metrics: Arc::default(),
        }
    }

    /// Counters.
    pub fn metrics(&self) -> Arc<ReviewMetrics> {
        self.metrics.clone()
    }

    /// Asks the API server.
    async fn review(&self, token: &str) -> Result<TokenReviewStatus, CallError> {
        self.metrics.asked.fetch_add(1, Ordering::Relaxed);
        let spec =
            TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(self.config.audiences.clone()) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let answer = call(self.reviews.create(&PostParams::default(), &review)).await?;
        // Without a status it accepts nobody.
        Ok(answer.status.unwrap_or_default())
    }

    /// The older answer for a token that the API server gave no answer about. It counts only while the server is away,
    /// and while the pod that the token is bound to lives.
    fn older_answer(&self, stale: Option<Identified>, error: &CallError) -> Option<Identified> {
        stale.filter(|_| error.is_unavailable()).filter(|identified| identified.is_alive(&*self.pods))
    }

    async fn identify(&self, token: &str, peer: Option<IpAddr>) -> Result<Identified, AuthenticationError> {
        let now = SystemTime::now();
        let expires =
            UnverifiedClaims::read(token).and_then(|claims| claims.check(&self.config.audiences, now));
        let expires = expires.map_err(AuthenticationError::Refused)?;
        let id = TokenId::of(token);
        let known = self.cache.lock().get(&id, now);
        let stale = match known {
            Known::Fresh(answer) => return answer.map_err(AuthenticationError::Refused),
            Known::Stale(identified) => Some(identified),
            Known::Nothing => None,
        };
        // A turn that does not come says nothing about the API server, so an older answer does not count for it.
        let turn = tokio::time::timeout(PATIENCE, self.turns.take(peer, stale.is_some())).await;
        let Ok(_turn) = turn else {
            self.metrics.failed.fetch_add(1, Ordering::Relaxed);
            return Err(AuthenticationError::Unavailable("too many tokens wait for their review".to_owned()));
        };
        let status = match self.review(token).await {
            Ok(status) => status,
            Err(error) => {
                self.metrics.failed.fetch_add(1, Ordering::Relaxed);
                let reason = error.to_string();
                let Some(identified) = self.older_answer(stale, &error) else {
                    return Err(AuthenticationError::Unavailable(reason));
                };
                self.metrics.stale.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(caller = %identified.identity, reason, "token not reviewed; an older answer counts");
                return Ok(identified);
            }
        };
        let answer = identified(status, &self.config);
        self.cache.lock().insert(id, answer.clone(), expires, SystemTime::now());
        answer.map_err(AuthenticationError::Refused)
    }
}

impl std::fmt::Debug for TokenReviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenReviewer").field("config", &self.config).finish_non_exhaustive()
    }
}

#[async_trait]
impl Authenticator for TokenReviewer {
    async fn authenticate(&self, credentials: &Credentials) -> Result<Caller, AuthenticationError> {
        let cluster = credentials.cluster_id();
        if !cluster.is_empty() && cluster != self.config.cluster_id {
            return Err(AuthenticationError::Cluster(cluster.to_owned()));
        }
        let identified = self.identify(credentials.bearer(), credentials.peer()).await?;
        Ok(identified.into_caller(credentials))
    }
}

/// Whom the answer of a review names; the error says why it is nobody.
fn identified(status: TokenReviewStatus, config: &ReviewConfig) -> Result<Identified, String> {
    let TokenReviewStatus { authenticated, audiences, error, user } = status;
    if authenticated != Some(true) {
        return Err(error.unwrap_or_else(|| "the API server does not accept it".to_owned()));
    }
    // The API's documentation: an answer without one of the audiences asked for is not about them.
    if !audiences.iter().flatten().any(|audience| config.audiences.contains(audience)) {
        return Err("it is for another audience".to_owned());
    }
    let UserInfo { username, extra, .. } = user.unwrap_or_default();
    let username = username.unwrap_or_default();
    let account = username.strip_prefix(USER_PREFIX).and_then(|rest| rest.split_once(':'));
    let (namespace, account) = account.ok_or_else(|| format!("user {username:?} is no service account"))?;
    let identity = SpiffeId::new(config.trust_domain.as_str(), namespace, account);
    let extra = extra.unwrap_or_default();
    let text = |key: &str| extra.get(&format!("authentication.kubernetes.io/{key}"))?.first().cloned();
    let pod = text("pod-name").zip(text("pod-uid"));
    Ok(Identified {
        identity: identity.map_err(|error| error.to_string())?,
        pod: pod.map(|(name, uid)| PodRef { name, uid }),
        node: text("node-name"),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::index::PodPlacement;
    use crate::object::NamespacedName;
    use crate::serve::live_pods::LivePods;

    fn config() -> ReviewConfig {
        ReviewConfig {
            audiences: vec!["istio-ca".to_owned()],
            trust_domain: TrustDomain::new("cluster.local").unwrap(),
            cluster_id: "Kubernetes".to_owned(),
        }
    }

    fn accepted(username: &str, audience: &str) -> TokenReviewStatus {
        let extra = [("pod-name", "ztunnel-x"), ("pod-uid", "u1"), ("node-name", "n1")];
        let extra: BTreeMap<String, Vec<String>> = extra
            .into_iter()
            .map(|(key, value)| (format!("authentication.kubernetes.io/{key}"), vec![value.to_owned()]))
            .collect();
        let user =
            UserInfo { username: Some(username.to_owned()), extra: Some(extra), ..UserInfo::default() };
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![audience.to_owned()]),
            user: Some(user),
            ..TokenReviewStatus::default()
        }
    }

    #[test]
    fn a_service_account_is_named_with_its_pod_and_node() {
        let status = accepted("system:serviceaccount:ambit-system:ztunnel", "istio-ca");
        let caller = identified(status, &config()).unwrap();
        assert_eq!(caller.identity.as_str(), "spiffe://cluster.local/ns/ambit-system/sa/ztunnel");
        assert_eq!(caller.pod, Some(PodRef { name: "ztunnel-x".to_owned(), uid: "u1".to_owned() }));
        assert_eq!(caller.node.as_deref(), Some("n1"));
    }

    #[test]
    fn an_older_answer_counts_only_while_its_pod_lives() {
        let caller =
            identified(accepted("system:serviceaccount:ambit-system:ztunnel", "istio-ca"), &config());
        let caller = caller.unwrap();
        let pods = LivePods::new(true);
        assert!(!caller.is_alive(&pods));
        let (node, service_account) = (Arc::from("n1"), Arc::from("ztunnel"));
        let placement = |uid: &str| {
            let (node, service_account) = (Arc::clone(&node), Arc::clone(&service_account));
            Some(PodPlacement { node, service_account, uid: uid.into() })
        };
        let name = NamespacedName::new("ambit-system", "ztunnel-x");
        pods.apply(vec![(name.clone(), placement("u1"))]);
        assert!(caller.is_alive(&pods));
        pods.apply(vec![(name, placement("u2"))]);
        assert!(!caller.is_alive(&pods));
        assert!(caller.is_alive(&LivePods::default()), "a directory need not have the pod");
    }

    #[test]
    fn others_than_service_accounts_of_our_audience_are_nobody() {
        let of = |user, audience| identified(accepted(user, audience), &config());
        assert!(of("system:serviceaccount:a:b", "api").unwrap_err().contains("audience"));
        assert!(of("system:node:n1", "istio-ca").unwrap_err().contains("no service account"));
        let refused = TokenReviewStatus { error: Some("expired".to_owned()), ..TokenReviewStatus::default() };
        assert_eq!(identified(refused, &config()).unwrap_err(), "expired");
    }
}
