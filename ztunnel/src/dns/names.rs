//! What a name may mean to a client: as it is, completed, or with a search domain taken off. Pure.

use smallvec::SmallVec;

/// Names with at least so many dots are complete, as in the `resolv.conf` of a cluster's pods.
const NDOTS: usize = 5;

/// The names to look for, in order, all in lower case without a dot at the end.
///
/// A client that knows no search domains asks for `reviews` or `reviews.shop`; one that adds them to
/// everything asks for `api.example.com.shop.svc.cluster.local`.
pub(super) fn candidates(name: &str, namespace: &str, cluster_domain: &str) -> SmallVec<[String; 4]> {
    let mut names = SmallVec::new();
    if name.is_empty() {
        return names;
    }
    names.push(name.to_owned());
    let domains = [
        format!(".{namespace}.svc.{cluster_domain}"),
        format!(".svc.{cluster_domain}"),
        format!(".{cluster_domain}"),
    ];
    if name.matches('.').count() < NDOTS {
        names.extend(domains.iter().map(|domain| format!("{name}{domain}")));
    }
    for domain in &domains {
        // One label alone would be any service of any namespace.
        if let Some(rest) = name.strip_suffix(domain.as_str()).filter(|rest| rest.contains('.')) {
            names.push(rest.to_owned());
        }
    }
    names
}

/// An address as the first label of a headless service's endpoint: `10-0-0-1`, `fd00--1`.
pub(super) fn dashed(address: std::net::IpAddr) -> String {
    address.to_string().replace(['.', ':'], "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str) -> Vec<String> {
        candidates(name, "shop", "cluster.local").into_vec()
    }

    #[test]
    fn short_names_are_completed() {
        for (short, full) in [
            ("reviews", "reviews.shop.svc.cluster.local"),
            ("reviews.other", "reviews.other.svc.cluster.local"),
            ("reviews.other.svc", "reviews.other.svc.cluster.local"),
            ("db-0.db", "db-0.db.shop.svc.cluster.local"),
            ("db-0.db.other", "db-0.db.other.svc.cluster.local"),
        ] {
            let names = of(short);
            assert_eq!(names[0], short);
            assert!(names.iter().any(|name| name == full), "{short} may mean {full}");
        }
    }

    #[test]
    fn search_domains_are_taken_off() {
        let name = "api.example.com.shop.svc.cluster.local";
        assert_eq!(of(name), [name, "api.example.com", "api.example.com.shop", "api.example.com.shop.svc"]);
        assert!(!of("reviews.shop.svc.cluster.local").contains(&"reviews".to_owned()));
    }

    #[test]
    fn nothing_means_nothing() {
        assert!(of("").is_empty());
    }

    #[test]
    fn addresses_make_labels() {
        assert_eq!(dashed("10.0.0.1".parse().unwrap()), "10-0-0-1");
        assert_eq!(dashed("fd00::1".parse().unwrap()), "fd00--1");
    }
}
