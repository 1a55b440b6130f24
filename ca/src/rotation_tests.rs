//! A mesh in simulated time: replicas over one store, each of which may restart at any moment.

use super::*;

const PROPAGATION: Propagation = Propagation::Fixed(Duration::from_secs(300));
const LIFETIME: Duration = Duration::from_secs(3600);
const LATE: u64 = 1_000_000;

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(100_000 + seconds)
}

/// A key that signs under the root of its name, with further roots beside it.
fn key(name: &str, further: &[&str]) -> SigningKey {
    let roots = std::iter::once(name).chain(further.iter().copied()).map(str::to_owned).collect();
    SigningKey {
        certificate: format!("certificate {name}"),
        key: format!("key {name}"),
        chain: Vec::new(),
        roots,
        active_root: name.to_owned(),
        not_after: 100_000 + LATE,
    }
}

/// The store, as text, and what the operator put beside it.
struct Store {
    record: Option<String>,
    wanted: SigningKey,
}

impl Store {
    fn with(wanted: SigningKey) -> Self {
        Self { record: None, wanted }
    }

    /// A replica that has just started, or looks again: it knows nothing but the store. Each gave out certificates
    /// of the usual lifetime before.
    fn look(&mut self, now: u64) -> (String, Vec<String>) {
        let record = self.record.as_deref().map(|text| Record::parse(text).unwrap());
        let decision = decide(record, &self.wanted, LIFETIME, PROPAGATION, at(now));
        self.record = Some(decision.record.to_text().unwrap());
        (decision.record.signing.active_root, decision.roots)
    }

    fn next(&self, now: u64) -> Option<SystemTime> {
        let record = self.record.as_deref().map(|text| Record::parse(text).unwrap());
        decide(record, &self.wanted, LIFETIME, PROPAGATION, at(now)).next
    }
}

fn published(signing: &str, roots: &[&str]) -> (String, Vec<String>) {
    (signing.to_owned(), roots.iter().map(|root| (*root).to_owned()).collect())
}

#[test]
fn a_root_swapped_at_once_is_published_before_it_signs() {
    let mut store = Store::with(key("old", &[]));
    assert_eq!(store.look(0), published("old", &["old"]));
    store.wanted = key("new", &[]);
    // Every call of `look` stands for a replica that has just started.
    assert_eq!(store.look(10), published("old", &["old", "new"]));
    assert_eq!(store.next(10), Some(at(310)));
    assert_eq!(store.look(309), published("old", &["old", "new"]));
    assert_eq!(store.look(310), published("new", &["new", "old"]));
}

/// Without another file of roots a workload learns the new one with its next certificate.
#[test]
fn a_swapped_root_signs_once_every_workload_has_renewed() {
    let look = |store: &mut Store, lifetime: Duration, now: u64| {
        let record = store.record.as_deref().map(|text| Record::parse(text).unwrap());
        let propagation = Propagation::UntilRenewed(Duration::from_secs(300));
        let decision = decide(record, &store.wanted, lifetime, propagation, at(now));
        store.record = Some(decision.record.to_text().unwrap());
        decision.record.signing.active_root
    };
    for (lifetime, due) in [(LIFETIME, 10 + 2160), (Duration::from_secs(60), 310), (Duration::ZERO, 310)] {
        let mut store = Store::with(key("old", &[]));
        look(&mut store, lifetime, 0);
        store.wanted = key("new", &[]);
        look(&mut store, lifetime, 10);
        assert_eq!(look(&mut store, lifetime, due - 1), "old");
        assert_eq!(look(&mut store, lifetime, due), "new");
    }
}

#[test]
fn a_root_does_not_sign_while_the_record_is_not_kept() {
    let mut store = Store::with(key("old", &[]));
    store.look(0);
    store.wanted = key("new", &[]);
    let mut record = store.record.as_deref().map(|text| Record::parse(text).unwrap());
    for now in [10, 10_000, LATE - 1] {
        let decision = decide(record, &store.wanted, LIFETIME, Propagation::Unkept, at(now));
        assert_eq!(decision.record.signing.active_root, "old");
        assert_eq!(decision.roots, ["old", "new"]);
        record = Some(decision.record);
    }
}

#[test]
fn an_old_root_is_published_until_its_last_certificate_ends() {
    let mut store = Store::with(key("old", &[]));
    store.look(0);
    store.wanted = key("new", &[]);
    store.look(10);
    store.look(310);
    let end = 310 + LIFETIME.as_secs() + SWITCH_DELAY.as_secs();
    assert_eq!(store.next(310), Some(at(end)));
    assert_eq!(store.look(end - 1), published("new", &["new", "old"]));
    assert_eq!(store.look(end), published("new", &["new"]));
    assert_eq!(store.next(end), None);
}

