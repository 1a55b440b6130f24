//! The endpoints of a service's port or subset in one state, and the choice among them.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ambit_api::l7::LocalityPreference;
use ambit_balance::{
    Algorithm, Level as LevelHealth, Members, OutlierSettings, Pool, TableKind, choose_level, hash,
};
use ambit_directory::{
    Candidate, NoEndpoint, Service, ServiceState, Snapshot, Transport, Workload, WorkloadUid,
};
use rand::{Rng, RngExt};

use super::host::HostState;
use super::{Shape, Wanted, locality};
use crate::backend_policies::{Found, HashKey, Outliers, PoolPolicy, PortPolicy};
use crate::backend_tls::EndpointTls;
use crate::balance::{Endpoint, is_elsewhere};
use crate::names;
use crate::session::EndpointId;

/// Points of the ring that keeps clients of a service with session affinity on one endpoint.
const AFFINITY_RING: usize = 1024;
/// A level with this share of its endpoints takes all of its requests: as [`choose_level`] has it.
const OVERPROVISIONING: u64 = 140;

/// The endpoints in one state. Immutable but for what is learned of each endpoint.
#[derive(Debug)]
pub struct Balancer {
    /// The newest state of the policies in which this is what they say.
    generation: AtomicU64,
    /// The revision of the directory in which this was last found to be of the present state; 0: never.
    seen: AtomicU64,
    pub(super) state: ServiceState,
    pub(super) own: Arc<Workload>,
    pub(super) found: Found,
    algorithm: Algorithm,
    hash_key: Option<HashKey>,
    hosts: Box<[Host]>,
    /// The nearest first.
    levels: Box<[Level]>,
    /// Terminating endpoints, for when there is no other.
    last_resort: Option<Group>,
    /// What its connections have of their own, once a request has asked for it.
    shape: OnceLock<Arc<Shape>>,
    /// Places in `hosts` by the names that sessions have for them, once one has asked.
    by_session: OnceLock<HashMap<EndpointId, usize>>,
}

/// An endpoint.
#[derive(Debug)]
pub struct Host {
    /// Where it is.
    pub endpoint: Arc<Endpoint>,
    /// What is known of it.
    pub state: Arc<HostState>,
    /// How far it is; the nearest have 0.
    pub level: usize,
    /// Whether it is terminating.
    pub is_terminating: bool,
}

#[derive(Debug)]
struct Level(Box<[Group]>);

/// Endpoints of one level that share a weight.
#[derive(Debug)]
struct Group {
    weight: u32,
    pool: Pool,
    /// Places in `hosts`.
    members: Box<[usize]>,
}

/// What a choice goes by besides the endpoints.
#[derive(Debug, Clone, Copy)]
pub struct Choosing<'a> {
    /// Who is where.
    pub snapshot: &'a Snapshot,
    /// Endpoints that were tried.
    pub tried: &'a [WorkloadUid],
    /// What the request says of its endpoint.
    pub wanted: Wanted<'a>,
    /// Counts the choices.
    pub turn: u64,
    /// The time.
    pub now: Duration,
    /// Whether an endpoint may be ejected.
    pub some_ejected: bool,
}

