//! Hosts that clients ask for where a ServiceEntry resolves dynamically: each is an endpoint, known while requests go to it.
//!
//! Clients choose them, so no more than [`MOST`] of a port or subset are remembered. One for which there is no room is used all the same, and
//! never ejected.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::host::HostState;

/// Hosts that are remembered of one port or subset.
const MOST: usize = 1024;

/// What is known of the hosts that were asked for.
#[derive(Debug, Default)]
pub(super) struct AskedHosts {
    /// The lock is held for look-ups, and for a walk where the table is full. Never across an await.
    states: Mutex<HashMap<Arc<str>, Arc<HostState>>>,
}

impl AskedHosts {
    /// What is known of a host; a new one is remembered if there is room.
    pub(super) fn state(&self, host: &Arc<str>, now: Duration) -> Arc<HostState> {
        let mut states = self.states.lock();
        if let Some(known) = states.get(host) {
            return known.clone();
        }
        let new = HostState::new(None);
        if states.len() >= MOST {
            states.retain(|_, state| state.active() > 0 || state.is_ejected(now));
        }
        if states.len() < MOST {
            states.insert(host.clone(), new.clone());
        }
        new
    }

    /// How many are ejected, of how many.
    pub(super) fn ejected(&self, now: Duration) -> (usize, usize) {
        let states = self.states.lock();
        (states.values().filter(|state| state.is_ejected(now)).count(), states.len())
    }

    /// Ends all ejections, and forgets failures.
    pub(super) fn readmit(&self) {
        self.states.lock().values().for_each(|state| state.readmit());
    }

    /// Every host that is remembered.
    pub(super) fn all(&self) -> Vec<(Arc<str>, Arc<HostState>)> {
        self.states.lock().iter().map(|(host, state)| (host.clone(), state.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_ask_for_takes_no_more_room_than_there_is() {
        let hosts = AskedHosts::default();
        let held = hosts.state(&"held.example".into(), Duration::ZERO).open();
        for at in 0..3 * MOST {
            hosts.state(&format!("{at}.example").into(), Duration::ZERO);
        }
        assert!(hosts.ejected(Duration::ZERO).1 <= MOST);
        let is_same = |host: &str| {
            let find = || hosts.state(&host.into(), Duration::ZERO);
            Arc::ptr_eq(&find(), &find())
        };
        assert!(is_same("held.example"));
        assert_eq!(hosts.state(&"held.example".into(), Duration::ZERO).active(), 1);
        drop(held);
    }
}
