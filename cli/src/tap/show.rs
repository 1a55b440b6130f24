//! A record of a proxy's access log as a line for people. Pure.

use std::fmt::Write as _;

use serde_json::Value;

use crate::output::Palette;

/// A record, and whose it is.
pub(super) struct Seen<'a> {
    /// The proxy.
    pub(super) proxy: &'a str,
    /// What it streamed.
    pub(super) record: &'a Value,
}

/// What the columns are of.
pub(super) fn heading(paint: Palette) -> String {
    format!("{}\n", paint.bold(&columns(["TIME", "SOURCE", "DESTINATION", "WHAT", "RESULT", "PROXY"])))
}

/// The same record with the name of its proxy.
pub(super) fn named(mut record: Value, proxy: &str) -> Value {
    record["proxy"] = proxy.into();
    record
}

/// Cells in columns of fixed width, as rows that come later are not known; a longer cell moves what follows.
fn columns(cells: [&str; 6]) -> String {
    const WIDTHS: [usize; 6] = [12, 28, 32, 40, 16, 0];
    let cells: Vec<String> =
        cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{cell:<width$}")).collect();
    cells.join("  ").trim_end().to_owned()
}

impl Seen<'_> {
    /// The line, and with `why` a second one for what was denied or failed.
    pub(super) fn render(&self, why: bool, paint: Palette) -> String {
        let status = self.text("status");
        let result = self.result(status);
        let cells = [self.time(), &self.party("src"), &self.destination(), &self.what(), &result, self.proxy];
        let line = columns(cells);
        let line = match status {
            "denied" | "failed" => paint.red(&line),
            _ if self.record["response_code"].as_u64().is_some_and(|code| code >= 500) => paint.yellow(&line),
            _ => line,
        };
        let mut text = format!("{line}\n");
        if why && status != "ok" {
            let reason = match self.text("error") {
                "" => "no reason was recorded",
                reason => reason,
            };
            let _ = writeln!(text, "    {}: {reason}", paint.bold("why"));
            if let Some(command) = self.explained_by() {
                let _ = writeln!(text, "    {}", paint.dim(&format!("step by step: {command}")));
            }
        }
        text
    }

    fn text(&self, field: &str) -> &str {
        self.record[field].as_str().unwrap_or_default()
    }

    /// The time of day, to the millisecond.
    fn time(&self) -> &str {
        self.text("time").split_once('T').and_then(|(_, time)| time.get(..12)).unwrap_or_default()
    }

    /// The workload of an end, or its address.
    fn party(&self, side: &str) -> String {
        let field = |name: &str| self.text(&format!("{side}.{name}"));
        match (field("namespace"), field("workload")) {
            (namespace, workload) if !workload.is_empty() => format!("{namespace}/{workload}"),
            _ => field("addr").to_owned(),
        }
    }

    fn destination(&self) -> String {
        match self.party("dst").as_str() {
            "" => self.text("dst.service").to_owned(),
            party => party.to_owned(),
        }
    }

    fn what(&self) -> String {
        if self.is_request() {
            return format!("{} http://{}{}", self.text("method"), self.text("authority"), self.text("path"));
        }
        let address = match self.text("dst.hbone_addr") {
            "" => self.text("dst.addr"),
            address => address,
        };
        match self.text("protocol") {
            "" => format!("{} {address}", self.text("direction")),
            protocol => format!("{} {protocol} {address}", self.text("direction")),
        }
    }

    fn is_request(&self) -> bool {
        self.record.get("method").is_some()
    }

    fn result(&self, status: &str) -> String {
        let duration = self.text("duration");
        match self.record["response_code"].as_u64() {
            Some(code) if status == "ok" => format!("{code} {duration}"),
            Some(code) => format!("{code} {status} {duration}"),
            None => format!("{status} {duration}"),
        }
    }

    /// The command that explains such a request or connection of a known pod.
    fn explained_by(&self) -> Option<String> {
        let plain = |text: &str| {
            !text.is_empty()
                && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"'\"`$\\;&|<>()".contains(&byte))
        };
        let (client, service) = (self.party("src"), self.text("dst.service"));
        // Nobody decides about datagrams inside the mesh.
        let is_udp = self.text("protocol") == "udp";
        if is_udp || self.text("src.workload").is_empty() || !plain(&client) {
            return None;
        }
        if self.is_request() {
            let (method, host, path) = (self.text("method"), self.text("authority"), self.text("path"));
            let fits = [method, host, path].into_iter().all(plain);
            let option = if method == "GET" { String::new() } else { format!(" -X {method}") };
            return fits.then(|| format!("ambit why{option} {client} http://{host}{path}"));
        }
        let address = match self.text("dst.hbone_addr") {
            "" => self.text("dst.addr"),
            address => address,
        };
        let port = address.rsplit_once(':').map(|(_, port)| port)?;
        let host = if service.is_empty() { address.to_owned() } else { format!("{service}:{port}") };
        plain(&host).then(|| format!("ambit why {client} {host}"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn records() -> [(&'static str, Value); 4] {
        let connection = json!({
            "time": "2026-11-28T17:04:01.123456Z", "src.workload": "cli-5d8f7c6b9-x2k4q", "src.namespace": "shop",
            "dst.workload": "db-0", "dst.namespace": "data", "dst.service": "db.data.svc.cluster.local",
            "dst.addr": "10.1.2.3:15008", "dst.hbone_addr": "10.1.2.3:5432", "direction": "inbound",
            "bytes_sent": 0, "bytes_recv": 0, "duration": "1ms",
            "error": "denied: policies that allow apply, and none matches", "status": "denied",
        });
        let request = |method: &str, path: &str, code: u16, status: &str, error: Option<&str>| {
            json!({
                "time": "2026-11-28T17:04:02.500000Z", "src.workload": "cli-5d8f7c6b9-x2k4q", "src.namespace": "shop",
                "dst.workload": if code == 200 { "web-1" } else { "" }, "dst.namespace": "shop",
                "dst.service": "web.shop.svc.cluster.local", "method": method, "authority": "web", "path": path,
                "response_code": code, "duration": "12ms", "error": error, "status": status,
            })
        };
        let denied = Some("denied by policy shop/no-admin");
        [
            ("node node-2", connection),
            ("waypoint shop/waypoint-1", request("GET", "/api", 200, "ok", None)),
            ("waypoint shop/waypoint-1", request("DELETE", "/admin", 403, "denied", denied)),
            (
                "waypoint shop/waypoint-1",
                request("GET", "/$(x)", 503, "failed", Some("no endpoint: none is known, or none is ready")),
            ),
        ]
    }

    #[test]
    fn each_record_is_a_line_and_a_denied_one_says_why() {
        let paint = Palette::new(false);
        let lines: Vec<String> =
            records().iter().map(|(proxy, record)| Seen { proxy, record }.render(true, paint)).collect();
        let text = format!("{}{}", heading(paint), lines.concat());
        let page = include_str!("../../../docs/tap.md");
        assert!(page.contains(&text), "docs/tap.md shows it");
        insta::assert_snapshot!(text);
    }

    #[test]
    fn without_why_each_record_is_one_line() {
        for (proxy, record) in records() {
            let text = Seen { proxy, record: &record }.render(false, Palette::new(false));
            assert_eq!(text.lines().count(), 1, "{text}");
        }
    }
}
