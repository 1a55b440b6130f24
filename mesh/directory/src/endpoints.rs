//! The endpoints of one service, kept in the pools that choices are made from.
//!
//! A pool holds the endpoints that may be chosen (healthy, or all if the service says so; with a capacity) and share the same values of the first
//! scopes of the service's preference. So a choice by preference is a look-up, whatever the number of endpoints and nodes. Terminating endpoints
//! that still serve have pools of their own, from which a client gets one when all others have nothing to offer. As in kube-proxy, STRICT keeps
//! to the client's scopes there too.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use equivalent::Equivalent;
use smallvec::SmallVec;

use crate::list::{Iter, List};
use crate::service::{HealthPolicy, LoadBalancing, Mode, Ports, Scope, Service, Transport};
use crate::table::Table;
use crate::workload::Workload;

/// A workload as an endpoint of one service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// What it makes of the service's ports.
    pub ports: Ports,
}

impl Endpoint {
    /// The port that connections to `service_port` go to: the workload's own mapping, else the service's.
    pub fn target_port(&self, service: &Service, service_port: u16) -> Option<u16> {
        self.target_port_of(Transport::Tcp, service, service_port)
    }

    /// The port that connections or datagrams to `service_port` go to, as [`target_port`](Self::target_port).
    pub fn target_port_of(&self, transport: Transport, service: &Service, service_port: u16) -> Option<u16> {
        let of = |ports: &Ports| {
            let mapping = ports.of(transport, service_port);
            mapping.map(|mapping| mapping.target_port).filter(|port| *port != 0)
        };
        of(&self.ports).or_else(|| of(&service.ports))
    }
}

/// A service with its endpoints, together as decisions need them.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) service: Arc<Service>,
    pub(crate) endpoints: Endpoints,
}

/// Endpoints that may be chosen, with the greatest capacity among them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pool {
    endpoints: List<Endpoint>,
    heaviest: u32,
    heaviest_count: usize,
}

impl Pool {
    pub(crate) fn len(&self) -> usize {
        self.endpoints.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.endpoints.is_empty()
    }

    pub(crate) fn get(&self, at: usize) -> Option<&Endpoint> {
        self.endpoints.get(at)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.iter()
    }

    /// At least the greatest capacity of an endpoint here.
    pub(crate) fn heaviest(&self) -> u32 {
        self.heaviest
    }

    fn insert(&mut self, endpoint: Endpoint) {
        let capacity = endpoint.workload.capacity;
        match capacity.cmp(&self.heaviest) {
            std::cmp::Ordering::Greater => (self.heaviest, self.heaviest_count) = (capacity, 1),
            std::cmp::Ordering::Equal => self.heaviest_count += 1,
            std::cmp::Ordering::Less => {}
        }
        self.endpoints.push(endpoint);
    }

    fn remove(&mut self, workload: &Arc<Workload>) {
        if !take(&mut self.endpoints, workload) || workload.capacity != self.heaviest {
            return;
        }
        self.heaviest_count = self.heaviest_count.saturating_sub(1);
        if self.heaviest_count == 0 {
            let capacities = || self.endpoints.iter().map(|endpoint| endpoint.workload.capacity);
            self.heaviest = capacities().max().unwrap_or_default();
            self.heaviest_count = capacities().filter(|capacity| *capacity == self.heaviest).count();
        }
    }
}

/// Takes the endpoint of `workload` out; the last one takes its place.
fn take(endpoints: &mut List<Endpoint>, workload: &Arc<Workload>) -> bool {
    endpoints.remove(|endpoint| Arc::ptr_eq(&endpoint.workload, workload))
}

/// Values of the first scopes of a preference.
#[derive(Clone, Debug)]
struct Place(SmallVec<[Arc<str>; 3]>);

impl Hash for Place {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for value in &self.0 {
            value.hash(state);
        }
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for Place {}

/// A [`Place`] as a workload has it.
struct PlaceOf<'a> {
    workload: &'a Workload,
    scopes: &'a [Scope],
}

impl Hash for PlaceOf<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for scope in self.scopes {
            self.workload.scope(*scope).hash(state);
        }
    }
}

impl Equivalent<Place> for PlaceOf<'_> {
    fn equivalent(&self, key: &Place) -> bool {
        self.scopes.len() == key.0.len()
            && self.scopes.iter().zip(&key.0).all(|(scope, value)| self.workload.scope(*scope) == &**value)
    }
}

impl PlaceOf<'_> {
    fn to_place(&self) -> Place {
        Place(self.scopes.iter().map(|scope| self.workload.scope(*scope).into()).collect())
    }
}

/// The endpoints of one service; there may be some before the service is known. Cloning is cheap and a clone never changes.
#[derive(Clone, Debug, Default)]
pub struct Endpoints {
    all: List<Endpoint>,
    eligible: Pool,
    near: Table<Place, Pool>,
    /// Terminating endpoints that still serve, by the scopes that they must share with a client: all of a STRICT preference, else none.
    terminating: Table<Place, Pool>,
    balancing: Arc<LoadBalancing>,
}

