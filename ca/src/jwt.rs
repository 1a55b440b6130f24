//! Callers authenticated by a service account token, verified against a key set in a file.
//!
//! The tokens are those of Kubernetes: bound to a pod and, from 1.29 on, naming its node. The key set is
//! re-read when its file changes; a key set that cannot be read leaves the last good one in force.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ambit_identity::files::FileWatch;
use ambit_identity::{SpiffeId, TrustDomain};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;

use crate::authentication::{AuthenticationError, Authenticator, Caller, Credentials, PodRef};

/// Keys in a set; more are ignored with a warning. Also bounds the work for a token that names no key.
const MAX_KEYS: usize = 32;
/// Tolerated difference between clocks, seconds.
const LEEWAY_SECONDS: u64 = 30;
/// What the subject of a service account token begins with.
const SUBJECT_PREFIX: &str = "system:serviceaccount:";

/// Why a key set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JwtError {
    /// The file cannot be read.
    #[error("key set {path}: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: std::io::Error,
    },
    /// It is not a JSON Web Key Set.
    #[error("key set {path} is not one: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the parser found.
        reason: serde_json::Error,
    },
    /// No key in it can verify tokens.
    #[error("key set {path} has no key that can verify tokens")]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Settings of token verification.
#[derive(Debug, Clone)]
pub struct JwtConfig {
    /// JSON Web Key Set, re-read when it changes.
    pub jwks: PathBuf,
    /// Audiences of which a token must name one; `istio-ca` in the field.
    pub audiences: Vec<String>,
    /// Issuers of which a token must name one; empty: any.
    pub issuers: Vec<String>,
    /// Trust domain of the identities that tokens prove.
    pub trust_domain: TrustDomain,
    /// Cluster whose tokens these are: callers that name another are refused. None: any.
    pub cluster_id: Option<String>,
}

/// Verifies service account tokens against a key set.
#[derive(Clone)]
pub struct JwtAuthenticator(Arc<Shared>);

struct Shared {
    config: JwtConfig,
    keys: ArcSwap<Vec<Key>>,
}

struct Key {
    id: Option<String>,
    decoding: DecodingKey,
    validation: Validation,
}

impl JwtAuthenticator {
    /// Reads the key set; the future returned follows its file and is run for the process's life.
    ///
    /// # Errors
    /// [`JwtError`] if the key set cannot be read or has no usable key.
    pub async fn open(
        config: JwtConfig,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static), JwtError> {
        let watch = FileWatch::new(std::slice::from_ref(&config.jwks));
        let content = read(&config.jwks).await?;
        let keys = parse(&content, &config)?;
        let shared = Arc::new(Shared { config, keys: ArcSwap::from_pointee(keys) });
        Ok((Self(Arc::clone(&shared)), follow(shared, watch, content)))
    }

    /// Verifies with the keys of `jwks`, the content of a key set, for good: no file is read or followed.
    ///
    /// # Errors
    /// [`JwtError`] if it is no key set or has no usable key.
    pub fn with_key_set(config: JwtConfig, jwks: &[u8]) -> Result<Self, JwtError> {
        let keys = parse(jwks, &config)?;
        Ok(Self(Arc::new(Shared { config, keys: ArcSwap::from_pointee(keys) })))
    }
}

impl std::fmt::Debug for JwtAuthenticator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JwtAuthenticator").field("config", &self.0.config).finish_non_exhaustive()
    }
}

#[async_trait]
impl Authenticator for JwtAuthenticator {
    async fn authenticate(&self, credentials: &Credentials) -> Result<Caller, AuthenticationError> {
        let config = &self.0.config;
        if let Some(cluster) = &config.cluster_id
            && !credentials.cluster_id().is_empty()
            && credentials.cluster_id() != cluster
        {
            return Err(AuthenticationError::Cluster(credentials.cluster_id().to_owned()));
        }
        let claims = verify(&self.0.keys.load(), credentials.bearer())?;
        caller(claims, config, credentials)
    }
}

