use super::*;

fn version(ino: u64) -> Version {
    Version { netns: Some(NetnsId { dev: 4, ino }), revision: 0 }
}

/// Answers every order until there is nothing to do, and returns the orders.
fn run(hub: &mut Hub, id: ProxyId, now: Instant, accept: impl Fn(&Order) -> bool) -> Vec<Order> {
    let mut orders = Vec::new();
    while let Next::Send(order) = hub.poll_next(id, now) {
        assert_eq!(hub.poll_next(id, now), Next::Wait, "one order at a time");
        hub.handle_ack(id, accept(&order), now);
        orders.push(order);
    }
    orders
}

fn add(uid: &str, ino: u64) -> Order {
    Order::Add(uid.into(), version(ino))
}

#[test]
fn a_proxy_gets_every_pod_the_snapshots_end_then_changes() {
    let now = Instant::now();
    let mut hub = Hub::default();
    hub.upsert("a", version(1));
    hub.upsert("b", Version { netns: None, revision: 0 });
    let id = hub.connect(now);
    let keep = Order::Keep("b".into(), Version { netns: None, revision: 0 });
    assert_eq!(run(&mut hub, id, now, |_| true), [add("a", 1), keep, Order::SnapshotSent]);
    assert!(hub.is_served("a"));
    hub.upsert("c", version(3));
    hub.delete("a");
    assert_eq!(run(&mut hub, id, now, |_| true), [Order::Del("a".into()), add("c", 3)]);
    assert!(!hub.is_known("a"));
}

#[test]
fn a_keep_is_sent_in_snapshots_only_and_is_not_serving() {
    let now = Instant::now();
    let mut hub = Hub::default();
    let lost = Version { netns: None, revision: 0 };
    hub.upsert("a", lost);
    let id = hub.connect(now);
    assert_eq!(run(&mut hub, id, now, |_| true), [Order::Keep("a".into(), lost), Order::SnapshotSent]);
    assert!(!hub.is_served("a"));
    hub.upsert("b", lost);
    assert_eq!(run(&mut hub, id, now, |_| true), []);
    hub.upsert("a", version(1));
    assert_eq!(run(&mut hub, id, now, |_| true), [add("a", 1)]);
    let id = hub.connect(now);
    let refused = run(&mut hub, id, now, |order| !matches!(order, Order::Keep(..)));
    assert_eq!(refused, [add("a", 1), Order::Keep("b".into(), lost), Order::SnapshotSent]);
    assert_eq!(hub.poll_next(id, now), Next::Wait, "a refused Keep is not sent again");
}

#[test]
fn a_pod_whose_add_cannot_be_sent_is_kept_and_added_later() {
    let now = Instant::now();
    let mut hub = Hub::default();
    hub.upsert("a", version(1));
    hub.upsert("b", version(2));
    let id = hub.connect(now);
    assert_eq!(hub.poll_next(id, now), Next::Send(add("a", 1)));
    assert_eq!(hub.handle_unsent(id, Unsendable::Failed, now), Some("a".into()));
    let keep = Order::Keep("a".into(), version(1));
    assert_eq!(run(&mut hub, id, now, |_| true), [keep, add("b", 2), Order::SnapshotSent]);
    assert!(!hub.is_served("a"));
    let Next::WaitUntil(at) = hub.poll_next(id, now) else { panic!("no retry planned") };
    assert_eq!(hub.poll_next(id, at), Next::Send(add("a", 1)));
    // Outside of a snapshot there is nothing to keep: the proxy goes on with what it has.
    assert_eq!(hub.handle_unsent(id, Unsendable::Failed, at), Some("a".into()));
    let Next::WaitUntil(at) = hub.poll_next(id, at) else { panic!("no retry planned") };
    assert_eq!(run(&mut hub, id, at, |_| true), [add("a", 1)]);
    assert!(hub.is_served("a"));
}

/// The proxy's predecessor holds the listeners of `a` and comes back to a restarted agent after its successor.
#[test]
fn a_snapshot_ends_when_held_listeners_were_taken_over() {
    let now = Instant::now();
    let mut hub = Hub::default();
    hub.upsert("a", version(1));
    hub.upsert("b", version(2));
    let id = hub.connect(now + Duration::from_secs(10));
    assert_eq!(hub.poll_next(id, now), Next::Send(add("a", 1)));
    assert_eq!(hub.handle_unsent(id, Unsendable::Held, now), None);
    assert_eq!(run(&mut hub, id, now, |_| true), [add("b", 2)], "others do not wait");
    let Next::WaitUntil(at) = hub.poll_next(id, now) else { panic!("no retry planned") };
    assert_eq!(hub.poll_next(id, at), Next::Send(add("a", 1)));
    hub.handle_unsent(id, Unsendable::Held, at);
    let Next::WaitUntil(at) = hub.poll_next(id, at) else { panic!("no retry planned") };
    assert_eq!(run(&mut hub, id, at, |_| true), [add("a", 1), Order::SnapshotSent]);
    assert!(hub.is_served("a"));
}

