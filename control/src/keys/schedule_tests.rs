use super::*;
use crate::index::WantedKeys;

const REFRESH: Duration = Duration::from_secs(1200);
const LIMIT: Duration = Duration::from_secs(5);

fn address(name: &str) -> KeyAddress {
    KeyAddress::Uri(name.into())
}

fn of(namespaces: &[&str], generation: u64) -> WantedKeys {
    let namespaces = namespaces.iter().map(|name| Arc::from(*name)).collect();
    WantedKeys { timeout: LIMIT, namespaces, generation }
}

/// Addresses that namespaces want.
fn wanted(all: &[(&str, &str)]) -> Wanted {
    all.iter().map(|(name, namespace)| (address(name), of(&[namespace], 0))).collect()
}

fn wanting(names: &[&str], now: Instant) -> Schedule {
    let mut schedule = Schedule::new(REFRESH);
    let all: Vec<(&str, &str)> = names.iter().map(|name| (*name, "shop")).collect();
    assert_eq!(schedule.set_wanted(&wanted(&all), now), []);
    schedule
}

fn started(schedule: &mut Schedule, now: Instant) -> Vec<KeyAddress> {
    schedule.poll_due(now).into_iter().map(|(address, _)| address).collect()
}

#[test]
fn keys_are_refreshed_and_kept_while_that_fails() {
    let now = Instant::now();
    let mut schedule = wanting(&["a"], now);
    assert_eq!(schedule.poll_due(now), [(address("a"), LIMIT)]);
    assert_eq!(schedule.poll_due(now), [], "it is being fetched");
    let keys = Bytes::from_static(b"keys");
    let good = FetchedKeys { keys: Some(keys.clone()), problem: None };
    assert_eq!(schedule.handle_fetched(&address("a"), Ok(Some(keys.clone())), now), Some(good.clone()));
    assert_eq!(schedule.next(), Some(now + REFRESH));

    let later = now + REFRESH;
    assert_eq!(schedule.poll_due(later).len(), 1);
    let unchanged = schedule.handle_fetched(&address("a"), Ok(Some(keys.clone())), later);
    assert_eq!(unchanged, None, "they did not change");

    let later = later + REFRESH;
    assert_eq!(schedule.poll_due(later).len(), 1);
    let stale = FetchedKeys { keys: Some(keys.clone()), problem: Some(NOT_FETCHED.into()) };
    assert_eq!(schedule.handle_fetched(&address("a"), Err(()), later), Some(stale));
    assert_eq!(schedule.problems(), (0, 1));
    assert_eq!(schedule.next(), Some(later + FIRST_RETRY));
    let later = later + FIRST_RETRY;
    assert_eq!(schedule.poll_due(later).len(), 1);
    assert_eq!(schedule.handle_fetched(&address("a"), Ok(Some(keys)), later), Some(good));
    assert_eq!(schedule.problems(), (0, 0));
}

/// Keys that were revoked must not count for ever where the issuer can't be reached.
#[test]
fn keys_that_are_not_refreshed_for_a_day_are_dropped() {
    let now = Instant::now();
    let mut schedule = wanting(&["a"], now);
    schedule.poll_due(now);
    schedule.handle_fetched(&address("a"), Ok(Some(Bytes::from_static(b"keys"))), now);
    let end = now + REFRESH + LONGEST_STALE;
    schedule.handle_fetched(&address("a"), Err(()), end - Duration::from_secs(1)).unwrap();
    assert_eq!((schedule.problems(), schedule.expired()), ((0, 1), 0));
    let dropped = FetchedKeys { keys: None, problem: Some(NOT_FETCHED.into()) };
    assert_eq!(schedule.handle_fetched(&address("a"), Err(()), end), Some(dropped));
    assert_eq!((schedule.problems(), schedule.expired()), ((1, 0), 1));
}

#[test]
fn an_issuer_that_has_no_keys_any_more_revokes_them() {
    let now = Instant::now();
    let mut schedule = wanting(&["a"], now);
    schedule.poll_due(now);
    schedule.handle_fetched(&address("a"), Ok(Some(Bytes::from_static(b"keys"))), now);
    let none = FetchedKeys { keys: None, problem: Some(NO_KEYS.into()) };
    assert_eq!(schedule.handle_fetched(&address("a"), Ok(None), now + REFRESH), Some(none));
    assert_eq!(schedule.next(), Some(now + REFRESH + FIRST_RETRY));
}

#[test]
fn failures_wait_longer_each_time() {
    let mut now = Instant::now();
    let mut schedule = wanting(&["a"], now);
    for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
        assert_eq!(schedule.poll_due(now).len(), 1);
        schedule.handle_fetched(&address("a"), Err(()), now);
        assert_eq!(schedule.next(), Some(now + Duration::from_secs(seconds)));
        now += Duration::from_secs(seconds);
    }
    assert_eq!(schedule.problems(), (1, 0));
}

