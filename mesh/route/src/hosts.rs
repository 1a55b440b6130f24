//! Rules by the host of a request.

use std::collections::HashMap;
use std::sync::Arc;

/// Something for each host: exact names, all names below one, and all names.
#[derive(Debug, Clone)]
pub struct Hosts<T> {
    exact: HashMap<Arc<str>, T>,
    /// By what follows the `*`, dot included.
    below: HashMap<Arc<str>, T>,
    any: T,
}

impl<T: Default> Default for Hosts<T> {
    fn default() -> Self {
        Self { exact: HashMap::new(), below: HashMap::new(), any: T::default() }
    }
}

impl<T: Default> Hosts<T> {
    /// The place of a host as a route or listener writes it: `a.b`, `*.b`, or nothing or `*` for all.
    pub fn entry(&mut self, host: &str) -> &mut T {
        let host = host.to_ascii_lowercase();
        match host.strip_prefix('*') {
            Some("") => &mut self.any,
            Some(suffix) => self.below.entry(suffix.into()).or_default(),
            None if host.is_empty() => &mut self.any,
            None => self.exact.entry(host.into()).or_default(),
        }
    }

    /// What is there for a host of a request (lower case), the most specific first.
    pub fn matching<'s, 'h>(&'s self, host: &'h str) -> impl Iterator<Item = &'s T> + use<'s, 'h, T> {
        let labels = host.match_indices('.').filter_map(move |(at, _)| host.get(at..));
        let labels = labels.filter(|_| !self.below.is_empty());
        let below = labels.filter_map(|suffix| self.below.get(suffix));
        let exact = (!self.exact.is_empty()).then(|| self.exact.get(host)).flatten();
        exact.into_iter().chain(below).chain([&self.any])
    }

    /// What is there for hosts that are not this one, by the host as a route writes it, in the order of names.
    pub(crate) fn others(&self, host: &str) -> Vec<(String, &T)> {
        let exact = self.exact.iter().filter(|(name, _)| ***name != *host);
        let exact = exact.map(|(name, found)| (name.to_string(), found));
        let below = self.below.iter().filter(|(suffix, _)| {
            // As `matching`: at least one label comes before the suffix.
            !host.match_indices('.').any(|(at, _)| host.get(at..) == Some(&***suffix))
        });
        let below = below.map(|(suffix, found)| (format!("*{suffix}"), found));
        let mut others: Vec<(String, &T)> = exact.chain(below).collect();
        others.sort_by(|(one, _), (other, _)| one.cmp(other));
        others
    }
}

impl<T: Clone + Default> Hosts<Arc<T>> {
    /// Changes what is there for a host as [`entry`](Self::entry) has it, and forgets it when it is empty.
    pub(crate) fn change(
        &mut self,
        host: &str,
        is_empty: impl FnOnce(&T) -> bool,
        change: impl FnOnce(&mut T),
    ) {
        let host = host.to_ascii_lowercase();
        let (of_names, name) = match host.strip_prefix('*') {
            Some("") => return change(Arc::make_mut(&mut self.any)),
            Some(suffix) => (&mut self.below, suffix),
            None if host.is_empty() => return change(Arc::make_mut(&mut self.any)),
            None => (&mut self.exact, host.as_str()),
        };
        let Some(known) = of_names.get_mut(name) else { return };
        let known = Arc::make_mut(known);
        change(known);
        if is_empty(known) {
            of_names.remove(name);
        }
    }
}