#[test]
fn a_pod_whose_listeners_stay_held_is_kept_at_the_end_of_the_wait() {
    let start = Instant::now();
    let end = start + RETRY_FIRST * 2;
    let mut hub = Hub::default();
    hub.upsert("a", version(1));
    let id = hub.connect(end);
    let mut now = start;
    loop {
        match hub.poll_next(id, now) {
            Next::Send(order) if order == add("a", 1) => {
                hub.handle_unsent(id, Unsendable::Held, now);
            }
            Next::WaitUntil(at) => now = at,
            Next::Send(order) => {
                assert_eq!((order, now), (Order::Keep("a".into(), version(1)), end));
                break;
            }
            Next::Wait => panic!("nothing is planned"),
        }
    }
    hub.handle_ack(id, true, now);
    assert_eq!(run(&mut hub, id, now, |_| true), [Order::SnapshotSent]);
    let Next::WaitUntil(at) = hub.poll_next(id, now) else { panic!("no retry planned") };
    assert_eq!(run(&mut hub, id, at, |_| true), [add("a", 1)]);
}

#[test]
fn a_pod_that_goes_before_it_is_kept_is_not_kept() {
    let now = Instant::now();
    let mut hub = Hub::default();
    hub.upsert("a", version(1));
    let id = hub.connect(now);
    hub.poll_next(id, now);
    hub.handle_unsent(id, Unsendable::Failed, now);
    hub.delete("a");
    assert_eq!(run(&mut hub, id, now, |_| true), [Order::SnapshotSent]);
}

#[test]
fn a_pod_seen_again_in_another_namespace_is_added_again() {
    let now = Instant::now();
    let mut hub = Hub::default();
    let id = hub.connect(now);
    hub.upsert("a", version(1));
    run(&mut hub, id, now, |_| true);
    hub.upsert("a", version(1));
    assert_eq!(run(&mut hub, id, now, |_| true), []);
    hub.upsert("a", version(2));
    assert!(!hub.is_served("a"));
    assert_eq!(run(&mut hub, id, now, |_| true), [add("a", 2)]);
}

#[test]
fn a_refused_pod_is_sent_again_with_growing_pauses() {
    let mut now = Instant::now();
    let mut hub = Hub::default();
    hub.upsert("a", version(1));
    hub.upsert("b", version(2));
    let id = hub.connect(now);
    let orders = run(&mut hub, id, now, |order| *order != add("a", 1));
    assert_eq!(orders, [add("a", 1), add("b", 2), Order::SnapshotSent]);
    let mut pauses = Vec::new();
    for _ in 0..8 {
        let Next::WaitUntil(at) = hub.poll_next(id, now) else { panic!("no retry planned") };
        pauses.push((at - now).as_millis());
        now = at;
        assert_eq!(run(&mut hub, id, now, |_| false), [add("a", 1)]);
    }
    assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 15000, 15000, 15000]);
    let Next::WaitUntil(at) = hub.poll_next(id, now) else { panic!("no retry planned") };
    assert_eq!(run(&mut hub, id, at, |_| true), [add("a", 1)]);
    assert!(hub.is_served("a"));
    assert_eq!(hub.poll_next(id, at), Next::Wait);
}

#[test]
fn of_two_proxies_the_newest_gets_adds_and_both_get_dels() {
    let now = Instant::now();
    let mut hub = Hub::default();
    hub.upsert("a", version(1));
    let old = hub.connect(now);
    run(&mut hub, old, now, |_| true);
    let new = hub.connect(now);
    assert_eq!(run(&mut hub, new, now, |_| true), [add("a", 1), Order::SnapshotSent]);
    hub.upsert("b", version(2));
    assert_eq!(run(&mut hub, old, now, |_| true), []);
    assert_eq!(run(&mut hub, new, now, |_| true), [add("b", 2)]);
    hub.delete("a");
    assert_eq!(run(&mut hub, old, now, |_| true), [Order::Del("a".into())]);
    assert_eq!(run(&mut hub, new, now, |_| true), [Order::Del("a".into())]);
    hub.disconnect(new);
    assert_eq!(run(&mut hub, old, now, |_| true), [add("b", 2)], "it is the newest again");
}

#[test]
fn the_older_proxy_leaves_a_namespace_that_its_pod_has_left() {
    let now = Instant::now();
    let mut hub = Hub::default();
    hub.upsert("a", version(1));
    let old = hub.connect(now);
    run(&mut hub, old, now, |_| true);
    let new = hub.connect(now);
    run(&mut hub, new, now, |_| true);
    hub.upsert("a", version(2));
    assert_eq!(run(&mut hub, old, now, |_| true), [Order::Del("a".into())]);
    assert_eq!(run(&mut hub, new, now, |_| true), [add("a", 2)]);
}

#[test]
fn two_proxies_that_reconnect_each_get_a_whole_snapshot() {
    let now = Instant::now();
    let mut hub = Hub::default();
    hub.upsert("a", version(1));
    let (first, second) = (hub.connect(now), hub.connect(now));
    for id in [first, second] {
        assert_eq!(run(&mut hub, id, now, |_| true), [add("a", 1), Order::SnapshotSent]);
    }
}

#[test]
fn a_pod_that_goes_while_its_add_is_out_is_deleted_afterwards() {
    let now = Instant::now();
    let mut hub = Hub::default();
    let id = hub.connect(now);
    run(&mut hub, id, now, |_| true);
    hub.upsert("a", version(1));
    assert_eq!(hub.poll_next(id, now), Next::Send(add("a", 1)));
    hub.delete("a");
    assert!(hub.is_known("a"));
    hub.handle_ack(id, true, now);
    assert_eq!(run(&mut hub, id, now, |_| true), [Order::Del("a".into())]);
    assert!(!hub.is_known("a"));
}
