//! Routes of one service, as waypoints get them: a path prefix of its own each, a split over two backends, retries.

use ambit_api::l7;

/// The namespace of the service and its hostname.
pub const SERVICE: (&str, &str) = ("app", "web.app.svc.cluster.local");

/// Route `number`, for paths below `/team-<number / 100>/r<number>`.
pub fn route(number: u32) -> l7::Route {
    let backend = |name: &str, weight| l7::Backend {
        namespace: SERVICE.0.to_owned(),
        hostname: format!("{name}.app.svc.cluster.local"),
        port: 80,
        weight,
        ..l7::Backend::default()
    };
    let prefix = format!("/team-{}/r{number}", number / 100);
    let path = l7::PathMatch { kind: Some(l7::path_match::Kind::Prefix(prefix)), ..l7::PathMatch::default() };
    let rule = l7::Rule {
        matches: vec![l7::Match { path: Some(path), ..l7::Match::default() }],
        backends: vec![backend("a", 90), backend("b", 10)],
        retry: Some(l7::Retry { attempts: 2, codes: vec![503], ..l7::Retry::default() }),
        ..l7::Rule::default()
    };
    let target = l7::Target {
        namespace: SERVICE.0.to_owned(),
        hostname: SERVICE.1.to_owned(),
        ..l7::Target::default()
    };
    let object = l7::ObjectName {
        kind: "HTTPRoute".to_owned(),
        namespace: SERVICE.0.to_owned(),
        name: format!("r{number}"),
    };
    l7::Route { object: Some(object), targets: vec![target], rules: vec![rule], ..l7::Route::default() }
}
