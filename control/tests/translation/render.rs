//! Messages as people read them: fields that are set, names for numbers.

use std::net::IpAddr;

use ambit_api::l7;
use ambit_api::security::{self, string_match::MatchType};
use ambit_api::workload::{self, address, gateway_address, load_balancing};
use prost::Message;
use serde_json::{Map, Value, json};

/// Leaves out what is not set.
fn object(fields: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    let is_set = |value: &Value| match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_u64() != Some(0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    };
    let set =
        fields.into_iter().filter(|(_, value)| is_set(value)).map(|(key, value)| (key.to_owned(), value));
    Value::Object(set.collect::<Map<_, _>>())
}

/// The name of an enum's value; nothing for its default.
fn name<E: TryFrom<i32> + std::fmt::Debug>(value: i32) -> Value {
    if value == 0 {
        return Value::Null;
    }
    E::try_from(value).map_or_else(|_| json!(value), |known| json!(format!("{known:?}")))
}

fn list<T>(items: &[T], render: impl Fn(&T) -> Value) -> Value {
    Value::Array(items.iter().map(render).collect())
}

fn ip(octets: &[u8]) -> String {
    match octets.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(octets).unwrap()).to_string(),
        16 => IpAddr::from(<[u8; 16]>::try_from(octets).unwrap()).to_string(),
        _ => format!("{octets:?}"),
    }
}

fn network_address(address: &workload::NetworkAddress) -> Value {
    let length = address.length.map(|length| format!("/{length}")).unwrap_or_default();
    json!(format!("{}/{}{length}", address.network, ip(&address.address)))
}

fn gateway(gateway: &Option<workload::GatewayAddress>) -> Value {
    let Some(gateway) = gateway else { return Value::Null };
    let destination = match gateway.destination.as_ref().unwrap() {
        gateway_address::Destination::Hostname(host) => {
            json!(format!("{}/{}", host.namespace, host.hostname))
        }
        gateway_address::Destination::Address(address) => network_address(address),
    };
    json!(format!("{} port {}", destination.as_str().unwrap(), gateway.hbone_mtls_port))
}

fn port(port: &workload::Port) -> Value {
    let protocol = name::<workload::AppProtocol>(port.app_protocol);
    let protocol = protocol.as_str().map(|p| format!(" {p}")).unwrap_or_default();
    json!(format!("{} -> {}{protocol}", port.service_port, port.target_port))
}

fn extension(extension: &workload::Extension) -> Value {
    let config = extension.config.as_ref().unwrap();
    json!(format!("{} {} {:?}", extension.name, config.type_url, config.value))
}

pub(crate) fn address(body: &[u8]) -> Value {
    match workload::Address::decode(body).unwrap().r#type.unwrap() {
        address::Type::Workload(workload) => json!({ "workload": render_workload(&workload) }),
        address::Type::Service(service) => json!({ "service": render_service(&service) }),
    }
}