#[test]
fn only_so_many_are_fetched_at_once() {
    let now = Instant::now();
    let mut schedule = Schedule::new(REFRESH);
    let names: Vec<String> = (0..=CONCURRENT).map(|number| format!("{number:02}")).collect();
    let all: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), name.as_str())).collect();
    schedule.set_wanted(&wanted(&all), now);
    assert_eq!(schedule.poll_due(now).len(), CONCURRENT);
    assert_eq!((schedule.poll_due(now).len(), schedule.next()), (0, None));
    schedule.handle_fetched(&address("03"), Ok(None), now);
    assert_eq!(schedule.poll_due(now).len(), 1);
}

/// However many addresses that do not answer another namespace has.
#[test]
fn a_namespace_does_not_hold_up_the_keys_of_another() {
    let now = Instant::now();
    let mut schedule = Schedule::new(REFRESH);
    let names: Vec<String> = (0..40).map(|number| format!("a{number:02}")).collect();
    let mut all: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "greedy")).collect();
    all.push(("z", "shop"));
    let mut wanted = wanted(&all);
    // Who names the keys of another does not slow them down.
    wanted.insert(address("y"), of(&["greedy", "shop"], 0));
    schedule.set_wanted(&wanted, now);
    assert_eq!(started(&mut schedule, now), ["a00", "a01", "y", "z"].map(address));
    assert_eq!(schedule.next(), None, "nothing may be started, so nothing is waited for");
    // What waits longest is next, not what has just failed.
    let later = now + Duration::from_secs(70);
    schedule.handle_fetched(&address("a00"), Err(()), now);
    assert_eq!(started(&mut schedule, later), [address("a02")]);
}

#[test]
fn a_namespace_has_its_share_of_key_sets() {
    let now = Instant::now();
    let mut schedule = Schedule::new(REFRESH);
    let names: Vec<String> = (0..=MOST_OF_NAMESPACE).map(|number| format!("a{number:03}")).collect();
    let mut all: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "greedy")).collect();
    all.push(("z", "shop"));
    let over = FetchedKeys { keys: None, problem: Some(TOO_MANY.into()) };
    assert_eq!(schedule.set_wanted(&wanted(&all), now), [(address("a064"), over)]);
    assert_eq!(schedule.set_wanted(&wanted(&all), now), [], "it was reported");
    all.remove(0);
    assert_eq!(schedule.set_wanted(&wanted(&all), now), []);
    let running = schedule.poll_due(now).len();
    assert_eq!(running, CONCURRENT_OF_NAMESPACE + 1);
    assert!(schedule.entries.values().all(|entry| entry.is_admitted));
}

/// Every namespace gets some before one gets all.
#[test]
fn the_mesh_has_its_share_of_key_sets() {
    let namespaces: Vec<String> = (0..=MOST / MOST_OF_NAMESPACE).map(|number| format!("n{number}")).collect();
    let mut all = Wanted::new();
    for namespace in &namespaces {
        for number in 0..MOST_OF_NAMESPACE {
            all.insert(address(&format!("{namespace}/{number:02}")), of(&[namespace], 0));
        }
    }
    all.insert(address("z"), of(&["shop"], 0));
    let admitted = admitted(&all);
    assert_eq!(admitted.len(), MOST);
    assert!(admitted.contains(&address("z")));
    assert!(namespaces.iter().all(|namespace| admitted.contains(&address(&format!("{namespace}/50")))));
}

#[test]
fn what_is_not_wanted_any_more_is_forgotten() {
    let now = Instant::now();
    let mut schedule = wanting(&["a"], now);
    assert_eq!(schedule.poll_due(now).len(), 1);
    schedule.set_wanted(&Wanted::new(), now);
    assert_eq!(schedule.handle_fetched(&address("a"), Ok(None), now), None);
    assert_eq!(schedule.next(), None);
}

/// Objects that are deleted and made again start no more attempts than others.
#[test]
fn attempts_for_what_is_not_wanted_any_more_count() {
    let now = Instant::now();
    let mut schedule = wanting(&["a", "b"], now);
    assert_eq!(schedule.poll_due(now).len(), 2);
    schedule.set_wanted(&wanted(&[("c", "shop"), ("a", "shop")]), now);
    assert_eq!(schedule.poll_due(now), []);
    schedule.handle_fetched(&address("b"), Err(()), now);
    assert_eq!(started(&mut schedule, now), [address("c")]);
}

/// The index forgets keys with the last object that wants them; that they were wanted in between may not be seen here.
#[test]
fn keys_that_are_wanted_again_are_reported_again() {
    let now = Instant::now();
    let mut schedule = wanting(&["a"], now);
    schedule.poll_due(now);
    let good = schedule.handle_fetched(&address("a"), Ok(Some(Bytes::from_static(b"keys"))), now).unwrap();
    let again = Wanted::from([(address("a"), of(&["shop"], 1))]);
    assert_eq!(schedule.set_wanted(&again, now), [(address("a"), good)]);
    assert_eq!(schedule.set_wanted(&again, now), []);
}