impl Balancer {
    /// The endpoints of a port as a policy wants them. What `old` knows of those that stay is kept.
    pub(super) fn new(
        generation: u64,
        (state, own): (ServiceState, Arc<Workload>),
        (transport, port): (Transport, u16),
        found: Found,
        old: Option<&Balancer>,
        now: Duration,
    ) -> Self {
        let policy = found.policy.clone();
        let mut candidates = state.candidates_of(transport, &own, port);
        // Those that DNS locates are looked at when they are.
        let may_dial = |it: &Candidate| it.workload.is_only_named() || is_elsewhere(it.address.ip(), &own);
        candidates.retain(may_dial);
        if let Some(labels) = &found.labels {
            let wanted = || labels.iter().map(|(name, value)| (&**name, &**value));
            candidates.retain(|candidate| candidate.workload.has_labels(wanted()));
        }
        // The same order in every replica.
        candidates.sort_unstable_by(|one, other| one.workload.uid.cmp(&other.workload.uid));
        let affinity = policy.algorithm.is_none() && state.service().session_affinity;
        let (algorithm, hash_key) = match affinity {
            true => (Algorithm::ConsistentHash(TableKind::Ring(AFFINITY_RING)), Some(HashKey::SourceIp)),
            false => (policy.algorithm.unwrap_or_default(), policy.hash.clone()),
        };
        let preference = preference(&policy, &state);
        let known = known(old);
        let host = |candidate: Candidate| {
            let level = match (preference.as_deref(), candidate.is_terminating) {
                (_, true) => 0,
                (Some(preference), false) if preference.disabled => 0,
                (Some(preference), false) => locality::distance(preference, &own, &candidate.workload),
                (None, false) => candidate.distance,
            };
            let fresh = || HostState::new(old.map(|_| now));
            let state_of = known.get(&(&candidate.workload.uid, candidate.address));
            // No TLS ends datagrams.
            let ends_tls = transport == Transport::Tcp;
            let tls = ends_tls.then(|| endpoint_tls(&policy, state.service(), &candidate)).flatten();
            let is_named = candidate.workload.is_only_named();
            let named = is_named.then(|| names::Host::vouched(&candidate.workload.hostname));
            Host {
                state: state_of.map_or_else(fresh, |state| Arc::clone(state)),
                level,
                is_terminating: candidate.is_terminating,
                endpoint: Arc::new(Endpoint {
                    workload: Some(candidate.workload),
                    service: Some(state.service().clone()),
                    address: candidate.address,
                    tunnel: candidate.tunnel,
                    crossing: None,
                    asked_of_waypoint: None,
                    tls,
                    host: named,
                }),
            }
        };
        let mut hosts: Vec<Host> = candidates.into_iter().map(host).collect();
        let levels = levels(&mut hosts, preference.as_deref(), &own, algorithm);
        let terminating: Vec<usize> = places(&hosts, |host| host.is_terminating);
        let last_resort = (!terminating.is_empty()).then(|| Group::new(1, terminating, &hosts, algorithm));
        drop(known);
        Self {
            generation: AtomicU64::new(generation),
            seen: AtomicU64::new(0),
            state,
            own,
            found,
            algorithm,
            hash_key,
            hosts: hosts.into(),
            levels,
            last_resort,
            shape: OnceLock::new(),
            by_session: OnceLock::new(),
        }
    }

    /// What the connections of the circuit with this number have of their own; none where no policy says anything of connections.
    pub(super) fn shape(&self, circuit: u64) -> Option<Arc<Shape>> {
        let pool = self.policy().pool;
        (pool != PoolPolicy::default())
            .then(|| self.shape.get_or_init(|| Arc::new(Shape { circuit, pool })).clone())
    }

    /// The newest state of the policies that this is of.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Whether it was found to be of the state of this revision of the directory, and these policies.
    pub(super) fn was_seen(&self, revision: u64, generation: u64) -> bool {
        revision != 0
            && self.seen.load(Ordering::Relaxed) == revision
            && self.generation.load(Ordering::Relaxed) >= generation
    }

    /// It is of the state of this revision of the directory.
    pub(super) fn see(&self, revision: u64) {
        self.seen.store(revision, Ordering::Relaxed);
    }

    /// The policies have changed, but not for this.
    pub(super) fn confirm(&self, generation: u64) {
        self.generation.fetch_max(generation, Ordering::Relaxed);
    }

    /// Whether it was made of the same.
    pub(super) fn is_same(&self, state: &ServiceState, own: &Arc<Workload>, found: &Found) -> bool {
        self.state.is_same(state) && Arc::ptr_eq(&self.own, own) && self.found == *found
    }

    /// The service.
    pub fn service(&self) -> &Arc<Service> {
        self.state.service()
    }

