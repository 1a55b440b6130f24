//! The certificate store in paused time with an issuer that can fail, hang, panic and refuse.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use ambit_identity::renewal::RenewalPolicy;
use ambit_identity::{
    CertificateError, CertificateStore, IssueError, Issuer, PeerCertificate, SpiffeId, StoreConfig, Trust,
    Usage, WorkloadCertificate,
};
use async_trait::async_trait;
use support::{HOUR, TestCa, Wish, domain, meet, trust_in};

fn id(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account).unwrap()
}

#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Works,
    Unavailable,
    Hangs,
    Panics,
}

struct TestIssuer {
    ca: Mutex<Arc<TestCa>>,
    /// Roots that are published beside that of `ca`.
    further_roots: Mutex<String>,
    mood: Mutex<Mood>,
    lifetime: Duration,
    clock: ambit_identity::store::Clock,
    asked: Mutex<Vec<SpiffeId>>,
    in_flight: AtomicUsize,
    most_in_flight: AtomicUsize,
    takes: Duration,
}

impl TestIssuer {
    fn new(clock: ambit_identity::store::Clock) -> Self {
        Self {
            ca: Mutex::new(Arc::new(TestCa::new("root"))),
            further_roots: Mutex::default(),
            mood: Mutex::new(Mood::Works),
            lifetime: HOUR,
            clock,
            asked: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            most_in_flight: AtomicUsize::new(0),
            takes: Duration::from_millis(10),
        }
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn asked(&self) -> Vec<SpiffeId> {
        self.asked.lock().unwrap().clone()
    }
}

#[async_trait]
impl Issuer for TestIssuer {
    async fn issue(&self, identity: &SpiffeId, csr: &str, _: Duration) -> Result<Vec<String>, IssueError> {
        self.asked.lock().unwrap().push(identity.clone());
        let running = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_in_flight.fetch_max(running, Ordering::SeqCst);
        let mood = *self.mood.lock().unwrap();
        tokio::time::sleep(self.takes).await;
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        match mood {
            Mood::Works => {
                let now = (self.clock)();
                let uris = [identity.as_str()];
                let wish =
                    Wish { not_before: now - HOUR, not_after: now + self.lifetime, ..Wish::valid(&uris) };
                let ca = Arc::clone(&self.ca.lock().unwrap());
                let mut chain = ca.sign_csr(csr, &wish);
                chain.last_mut().unwrap().push_str(&self.further_roots.lock().unwrap());
                Ok(chain)
            }
            Mood::Unavailable => Err(IssueError::Unavailable {
                address: "ca:15012".into(),
                identity: identity.clone(),
                reason: "connection refused".into(),
            }),
            Mood::Hangs => std::future::pending().await,
            Mood::Panics => panic!("the issuer broke"),
        }
    }
}

/// A wall clock that goes with tokio's paused time.
fn virtual_clock() -> ambit_identity::store::Clock {
    let (wall, start) = (SystemTime::now(), tokio::time::Instant::now());
    Arc::new(move || wall + start.elapsed())
}

/// The same, set by as many seconds as the number says.
fn settable_clock() -> (ambit_identity::store::Clock, Arc<AtomicI64>) {
    let (steady, offset) = (virtual_clock(), Arc::new(AtomicI64::new(0)));
    let set = Arc::clone(&offset);
    let clock = move || {
        let offset = set.load(Ordering::SeqCst);
        let by = Duration::from_secs(offset.unsigned_abs());
        if offset < 0 { steady() - by } else { steady() + by }
    };
    (Arc::new(clock), offset)
}

fn start(config: StoreConfig, issuer: &Arc<TestIssuer>) -> CertificateStore {
    start_trusting(config, issuer, Trust::new(domain("cluster.local"), Vec::new()))
}

fn start_trusting(config: StoreConfig, issuer: &Arc<TestIssuer>, trust: Trust) -> CertificateStore {
    let (store, driver) = CertificateStore::new(config, Arc::clone(issuer) as Arc<dyn Issuer>, trust);
    tokio::spawn(driver);
    store
}

fn setup() -> (CertificateStore, Arc<TestIssuer>) {
    let clock = virtual_clock();
    let issuer = Arc::new(TestIssuer::new(Arc::clone(&clock)));
    (start(StoreConfig { clock, ..StoreConfig::default() }, &issuer), issuer)
}

async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn a_prefetched_certificate_is_replaced_at_half_life() {
    let (store, issuer) = setup();
    store.prefetch(&id("a")).unwrap();
    assert!(store.current(&id("a")).is_none());
    let first = store.certificate(&id("a")).await.unwrap();
    assert!(Arc::ptr_eq(&first, &store.current(&id("a")).unwrap()));
    pass(26 * 60).await;
    assert_eq!(issuer.asked().len(), 1);
    pass(8 * 60).await;
    assert_eq!(issuer.asked().len(), 2);
    let second = store.current(&id("a")).unwrap();
    assert_ne!(first.info().serial, second.info().serial);
    assert_eq!(*store.subscribe().borrow(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_failed_renewal_never_discards_a_valid_certificate() {
    let (store, issuer) = setup();
    store.prefetch(&id("a")).unwrap();
    let first = store.certificate(&id("a")).await.unwrap();
    issuer.set(Mood::Unavailable);
    pass(55 * 60).await;
    assert!(issuer.asked().len() > 5);
    assert!(Arc::ptr_eq(&first, &store.current(&id("a")).unwrap()));
    let state = store.list().remove(0);
    assert!(state.is_valid && state.failures > 3 && state.last_error.is_some());

    pass(10 * 60).await;
    assert!(store.current(&id("a")).is_none(), "expired");
    let error = store.certificate(&id("a")).await.unwrap_err();
    assert!(matches!(&error, CertificateError::Timeout { last: Some(_), .. }));
    assert!(error.to_string().contains("connection refused"), "{error}");

    issuer.set(Mood::Works);
    pass(70).await;
    assert!(store.current(&id("a")).is_some(), "recovers without being asked");
    assert_eq!(store.list().remove(0).failures, 0);
}

/// The driver looks at the clock every ten seconds.
const NOTICED: u64 = 11;

#[tokio::test(start_paused = true)]
async fn a_clock_set_back_delays_no_renewal() {
    let (clock, offset) = settable_clock();
    let issuer = Arc::new(TestIssuer::new(Arc::clone(&clock)));
    let store = start(StoreConfig { clock, ..StoreConfig::default() }, &issuer);
    store.prefetch(&id("a")).unwrap();
    store.certificate(&id("a")).await.unwrap();
    pass(20 * 60).await;
    offset.store(-15 * 60, Ordering::SeqCst);
    pass(14 * 60 + NOTICED).await;
    assert_eq!(issuer.asked().len(), 2, "half of an hour has passed, and a tenth more");
    offset.store(-24 * 60 * 60, Ordering::SeqCst);
    pass(NOTICED).await;
    assert_eq!(issuer.asked().len(), 3, "peers may hold the certificate not valid yet");
}

#[tokio::test(start_paused = true)]
async fn a_clock_set_past_the_end_renews_at_once() {
    let (clock, offset) = settable_clock();
    let issuer = Arc::new(TestIssuer::new(Arc::clone(&clock)));
    let trust = Trust::new(domain("cluster.local"), Vec::new());
    let config = StoreConfig { clock: Arc::clone(&clock), ..StoreConfig::default() };
    let store = start_trusting(config, &issuer, trust.clone());
    store.prefetch(&id("a")).unwrap();
    store.prefetch(&id("b")).unwrap();
    let first = store.certificate(&id("a")).await.unwrap();
    store.certificate(&id("b")).await.unwrap();
    let believed = |certificate: &WorkloadCertificate| {
        trust.verify(certificate.chain(), Usage::Client, clock()).map(drop)
    };
    assert!(believed(&first).is_ok());
    offset.store(24 * 60 * 60, Ordering::SeqCst);
    assert!(believed(&first).is_err(), "a peer that still shows it is refused");
    assert!(store.current(&id("a")).is_none(), "expired by the clock as it stands");
    let asked = tokio::time::Instant::now();
    let second = store.certificate(&id("a")).await.unwrap();
    assert_ne!(first.info().serial, second.info().serial);
    assert!(believed(&second).is_ok());
    assert!(asked.elapsed() < Duration::from_secs(1), "a connection waited {:?}", asked.elapsed());
    pass(NOTICED).await;
    assert!(store.current(&id("b")).is_some(), "renewed without being asked for");
}

#[tokio::test(start_paused = true)]
async fn a_waiting_connection_is_served_when_the_issuer_returns() {
    let (store, issuer) = setup();
    issuer.set(Mood::Unavailable);
    store.prefetch(&id("a")).unwrap();
    pass(600).await;
    let waiter = tokio::spawn({
        let store = store.clone();
        async move { store.certificate(&id("a")).await }
    });
    pass(3).await;
    issuer.set(Mood::Works);
    let started = tokio::time::Instant::now();
    waiter.await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_waited_identity_overtakes_a_thousand_prefetched_ones() {
    let (store, issuer) = setup();
    for number in 0..1000 {
        store.prefetch(&id(&format!("bulk-{number}"))).unwrap();
    }
    pass(0).await;
    let started = tokio::time::Instant::now();
    store.certificate(&id("bulk-999")).await.unwrap();
    store.certificate(&id("new")).await.unwrap();
    assert!(started.elapsed() < Duration::from_millis(50), "{:?}", started.elapsed());
    while store.list().iter().any(|state| !state.is_valid) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let most = issuer.most_in_flight.load(Ordering::SeqCst);
    let policy = RenewalPolicy::default();
    assert!(most <= policy.max_background + policy.max_waited, "{most}");
    assert_eq!(issuer.asked().len(), 1001);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_connections_share_one_request() {
    let (store, issuer) = setup();
    let waiters: Vec<_> = (0..1000)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.certificate(&id("a")).await })
        })
        .collect();
    for waiter in waiters {
        waiter.await.unwrap().unwrap();
    }
    assert_eq!(issuer.asked().len(), 1);
    assert_eq!(store.metrics().waiting.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn an_issuer_that_hangs_or_panics_costs_one_attempt() {
    let (store, issuer) = setup();
    issuer.set(Mood::Hangs);
    store.prefetch(&id("a")).unwrap();
    pass(11).await;
    assert!(store.list()[0].last_error.as_ref().unwrap().to_string().contains("within 10s"));
    // The second attempt hangs already; the third one panics.
    issuer.set(Mood::Panics);
    pass(10).await;
    assert!(store.list()[0].last_error.as_ref().unwrap().to_string().contains("abnormally"));
    issuer.set(Mood::Works);
    pass(10).await;
    assert!(store.current(&id("a")).is_some());
}

#[tokio::test(start_paused = true)]
async fn waiters_are_bounded_and_get_the_reason() {
    let clock = virtual_clock();
    let issuer = Arc::new(TestIssuer::new(Arc::clone(&clock)));
    issuer.set(Mood::Hangs);
    let store = start(StoreConfig { clock, max_waiters: 2, ..StoreConfig::default() }, &issuer);
    let waiters: Vec<_> = (0..2)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.certificate(&id("a")).await })
        })
        .collect();
    pass(1).await;
    let refused = store.certificate(&id("a")).await;
    assert!(matches!(refused, Err(CertificateError::TooManyWaiters { waiting: 2, .. })));
    for waiter in waiters {
        assert!(matches!(waiter.await.unwrap(), Err(CertificateError::Timeout { .. })));
    }
}