fn render_workload(w: &workload::Workload) -> Value {
    let services = w.services.iter().map(|(name, ports)| (name.clone(), list(&ports.ports, port)));
    let of_datagrams = w.services.iter().filter(|(_, ports)| !ports.udp_ports.is_empty());
    let of_datagrams = of_datagrams.map(|(name, ports)| (name.clone(), list(&ports.udp_ports, port)));
    let locality = w.locality.as_ref().map(|l| format!("{}/{}/{}", l.region, l.zone, l.subzone));
    let tunnel = w.application_tunnel.as_ref().map(|t| {
        format!("{:?} port {}", workload::application_tunnel::Protocol::try_from(t.protocol).unwrap(), t.port)
    });
    object([
        ("uid", json!(w.uid)),
        ("name", json!(w.name)),
        ("namespace", json!(w.namespace)),
        ("addresses", list(&w.addresses, |a| json!(ip(a)))),
        ("hostname", json!(w.hostname)),
        ("network", json!(w.network)),
        ("networkGateway", gateway(&w.network_gateway)),
        ("networkMode", name::<workload::NetworkMode>(w.network_mode)),
        ("tunnelProtocol", name::<workload::TunnelProtocol>(w.tunnel_protocol)),
        ("nativeTunnel", json!(w.native_tunnel)),
        ("applicationTunnel", json!(tunnel)),
        ("trustDomain", json!(w.trust_domain)),
        ("serviceAccount", json!(w.service_account)),
        ("node", json!(w.node)),
        ("canonical", json!(format!("{} {}", w.canonical_name, w.canonical_revision))),
        (
            "workload",
            json!(format!(
                "{:?} {}",
                workload::WorkloadType::try_from(w.workload_type).unwrap(),
                w.workload_name
            )),
        ),
        ("status", name::<workload::WorkloadStatus>(w.status)),
        ("servingWhileTerminating", json!(w.serving_while_terminating)),
        ("created", json!(w.created)),
        ("clusterId", json!(w.cluster_id)),
        ("locality", json!(locality)),
        ("capacity", json!(w.capacity)),
        ("waypoint", gateway(&w.waypoint)),
        ("policies", json!(w.authorization_policies)),
        ("services", Value::Object(services.collect())),
        ("udpServices", Value::Object(of_datagrams.collect())),
        ("extensions", list(&w.extensions, extension)),
    ])
}

fn render_service(s: &workload::Service) -> Value {
    let balancing = s.load_balancing.as_ref().map(|b| {
        object([
            ("mode", name::<load_balancing::Mode>(b.mode)),
            ("health", name::<load_balancing::HealthPolicy>(b.health_policy)),
            ("preference", list(&b.routing_preference, |scope| name::<load_balancing::Scope>(*scope))),
        ])
    });
    object([
        ("name", json!(s.name)),
        ("namespace", json!(s.namespace)),
        ("hostname", json!(s.hostname)),
        ("addresses", list(&s.addresses, network_address)),
        ("ports", list(&s.ports, port)),
        ("udpPorts", list(&s.udp_ports, port)),
        ("subjectAltNames", json!(s.subject_alt_names)),
        ("waypoint", gateway(&s.waypoint)),
        (
            "weightedWaypoints",
            list(&s.weighted_waypoints, |w| {
                json!(format!("{} weight {}", gateway(&w.destination).as_str().unwrap(), w.weight))
            }),
        ),
        ("loadBalancing", json!(balancing)),
        ("ipFamilies", name::<workload::IpFamilies>(s.ip_families)),
        ("canonical", json!(s.canonical)),
        ("ingressUseWaypoint", json!(s.ingress_use_waypoint)),
        ("visibility", name::<workload::service::Visibility>(s.visibility)),
        ("extensions", list(&s.extensions, extension)),
    ])
}

pub(crate) fn authorization(body: &[u8]) -> Value {
    let policy = security::Authorization::decode(body).unwrap();
    object([
        ("name", json!(policy.name)),
        ("namespace", json!(policy.namespace)),
        ("scope", json!(format!("{:?}", security::Scope::try_from(policy.scope).unwrap()))),
        ("action", json!(format!("{:?}", security::Action::try_from(policy.action).unwrap()))),
        ("dryRun", json!(policy.dry_run)),
        (
            "rules",
            list(&policy.rules, |rule| list(&rule.clauses, |clause| list(&clause.matches, render_match))),
        ),
    ])
}

fn string_match(value: &security::StringMatch) -> Value {
    match value.match_type.as_ref().unwrap() {
        MatchType::Exact(text) => json!(text),
        MatchType::Prefix(text) => json!(format!("{text}*")),
        MatchType::Suffix(text) => json!(format!("*{text}")),
        MatchType::Presence(()) => json!("*"),
    }
}

fn blocks(values: &[security::Address]) -> Value {
    list(values, |block| json!(format!("{}/{}", ip(&block.address), block.length)))
}