    /// What is said of them.
    pub fn policy(&self) -> &Arc<PortPolicy> {
        &self.found.policy
    }

    /// When one of them is ejected, if ever.
    pub(super) fn outlier_settings(&self) -> Option<&OutlierSettings> {
        self.policy().outliers.as_ref().map(|outliers| &outliers.settings)
    }

    /// How one is chosen.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// What of a request decides about its endpoint.
    pub fn hash_key(&self) -> Option<&HashKey> {
        self.hash_key.as_ref()
    }

    /// The endpoints.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// How many are ejected, of how many.
    pub fn ejected(&self, now: Duration) -> (usize, usize) {
        let counted = || self.hosts.iter().filter(|host| !host.is_terminating);
        (counted().filter(|host| host.state.is_ejected(now)).count(), counted().count())
    }

    /// Chooses an endpoint that was not tried: of the nearest level, of a farther one as far as that has too few healthy ones.
    ///
    /// # Errors
    /// Why there is none.
    pub fn choose(&self, choosing: &Choosing<'_>, rng: &mut impl Rng) -> Result<&Host, NoEndpoint> {
        let heeds_ejections = choosing.some_ejected && !self.is_panicking(self.ejected(choosing.now));
        let view = View { balancer: self, choosing, heeds_ejections };
        if let Some(host) = choosing.wanted.session.and_then(|id| self.host_of_session(id, &view)) {
            return Ok(host);
        }
        let first = match self.levels.len() {
            0 | 1 => 0,
            _ if !heeds_ejections => 0,
            _ => {
                let health = self.levels.iter().map(|level| level.health(&view));
                let health: smallvec::SmallVec<[LevelHealth; 8]> = health.collect();
                choose_level(&health, rng.random_range(0..100)).unwrap_or_default()
            }
        };
        let others = (0..self.levels.len()).filter(|at| *at != first);
        let levels = std::iter::once(first).chain(others).filter_map(|at| self.levels.get(at));
        let mut chosen = None;
        for level in levels {
            chosen = level.choose(&view, rng);
            if chosen.is_some() {
                break;
            }
        }
        let last = || self.last_resort.as_ref().and_then(|group| group.choose(&view, rng));
        chosen.or_else(last).and_then(|at| self.hosts.get(at)).ok_or_else(|| self.why_none(choosing))
    }

    /// The endpoint that a session is at, if it can be used and is not about to go.
    fn host_of_session(&self, id: &EndpointId, view: &View<'_>) -> Option<&Host> {
        let by_session = self.by_session.get_or_init(|| {
            let named = self.hosts.iter().enumerate().filter(|(_, host)| !host.is_terminating);
            named.filter_map(|(at, host)| Some((host.endpoint.session_id()?, at))).collect()
        });
        let host = self.hosts.get(*by_session.get(id)?)?;
        view.is_usable(host).then_some(host)
    }

    /// Whether so many are ejected, of how many, that ejections are ignored.
    pub(super) fn is_panicking(&self, (ejected, total): (usize, usize)) -> bool {
        let Some(Outliers { min_health, .. }) = &self.policy().outliers else { return false };
        let min_health = *min_health;
        min_health > 0 && (total - ejected) * 100 < total * min_health as usize
    }

    fn why_none(&self, choosing: &Choosing<'_>) -> NoEndpoint {
        let tried = |host: &Host| host.workload().is_some_and(|it| choosing.tried.contains(&it.uid));
        if self.hosts.iter().any(tried) {
            NoEndpoint::AllTried
        } else if !self.hosts.is_empty() {
            NoEndpoint::NoneHealthy
        } else if self.state.endpoints() == 0 {
            NoEndpoint::NoneKnown
        } else {
            NoEndpoint::NoneSuitable
        }
    }
}

impl Host {
    fn workload(&self) -> Option<&Arc<Workload>> {
        self.endpoint.workload.as_ref()
    }
}

type Known<'a> = HashMap<(&'a WorkloadUid, SocketAddr), &'a Arc<HostState>>;

