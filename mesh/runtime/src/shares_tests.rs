use super::*;
use proptest::prelude::*;

fn take_all(budget: &Arc<Budget>, holder: &Holder) -> Vec<Taken> {
    std::iter::from_fn(|| budget.take(holder, 1).ok()).collect()
}

#[test]
fn one_pod_gets_half_two_get_a_third_each() {
    let budget = Budget::new(Resource::Descriptors, 900);
    let [one, two] = [(); 2].map(|()| PodShares::default());
    let first = take_all(&budget, &one.outbound());
    assert_eq!(first.len(), 450);
    let second = take_all(&budget, &two.outbound());
    assert_eq!(second.len(), 225);
    drop(first);
    let _second = (take_all(&budget, &two.outbound()), second);
    assert_eq!(budget.used(), 450);
}

#[test]
fn a_peer_leaves_room_for_other_peers_and_for_the_pod() {
    let budget = Budget::new(Resource::Handshakes, 900);
    let pod = PodShares::default();
    let [one, two] = ["10.0.0.1", "10.0.0.2"].map(|ip| ip.parse().unwrap());
    let greedy = take_all(&budget, &pod.inbound(one));
    assert_eq!(greedy.len(), 300);
    assert_eq!(budget.take(&pod.inbound(one), 1).unwrap_err().limit, Limit::Peer);
    assert_eq!(take_all(&budget, &pod.inbound(two)).len(), 100);
    assert_eq!(take_all(&budget, &pod.outbound()).len(), 300);
    drop(greedy);
    assert_eq!(budget.used(), 0);
}

#[test]
fn unused_peers_are_forgotten() {
    let peers = Peers::default();
    let kept = peers.share([10, 0, 0, 1].into());
    for n in 0..100_000_u32 {
        drop(peers.share(IpAddr::V4(n.into())));
    }
    assert!(peers.len() <= SWEEP_FLOOR + 1, "{}", peers.len());
    assert!(Arc::ptr_eq(&kept, &peers.share([10, 0, 0, 1].into())));
}

#[test]
fn refusals_are_logged_now_and_then() {
    let share = Share::default();
    assert_eq!(share.note_refusal(), Some(1));
    assert_eq!((0..1000).filter_map(|_| share.note_refusal()).count(), 0);
}

proptest! {
    /// However many pods take all they can get, the next one gets something, and nobody gets more than there is.
    #[test]
    fn greedy_pods_always_leave_something(capacity in 64_u64..100_000, pods in 1_usize..40) {
        let budget = Budget::new(Resource::Descriptors, capacity);
        let shares: Vec<_> = (0..pods).map(|_| PodShares::default()).collect();
        let mut held = Vec::new();
        for pod in &shares {
            let before = budget.used();
            let taken = take_all(&budget, &pod.outbound());
            if before < capacity {
                prop_assert!(!taken.is_empty());
            }
            held.push(taken);
        }
        prop_assert!(budget.used() <= capacity);
    }
}