/// What a match demands of a request.
fn http_match(extension: &security::Extension) -> Value {
    let config = extension.config.as_ref().unwrap();
    assert_eq!(config.type_url, ambit_api::HTTP_MATCH_TYPE_URL);
    let http = l7::HttpMatch::decode(&*config.value).unwrap();
    let paths = |paths: &[l7::PolicyPath]| {
        list(paths, |path| match path.kind.as_ref().unwrap() {
            l7::policy_path::Kind::Text(text) => string_match(text),
            l7::policy_path::Kind::Template(template) => json!(format!("template {template}")),
        })
    };
    let attribute = |wanted: &l7::AttributeMatch| {
        use l7::attribute_match::Attribute;
        let name = match wanted.attribute.as_ref().unwrap() {
            Attribute::Named(named) => format!("{:?}", l7::RequestAttribute::try_from(*named).unwrap()),
            Attribute::Header(name) => format!("header {name}"),
            Attribute::Claim(path) => format!("claim {}", path.names.join(".")),
        };
        object([
            ("attribute", json!(name)),
            ("values", list(&wanted.values, string_match)),
            ("notValues", list(&wanted.not_values, string_match)),
        ])
    };
    object([
        ("attributes", list(&http.attributes, attribute)),
        ("paths", paths(&http.paths)),
        ("notPaths", paths(&http.not_paths)),
        ("remoteIps", blocks(&http.remote_ips)),
        ("notRemoteIps", blocks(&http.not_remote_ips)),
    ])
}

fn render_match(m: &security::Match) -> Value {
    let strings = |values: &[security::StringMatch]| list(values, string_match);
    let accounts = |values: &[security::ServiceAccountMatch]| {
        list(values, |account| json!(format!("{}/{}", account.namespace, account.service_account)))
    };
    object([
        ("namespaces", strings(&m.namespaces)),
        ("notNamespaces", strings(&m.not_namespaces)),
        ("principals", strings(&m.principals)),
        ("notPrincipals", strings(&m.not_principals)),
        ("sourceIps", blocks(&m.source_ips)),
        ("notSourceIps", blocks(&m.not_source_ips)),
        ("destinationIps", blocks(&m.destination_ips)),
        ("notDestinationIps", blocks(&m.not_destination_ips)),
        ("destinationPorts", json!(m.destination_ports)),
        ("notDestinationPorts", json!(m.not_destination_ports)),
        ("serviceAccounts", accounts(&m.service_accounts)),
        ("notServiceAccounts", accounts(&m.not_service_accounts)),
        ("http", list(&m.extensions, http_match)),
    ])
}

pub(crate) fn gateway_resource(body: &[u8]) -> Value {
    let gateway = l7::Gateway::decode(body).unwrap();
    let addresses = gateway.addresses.iter().map(|address| match address.hostname.as_str() {
        "" => format!("{}/{}", address.network, ip(&address.ip)),
        hostname => format!("{}/{hostname}", address.namespace),
    });
    let trusted = gateway.trusted_proxies.filter(|it| *it != l7::TrustedProxies::default());
    let trusted = trusted.map(|it| {
        let l7::TrustedProxies { hops, networks, proxy_protocol } = it;
        format!("trusted proxies: {hops} hops, in {networks:?}, PROXY {proxy_protocol}")
    });
    let forwarders = gateway.trusted_forwarders.iter().map(|identity| format!("believes {identity}"));
    let addresses = json!(addresses.chain(trusted).chain(forwarders).collect::<Vec<_>>());
    if gateway.telemetry.is_none() && gateway.service_telemetries.is_empty() {
        return addresses;
    }
    let services = list(
        &gateway.service_telemetries,
        |of| json!({ format!("{}/{}", of.namespace, of.hostname): of.telemetry.as_ref().map(telemetry) }),
    );
    object([
        ("addresses", addresses),
        ("telemetry", gateway.telemetry.as_ref().map_or(Value::Null, telemetry)),
        ("services", services),
    ])
}

