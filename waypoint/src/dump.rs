//! How routes show in the admin server's `/config_dump`: what they are for, not what they say.

use ambit_api::l7;
use serde::Serialize;

/// A route as it shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteSummary {
    kind: String,
    namespace: String,
    name: String,
    targets: Vec<TargetSummary>,
    /// Number of rules.
    rules: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct TargetSummary {
    namespace: String,
    hostname: String,
    /// 0: all.
    port: u32,
    /// Hosts of requests that it is for; none: all.
    hostnames: Vec<String>,
    /// Only requests of clients in this namespace; empty: of all.
    client_namespace: String,
}

/// Routes as they show, in their order.
pub fn routes<'a>(
    routes: impl IntoIterator<Item = &'a l7::Route>,
    streams: impl IntoIterator<Item = &'a l7::StreamRoute>,
) -> Vec<RouteSummary> {
    let routes = routes.into_iter().map(|it| route(it.object.as_ref(), &it.targets, it.rules.len()));
    let streams = streams.into_iter().map(|it| route(it.object.as_ref(), &it.targets, it.rules.len()));
    routes.chain(streams).collect()
}

fn route(object: Option<&l7::ObjectName>, targets: &[l7::Target], rules: usize) -> RouteSummary {
    let object = object.cloned().unwrap_or_default();
    let target = |target: &l7::Target| TargetSummary {
        namespace: target.namespace.clone(),
        hostname: target.hostname.clone(),
        port: target.port,
        hostnames: target.hostnames.clone(),
        client_namespace: target.client_namespace.clone(),
    };
    RouteSummary {
        kind: object.kind,
        namespace: object.namespace,
        name: object.name,
        targets: targets.iter().map(target).collect(),
        rules,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_shows_what_it_is_for() {
        let target =
            l7::Target { namespace: "shop".into(), hostname: "web".into(), port: 80, ..Default::default() };
        let object =
            l7::ObjectName { kind: "HTTPRoute".into(), namespace: "shop".into(), name: "split".into() };
        let route = l7::Route {
            object: Some(object),
            targets: vec![target],
            rules: vec![l7::Rule::default()],
            ..Default::default()
        };
        let shown = serde_json::to_value(routes([&route], [])).unwrap();
        assert_eq!((&shown[0]["kind"], &shown[0]["rules"]), (&"HTTPRoute".into(), &1.into()));
        assert_eq!(shown[0]["targets"][0]["port"], 80);
    }
}
