//! A control plane in the test's own process: discovery from tables, certificates from a real authority.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_api::security::Authorization;
use ambit_api::workload::address::Type;
use ambit_api::workload::{Address, Service, Workload};
use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_ca::{
    AuthenticationError, Authenticator, Authority, AuthorityConfig, Caller, CertificateService, Credentials,
    IssuancePolicy, NodePods, PodRef, RevokedCertificate,
};
use ambit_identity::{SpiffeId, TrustDomain};
use ambit_xds::{Change, Resource, Server, Store};
use async_trait::async_trait;
use futures_util::{Stream, stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

pub(crate) const SERVER_NAME: &str = "ambit-control.ambit-system.svc";
pub(crate) const TRUST_DOMAIN: &str = "cluster.local";

/// The control plane. Its tasks end with the test's runtime.
pub(crate) struct Control {
    /// Where proxies reach it.
    pub(crate) gate: Gate,
    pub(crate) root_file: PathBuf,
    pub(crate) token_file: PathBuf,
    pub(crate) crl_file: PathBuf,
    authority: Authority,
    store: Store,
}

impl Control {
    pub(crate) async fn start(dir: &Path) -> Self {
        let domain = TrustDomain::new(TRUST_DOMAIN).unwrap();
        let (authority, driver) =
            Authority::open(AuthorityConfig::new(domain, dir.join("ca"))).await.unwrap();
        tokio::spawn(driver);
        let (tls, fresh) = authority.serving(vec![SERVER_NAME.to_owned()]).unwrap();
        tokio::spawn(fresh);
        let (store, publisher) = Store::new(&[AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL], <_>::default());
        tokio::spawn(publisher.run());
        let discovery = Server::new(store.clone(), <_>::default());
        let certificates = CertificateService::new(
            authority.clone(),
            Arc::new(Everybody),
            Arc::new(Everywhere),
            IssuancePolicy::default(),
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let gate = Gate::start(listener.local_addr().unwrap()).await;
        let server = tonic::transport::Server::builder()
            .add_service(certificates.into_server())
            .add_service(discovery);
        tokio::spawn(server.serve_with_incoming(accepted(listener, TlsAcceptor::from(tls))));
        let (root_file, token_file) = (dir.join("root.pem"), dir.join("token"));
        std::fs::write(&root_file, authority.roots_pem().as_bytes()).unwrap();
        std::fs::write(&token_file, "a token").unwrap();
        Self { gate, root_file, token_file, crl_file: dir.join("crl.pem"), authority, store }
    }

    pub(crate) fn workload(&self, workload: Workload) {
        let mut resource =
            Resource::new(workload.uid.clone(), &Address { r#type: Some(Type::Workload(workload.clone())) });
        for address in &workload.addresses {
            resource = resource.alias(format!("{}/{}", workload.network, ip(address)));
        }
        for service in workload.services.keys() {
            resource = resource.parent(service.clone());
        }
        self.store.apply(ADDRESS_TYPE_URL, vec![Change::Upsert(resource)]);
    }

    pub(crate) fn service(&self, service: Service) {
        let name = format!("{}/{}", service.namespace, service.hostname);
        let mut resource = Resource::new(name, &Address { r#type: Some(Type::Service(service.clone())) });
        for address in &service.addresses {
            resource = resource.alias(format!("{}/{}", address.network, ip(&address.address)));
        }
        self.store.apply(ADDRESS_TYPE_URL, vec![Change::Upsert(resource)]);
    }

    pub(crate) fn remove_address(&self, name: &str) {
        self.store.apply(ADDRESS_TYPE_URL, vec![Change::Remove(name.into())]);
    }

    pub(crate) fn policy(&self, policy: &Authorization) {
        let name = format!("{}/{}", policy.namespace, policy.name);
        self.store.apply(AUTHORIZATION_TYPE_URL, vec![Change::Upsert(Resource::new(name, policy))]);
    }

    pub(crate) fn remove_policy(&self, name: &str) {
        self.store.apply(AUTHORIZATION_TYPE_URL, vec![Change::Remove(name.into())]);
    }

    /// Signs a key for any identity, as a rogue or a foreign proxy would have it.
    pub(crate) fn sign(&self, csr_pem: &str, identity: &SpiffeId, lifetime: Duration) -> Vec<String> {
        self.authority.sign(csr_pem, identity, Some(lifetime)).unwrap().chain
    }

    /// Puts certificates on the revocation list that the proxies watch.
    pub(crate) fn revoke(&self, serials: &[String]) {
        let revoked: Vec<_> = serials
            .iter()
            .map(|serial| RevokedCertificate { serial: bytes_of(serial), since: SystemTime::now() })
            .collect();
        let pem =
            self.authority.sign_revocations(&revoked, SystemTime::now() + Duration::from_secs(3600)).unwrap();
        let fresh = self.crl_file.with_extension("new");
        std::fs::write(&fresh, pem).unwrap();
        std::fs::rename(fresh, &self.crl_file).unwrap();
    }
}

/// The plaintext of the connections that `listener` accepts.
fn accepted(listener: TcpListener, tls: TlsAcceptor) -> impl Stream<Item = Result<DuplexStream, Infallible>> {
    stream::unfold((listener, tls), async |(listener, tls)| {
        let (socket, _) = listener.accept().await.ok()?;
        let handshake = tls.accept(socket);
        let (mut inside, outside) = tokio::io::duplex(1 << 16);
        tokio::spawn(async move {
            if let Ok(mut secured) = handshake.await {
                _ = tokio::io::copy_bidirectional(&mut secured, &mut inside).await;
            }
        });
        Some((Ok(outside), (listener, tls)))
    })
}

/// A relay in front of the control plane, which can be made to fall silent while its connections stay open.
pub(crate) struct Gate {
    pub(crate) address: SocketAddr,
    open: watch::Sender<bool>,
}

impl Gate {
    async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, is_open) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(target).await else { continue };
                let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
                tokio::spawn(pass(near_read, far_write, is_open.clone()));
                tokio::spawn(pass(far_read, near_write, is_open.clone()));
            }
        });
        Self { address, open }
    }

    /// Holds back everything in both directions, or lets it pass again.
    pub(crate) fn set_open(&self, open: bool) {
        self.open.send_replace(open);
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut is_open: watch::Receiver<bool>) {
    let mut buffer = [0; 16_384];
    while let Ok(length) = from.read(&mut buffer).await
        && length > 0
        && is_open.wait_for(|open| *open).await.is_ok()
        && to.write_all(&buffer[..length]).await.is_ok()
    {}
}

fn bytes_of(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn ip(bytes: &[u8]) -> std::net::IpAddr {
    match <[u8; 4]>::try_from(bytes) {
        Ok(v4) => v4.into(),
        Err(_) => <[u8; 16]>::try_from(bytes).unwrap().into(),
    }
}

/// Takes every token for that of a node proxy: who may have what is the authority's own test.
struct Everybody;

#[async_trait]
impl Authenticator for Everybody {
    async fn authenticate(&self, credentials: &Credentials) -> Result<Caller, AuthenticationError> {
        Ok(Caller {
            identity: SpiffeId::new(TRUST_DOMAIN, "ambit-system", "ztunnel").unwrap(),
            pod: Some(PodRef { name: "ztunnel".into(), uid: "ztunnel".into() }),
            node: Some("node".into()),
            cluster_id: credentials.cluster_id().to_owned(),
        })
    }
}

struct Everywhere;

impl NodePods for Everywhere {
    fn runs(&self, _: &str, _: &SpiffeId) -> bool {
        true
    }
}