fn telemetry(telemetry: &l7::Telemetry) -> Value {
    let collector = |it: &Option<l7::Collector>| match it {
        Some(it) => {
            let path = it.http.as_ref().map(|http| http.path.as_str()).unwrap_or_default();
            format!("{} {}/{}:{}{path}", it.provider, it.namespace, it.hostname, it.port)
        }
        None => "own".to_owned(),
    };
    let tracing = telemetry.tracing.as_ref().map(|tracing| {
        object([
            ("collector", json!(collector(&tracing.collector))),
            ("sampling", json!(tracing.sampling.to_string())),
            ("tags", list(&tracing.tags, |tag| json!(format!("{} {:?}", tag.name, tag.value)))),
        ])
    });
    let log = |log: &l7::AccessLog| {
        object([
            ("to", json!(collector(&log.collector))),
            ("filter", json!(log.filter)),
            ("name", json!(log.log_name)),
        ])
    };
    object([
        ("tracing", json!(tracing)),
        ("logs", list(&telemetry.access_logs, log)),
        ("metrics", list(&telemetry.metrics, |it| json!(format!("{it:?}")))),
    ])
}

pub(crate) fn waypoint_policy(body: &[u8]) -> Value {
    let policy = l7::Policy::decode(body).unwrap();
    let enforced = policy.authorization.map(|policy| authorization(&policy.encode_to_vec()));
    let tokens = policy.authentication.map(|rules| list(&rules.rules, |rule| json!(format!("{rule:?}"))));
    let asked = policy.external.map_or(Value::Null, |authorizer| json!(format!("{authorizer:?}")));
    let enforced = match (enforced, tokens, policy.traffic.as_ref()) {
        (_, _, Some(demands)) => ("traffic", traffic(demands)),
        (None, None, None) => ("authorization", json!("denies everything")),
        (_, Some(tokens), None) => ("tokens", tokens),
        (Some(enforced), None, None) => ("authorization", enforced),
    };
    let (targets, gateways) = (list(&policy.targets, target), json!(policy.gateways));
    let audited = policy.audit.map_or(Value::Null, |policy| authorization(&policy.encode_to_vec()));
    object([("targets", targets), ("gateways", gateways), enforced, ("asked", asked), ("audited", audited)])
}

fn traffic(demands: &l7::Traffic) -> Value {
    let limit = |it: &l7::RateLimit| {
        object([
            ("name", json!(it.name)),
            (
                "rate",
                json!(format!(
                    "{} in {} ms, {} at once",
                    it.requests,
                    it.interval_nanos / 1_000_000,
                    it.burst
                )),
            ),
            ("keys", list(&it.keys, |key| json!(format!("{:?}", key.kind)))),
            ("when", json!(it.when)),
            ("status", json!(it.status)),
        ])
    };
    let route = |it: &l7::RouteTarget| {
        let rule = if it.rule.is_empty() { String::new() } else { format!(" rule {}", it.rule) };
        json!(format!("{}/{}/{}{rule}", it.kind, it.namespace, it.name))
    };
    let condition = |it: &l7::Condition| json!(format!("{}: {}", it.name, it.expression));
    object([
        ("routes", list(&demands.routes, route)),
        ("rateLimits", list(&demands.rate_limits, limit)),
        ("conditions", list(&demands.conditions, condition)),
        ("invalid", json!(demands.invalid)),
    ])
}

pub(crate) fn route(body: &[u8]) -> Value {
    let route = l7::Route::decode(body).unwrap();
    object([
        ("targets", list(&route.targets, target)),
        ("protocol", name::<l7::Protocol>(route.protocol)),
        ("order", name::<l7::Order>(route.order)),
        ("created", json!(route.created)),
        ("rules", list(&route.rules, rule)),
    ])
}