/// TLS to an endpoint. That of the mesh is there already where there is a tunnel.
fn endpoint_tls(policy: &PortPolicy, service: &Service, candidate: &Candidate) -> Option<EndpointTls> {
    let settings = policy.tls.as_ref()?;
    if settings.is_of_mesh() && candidate.tunnel.is_some() {
        return None;
    }
    let name = settings.server_name().map_or_else(|| service.host.hostname.clone(), Arc::from);
    let identity = Some(candidate.workload.identity.clone());
    Some(EndpointTls { settings: settings.clone(), name, identity })
}

/// What is known of endpoints, by uid and address.
fn known(old: Option<&Balancer>) -> Known<'_> {
    let hosts = old.into_iter().flat_map(|old| old.hosts.iter());
    hosts.filter_map(|host| Some(((&host.workload()?.uid, host.endpoint.address), &host.state))).collect()
}

/// The policy's preference of localities; `None`: the service's own.
///
/// As in Istio, a policy that ejects endpoints prefers near ones unless it says otherwise.
fn preference<'p>(
    policy: &'p PortPolicy,
    state: &ServiceState,
) -> Option<std::borrow::Cow<'p, LocalityPreference>> {
    use std::borrow::Cow;
    match &policy.locality {
        Some(preference) => Some(Cow::Borrowed(preference)),
        None if policy.outliers.is_some() && state.service().load_balancing.preference.is_empty() => {
            Some(Cow::Owned(LocalityPreference::default()))
        }
        None => None,
    }
}

/// Puts endpoints on levels without gaps, and says on each which one it is.
fn levels(
    hosts: &mut [Host],
    preference: Option<&LocalityPreference>,
    own: &Workload,
    algorithm: Algorithm,
) -> Box<[Level]> {
    if let Some(distribution) =
        preference.filter(|preference| !preference.disabled).and_then(|it| locality::distribution(it, own))
    {
        let mut shares: BTreeMap<usize, (u32, Vec<usize>)> = BTreeMap::new();
        for (at, host) in hosts.iter_mut().enumerate().filter(|(_, host)| !host.is_terminating) {
            host.level = 0;
            let place = host.workload().and_then(|workload| locality::place(distribution, workload));
            if let Some((place, weight)) = place {
                shares.entry(place).or_insert((weight, Vec::new())).1.push(at);
            }
        }
        let groups =
            shares.into_values().map(|(weight, members)| Group::new(weight, members, hosts, algorithm));
        return [Level(groups.collect())].into();
    }
    let mut by_distance: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (at, host) in hosts.iter().enumerate().filter(|(_, host)| !host.is_terminating) {
        by_distance.entry(host.level).or_default().push(at);
    }
    let mut levels = Vec::with_capacity(by_distance.len());
    for members in by_distance.into_values() {
        for at in &members {
            if let Some(host) = hosts.get_mut(*at) {
                host.level = levels.len();
            }
        }
        levels.push(Level([Group::new(1, members, hosts, algorithm)].into()));
    }
    levels.into()
}

fn places(hosts: &[Host], wanted: impl Fn(&Host) -> bool) -> Vec<usize> {
    hosts.iter().enumerate().filter(|(_, host)| wanted(host)).map(|(at, _)| at).collect()
}

impl Level {
    fn health(&self, view: &View<'_>) -> LevelHealth {
        let healths = self.0.iter().map(|group| group.health(view));
        healths.fold(LevelHealth { total: 0, usable: 0 }, |sum, health| LevelHealth {
            total: sum.total + health.total,
            usable: sum.usable + health.usable,
        })
    }

    fn choose(&self, view: &View<'_>, rng: &mut impl Rng) -> Option<usize> {
        if let [group] = &*self.0 {
            return group.choose(view, rng);
        }
        let weights: smallvec::SmallVec<[u64; 8]> = self.0.iter().map(|group| group.share(view)).collect();
        let total: u64 = weights.iter().sum();
        let mut draw = if total > 0 { rng.random_range(0..total) } else { 0 };
        let drawn = weights.iter().position(|weight| {
            let is_it = draw < *weight;
            draw = draw.saturating_sub(*weight);
            is_it
        });
        let first = drawn.and_then(|at| self.0.get(at)?.choose(view, rng));
        // What was drawn may have been tried.
        first.or_else(|| self.0.iter().find_map(|group| group.choose(view, rng)))
    }
}