async fn follow(shared: Arc<Shared>, mut watch: FileWatch, mut seen: Vec<u8>) {
    loop {
        watch.changed().await;
        let content = match read(&shared.config.jwks).await {
            Ok(content) if content == seen => continue,
            Ok(content) => content,
            Err(error) => {
                tracing::warn!(%error, "key set not reloaded; the last good one stays in force");
                continue;
            }
        };
        match parse(&content, &shared.config) {
            Ok(keys) => {
                tracing::info!(keys = keys.len(), "key set loaded");
                shared.keys.store(Arc::new(keys));
            }
            Err(error) => tracing::warn!(%error, "key set not reloaded; the last good one stays in force"),
        }
        seen = content;
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, JwtError> {
    tokio::fs::read(path).await.map_err(|reason| JwtError::Read { path: path.to_owned(), reason })
}

#[derive(Deserialize)]
struct KeySet {
    keys: Vec<serde_json::Value>,
}

fn parse(content: &[u8], config: &JwtConfig) -> Result<Vec<Key>, JwtError> {
    let malformed = |reason| JwtError::Malformed { path: config.jwks.clone(), reason };
    let set: KeySet = serde_json::from_slice(content).map_err(malformed)?;
    let mut keys = Vec::new();
    for (position, value) in set.keys.into_iter().enumerate().take(MAX_KEYS) {
        // RFC 7517 §5: keys that are not understood are ignored.
        if let Some(key) = serde_json::from_value::<Jwk>(value).ok().as_ref().and_then(|jwk| key(jwk, config))
        {
            keys.push(key);
        } else {
            tracing::warn!(position, path = %config.jwks.display(), "key ignored: of no use for tokens");
        }
    }
    if keys.is_empty() {
        return Err(JwtError::Empty { path: config.jwks.clone() });
    }
    Ok(keys)
}

/// The key with the algorithms that belong to its kind; symmetric keys are none (RFC 8725 §3.2).
fn key(jwk: &Jwk, config: &JwtConfig) -> Option<Key> {
    use Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
    let algorithms = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => vec![RS256, RS384, RS512, PS256, PS384, PS512],
        AlgorithmParameters::EllipticCurve(parameters) => match parameters.curve {
            EllipticCurve::P256 => vec![ES256],
            EllipticCurve::P384 => vec![ES384],
            _ => return None,
        },
        AlgorithmParameters::OctetKeyPair(_) => vec![EdDSA],
        _ => return None,
    };
    let decoding = DecodingKey::from_jwk(jwk).ok()?;
    let mut validation = Validation::new(*algorithms.first()?);
    validation.algorithms = algorithms;
    validation.leeway = LEEWAY_SECONDS;
    validation.validate_nbf = true;
    validation.set_audience(&config.audiences);
    if config.issuers.is_empty() {
        validation.set_required_spec_claims(&["exp", "aud", "sub"]);
    } else {
        validation.set_issuer(&config.issuers);
        validation.set_required_spec_claims(&["exp", "aud", "sub", "iss"]);
    }
    Some(Key { id: jwk.common.key_id.clone(), decoding, validation })
}

#[derive(Debug, Deserialize)]
struct Claims {
    sub: String,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Option<KubernetesClaims>,
}

#[derive(Debug, Deserialize)]
struct KubernetesClaims {
    namespace: String,
    serviceaccount: NamedClaim,
    pod: Option<NamedClaim>,
    node: Option<NamedClaim>,
}

#[derive(Debug, Deserialize)]
struct NamedClaim {
    name: String,
    #[serde(default)]
    uid: String,
}

/// Verifies with the key that the token names, or with each whose algorithm fits if it names none.
fn verify(keys: &[Key], token: &str) -> Result<Claims, AuthenticationError> {
    let refused = |error: jsonwebtoken::errors::Error| AuthenticationError::Refused(error.to_string());
    let header = decode_header(token).map_err(refused)?;
    let mut last = AuthenticationError::Refused("signed with a key that is not known".to_owned());
    let candidates = keys.iter().filter(|key| {
        key.validation.algorithms.contains(&header.alg) && (header.kid.is_none() || key.id == header.kid)
    });
    for key in candidates {
        match decode::<Claims>(token, &key.decoding, &key.validation) {
            Ok(token) => return Ok(token.claims),
            Err(error) => last = refused(error),
        }
    }
    Err(last)
}

fn caller(
    claims: Claims,
    config: &JwtConfig,
    credentials: &Credentials,
) -> Result<Caller, AuthenticationError> {
    let subject = claims
        .sub
        .strip_prefix(SUBJECT_PREFIX)
        .and_then(|rest| rest.split_once(':'))
        .ok_or_else(|| AuthenticationError::Identity(format!("subject {:?}", claims.sub)))?;
    let (namespace, account) = subject;
    let (pod, node) = match claims.kubernetes {
        Some(bound) => {
            if (bound.namespace.as_str(), bound.serviceaccount.name.as_str()) != subject {
                let text = format!("subject {:?} contradicts the bound claims", claims.sub);
                return Err(AuthenticationError::Identity(text));
            }
            let pod = bound.pod.map(|pod| PodRef { name: pod.name, uid: pod.uid });
            (pod, bound.node.map(|node| node.name))
        }
        None => (None, None),
    };
    let identity = SpiffeId::new(config.trust_domain.as_str(), namespace, account)
        .map_err(|error| AuthenticationError::Identity(error.to_string()))?;
    Ok(Caller { identity, pod, node, cluster_id: credentials.cluster_id().to_owned() })
}
