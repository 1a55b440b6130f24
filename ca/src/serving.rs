//! The control plane's own TLS: a server certificate that the authority signs and renews.
//!
//! One rustls configuration for the process's life; the certificate inside is replaced at half of its lifetime and
//! whenever the authority changes. Callers prove themselves by token, so no client certificate is asked for.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_identity::TlsSettings;
use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use crate::authority::Authority;
use crate::signer::SignError;

/// Lifetime of the server certificate, where the authority gives that much.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// Shortest pause between two renewals, also of an authority that is about to expire.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
/// Pause after a failed renewal, and the longest one at all: a clock that was set, or a machine that slept, is noticed
/// within it.
const LOOK: Duration = Duration::from_secs(10);

/// Why there is no server certificate.
#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    /// It cannot be signed.
    #[error("server certificate for {names:?}: {reason}")]
    Sign {
        /// For which names.
        names: Vec<String>,
        /// Why not.
        reason: SignError,
    },
    /// TLS does not accept it.
    #[error("server certificate for {names:?} cannot be used: {reason}")]
    Tls {
        /// For which names.
        names: Vec<String>,
        /// Why not.
        reason: rustls::Error,
    },
}

#[derive(Debug)]
struct Current(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

impl Authority {
    /// A TLS 1.3 configuration that serves under `names` (DNS names or addresses) with ALPN `h2`, and the future
    /// that keeps its certificate fresh; run that for the process's life.
    ///
    /// # Errors
    /// [`ServingError`] if the first certificate cannot be made.
    pub fn serving(
        &self,
        names: Vec<String>,
    ) -> Result<(Arc<ServerConfig>, impl Future<Output = ()> + Send + 'static), ServingError> {
        let provider = TlsSettings::default().provider();
        let (key, age) = self.certified_key(&names)?;
        let current = Arc::new(Current(ArcSwap::from_pointee(key)));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|reason| ServingError::Tls { names: names.clone(), reason })?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.send_tls13_tickets = 0;
        Ok((Arc::new(config), self.clone().keep_fresh(names, current, age)))
    }

    /// A new certificate, and its replacement time: half of its lifetime.
    fn certified_key(&self, names: &[String]) -> Result<(CertifiedKey, Age), ServingError> {
        let made = SystemTime::now();
        let issued = self
            .issue_server_certificate(names, Some(LIFETIME))
            .map_err(|reason| ServingError::Sign { names: names.to_vec(), reason })?;
        let key = CertifiedKey::from_der(issued.chain, issued.key, &TlsSettings::default().provider())
            .map_err(|reason| ServingError::Tls { names: names.to_vec(), reason })?;
        let left = issued.not_after.duration_since(made).unwrap_or_default();
        Ok((key, Age { made, replaced: made + (left / 2).max(SHORTEST_PAUSE) }))
    }

    async fn keep_fresh(self, names: Vec<String>, current: Arc<Current>, mut age: Age) {
        let mut changes = self.subscribe();
        let mut pause = age.pause(SystemTime::now());
        loop {
            // The authority is alive as long as we hold it, so the channel cannot close.
            let changed = tokio::select! {
                _ = changes.changed() => true,
                () = tokio::time::sleep(pause) => false,
            };
            let now = SystemTime::now();
            if !changed && !age.is_over(now) {
                pause = age.pause(now);
                continue;
            }
            match self.certified_key(&names) {
                Ok((key, next)) => {
                    current.0.store(Arc::new(key));
                    age = next;
                    pause = age.pause(SystemTime::now());
                }
                Err(error) => {
                    tracing::warn!(%error, "server certificate not renewed; the last one stays in use");
                    pause = LOOK;
                }
            }
        }
    }
}

/// When a certificate was issued and when it must be replaced, by the wall clock.
#[derive(Debug, Clone, Copy)]
struct Age {
    made: SystemTime,
    replaced: SystemTime,
}

impl Age {
    /// Whether it must be replaced. If the clock was set back, a certificate from what is now the future may be rejected
    /// as not yet valid, so it is replaced too.
    fn is_over(&self, now: SystemTime) -> bool {
        now >= self.replaced || now < self.made
    }

    /// How long to sleep before the next check.
    fn pause(&self, now: SystemTime) -> Duration {
        self.replaced.duration_since(now).unwrap_or_default().min(LOOK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_certificate_is_replaced_by_the_wall_clock() {
        let made = SystemTime::UNIX_EPOCH + HOUR * 1000;
        let age = Age { made, replaced: made + HOUR * 12 };
        assert!(!age.is_over(made) && !age.is_over(made + HOUR * 11));
        assert!(age.is_over(made + HOUR * 12), "when half of its lifetime has passed");
        assert!(age.is_over(made - HOUR), "when it is one of the future");
        assert_eq!(age.pause(made), LOOK, "a clock that is set is noticed");
        assert_eq!(age.pause(made + HOUR * 12 - Duration::from_secs(3)), Duration::from_secs(3));
        assert_eq!(age.pause(made + HOUR * 20), Duration::ZERO);
    }
}
