//! The choice of a connection for the next tunnel. Pure.

/// A connection that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Tunnels open or being opened.
    pub open: u32,
    /// Largest number of tunnels.
    pub limit: u32,
    /// Whether one of its tunnels carries bulk.
    pub bulk: bool,
}

/// How many connections a key may have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Connections dialled because others are busy; with 0, a busy one is used without waiting.
    pub spread: usize,
    /// Connections dialled because others are full.
    pub connections: usize,
    /// Tunnels above which a connection is busy.
    pub busy: u32,
}

/// What to do with the next tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Open it on the candidate with this index.
    Use(usize),
    /// Dial a connection first.
    Dial,
    /// Wait for the connection that is being dialled.
    Wait,
    /// All connections are full and no more are allowed.
    Full,
}

/// Chooses the least loaded connection without bulk; a new one when all are busy or full; the least loaded
/// busy one when the key may not have more.
pub(crate) fn choose(candidates: &[Candidate], dialling: bool, bounds: Bounds) -> Choice {
    let free = candidates.iter().enumerate().filter(|(_, one)| one.open < one.limit);
    let best = free.min_by_key(|(_, one)| (one.bulk, one.open)).map(|(index, one)| (index, *one));
    let grow = |limit: usize| candidates.len() < limit;
    match best {
        Some((index, one)) if !one.bulk && one.open < bounds.busy => Choice::Use(index),
        Some(_) if dialling && bounds.spread > 0 => Choice::Wait,
        Some(_) if grow(bounds.spread) => Choice::Dial,
        Some((index, _)) => Choice::Use(index),
        None if dialling => Choice::Wait,
        None if grow(bounds.connections) => Choice::Dial,
        None => Choice::Full,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds { spread: 2, connections: 3, busy: 100 };

    fn candidate(open: u32, bulk: bool) -> Candidate {
        Candidate { open, limit: 200, bulk }
    }

    #[test]
    fn the_first_tunnel_dials_and_others_wait() {
        assert_eq!(choose(&[], false, BOUNDS), Choice::Dial);
        assert_eq!(choose(&[], true, BOUNDS), Choice::Wait);
    }

    #[test]
    fn the_least_loaded_quiet_connection_is_used() {
        let all = [candidate(3, false), candidate(1, true), candidate(2, false)];
        assert_eq!(choose(&all, false, BOUNDS), Choice::Use(2));
    }

    #[test]
    fn bulk_or_many_tunnels_spread_within_bounds() {
        assert_eq!(choose(&[candidate(1, true)], false, BOUNDS), Choice::Dial);
        assert_eq!(choose(&[candidate(100, false)], false, BOUNDS), Choice::Dial);
        assert_eq!(choose(&[candidate(1, true)], true, BOUNDS), Choice::Wait);
        assert_eq!(choose(&[candidate(9, true), candidate(4, true)], false, BOUNDS), Choice::Use(1));
    }

    #[test]
    fn a_tunnel_that_may_not_spread_takes_a_busy_connection_at_once() {
        let bounds = Bounds { spread: 0, ..BOUNDS };
        assert_eq!(choose(&[candidate(1, true)], true, bounds), Choice::Use(0));
        assert_eq!(choose(&[candidate(200, true)], true, bounds), Choice::Wait);
    }

    #[test]
    fn full_connections_are_never_used() {
        let full = candidate(200, false);
        assert_eq!(choose(&[full, full], false, BOUNDS), Choice::Dial);
        assert_eq!(choose(&[full, full, full], false, BOUNDS), Choice::Full);
        assert_eq!(choose(&[full, full, full], true, BOUNDS), Choice::Wait);
    }

    proptest! {
        #[test]
        fn the_choice_has_room_and_is_the_quietest(
            all in proptest::collection::vec((0u32..260, any::<bool>()), 0..6), dialling: bool,
        ) {
            let all: Vec<_> = all.into_iter().map(|(open, bulk)| candidate(open, bulk)).collect();
            match choose(&all, dialling, BOUNDS) {
                Choice::Use(index) => {
                    let used = all[index];
                    prop_assert!(used.open < used.limit);
                    prop_assert!(all.iter().filter(|one| !one.bulk && used.bulk == one.bulk).all(|one| one.open >= used.open));
                }
                Choice::Dial => prop_assert!(!dialling && all.len() < BOUNDS.connections),
                Choice::Wait => prop_assert!(dialling),
                Choice::Full => prop_assert!(all.len() >= BOUNDS.connections && all.iter().all(|one| one.open >= one.limit)),
            }
        }
    }
}
