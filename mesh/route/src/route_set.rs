//! The routes for one port of a service, or of one listener.

use std::cmp::{Ordering, Reverse};
use std::collections::HashMap;
use std::sync::Arc;

use ambit_api::l7;

use crate::compile::Compiled;
use crate::conditions::{Conditions, PathMatch};
use crate::hosts::Hosts;
use crate::rule::Rule;
use crate::table::{Matched, RequestHead};

/// The routes for one port of a service. A copy is cheap: it shares the entries.
#[derive(Debug, Clone, Default)]
pub struct RouteSet {
    pub(crate) specific: Hosts<Arc<Paths>>,
    /// Targets of routes of Gateway API.
    specific_targets: usize,
    pub(crate) declared: Hosts<Arc<Entries>>,
    /// Targets of routes that go by declaration.
    declared_targets: usize,
}

/// In the order in which they are tried.
pub(crate) type Entries = Vec<Arc<Entry>>;

/// One match of one rule.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: PathMatch,
    pub(crate) conditions: Conditions,
    pub(crate) rule: Arc<Rule>,
    /// Age and name of the route, then the places of rule and match in it.
    pub(crate) seniority: (i64, Arc<str>, u32, u32),
}

/// Entries by path.
#[derive(Debug, Clone, Default)]
pub(crate) struct Paths {
    pub(crate) exact: HashMap<Arc<str>, Arc<Entries>>,
    /// Those that are tried one by one.
    pub(crate) patterns: Entries,
    pub(crate) prefix: HashMap<Arc<str>, Arc<Entries>>,
    /// No prefix is longer: no longer part of a path needs a look.
    longest: usize,
}

impl Entry {
    fn matches(&self, request: &RequestHead<'_>) -> bool {
        self.conditions.matches(request)
    }

    fn matched(&self, request: &RequestHead<'_>, prefix: usize) -> Matched<'_> {
        Matched { rule: &self.rule, prefix, common: self.path.common(request.path) }
    }

    fn is_of(&self, route: &Compiled) -> bool {
        Arc::ptr_eq(&self.rule.route, &route.name)
    }

    /// Gateway API, HTTPRouteMatch: after the path a method counts, then the number of headers, then that of query
    /// parameters, then the route's age, its name, and the order of its rules.
    fn precedence(&self) -> impl Ord {
        let Conditions { method, headers, query, .. } = &self.conditions;
        (method.is_none(), Reverse(headers.len()), Reverse(query.len()), &self.seniority)
    }

    /// Of entries with one path.
    fn by_precedence(&self, other: &Entry) -> Ordering {
        self.precedence().cmp(&other.precedence())
    }

    /// Of patterns: the longer first.
    fn by_length(&self, other: &Entry) -> Ordering {
        let length = |entry: &Entry| Reverse(entry.path.length());
        length(self).cmp(&length(other)).then_with(|| self.by_precedence(other))
    }

    fn by_seniority(&self, other: &Entry) -> Ordering {
        self.seniority.cmp(&other.seniority)
    }
}

/// Puts an entry behind all that do not come after it.
fn place(entries: &mut Entries, entry: &Arc<Entry>, order: fn(&Entry, &Entry) -> Ordering) {
    let at = entries.partition_point(|known| order(known, entry).is_le());
    entries.insert(at, entry.clone());
}

/// The hosts of a target: all of them if it names none.
fn hosts(hostnames: &[String]) -> impl Iterator<Item = &str> {
    let all = hostnames.is_empty().then_some("*");
    hostnames.iter().map(String::as_str).chain(all)
}

impl RouteSet {
    pub(crate) fn is_empty(&self) -> bool {
        // Routes without rules are routes: they answer 404.
        !self.has_specific() && self.declared_targets == 0
    }

    pub(crate) fn has_specific(&self) -> bool {
        self.specific_targets > 0
    }

    pub(crate) fn insert(&mut self, hostnames: &[String], route: &Compiled) {
        match route.order {
            l7::Order::Specific => self.specific_targets += 1,
            l7::Order::Declared => self.declared_targets += 1,
        }
        if route.entries.is_empty() {
            return;
        }
        for host in hosts(hostnames) {
            match route.order {
                l7::Order::Specific => {
                    let paths = Arc::make_mut(self.specific.entry(host));
                    route.entries.iter().for_each(|entry| paths.insert(entry));
                }
                l7::Order::Declared => {
                    let declared = Arc::make_mut(self.declared.entry(host));
                    route.entries.iter().for_each(|entry| place(declared, entry, Entry::by_seniority));
                }
            }
        }
    }