impl Endpoints {
    /// All, whatever their health, in no order.
    pub fn iter(&self) -> Iter<'_, Endpoint> {
        self.all.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Those that may be chosen.
    pub(crate) fn eligible(&self) -> &Pool {
        &self.eligible
    }

    /// Whether some endpoint is terminating and still serves.
    pub(crate) fn has_terminating(&self) -> bool {
        !self.terminating.is_empty()
    }

    /// The pools from which a client gets an endpoint: a later one only when those before have none to offer.
    pub(crate) fn pools<'a, 'c>(
        &'a self,
        client: &'c Workload,
    ) -> impl Iterator<Item = &'a Pool> + use<'a, 'c> {
        let last = PlaceOf { workload: client, scopes: required(&self.balancing) };
        self.preferred_pools(client).chain(self.terminating.get(&last))
    }

    fn preferred_pools<'a, 'c>(
        &'a self,
        client: &'c Workload,
    ) -> impl Iterator<Item = &'a Pool> + use<'a, 'c> {
        let preference: &[Scope] = &self.balancing.preference;
        let shortest = match self.balancing.mode {
            Mode::Strict => preference.len(),
            Mode::Failover => 0,
            Mode::Any | Mode::Passthrough => return Pools::One(std::iter::once(&self.eligible)),
        };
        Pools::Many((shortest..=preference.len()).rev().filter_map(move |shared| match shared {
            0 => Some(&self.eligible),
            _ => self.near.get(&PlaceOf { workload: client, scopes: preference.get(..shared)? }),
        }))
    }

    pub(crate) fn insert(&mut self, endpoint: Endpoint) {
        self.all.push(endpoint.clone());
        self.pool(endpoint);
    }

    pub(crate) fn remove(&mut self, workload: &Arc<Workload>) {
        if !take(&mut self.all, workload) {
            return;
        }
        let balancing = Arc::clone(&self.balancing);
        if !self.is_eligible(workload) {
            remove_at(&mut self.terminating, workload, required(&balancing));
            return;
        }
        self.eligible.remove(workload);
        for scopes in prefixes(&balancing) {
            remove_at(&mut self.near, workload, scopes);
        }
    }

    /// Puts the endpoints in the pools that `balancing` asks for.
    pub(crate) fn set_balancing(&mut self, balancing: &LoadBalancing) {
        if *self.balancing == *balancing {
            return;
        }
        self.balancing = Arc::new(balancing.clone());
        self.eligible = Pool::default();
        self.near = Table::default();
        self.terminating = Table::default();
        for endpoint in self.all.clone().iter() {
            self.pool(endpoint.clone());
        }
    }

    fn pool(&mut self, endpoint: Endpoint) {
        let balancing = Arc::clone(&self.balancing);
        if !self.is_eligible(&endpoint.workload) {
            if endpoint.workload.serving_while_terminating && endpoint.workload.capacity > 0 {
                let place = PlaceOf { workload: &endpoint.workload, scopes: required(&balancing) }.to_place();
                self.terminating.change(&place, |pool| pool.insert(endpoint));
            }
            return;
        }
        for scopes in prefixes(&balancing) {
            let place = PlaceOf { workload: &endpoint.workload, scopes }.to_place();
            self.near.change(&place, |pool| pool.insert(endpoint.clone()));
        }
        self.eligible.insert(endpoint);
    }

    /// Whether a workload may be chosen while it is not terminating.
    pub(crate) fn is_eligible(&self, workload: &Workload) -> bool {
        workload.capacity > 0 && (workload.is_healthy() || self.balancing.health == HealthPolicy::AllowAll)
    }
}

impl<'a> IntoIterator for &'a Endpoints {
    type Item = &'a Endpoint;
    type IntoIter = Iter<'a, Endpoint>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Removes a workload from the pool of its place.
fn remove_at(pools: &mut Table<Place, Pool>, workload: &Arc<Workload>, scopes: &[Scope]) {
    let place = PlaceOf { workload, scopes };
    if let Some(pool) = pools.get_mut(&place) {
        pool.remove(workload);
        if pool.is_empty() {
            pools.remove(&place);
        }
    }
}

/// The scopes that an endpoint must share with its client.
fn required(balancing: &LoadBalancing) -> &[Scope] {
    if balancing.mode == Mode::Strict { &balancing.preference } else { &[] }
}

/// The beginnings of a preference for which there are pools besides the one of all.
fn prefixes(balancing: &LoadBalancing) -> impl Iterator<Item = &[Scope]> {
    let preference: &[Scope] = &balancing.preference;
    let shortest = match balancing.mode {
        Mode::Strict => preference.len().max(1),
        Mode::Failover => 1,
        Mode::Any | Mode::Passthrough => preference.len() + 1,
    };
    (shortest..=preference.len()).filter_map(move |length| preference.get(..length))
}

/// One pool, or several in order.
enum Pools<One, Many> {
    One(One),
    Many(Many),
}

impl<'a, One, Many> Iterator for Pools<One, Many>
where
    One: Iterator<Item = &'a Pool>,
    Many: Iterator<Item = &'a Pool>,
{
    type Item = &'a Pool;

    fn next(&mut self) -> Option<&'a Pool> {
        match self {
            Self::One(one) => one.next(),
            Self::Many(many) => many.next(),
        }
    }
}
