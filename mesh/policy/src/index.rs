//! Rules found by what they demand, so that a decision looks only at rules that may match.
//!
//! For every rule one clause is chosen whose matches all demand something that can be looked up (a principal, a prefix of one, a
//! namespace, a network, a port); the rule is filed under those demands. A request looks up what it has to offer and checks the few
//! rules found in full. A rule without such a clause is checked for every request. [`crate::set`] holds one index per scope and action.

use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher, RandomState};
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};

use imbl::shared_ptr::DefaultSharedPtr;
use ipnet::IpNet;

use crate::compile::{Clause, Facts, Match, Policy, Rule};
use crate::matcher::{Nets, Pattern, Texts};

/// Keys of the hash under which demands are filed. Seeded per process: policies and peers can't aim for collisions, and one that happens
/// only adds a candidate, as every candidate is checked in full.
static SEED: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// Passes on a key that is a hash already.
#[derive(Default, Clone, Copy)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }

    fn write_u32(&mut self, value: u32) {
        self.0 = value.into();
    }
}

type Map<K, V> = imbl::GenericHashMap<K, V, BuildHasherDefault<Hashed>, DefaultSharedPtr>;

/// What a rule may demand and a request may offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Demand {
    Principal,
    ServiceAccount,
    SourceIpv4,
    SourceIpv6,
    Namespace,
    PrincipalPrefix,
    PrincipalSuffix,
    NamespacePrefix,
    NamespaceSuffix,
    DestinationIpv4,
    DestinationIpv6,
    Port,
    Identity,
}

/// How many kinds of demand there are.
const DEMANDS: usize = 13;

/// One demand: its kind, the length of what is compared (bytes of a prefix or suffix, bits of a network, else 0), and its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    demand: Demand,
    length: u16,
    hash: u64,
}

impl Key {
    fn new(demand: Demand, length: usize, value: impl Hash) -> Option<Self> {
        let length = u16::try_from(length).ok()?;
        Some(Self { demand, length, hash: SEED.hash_one((demand, length, value)) })
    }
}

/// One rule of one policy, by the policy's slot and the rule's position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RuleAt {
    slot: u32,
    rule: u32,
}

/// The rules filed under one key. Most often it is one: kept in place, as copying a map's node must not touch what every neighbour points to.
#[derive(Debug, Clone)]
enum Posting {
    One(RuleAt),
    Many(Arc<Vec<RuleAt>>),
}

impl Posting {
    fn as_slice(&self) -> &[RuleAt] {
        match self {
            Self::One(at) => std::slice::from_ref(at),
            Self::Many(rules) => rules,
        }
    }

    fn push(&mut self, at: RuleAt) {
        match self {
            Self::One(first) => *self = Self::Many(Arc::new(vec![*first, at])),
            Self::Many(rules) => Arc::make_mut(rules).push(at),
        }
    }

    /// Without the rules of the policy in `slot`; `None` if nothing is left.
    fn without(&self, slot: u32) -> Option<Self> {
        let mut left = self.as_slice().iter().filter(|at| at.slot != slot);
        let first = *left.next()?;
        Some(match left.next() {
            None => Self::One(first),
            Some(second) => Self::Many(Arc::new([&first, second].into_iter().chain(left).copied().collect())),
        })
    }
}

/// A policy and where its rules are filed.
#[derive(Debug)]
struct IndexedPolicy {
    policy: Arc<Policy>,
    keys: Vec<Key>,
    unkeyed: bool,
}

/// Rules of policies of one action and scope. Cloning is cheap, and a clone never changes.
#[derive(Clone, Default)]
pub(crate) struct RuleIndex {
    filed: Map<u32, Arc<IndexedPolicy>>,
    postings: Map<u64, Posting>,
    unkeyed: Arc<Vec<RuleAt>>,
    /// For each kind of demand the lengths in use, each with the number of keys, so that no look-up is made in vain.
    lengths: Arc<[Vec<(u16, u32)>; DEMANDS]>,
    next_slot: u32,
}

impl RuleIndex {
    pub(crate) fn is_empty(&self) -> bool {
        self.filed.is_empty()
    }

    /// Files the rules of `policy`; the slot returned takes them out again.
    pub(crate) fn insert(&mut self, policy: &Arc<Policy>) -> u32 {
        while self.filed.contains_key(&self.next_slot) {
            self.next_slot = self.next_slot.wrapping_add(1);
        }
        let slot = self.next_slot;
        self.next_slot = slot.wrapping_add(1);
        let mut filed = IndexedPolicy { policy: Arc::clone(policy), keys: Vec::new(), unkeyed: false };
        for (position, rule) in (0u32..).zip(policy.rules()) {
            let at = RuleAt { slot, rule: position };
            match self.discriminator(rule) {
                Discriminator::Never => {}
                Discriminator::Nothing => {
                    Arc::make_mut(&mut self.unkeyed).push(at);
                    filed.unkeyed = true;
                }
                Discriminator::Keys(keys) => {
                    for key in keys {
                        self.file(key, at);
                        filed.keys.push(key);
                    }
                }
            }
        }
        self.filed.insert(slot, Arc::new(filed));
        slot
    }