pub(crate) fn stream_route(body: &[u8]) -> Value {
    let route = l7::StreamRoute::decode(body).unwrap();
    let one = |it: &l7::StreamMatch| {
        object([
            ("port", json!(it.port)),
            ("serverNames", json!(it.server_names)),
            ("destinationSubnets", blocks(&it.destination_subnets)),
            ("sourceNamespace", json!(it.source_namespace)),
            ("clients", json!(it.clients.as_ref().map(|it| format!("{it:?}")))),
        ])
    };
    let rule = |rule: &l7::StreamRule| {
        object([
            ("name", json!(rule.name)),
            ("matches", list(&rule.matches, one)),
            ("backends", list(&rule.backends, backend)),
            ("invalid", json!(rule.invalid)),
        ])
    };
    object([
        ("targets", list(&route.targets, target)),
        ("layer", name::<l7::StreamLayer>(route.layer)),
        ("order", name::<l7::Order>(route.order)),
        ("created", json!(route.created)),
        ("rules", list(&route.rules, rule)),
    ])
}

/// A listener; the name of the resource says of which gateway it is.
pub(crate) fn listener(body: &[u8]) -> Value {
    let listener = l7::Listener::decode(body).unwrap();
    let tls = listener.tls.as_ref();
    object([
        ("port", json!(listener.port)),
        ("protocol", json!(format!("{:?}", listener.protocol()))),
        ("hostname", json!(listener.hostname)),
        ("passthrough", json!(tls.is_some_and(|tls| tls.passthrough))),
        ("keyPairs", json!(tls.map(|tls| &tls.key_pairs))),
        (
            "insecureFallback",
            json!(tls.and_then(|tls| tls.client_validation.as_ref().map(|it| it.allow_insecure_fallback))),
        ),
        ("authorizers", list(&listener.authorizers, |it| json!(format!("{it:?}")))),
    ])
}

fn target(target: &l7::Target) -> Value {
    if !target.listener.is_empty() {
        return json!(format!("listener {} {:?}", target.listener, target.hostnames));
    }
    let port = if target.port == 0 { String::new() } else { format!(":{}", target.port) };
    let clients = match target.client_namespace.as_str() {
        "" => String::new(),
        namespace => format!(" for clients in {namespace}"),
    };
    json!(format!("{}/{}{port} {:?}{clients}", target.namespace, target.hostname, target.hostnames))
}

/// What has no name of its own is shown as the generated types print it.
fn rule(rule: &l7::Rule) -> Value {
    object([
        ("name", json!(rule.name)),
        ("matches", list(&rule.matches, |it| json!(format!("{it:?}")))),
        ("filters", list(&rule.filters, |it| json!(format!("{:?}", it.kind)))),
        ("backends", list(&rule.backends, backend)),
        ("timeouts", json!(rule.timeouts.as_ref().map(|it| format!("{it:?}")))),
        ("retry", json!(rule.retry.as_ref().map(|it| format!("{it:?}")))),
        ("session", json!(rule.session.as_ref().map(|it| format!("{it:?}")))),
        ("invalid", json!(rule.invalid)),
    ])
}

fn backend(backend: &l7::Backend) -> Value {
    let subset =
        if backend.subset.is_empty() { String::new() } else { format!(" subset {}", backend.subset) };
    let filters = match backend.filters.as_slice() {
        [] => String::new(),
        filters => format!(" {:?}", filters.iter().map(|filter| &filter.kind).collect::<Vec<_>>()),
    };
    let invalid = if backend.invalid.is_empty() { String::new() } else { format!(": {}", backend.invalid) };
    json!(format!(
        "{}/{}:{}{subset} weight {}{filters}{invalid}",
        backend.namespace, backend.hostname, backend.port, backend.weight
    ))
}

pub(crate) fn backend_policy(body: &[u8]) -> Value {
    let policy = l7::BackendPolicy::decode(body).unwrap();
    let settings = |all: &[l7::PortSettings]| list(all, |it| json!(format!("{it:?}")));
    object([
        ("host", json!(policy.host)),
        ("meshWide", json!(policy.mesh_wide)),
        ("created", json!(policy.created)),
        ("settings", settings(&policy.settings)),
        (
            "subsets",
            list(&policy.subsets, |subset| {
                object([
                    ("name", json!(subset.name)),
                    ("labels", json!(subset.labels)),
                    ("settings", settings(&subset.settings)),
                ])
            }),
        ),
    ])
}
