//! Other proxies with the same task: their settings, and how they are started.
//!
//! Each splits 90 to 10 between two servers, tries again on 503 and failed connections, keeps connections to the servers, adds
//! `x-forwarded-for` and a request id, counts, and writes an access log to a file. Port 8080 has the routes, 8081 HTTP/2, 8082 gRPC.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use ambit_local::Command;
use anyhow::{Context, Result};
use serde::Serialize;

/// Where each proxy listens: HTTP/1.1 and the routes, HTTP/2, gRPC.
pub(crate) const PORTS: [u16; 3] = [8080, 8081, 8082];

/// A proxy that is not ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Rival {
    /// Envoy.
    Envoy,
    /// HAProxy.
    Haproxy,
    /// nginx.
    Nginx,
}

/// What a proxy is to do.
pub(crate) struct Task<'a> {
    /// Its own address.
    pub(crate) listen: IpAddr,
    /// The server that gets 90 of 100 requests, and the other.
    pub(crate) servers: [SocketAddr; 2],
    /// Number of routes `/r<n>/`.
    pub(crate) routes: usize,
    /// The value of `x-change` in answers to `/change/`.
    pub(crate) change: u32,
    /// Where its files go.
    pub(crate) directory: &'a Path,
}

impl Rival {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Envoy, Self::Haproxy, Self::Nginx];

    /// The program, if this machine has it.
    pub(crate) fn program(self) -> Option<PathBuf> {
        let here = match self {
            Self::Envoy => std::env::var_os("AMBIT_BENCH_ENVOY").map(PathBuf::from),
            Self::Haproxy => Some("/usr/sbin/haproxy".into()),
            Self::Nginx => Some("/usr/sbin/nginx".into()),
        };
        here.filter(|program| program.exists())
    }

    /// What is written about it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Envoy => "Envoy",
            Self::Haproxy => "HAProxy",
            Self::Nginx => "nginx",
        }
    }

    /// Whether its routes can be replaced while it runs, without a second process of ours that hands over.
    pub(crate) fn can_change(self) -> bool {
        matches!(self, Self::Envoy | Self::Nginx)
    }

    /// Writes its settings and returns how it is started; `None` where this machine does not have it.
    ///
    /// # Errors
    /// When its files can't be written.
    pub(crate) fn command(self, task: &Task<'_>) -> Result<Option<Command>> {
        let Some(program) = self.program() else { return Ok(None) };
        self.write(task)?;
        let at = |name: &str| task.directory.join(name);
        let command = Command::new(program);
        Ok(Some(match self {
            Self::Envoy => command
                .args(["--concurrency", "2", "--log-level", "error", "--disable-hot-restart"])
                .args(["--service-node", "bench", "--service-cluster", "bench", "-c"])
                .arg(at("envoy.yaml")),
            Self::Haproxy => command.arg("-db").arg("-f").arg(at("haproxy.cfg")).log_file(at("access.log")),
            Self::Nginx => command
                .arg("-p")
                .arg(task.directory)
                .arg("-e")
                .arg(at("error.log"))
                .arg("-c")
                .arg(at("nginx.conf")),
        }))
    }

    /// Writes its settings anew.
    ///
    /// # Errors
    /// When its files can't be written.
    pub(crate) fn write(self, task: &Task<'_>) -> Result<()> {
        let put = |name: &str, text: String| {
            // Renamed, as Envoy takes notice of a file that is moved only.
            let (path, new) = (task.directory.join(name), task.directory.join(format!("{name}.new")));
            std::fs::write(&new, text)
                .and_then(|()| std::fs::rename(&new, &path))
                .with_context(|| format!("writing {}", path.display()))
        };
        match self {
            Self::Envoy => {
                put("routes.yaml", envoy_routes(task))?;
                put("envoy.yaml", envoy(task))
            }
            Self::Haproxy => {
                put("routes.map", haproxy_routes(task))?;
                put("haproxy.cfg", haproxy(task))
            }
            Self::Nginx => put("nginx.conf", nginx(task)),
        }
    }
}

fn nginx(task: &Task<'_>) -> String {
    let Task { listen, servers: [a, b], routes, change, directory } = task;
    let directory = directory.display();
    // gRPC has connections of its own: nginx would send it on kept ones of HTTP/1.1.
    let mut text = format!(
        "user root;\ndaemon off;\nworker_processes 2;\npid {directory}/nginx.pid;\nerror_log {directory}/error.log;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n  access_log {directory}/access.log combined buffer=64k flush=1s;\n  keepalive_requests 100000000;\n\
         \x20 upstream web {{ server {a} weight=9; server {b} weight=1; keepalive 128; keepalive_requests 100000000; }}\n\
         \x20 upstream grpc {{ server {a} weight=9; server {b} weight=1; keepalive 128; keepalive_requests 100000000; }}\n\
         \x20 proxy_http_version 1.1;\n  proxy_set_header Connection '';\n  proxy_set_header Host $host;\n\
         \x20 proxy_set_header X-Forwarded-For $remote_addr;\n  proxy_set_header X-Request-Id $request_id;\n\
         \x20 proxy_next_upstream error timeout http_503;\n  proxy_next_upstream_tries 3;\n\
         \x20 server {{\n    listen {listen}:{};\n    location /change/ {{ add_header x-change {change}; proxy_pass http://web; }}\n",
        PORTS[0]
    );
    for number in 0..*routes {
        let _ = writeln!(text, "    location /r{number}/ {{ proxy_pass http://web; }}");
    }
    let _ = write!(
        text,
        "  }}\n  server {{ listen {listen}:{} http2; location / {{ proxy_pass http://web; }} }}\n\
         \x20 server {{ listen {listen}:{} http2; location / {{ grpc_pass grpc://grpc; \
         grpc_next_upstream error timeout http_503; }} }}\n}}\n",
        PORTS[1], PORTS[2]
    );
    text
}