impl Group {
    fn new(weight: u32, members: Vec<usize>, hosts: &[Host], algorithm: Algorithm) -> Self {
        let endpoints = members.iter().filter_map(|at| {
            let workload = hosts.get(*at)?.workload()?;
            Some((hash(workload.uid.as_str().as_bytes()), workload.capacity))
        });
        let endpoints: Vec<(u64, u32)> = endpoints.collect();
        Self { weight, pool: Pool::new(algorithm, &endpoints), members: members.into() }
    }

    fn health(&self, view: &View<'_>) -> LevelHealth {
        let usable = self.members.iter().filter(|at| view.is_healthy(**at)).count();
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        LevelHealth { total: count(self.members.len()), usable: count(usable) }
    }

    /// Its weight, less as far as it has too few healthy endpoints.
    fn share(&self, view: &View<'_>) -> u64 {
        let health = self.health(view);
        let share = OVERPROVISIONING * u64::from(health.usable) / u64::from(health.total.max(1));
        u64::from(self.weight) * share.min(100)
    }

    fn choose(&self, view: &View<'_>, rng: &mut impl Rng) -> Option<usize> {
        let in_group = InGroup { view, group: self };
        let at = self.pool.choose(&in_group, view.choosing.turn, view.choosing.wanted.key, rng)?;
        self.members.get(at).copied()
    }
}

/// The endpoints as one choice sees them.
struct View<'a> {
    balancer: &'a Balancer,
    choosing: &'a Choosing<'a>,
    heeds_ejections: bool,
}

impl View<'_> {
    fn is_healthy(&self, at: usize) -> bool {
        let host = self.balancer.hosts.get(at);
        host.is_some_and(|host| !self.heeds_ejections || !host.state.is_ejected(self.choosing.now))
    }
}

impl View<'_> {
    /// Whether an endpoint may be chosen: it was not tried, is not ejected, and is nobody else's.
    fn is_usable(&self, host: &Host) -> bool {
        let Some(workload) = host.workload() else { return false };
        !(self.choosing.tried.contains(&workload.uid)
            || self.heeds_ejections && host.state.is_ejected(self.choosing.now)
            || self.choosing.snapshot.claims_a_pods_place(workload))
    }
}

struct InGroup<'a> {
    view: &'a View<'a>,
    group: &'a Group,
}

impl InGroup<'_> {
    fn host(&self, at: usize) -> Option<&Host> {
        self.view.balancer.hosts.get(*self.group.members.get(at)?)
    }

    fn of<T>(&self, at: usize, or: T, read: impl FnOnce(&HostState) -> T) -> T {
        self.host(at).map_or(or, |host| read(&host.state))
    }
}

impl Members for InGroup<'_> {
    fn is_usable(&self, at: usize) -> bool {
        self.host(at).is_some_and(|host| self.view.is_usable(host))
    }

    fn peak_cost(&self, at: usize) -> f64 {
        self.of(at, f64::MAX, |state| state.estimate(self.view.choosing.now).peak_cost(state.active()))
    }

    fn adaptive_cost(&self, at: usize) -> f64 {
        self.of(at, f64::MAX, |state| state.estimate(self.view.choosing.now).adaptive_cost(state.active()))
    }

    fn active(&self, at: usize) -> u32 {
        self.of(at, u32::MAX, HostState::active)
    }

    fn warmth(&self, at: usize) -> f64 {
        let warmup = self.view.balancer.policy().warmup;
        if warmup.is_zero() {
            return 1.0;
        }
        self.of(at, 1.0, |state| state.warmth(self.view.choosing.now, warmup))
    }
}
