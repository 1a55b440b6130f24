//! TLS of a Gateway as a whole: certificates of clients, and its own for endpoints.

use std::sync::Arc;

use serde::Deserialize;

use super::listener;
use super::roots::RootsRef;
use crate::object::CertificateRef;

/// TLS of a Gateway as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GatewayTls {
    /// What is asked of clients on ports that `by_port` does not have.
    pub default: Option<ClientValidation>,
    /// What is asked of clients on single ports.
    pub by_port: Vec<(u16, Option<ClientValidation>)>,
    /// The certificate that is shown to endpoints.
    pub client_certificate: Option<CertificateRef>,
}

impl GatewayTls {
    /// What is asked of clients on a port.
    pub fn validation(&self, port: u16) -> Option<&ClientValidation> {
        let own = self.by_port.iter().find(|(known, _)| *known == port);
        own.map_or(self.default.as_ref(), |(_, validation)| validation.as_ref())
    }

    /// Whether clients without a valid certificate may connect somewhere that asks for one.
    pub fn has_insecure_fallback(&self) -> bool {
        let by_port = self.by_port.iter().filter_map(|(_, validation)| validation.as_ref());
        by_port.chain(&self.default).any(|validation| validation.allow_insecure_fallback)
    }
}

/// What is asked of certificates of clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientValidation {
    /// Where the roots are.
    pub roots: Vec<RootsRef>,
    /// Clients whose certificate is not valid, or that have none, may connect all the same.
    pub allow_insecure_fallback: bool,
}

/// `spec.tls` as written.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Manifest {
    backend: Option<Backend>,
    frontend: Option<Frontend>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Backend {
    client_certificate_ref: Option<listener::Certificate>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Frontend {
    #[serde(default)]
    default: Config,
    #[serde(default)]
    per_port: Vec<PortConfig>,
}

#[derive(Debug, Default, Deserialize)]
struct Config {
    validation: Option<Validation>,
}

#[derive(Debug, Deserialize)]
struct PortConfig {
    port: i32,
    #[serde(default)]
    tls: Config,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Validation {
    #[serde(default)]
    ca_certificate_refs: Vec<Roots>,
    mode: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Roots {
    #[serde(default)]
    group: String,
    kind: String,
    namespace: Option<String>,
    name: String,
}

impl Manifest {
    /// What it says in a Gateway of `namespace`.
    pub(super) fn read(self, namespace: &Arc<str>) -> GatewayTls {
        let Manifest { backend, frontend } = self;
        let certificate = backend.and_then(|backend| backend.client_certificate_ref);
        let Frontend { default, per_port } =
            frontend.unwrap_or(Frontend { default: Config::default(), per_port: Vec::new() });
        let by_port = per_port.into_iter().filter_map(|config| {
            let port = u16::try_from(config.port).ok()?;
            Some((port, config.tls.read(namespace)))
        });
        GatewayTls {
            default: default.read(namespace),
            by_port: by_port.collect(),
            client_certificate: certificate.map(|certificate| certificate.read(namespace)),
        }
    }
}

impl Config {
    fn read(self, namespace: &Arc<str>) -> Option<ClientValidation> {
        let Validation { ca_certificate_refs, mode } = self.validation?;
        let roots = ca_certificate_refs.into_iter().map(|Roots { group, kind, namespace: of, name }| {
            RootsRef::new(&group, &kind, &of.map_or_else(|| namespace.clone(), Arc::from), &name)
        });
        Some(ClientValidation {
            roots: roots.collect(),
            // Any other mode asks for a valid certificate.
            allow_insecure_fallback: mode.as_deref() == Some("AllowInsecureFallback"),
        })
    }
}