#[tokio::test(start_paused = true)]
async fn releasing_an_identity_fails_its_waiters() {
    let (store, issuer) = setup();
    store.prefetch(&id("a")).unwrap();
    store.prefetch(&id("a")).unwrap();
    store.certificate(&id("a")).await.unwrap();
    store.release(&id("a"));
    assert!(store.current(&id("a")).is_some());
    store.release(&id("a"));
    assert!(store.current(&id("a")).is_none());
    assert!(store.list().is_empty());

    issuer.set(Mood::Unavailable);
    store.prefetch(&id("b")).unwrap();
    pass(30).await;
    let waiter = tokio::spawn({
        let store = store.clone();
        async move { store.certificate(&id("b")).await }
    });
    pass(0).await;
    store.release(&id("b"));
    pass(3).await;
    store.release(&id("b"));
    assert!(matches!(
        waiter.await.unwrap(),
        Err(CertificateError::Released(_) | CertificateError::Timeout { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn waiters_fail_at_once_when_the_driver_ends() {
    let clock = virtual_clock();
    let issuer = Arc::new(TestIssuer::new(Arc::clone(&clock)));
    issuer.set(Mood::Hangs);
    let trust = Trust::new(domain("cluster.local"), Vec::new());
    let config = StoreConfig { clock, ..StoreConfig::default() };
    let (store, driver) = CertificateStore::new(config, issuer, trust);
    let driver = tokio::spawn(driver);
    let waiter = tokio::spawn({
        let store = store.clone();
        async move { store.certificate(&id("a")).await }
    });
    pass(1).await;
    driver.abort();
    assert!(matches!(waiter.await.unwrap(), Err(CertificateError::Stopped(_))));
}

#[tokio::test]
async fn no_connection_fails_while_the_authority_changes_its_root() {
    let clock: ambit_identity::store::Clock = Arc::new(SystemTime::now);
    let mut issuer = TestIssuer::new(Arc::clone(&clock));
    issuer.lifetime = Duration::from_secs(4);
    let old_root = Arc::clone(&issuer.ca.lock().unwrap());
    let issuer = Arc::new(issuer);
    let trust = Trust::new(domain("cluster.local"), Vec::new());
    let (store, driver) =
        CertificateStore::new(StoreConfig::default(), Arc::clone(&issuer) as Arc<dyn Issuer>, trust);
    tokio::spawn(driver);
    let (client, server) = (id("client"), id("server"));
    store.prefetch(&client).unwrap();
    store.prefetch(&server).unwrap();
    let first = store.certificate(&client).await.unwrap();
    store.certificate(&server).await.unwrap();
    // Another root signs from now on. The old one is still published with it.
    *issuer.further_roots.lock().unwrap() = old_root.pem.clone();
    *issuer.ca.lock().unwrap() = Arc::new(TestCa::new("new"));

    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let (mut connections, mut is_rotated) = (0, false);
    while !is_rotated {
        assert!(tokio::time::Instant::now() < deadline, "not rotated within 20 s");
        let current = |identity| store.current(identity).expect("there is always a valid certificate");
        let (ours, theirs) = (current(&client), current(&server));
        let (dialled, accepted) =
            meet(ours.client_tls().expecting(&[id("server")]), theirs.server_config()).await;
        dialled.unwrap();
        let peer = PeerCertificate::of_client(accepted.unwrap().get_ref().1).unwrap();
        assert_eq!(peer.serial(), ours.info().serial);
        connections += 1;
        let replaced = [&ours, &theirs].iter().all(|certificate| certificate.info().issuer == "CN=new");
        is_rotated = replaced && ours.info().serial != first.info().serial;
    }
    assert!(connections > 3);
}

/// Whether `trust` believes what `ca` signs.
fn believes(trust: &Trust, ca: &TestCa) -> bool {
    let (leaf, _) = ca.raw(&Wish::valid(&["spiffe://cluster.local/ns/shop/sa/a"]));
    trust.verify(&[leaf], Usage::Client, SystemTime::now()).is_ok()
}

#[tokio::test]
async fn a_root_that_is_no_longer_published_is_disbelieved_at_once() {
    let issuer = Arc::new(TestIssuer::new(Arc::new(SystemTime::now)));
    let trust = Trust::new(domain("cluster.local"), Vec::new());
    let (store, driver) = CertificateStore::new(StoreConfig::default(), issuer.clone(), trust.clone());
    tokio::spawn(driver);
    let old = Arc::clone(&issuer.ca.lock().unwrap());
    let held = store.certificate(&id("a")).await.unwrap();
    assert!(believes(&trust, &old));
    let mut changes = trust.subscribe();

    let new = Arc::new(TestCa::new("new"));
    *issuer.ca.lock().unwrap() = Arc::clone(&new);
    store.certificate(&id("b")).await.unwrap();
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    assert!(believes(&trust, &new));
    assert!(!believes(&trust, &old), "the certificate of a, still held, carried it");
    assert!(held.is_valid_at(SystemTime::now()));
}

#[tokio::test]
async fn configured_roots_override_those_that_come_with_certificates() {
    let issuer = Arc::new(TestIssuer::new(Arc::new(SystemTime::now)));
    let configured = TestCa::new("configured");
    let trust = trust_in(&[&configured]);
    let (store, driver) = CertificateStore::new(StoreConfig::default(), issuer.clone(), trust.clone());
    tokio::spawn(driver);
    let carried = Arc::clone(&issuer.ca.lock().unwrap());
    store.certificate(&id("a")).await.unwrap();
    assert!(believes(&trust, &configured));
    assert!(!believes(&trust, &carried));
}

#[tokio::test(start_paused = true)]
async fn certificates_under_a_removed_root_are_replaced_at_once() {
    let clock = virtual_clock();
    let issuer = Arc::new(TestIssuer::new(Arc::clone(&clock)));
    let (old, new) = (Arc::clone(&issuer.ca.lock().unwrap()), Arc::new(TestCa::new("new")));
    let trust = trust_in(&[&old, &new]);
    let config = StoreConfig { clock: Arc::clone(&clock), ..StoreConfig::default() };
    let (store, driver) = CertificateStore::new(config, issuer.clone(), trust.clone());
    tokio::spawn(driver);
    store.prefetch(&id("a")).unwrap();
    let first = store.certificate(&id("a")).await.unwrap();
    *issuer.ca.lock().unwrap() = Arc::clone(&new);
    trust.set_roots(new.pem.as_bytes()).unwrap();
    pass(20).await;
    let second = store.current(&id("a")).unwrap();
    assert_ne!(first.info().serial, second.info().serial);
    assert_eq!(second.info().issuer, "CN=new");
    assert_eq!(issuer.asked().len(), 2);
}
