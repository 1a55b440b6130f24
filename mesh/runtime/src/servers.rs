//! The servers for a proxy's operators: admin, metrics and readiness.
//!
//! What they show of one kind of proxy is added by its program; see also [`crate::observe`].

use std::io;
use std::net::SocketAddr;

use ambit_telemetry::logging::Logging;
use ambit_telemetry::{AccessLog, Admin, Readiness, Registry, http};
use serde::Serialize;
use serde_json::json;
use tokio::net::TcpListener;

use crate::configuration::proxy::ProxySettings;
use crate::stop::Requests;
use crate::tasks::Tasks;

/// An address that can't be listened on.
#[derive(Debug, thiserror::Error)]
#[error("listen on {key} {address}")]
pub struct ListenError {
    key: &'static str,
    address: SocketAddr,
    source: io::Error,
}

/// Starts the three servers.
///
/// # Errors
/// [`ListenError`], naming the setting.
pub async fn start(
    settings: &ProxySettings,
    admin: Admin,
    registry: &Registry,
    readiness: &Readiness,
    tasks: &mut Tasks,
) -> Result<(), ListenError> {
    let admin_listener = listen("adminAddress", settings.admin_address).await?;
    let metrics = listen("metricsAddress", settings.metrics_address).await?;
    let ready = listen("readinessAddress", settings.readiness_address).await?;
    tasks.spawn("admin server", http::serve(admin_listener, admin.into_router()));
    tasks.spawn("metrics server", http::serve(metrics, http::metrics_router(registry)));
    tasks.spawn("readiness server", http::serve(ready, http::readiness_router(readiness)));
    Ok(())
}

async fn listen(key: &'static str, address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|source| ListenError { key, address, source })
}

/// Adds to `admin` what every proxy shows and takes: configuration, version, levels of the log, taps, requests to stop.
pub fn with_common_routes<C: Serialize + Send + Sync + 'static>(
    admin: Admin,
    config: C,
    version: &'static str,
    (logging, access_log): (&Logging, &AccessLog),
    stop: &Requests,
) -> Admin {
    let (quit, drain) = (stop.clone(), stop.clone());
    admin
        .taps(access_log.taps().clone())
        .section("config", move || serde_json::to_value(&config))
        .section("version", move || Ok(json!({ "version": version })))
        .logging(logging.level.clone())
        .on_quit(move || quit.quit())
        .on_drain(move || drain.drain())
}