fn haproxy(task: &Task<'_>) -> String {
    let Task { listen, servers: [a, b], change, directory, .. } = task;
    let directory = directory.display();
    format!(
        "global\n  nbthread 2\n  maxconn 8000\n  log stdout format raw local0 info\n\
         defaults\n  mode http\n  option httplog\n  log global\n  option forwardfor\n  http-reuse always\n\
         \x20 timeout connect 5s\n  timeout client 300s\n  timeout server 300s\n  retries 2\n\
         \x20 retry-on conn-failure empty-response 503\n\
         frontend http1\n  bind {listen}:{}\n  unique-id-format %[uuid()]\n  unique-id-header x-request-id\n\
         \x20 http-response set-header x-change {change} if {{ var(txn.change) -m bool }}\n\
         \x20 http-request set-var(txn.change) bool(true) if {{ path_beg /change/ }}\n\
         \x20 use_backend %[path,map_beg({directory}/routes.map,none)]\n\
         frontend http2\n  bind {listen}:{} proto h2\n  default_backend web2\n\
         frontend grpc\n  bind {listen}:{} proto h2\n  default_backend web2\n\
         backend web\n  balance roundrobin\n  server a {a} weight 90\n  server b {b} weight 10\n\
         backend web2\n  balance roundrobin\n  server a {a} weight 90 proto h2\n  server b {b} weight 10 proto h2\n",
        PORTS[0], PORTS[1], PORTS[2]
    )
}

fn haproxy_routes(task: &Task<'_>) -> String {
    let mut text = "/change/ web\n".to_owned();
    for number in 0..task.routes {
        let _ = writeln!(text, "/r{number}/ web");
    }
    text
}

const ENVOY_ROUTE: &str = "route: {weighted_clusters: {clusters: [{name: a, weight: 90}, {name: b, weight: 10}]}, \
     retry_policy: {retry_on: 'connect-failure,refused-stream,retriable-status-codes', retriable_status_codes: [503], \
     num_retries: 2}}";

fn envoy_routes(task: &Task<'_>) -> String {
    let mut text = format!(
        "version_info: '{change}'\nresources:\n- '@type': type.googleapis.com/envoy.config.route.v3.RouteConfiguration\n  \
         name: routes\n  virtual_hosts:\n  - name: all\n    domains: ['*']\n    routes:\n    - {{match: {{prefix: /change/}}, \
         response_headers_to_add: [{{header: {{key: x-change, value: '{change}'}}}}], {ENVOY_ROUTE}}}\n",
        change = task.change
    );
    for number in 0..task.routes {
        let _ = writeln!(text, "    - {{match: {{prefix: /r{number}/}}, {ENVOY_ROUTE}}}");
    }
    text
}

fn envoy(task: &Task<'_>) -> String {
    let Task { listen, servers: [a, b], directory, .. } = task;
    let directory = directory.display();
    let mut text = "admin: {address: {socket_address: {address: 127.0.0.1, port_value: 9901}}}\n\
                    static_resources:\n  listeners:\n"
        .to_owned();
    let http2_routes = ENVOY_ROUTE.replace("name: a", "name: a2").replace("name: b", "name: b2");
    for (number, port) in PORTS.into_iter().enumerate() {
        let routes = match number {
            0 => format!(
                "rds: {{route_config_name: routes, config_source: {{resource_api_version: V3, path_config_source: \
                 {{path: {directory}/routes.yaml}}}}}}"
            ),
            _ => format!(
                "route_config: {{virtual_hosts: [{{name: all, domains: ['*'], routes: [{{match: {{prefix: /}}, \
                 {http2_routes}}}]}}]}}"
            ),
        };
        let _ = writeln!(
            text,
            "  - name: l{number}\n    address: {{socket_address: {{address: {listen}, port_value: {port}}}}}\n    \
             filter_chains:\n    - filters:\n      - name: hcm\n        typed_config:\n          \
             '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager\n          \
             stat_prefix: l{number}\n          use_remote_address: true\n          {routes}\n          \
             access_log: [{{name: file, typed_config: {{'@type': \
             type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {directory}/access.log}}}}]\n          \
             http_filters: [{{name: router, typed_config: {{'@type': \
             type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]"
        );
    }
    text.push_str("  clusters:\n");
    for (name, server, http2) in [("a", a, false), ("b", b, false), ("a2", a, true), ("b2", b, true)] {
        let options = match http2 {
            false => "http_protocol_options: {}",
            true => "http2_protocol_options: {}",
        };
        let _ = writeln!(
            text,
            "  - name: {name}\n    type: STATIC\n    connect_timeout: 5s\n    typed_extension_protocol_options:\n      \
             envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        '@type': \
             type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n        \
             explicit_http_config: {{{options}}}\n    load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: \
             [{{endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}}}]}}]}}",
            server.ip(),
            server.port()
        );
    }
    text
}