    /// Takes out the policy that was given `slot`.
    pub(crate) fn remove(&mut self, slot: u32) {
        let Some(filed) = self.filed.remove(&slot) else { return };
        if filed.unkeyed {
            Arc::make_mut(&mut self.unkeyed).retain(|at| at.slot != slot);
        }
        for key in &filed.keys {
            if let Some(posting) = self.postings.get_mut(&key.hash) {
                match posting.without(slot) {
                    Some(left) => *posting = left,
                    None => _ = self.postings.remove(&key.hash),
                }
            }
            self.count(*key, false);
        }
    }

    /// The first policy that `applies` and matches.
    pub(crate) fn find(
        &self,
        request: &Facts<'_>,
        applies: impl Fn(&Policy) -> bool,
    ) -> Option<&Arc<Policy>> {
        if self.is_empty() {
            return None;
        }
        let check = |rules: &[RuleAt]| rules.iter().find_map(|at| self.check(*at, request, &applies));
        let mut found = check(&self.unkeyed);
        if found.is_none() {
            let _: ControlFlow<()> = self.offers(request, |key| {
                found = self.postings.get(&key.hash).and_then(|posting| check(posting.as_slice()));
                if found.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
        }
        found
    }

    fn check(
        &self,
        at: RuleAt,
        request: &Facts<'_>,
        applies: impl Fn(&Policy) -> bool,
    ) -> Option<&Arc<Policy>> {
        let policy = &self.filed.get(&at.slot)?.policy;
        let rule = policy.rules().get(usize::try_from(at.rule).ok()?)?;
        (applies(policy) && rule.matches(request)).then_some(policy)
    }

    fn file(&mut self, key: Key, at: RuleAt) {
        match self.postings.get_mut(&key.hash) {
            Some(posting) => posting.push(at),
            None => _ = self.postings.insert(key.hash, Posting::One(at)),
        }
        self.count(key, true);
    }

    fn count(&mut self, key: Key, more: bool) {
        let Some(lengths) = Arc::make_mut(&mut self.lengths).get_mut(key.demand as usize) else { return };
        match (lengths.iter().position(|(length, _)| *length == key.length), more) {
            (None, true) => lengths.push((key.length, 1)),
            (None, false) => {}
            (Some(at), more) => {
                if let Some((_, count)) = lengths.get_mut(at) {
                    *count = if more { count.saturating_add(1) } else { count.saturating_sub(1) };
                    if *count == 0 {
                        lengths.swap_remove(at);
                    }
                }
            }
        }
    }

    fn in_use(&self, demand: Demand) -> &[(u16, u32)] {
        self.lengths.get(demand as usize).map_or(&[], Vec::as_slice)
    }

    /// Hands every key that `request` satisfies, of the kinds and lengths in use, to `visit` until it breaks.
    fn offers<B>(&self, request: &Facts<'_>, mut visit: impl FnMut(Key) -> ControlFlow<B>) -> ControlFlow<B> {
        let mut offer = |key: Option<Key>| key.map_or(ControlFlow::Continue(()), &mut visit);
        let texts = [
            (request.principal, Demand::Principal, Demand::PrincipalPrefix, Demand::PrincipalSuffix),
            (request.namespace, Demand::Namespace, Demand::NamespacePrefix, Demand::NamespaceSuffix),
        ];
        for (text, exact, prefix, suffix) in texts {
            let Some(bytes) = text.map(str::as_bytes) else { continue };
            if !self.in_use(exact).is_empty() {
                offer(Key::new(exact, 0, bytes))?;
            }
            for length in self.in_use(prefix).iter().map(|(length, _)| usize::from(*length)) {
                offer(bytes.get(..length).and_then(|head| Key::new(prefix, length, head)))?;
            }
            for length in self.in_use(suffix).iter().map(|(length, _)| usize::from(*length)) {
                let tail = bytes.len().checked_sub(length).and_then(|from| bytes.get(from..));
                offer(tail.and_then(|tail| Key::new(suffix, length, tail)))?;
            }
        }
        if let Some(account) =
            request.service_account.filter(|_| !self.in_use(Demand::ServiceAccount).is_empty())
        {
            offer(Key::new(Demand::ServiceAccount, 0, account))?;
        }
        if request.principal.is_some() && !self.in_use(Demand::Identity).is_empty() {
            offer(Key::new(Demand::Identity, 0, ()))?;
        }
        let addresses = [
            (
                request.source_ip,
                if request.source_ip.is_ipv4() { Demand::SourceIpv4 } else { Demand::SourceIpv6 },
            ),
            (
                request.destination_ip,
                if request.destination_ip.is_ipv4() {
                    Demand::DestinationIpv4
                } else {
                    Demand::DestinationIpv6
                },
            ),
        ];
        for (address, demand) in addresses {
            for (length, _) in self.in_use(demand) {
                offer(
                    network_of(address, *length).and_then(|net| Key::new(demand, usize::from(*length), net)),
                )?;
            }
        }
        if !self.in_use(Demand::Port).is_empty() {
            offer(Key::new(Demand::Port, 0, request.destination_port))?;
        }
        ControlFlow::Continue(())
    }

    /// The clause of `rule` under which fewest rules are filed so far.
    fn discriminator(&self, rule: &Rule) -> Discriminator {
        let mut best: Option<(usize, Vec<Key>)> = None;
        for clause in rule.clauses.iter().filter(|clause| !clause.matches.is_empty()) {
            if clause.matches.iter().all(Match::is_empty) {
                return Discriminator::Never;
            }
            if let Some((cost, keys)) = self.clause_keys(clause)
                && best.as_ref().is_none_or(|(least, _)| cost < *least)
            {
                best = Some((cost, keys));
            }
        }
        best.map_or(Discriminator::Nothing, |(_, keys)| Discriminator::Keys(keys))
    }

    /// Keys of which a request must satisfy one to satisfy `clause`, and what they cost; `None` if a match of it has no such keys.
    fn clause_keys(&self, clause: &Clause) -> Option<(usize, Vec<Key>)> {
        let (mut cost, mut keys) = (0usize, Vec::new());
        for candidate in clause.matches.iter().filter(|candidate| !candidate.is_empty()) {
            let (match_cost, match_keys) = field_keys(candidate)
                .into_iter()
                .flatten()
                .filter(|keys| !keys.is_empty())
                .map(|keys| (self.cost(&keys), keys))
                .min_by_key(|(cost, _)| *cost)?;
            cost = cost.saturating_add(match_cost);
            keys.extend(match_keys);
        }
        Some((cost, keys))
    }

    /// How many rules are filed under `keys`, plus one for each key, as each takes room.
    fn cost(&self, keys: &[Key]) -> usize {
        keys.iter()
            .map(|key| 1 + self.postings.get(&key.hash).map_or(0, |posting| posting.as_slice().len()))
            .sum()
    }
}

/// What distinguishes a rule from others.
enum Discriminator {
    /// The rule can't match.
    Never,
    /// Nothing that can be looked up.
    Nothing,
    /// A request must satisfy one of these.
    Keys(Vec<Key>),
}

/// For every field of a match that demands something, its keys; the most selective fields first. `None` for a field that can't be keyed.
fn field_keys(candidate: &Match) -> [Option<Vec<Key>>; 6] {
    let accounts = candidate.service_accounts.0.iter();
    let ports = candidate.destination_ports.0.iter();
    [
        text_keys(&candidate.principals, Demand::Principal, Demand::PrincipalPrefix, Demand::PrincipalSuffix),
        accounts
            .map(|account| {
                Key::new(Demand::ServiceAccount, 0, (&*account.namespace, &*account.service_account))
            })
            .collect(),
        net_keys(&candidate.source_ips, Demand::SourceIpv4, Demand::SourceIpv6),
        text_keys(&candidate.namespaces, Demand::Namespace, Demand::NamespacePrefix, Demand::NamespaceSuffix),
        net_keys(&candidate.destination_ips, Demand::DestinationIpv4, Demand::DestinationIpv6),
        ports.map(|port| Key::new(Demand::Port, 0, port)).collect(),
    ]
}

fn text_keys(texts: &Texts, exact: Demand, prefix: Demand, suffix: Demand) -> Option<Vec<Key>> {
    let whole = texts.exact.iter().map(|text| Key::new(exact, 0, text.as_bytes()));
    let patterns = texts.patterns.iter().map(|pattern| match pattern {
        Pattern::Prefix(text) => Key::new(prefix, text.len(), text.as_bytes()),
        Pattern::Suffix(text) => Key::new(suffix, text.len(), text.as_bytes()),
        Pattern::Presence => Key::new(Demand::Identity, 0, ()),
    });
    whole.chain(patterns).collect()
}

fn net_keys(nets: &Nets, v4: Demand, v6: Demand) -> Option<Vec<Key>> {
    let keys = nets.0.iter().map(|net| {
        let demand = if net.addr().is_ipv4() { v4 } else { v6 };
        Key::new(demand, net.prefix_len().into(), net.trunc())
    });
    keys.collect()
}

fn network_of(address: IpAddr, length: u16) -> Option<IpNet> {
    Some(IpNet::new(address, u8::try_from(length).ok()?).ok()?.trunc())
}
