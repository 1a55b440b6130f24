//! A store that loses what it held: nothing signs that was not propagated, and what was lost is written back.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use ambit_ca::{
    Authority, AuthorityConfig, AuthorityError, AuthorityStore, StoreError, StoreWatch, StoredMaterial,
};
use ambit_identity::{CertificateRequest, SpiffeId, TrustDomain};

/// A store in memory that behaves as a Secret does. Clones share it.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Content>>);

#[derive(Clone, Default)]
struct Content {
    material: StoredMaterial,
    record: Option<String>,
    published: Option<String>,
}

impl Memory {
    fn content(&self) -> Content {
        self.0.lock().unwrap().clone()
    }

    fn change(&self, change: impl FnOnce(&mut Content)) {
        change(&mut self.0.lock().unwrap());
    }

    /// Whether the record says that certificates were given.
    fn knows_lifetime(&self) -> bool {
        self.content().record.is_some_and(|record| !record.contains("\"longestLifetime\": 0"))
    }

    fn config(&self) -> AuthorityConfig {
        AuthorityConfig::with_store(TrustDomain::new("cluster.local").unwrap(), Arc::new(self.clone()))
    }

    /// Opens an authority that gave a certificate, so that its root must stay.
    async fn open(&self) -> (Authority, tokio::task::JoinHandle<()>) {
        let (authority, driver) = Authority::open(self.config()).await.unwrap();
        let identity = SpiffeId::new("cluster.local", "shop", "reviews").unwrap();
        let request = CertificateRequest::new(&identity).unwrap();
        authority.sign(request.csr_pem(), &identity, None).unwrap();
        (authority, tokio::spawn(driver))
    }
}

#[async_trait::async_trait]
impl AuthorityStore for Memory {
    async fn material(&self) -> Result<StoredMaterial, StoreError> {
        Ok(self.content().material)
    }

    async fn replace_material(
        &self,
        replaced: &StoredMaterial,
        certificate: &str,
        key: &str,
    ) -> Result<bool, StoreError> {
        let mut content = self.0.lock().unwrap();
        if content.material != *replaced {
            return Ok(false);
        }
        content.material.certificate = Some(certificate.to_owned());
        content.material.key = Some(key.to_owned());
        Ok(true)
    }

    async fn rotation(&self) -> Result<Option<String>, StoreError> {
        Ok(self.content().record)
    }

    async fn replace_rotation(&self, replaced: Option<&str>, record: &str) -> Result<bool, StoreError> {
        let mut content = self.0.lock().unwrap();
        if content.record.as_deref() != replaced {
            return Ok(false);
        }
        content.record = Some(record.to_owned());
        Ok(true)
    }

    async fn published_roots(&self) -> Result<Option<String>, StoreError> {
        Ok(self.content().published)
    }

    fn restores_material(&self) -> bool {
        true
    }

    fn watch(&self) -> StoreWatch {
        StoreWatch::Intervals
    }

    fn name(&self) -> String {
        "memory".to_owned()
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not within 60 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_emptied_store_gets_key_and_record_back() {
    let store = Memory::default();
    let (authority, driver) = store.open().await;
    until("the record knows the lifetime", || store.knows_lifetime()).await;
    let (before, roots) = (store.content(), authority.roots_pem());
    store.change(|content| *content = Content::default());
    until("both are back", || {
        store.content().material == before.material && store.content().record.is_some()
    })
    .await;
    assert_eq!((authority.roots_pem(), authority.restorations()), (roots, 2));
    driver.abort();
}

/// A replica that starts between the loss and the restoration, or another program, made a root of its own.
#[tokio::test]
async fn a_root_begun_anew_does_not_sign_before_its_propagation() {
    let (store, other) = (Memory::default(), Memory::default());
    let (authority, driver) = store.open().await;
    let (stranger, _) = other.open().await;
    until("the record knows the lifetime", || store.knows_lifetime()).await;
    let old = authority.roots_pem();
    store.change(|content| *content = other.content());
    until("both roots are published", || authority.roots_pem().len() > old.len()).await;
    assert!(authority.roots_pem().starts_with(&*old), "the old root signs");
    assert!(authority.roots_pem().contains(&*stranger.roots_pem()), "the new root is propagated");
    let (late, _driver) = Authority::open(store.config()).await.unwrap();
    assert_eq!(late.roots_pem(), authority.roots_pem(), "a replica that starts later decides alike");
    driver.abort();
}

#[tokio::test]
async fn a_lost_key_is_replaced_only_where_that_is_allowed() {
    let store = Memory::default();
    let (authority, driver) = store.open().await;
    let old = authority.roots_pem();
    driver.abort();
    store.change(|content| *content = Content { published: Some(old.to_string()), ..Content::default() });
    let refused = Authority::open(store.config()).await.map(|_| ());
    assert!(matches!(refused, Err(AuthorityError::Lost(_))), "{refused:?}");
    assert!(store.content().material.is_empty(), "nothing was made");
    let allowed = AuthorityConfig { replace_lost_root: true, ..store.config() };
    let (authority, _driver) = Authority::open(allowed).await.unwrap();
    let roots = authority.roots_pem();
    assert!(!roots.starts_with(&*old) && roots.contains(&*old), "the new root signs, the old one is trusted");
}

/// The record has the key as well, so a Secret of which only the root's own keys were removed is restored at a start.
#[tokio::test]
async fn a_root_without_its_keys_is_restored_from_the_record() {
    let store = Memory::default();
    let (authority, driver) = store.open().await;
    let (before, old) = (store.content().material, authority.roots_pem());
    driver.abort();
    store.change(|content| content.material = StoredMaterial::default());
    let (authority, _driver) = Authority::open(store.config()).await.unwrap();
    assert!(store.content().material == before && authority.roots_pem() == old);
}
