//! The servers beside the TLS port: metrics, readiness, the admin interface.

use std::net::SocketAddr;

use ambit_telemetry::http::{metrics_router, readiness_router, serve, text};
use ambit_telemetry::{Readiness, Registry, logging};
use http::StatusCode;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::{AppError, Tasks};
use crate::config::Config;
use crate::observe::{Observed, VERSION};

pub(super) async fn listen(address: SocketAddr, purpose: &'static str) -> Result<TcpListener, AppError> {
    let listener =
        TcpListener::bind(address).await.map_err(|source| AppError::Listen { address, purpose, source })?;
    let address = listener.local_addr().unwrap_or(address);
    tracing::info!(%address, purpose, "listening");
    Ok(listener)
}

/// Serves metrics and readiness, from the start on.
pub(super) async fn serve_metrics(
    tasks: &mut Tasks,
    config: &Config,
    registry: &Registry,
    readiness: &Readiness,
) -> Result<Option<SocketAddr>, AppError> {
    if let Some(address) = config.readiness {
        let listener = listen(address, "readiness").await?;
        tasks.spawn("the readiness server", serve(listener, readiness_router(readiness)));
    }
    let Some(address) = config.metrics else { return Ok(None) };
    let listener = listen(address, "metrics").await?;
    let address = listener.local_addr().unwrap_or(address);
    let router = metrics_router(registry).get("/version", async |_| text(StatusCode::OK, VERSION));
    tasks.spawn("the metrics server", serve(listener, router));
    Ok(Some(address))
}

pub(super) async fn serve_admin(
    tasks: &mut Tasks,
    config: &Config,
    observed: &Observed,
    logging: Option<&logging::Logging>,
    quit: watch::Sender<bool>,
) -> Result<(), AppError> {
    let addresses = [("the admin interface", config.admin), ("commands", config.commands)];
    for (purpose, address) in addresses {
        let Some(address) = address else { continue };
        let mut admin = observed.admin();
        if address.ip().is_loopback() {
            let quit = quit.clone();
            admin = admin.on_quit(move || {
                quit.send_replace(true);
            });
            if let Some(logging) = logging {
                admin = admin.logging(logging.level.clone());
            }
        } else {
            tracing::info!(%address, "the admin interface takes no commands here: others than this host reach it");
        }
        let listener = listen(address, purpose).await?;
        tasks.spawn(purpose, serve(listener, admin.into_router()));
    }
    Ok(())
}
