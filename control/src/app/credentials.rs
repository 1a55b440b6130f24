//! Who signs and who is believed: the certificate authority and the authentication of callers, from files or by a cluster.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ambit_ca::{
    Authenticator, Authority, AuthorityConfig, AuthorityError, JwtAuthenticator, JwtConfig, StoreError,
};
use kube::Client;
use tokio::time::Instant;

use super::{AppError, Tasks};
use crate::api_server::Backoff;
use crate::config::Config;
use crate::serve::ca_secrets::SecretStore;
use crate::serve::live_pods::LivePods;
use crate::serve::roots;
use crate::serve::token_review::{ReviewConfig, ReviewMetrics, TokenReviewer};

/// Opens the authority and follows its store.
pub(super) async fn start_authority(
    tasks: &mut Tasks,
    config: &Config,
    client: Option<&Client>,
) -> Result<Authority, AppError> {
    let trust_domain = config.trust_domain.clone();
    let settings = match (&config.ca_dir, client) {
        (Some(directory), _) => AuthorityConfig::new(trust_domain, directory.clone()),
        (None, Some(client)) => {
            let store = SecretStore::new(client.clone(), &config.system_namespace);
            AuthorityConfig::with_store(trust_domain, Arc::new(store))
        }
        (None, None) => return Err(AppError::Unset("caDir")),
    };
    let settings = AuthorityConfig {
        max_lifetime: config.max_certificate_lifetime,
        root_propagation: config.root_propagation,
        ..settings
    };
    let (authority, follow) = open(settings).await?;
    tasks.spawn("the certificate authority", follow);
    if let Some(path) = &config.root_out {
        let written = roots::write_out(authority.clone(), path.clone()).await;
        let keep = written.map_err(|source| AppError::Roots { path: path.clone(), source })?;
        tasks.spawn("the writer of roots", keep);
    }
    Ok(authority)
}

/// How long another replica has to write back a key that its Secret has lost; each looks every ten seconds.
const RESTORE: Duration = Duration::from_secs(30);

/// Opens the authority, waiting for an API server that is away, for replicas that start at the same time, and for one that
/// knows the key where it is lost.
async fn open(
    mut settings: AuthorityConfig,
) -> Result<(Authority, impl Future<Output = ()> + Send + 'static), AuthorityError> {
    let mut backoff = Backoff::default();
    let mut lost_since = None;
    loop {
        match Authority::open(settings.clone()).await {
            Err(
                error @ (AuthorityError::Store { reason: StoreError::Server { .. }, .. }
                | AuthorityError::Contended(_)),
            ) => {
                tracing::warn!(%error, "certificate authority not opened; trying again");
                tokio::time::sleep(backoff.pause()).await;
            }
            Err(error @ AuthorityError::Lost(_)) if !settings.replace_lost_root => {
                let since = *lost_since.get_or_insert_with(Instant::now);
                settings.replace_lost_root = since.elapsed() >= RESTORE;
                tracing::warn!(%error, "certificate authority not opened; another replica may know the key");
                tokio::time::sleep(backoff.pause()).await;
            }
            outcome => return outcome,
        }
    }
}

/// Who callers are, by a key set in a file or by the API server.
pub(super) async fn start_authentication(
    tasks: &mut Tasks,
    config: &Config,
    client: Option<&Client>,
    live_pods: &Arc<LivePods>,
) -> Result<(Arc<dyn Authenticator>, Option<Arc<ReviewMetrics>>), AppError> {
    match (&config.jwks, client) {
        (Some(jwks), _) => Ok((key_set(tasks, config, jwks.clone()).await?, None)),
        (None, Some(client)) => {
            let settings = ReviewConfig {
                audiences: config.audiences.clone(),
                trust_domain: config.trust_domain.clone(),
                cluster_id: config.index.cluster_id.to_string(),
            };
            let reviewer = TokenReviewer::new(client.clone(), settings, live_pods.clone());
            let metrics = reviewer.metrics();
            Ok((Arc::new(reviewer), Some(metrics)))
        }
        (None, None) => Err(AppError::Unset("jwks")),
    }
}

async fn key_set(
    tasks: &mut Tasks,
    config: &Config,
    jwks: PathBuf,
) -> Result<Arc<dyn Authenticator>, AppError> {
    let settings = JwtConfig {
        jwks,
        audiences: config.audiences.clone(),
        issuers: Vec::new(),
        trust_domain: config.trust_domain.clone(),
        cluster_id: Some(config.index.cluster_id.to_string()),
    };
    let (authenticator, follow) = JwtAuthenticator::open(settings).await?;
    tasks.spawn("the key set", follow);
    Ok(Arc::new(authenticator))
}