#[test]
fn a_replica_that_was_down_signs_once_the_propagation_is_over() {
    let mut store = Store::with(key("old", &[]));
    store.look(0);
    store.wanted = key("new", &[]);
    store.look(10);
    assert_eq!(store.look(5_000), published("new", &["new", "old"]));
}

#[test]
fn a_root_that_nobody_saw_before_a_restart_is_published_first() {
    let mut store = Store::with(key("old", &[]));
    store.look(0);
    // The files are swapped while no replica runs.
    store.wanted = key("new", &[]);
    assert_eq!(store.look(5_000), published("old", &["old", "new"]));
    assert_eq!(store.look(5_300), published("new", &["new", "old"]));
}

#[test]
fn a_root_that_was_published_long_enough_signs_at_once() {
    let mut store = Store::with(key("old", &[]));
    store.look(0);
    store.wanted = key("old", &["new"]);
    assert_eq!(store.look(10), published("old", &["old", "new"]));
    store.wanted = key("new", &["old"]);
    assert_eq!(store.look(400), published("new", &["new", "old"]));
}

#[test]
fn an_expired_key_gives_way_at_once() {
    let mut old = key("old", &[]);
    old.not_after = 100_005;
    let mut store = Store::with(old);
    store.look(0);
    store.wanted = key("new", &[]);
    assert_eq!(store.look(30), published("new", &["new"]));
}

#[test]
fn going_back_before_the_switch_leaves_the_old_key_in_charge() {
    let mut store = Store::with(key("old", &[]));
    store.look(0);
    store.wanted = key("new", &[]);
    store.look(10);
    store.wanted = key("old", &[]);
    assert_eq!(store.look(20), published("old", &["old"]));
    assert_eq!(store.look(400), published("old", &["old"]));
    // A second attempt is propagated anew.
    store.wanted = key("new", &[]);
    assert_eq!(store.look(500), published("old", &["old", "new"]));
}

#[test]
fn a_second_rotation_during_the_first_keeps_all_roots_in_use() {
    let mut store = Store::with(key("first", &[]));
    store.look(0);
    store.wanted = key("second", &[]);
    store.look(10);
    store.look(310);
    store.wanted = key("third", &[]);
    assert_eq!(store.look(400), published("second", &["second", "third", "first"]));
    assert_eq!(store.look(700), published("third", &["third", "first", "second"]));
}

#[test]
fn two_replicas_over_one_store_decide_alike_at_every_moment() {
    let mut store = Store::with(key("old", &[]));
    store.look(0);
    store.wanted = key("new", &[]);
    for now in (10..8_000).step_by(7) {
        let one = store.look(now);
        let other = store.look(now);
        assert_eq!(one, other, "at {now}");
        let record = store.record.clone();
        store.look(now);
        assert_eq!(record, store.record, "nothing is left to write at {now}");
    }
}

#[test]
fn the_longest_lifetime_that_any_replica_gave_counts() {
    let mut store = Store::with(key("old", &[]));
    store.look(0);
    let record = Record::parse(store.record.as_deref().unwrap()).unwrap();
    let longer = decide(Some(record), &store.wanted, LIFETIME * 3, PROPAGATION, at(1));
    store.record = Some(longer.record.to_text().unwrap());
    store.wanted = key("new", &[]);
    store.look(10);
    store.look(310);
    let end = 310 + 3 * LIFETIME.as_secs();
    assert_eq!(store.look(end), published("new", &["new", "old"]));
    assert_eq!(store.look(end + SWITCH_DELAY.as_secs()), published("new", &["new"]));
}

#[test]
fn a_record_of_another_version_is_refused_not_replaced() {
    assert!(matches!(Record::parse("{\"version\": 2, \"more\": 1}"), Err(RecordError::Version(2))));
    assert!(matches!(Record::parse("{}"), Err(RecordError::Malformed(_))));
    assert!(matches!(Record::parse("nonsense"), Err(RecordError::Malformed(_))));
}

#[test]
fn a_record_that_forgets_the_signing_root_does_not_continue() {
    let mut store = Store::with(key("old", &[]));
    store.look(0);
    let record = |store: &Store| Record::parse(store.record.as_deref().unwrap()).unwrap();
    let former = record(&store);
    let mut begun_anew = Store::with(key("other", &[]));
    begun_anew.look(10);
    let other = record(&begun_anew);
    assert!(!other.continues(&former, at(0), at(10)));
    let expired = LIFETIME.as_secs() + SWITCH_DELAY.as_secs();
    assert!(
        !other.continues(&former, at(0), at(expired)) && other.continues(&former, at(0), at(expired + 1))
    );
    // A rotation that another replica went through continues, in each of its phases.
    store.wanted = key("new", &[]);
    for now in [10, 310, 400] {
        store.look(now);
        assert!(record(&store).continues(&former, at(0), at(now)), "{now}");
    }
    assert_eq!(record(&store).signing.active_root, "new");
}
