//! How far an endpoint is from the waypoint, and which share its locality gets, as a DestinationRule says.

use ambit_api::l7::{Distribution, LocalityPreference};
use ambit_directory::{Locality, Workload};

/// How far an endpoint is: the nearest have 0.
pub(super) fn distance(preference: &LocalityPreference, own: &Workload, other: &Workload) -> usize {
    if !preference.priority.is_empty() {
        return by_priority(&preference.priority, own, other);
    }
    let (here, there) = (&own.locality, &other.locality);
    let shared = shared(here, there);
    if shared > 0 {
        return 3 - shared;
    }
    let preferred = preference.failover.get(&*here.region);
    if preferred.is_some_and(|region| **region == *there.region) { 3 } else { 4 }
}

/// How many parts two localities share from the region on: 0 to 3.
fn shared(here: &Locality, there: &Locality) -> usize {
    let parts = [(&here.region, &there.region), (&here.zone, &there.zone), (&here.subzone, &there.subzone)];
    parts.iter().take_while(|(here, there)| here == there).count()
}

/// Labels before the first that differs make an endpoint nearer. A label that is not known here ends the list.
fn by_priority(labels: &[String], own: &Workload, other: &Workload) -> usize {
    let values = |label: &String| {
        Some(match label.as_str() {
            "topology.kubernetes.io/region" => (&own.locality.region, &other.locality.region),
            "topology.kubernetes.io/zone" => (&own.locality.zone, &other.locality.zone),
            "topology.istio.io/subzone" => (&own.locality.subzone, &other.locality.subzone),
            "kubernetes.io/hostname" => (&own.node, &other.node),
            "topology.istio.io/network" => (&own.network, &other.network),
            "topology.istio.io/cluster" => (&own.cluster_id, &other.cluster_id),
            _ => return None,
        })
    };
    let known: Vec<_> = labels.iter().map_while(values).collect();
    known.len() - known.iter().take_while(|(own, other)| own == other).count()
}

/// The distribution that is for a proxy in this locality.
pub(super) fn distribution<'p>(
    preference: &'p LocalityPreference,
    own: &Workload,
) -> Option<&'p Distribution> {
    preference.distribute.iter().find(|rule| covers(&rule.from, &own.locality))
}

/// The place in a distribution that an endpoint's locality has, in the order of the names, and its weight; `None`: it gets nothing.
/// The most specific place counts.
pub(super) fn place(distribution: &Distribution, other: &Workload) -> Option<(usize, u32)> {
    let mut places: Vec<(&String, u32)> =
        distribution.to.iter().map(|(place, weight)| (place, *weight)).collect();
    places.sort_unstable();
    let covering = places.iter().enumerate().filter(|(_, (place, _))| covers(place, &other.locality));
    let best = covering.max_by_key(|(_, (place, _))| place.len());
    best.map(|(at, (_, weight))| (at, *weight)).filter(|(_, weight)| *weight > 0)
}

/// Whether `region/zone/subzone`, `*` for all below, covers a locality.
fn covers(pattern: &str, locality: &Locality) -> bool {
    let mut values = [&locality.region, &locality.zone, &locality.subzone].into_iter();
    for part in pattern.split('/') {
        match (part, values.next()) {
            ("*", _) => return true,
            (part, Some(value)) if *part == **value => {}
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Locality {
        let mut parts = text.split('/').map(Into::into).chain(std::iter::repeat_with(|| "".into()));
        let mut next = || parts.next().unwrap();
        Locality { region: next(), zone: next(), subzone: next() }
    }

    #[test]
    fn patterns_cover_what_is_below_them() {
        for (pattern, locality, expected) in [
            ("*", "a/b/c", true),
            ("a/*", "a/b/c", true),
            ("a/b/*", "a/b/c", true),
            ("a/b/c", "a/b/c", true),
            ("a", "a/b/c", true),
            ("a/b", "a/b/c", true),
            ("a/*", "b/b/c", false),
            ("a/b/d", "a/b/c", false),
        ] {
            assert_eq!(covers(pattern, &at(locality)), expected, "{pattern} {locality}");
        }
    }

    #[test]
    fn localities_share_their_beginning() {
        assert_eq!(shared(&at("a/b/c"), &at("a/b/c")), 3);
        assert_eq!(shared(&at("a/b/c"), &at("a/x/c")), 1);
        assert_eq!(shared(&at("a/b/c"), &at("x/b/c")), 0);
        assert_eq!(shared(&at(""), &at("")), 3);
    }
}