    /// Takes out a route that was put in with the same hosts.
    pub(crate) fn remove(&mut self, hostnames: &[String], route: &Compiled) {
        match route.order {
            l7::Order::Specific => {
                self.specific_targets -= 1;
                for host in hosts(hostnames) {
                    self.specific.change(host, Paths::is_empty, |paths| paths.remove(route));
                }
            }
            l7::Order::Declared => {
                self.declared_targets -= 1;
                for host in hosts(hostnames) {
                    let others = |entries: &mut Entries| entries.retain(|entry| !entry.is_of(route));
                    self.declared.change(host, Vec::is_empty, others);
                }
            }
        }
    }

    /// The rule that a request follows; `None`: no rule matches, and the answer is 404.
    ///
    /// Routes of Gateway API come first. Where there is one, routes that go by declaration have no effect.
    pub fn find(&self, request: &RequestHead<'_>) -> Option<Matched<'_>> {
        if self.has_specific() {
            return self.specific.matching(request.host).find_map(|paths| paths.find(request));
        }
        self.declared.matching(request.host).flat_map(|entries| entries.iter()).find_map(|entry| {
            let prefix = entry.path.matches(request.path)?;
            entry.matches(request).then_some(entry.matched(request, prefix))
        })
    }
}

impl Paths {
    fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.patterns.is_empty() && self.prefix.is_empty()
    }

    fn insert(&mut self, entry: &Arc<Entry>) {
        let add = |entries: &mut HashMap<Arc<str>, Arc<Entries>>, path: &Arc<str>| {
            place(Arc::make_mut(entries.entry(path.clone()).or_default()), entry, Entry::by_precedence);
        };
        match &entry.path {
            PathMatch::Exact(path) => add(&mut self.exact, path),
            PathMatch::Regex(..)
            | PathMatch::TextPrefix(_)
            | PathMatch::ExactIgnoringCase(_)
            | PathMatch::TextPrefixIgnoringCase(_) => place(&mut self.patterns, entry, Entry::by_length),
            PathMatch::Prefix(prefix) => {
                self.longest = self.longest.max(prefix.len());
                add(&mut self.prefix, prefix);
            }
        }
    }

    fn remove(&mut self, route: &Compiled) {
        let take = |entries: &mut HashMap<Arc<str>, Arc<Entries>>, path: &Arc<str>| {
            let Some(of_path) = entries.get_mut(path) else { return };
            Arc::make_mut(of_path).retain(|entry| !entry.is_of(route));
            if of_path.is_empty() {
                entries.remove(path);
            }
        };
        let mut has_pattern = false;
        for entry in &route.entries {
            match &entry.path {
                PathMatch::Exact(path) => take(&mut self.exact, path),
                PathMatch::Prefix(prefix) => take(&mut self.prefix, prefix),
                PathMatch::Regex(..)
                | PathMatch::TextPrefix(_)
                | PathMatch::ExactIgnoringCase(_)
                | PathMatch::TextPrefixIgnoringCase(_) => has_pattern = true,
            }
        }
        if has_pattern {
            self.patterns.retain(|entry| !entry.is_of(route));
        }
    }

    fn find(&self, request: &RequestHead<'_>) -> Option<Matched<'_>> {
        let path = request.path;
        // Gateway API: an exact path comes before all others. Patterns are left to the implementation: they come next.
        if let Some(entries) = self.exact.get(path)
            && let Some(matched) = first(entries, request, path.len())
        {
            return Some(matched);
        }
        let by_pattern = self.patterns.iter().find_map(|entry| {
            let prefix = entry.path.matches(path)?;
            entry.matches(request).then_some(entry.matched(request, prefix))
        });
        if by_pattern.is_some() {
            return by_pattern;
        }
        if self.prefix.is_empty() {
            return None;
        }
        segments(path)
            .skip_while(|prefix| prefix.len() > self.longest)
            .find_map(|prefix| first(self.prefix.get(prefix)?, request, prefix.len()))
    }
}

fn first<'e>(entries: &'e Entries, request: &RequestHead<'_>, prefix: usize) -> Option<Matched<'e>> {
    let entry = entries.iter().find(|entry| entry.matches(request))?;
    Some(entry.matched(request, prefix))
}

/// The prefixes of a path that end with a segment, the longest first, without the slash at their end; last the empty one.
fn segments(path: &str) -> impl Iterator<Item = &str> {
    let whole = std::iter::once(path);
    whole.chain(path.rmatch_indices('/').filter_map(move |(at, _)| path.get(..at)))
}
