//! Renders entries: tab-separated for people, JSON for machines. Pure.
//!
//! The writer's thread renders a line for each request, so what all lines have is put together without the machinery of `format!`.

use std::fmt::Display;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::SystemTime;

use time::OffsetDateTime;

use super::{Direction, Entry, FieldValue, Party, RequestEntry};

/// A field's value: how it is written depends on the format.
pub(super) enum Field<'a> {
    Address(SocketAddr),
    /// Names and reasons from elsewhere; quoted and escaped.
    Text(&'a str),
    /// The same, of a value that is made into text here.
    Shown(&'a dyn Display),
    /// An authority; holds no spaces, but comes from a peer.
    Authority(&'a str),
    Number(u64),
    Milliseconds(u128),
}

/// What a line says, whatever it is of.
pub(super) trait Fields {
    /// Whether it reports a failure.
    fn has_failed(&self) -> bool;
    /// Hands over the fields in the order of the contract; those that are not known are left out.
    fn each<'a>(&'a self, put: impl FnMut(&'static str, Field<'a>));
}

fn level(entry: &impl Fields) -> &'static str {
    if entry.has_failed() { "error" } else { "info" }
}

impl Fields for Entry {
    fn has_failed(&self) -> bool {
        self.error.is_some()
    }

    /// In the order of the observability contract.
    fn each<'a>(&'a self, mut put: impl FnMut(&'static str, Field<'a>)) {
        let Self {
            source,
            destination,
            hbone_addr,
            service,
            dialled: _,
            is_udp,
            direction,
            status: _,
            bytes_sent,
            bytes_received,
            duration,
            error,
            was_observed: _,
        } = self;
        let direction = match direction {
            Direction::Inbound => "inbound",
            Direction::Outbound => "outbound",
        };
        each_of_source(source, &mut put);
        address("dst.addr", destination, &mut put);
        if let Some(authority) = hbone_addr {
            put("dst.hbone_addr", Field::Authority(authority));
        }
        text("dst.service", service.as_deref(), &mut put);
        each_of_destination(destination, &mut put);
        put("direction", Field::Text(direction));
        if *is_udp {
            put("protocol", Field::Text("udp"));
        }
        put("bytes_sent", Field::Number(*bytes_sent));
        put("bytes_recv", Field::Number(*bytes_received));
        put("duration", Field::Milliseconds(duration.as_millis()));
        text("error", error.as_deref(), &mut put);
    }
}

impl Fields for RequestEntry {
    fn has_failed(&self) -> bool {
        self.error.is_some()
    }

    fn each<'a>(&'a self, mut put: impl FnMut(&'static str, Field<'a>)) {
        let Self {
            source,
            destination,
            service,
            dialled: _,
            status: _,
            protocol,
            method,
            texts,
            code,
            grpc_status,
            flags,
            route,
            audited_by,
            attempts,
            bytes_sent,
            bytes_received,
            duration,
            error,
            was_observed: _,
        } = self;
        each_of_source(source, &mut put);
        address("dst.addr", destination, &mut put);
        text("dst.service", service.as_deref(), &mut put);
        each_of_destination(destination, &mut put);
        put("protocol", Field::Text(protocol));
        put("method", Field::Text(method.as_str()));
        put("authority", Field::Text(texts.authority()));
        put("path", Field::Text(texts.path()));
        put("response_code", Field::Number(u64::from(*code)));
        if let Some(status) = grpc_status {
            put("grpc_status", Field::Number(u64::from(*status)));
        }
        put("response_flags", Field::Text(flags));
        if let Some(route) = route {
            put("route", Field::Shown(route));
        }
        text("audited_by", audited_by.as_deref(), &mut put);
        put("attempts", Field::Number(u64::from(*attempts)));
        text("request_id", texts.request_id(), &mut put);
        text("user_agent", texts.user_agent(), &mut put);
        put("bytes_sent", Field::Number(*bytes_sent));
        put("bytes_recv", Field::Number(*bytes_received));
        put("duration", Field::Milliseconds(duration.as_millis()));
        text("error", error.as_deref(), &mut put);
    }
}

fn text<'a>(name: &'static str, value: Option<&'a str>, put: &mut impl FnMut(&'static str, Field<'a>)) {
    if let Some(value) = value {
        put(name, Field::Text(value));
    }
}

fn address<'a>(name: &'static str, party: &Party, put: &mut impl FnMut(&'static str, Field<'a>)) {
    if let Some(address) = party.addr {
        put(name, Field::Address(address));
    }
}

fn each_of_source<'a>(source: &'a Party, put: &mut impl FnMut(&'static str, Field<'a>)) {
    let Party { addr: _, workload, namespace, identity, owner: _ } = source;
    address("src.addr", source, put);
    text("src.workload", workload.as_deref(), put);
    text("src.namespace", namespace.as_deref(), put);
    text("src.identity", identity.as_deref(), put);
}

/// Without the address, which the service follows.
fn each_of_destination<'a>(destination: &'a Party, put: &mut impl FnMut(&'static str, Field<'a>)) {
    let Party { addr: _, workload, namespace, identity, owner: _ } = destination;
    text("dst.workload", workload.as_deref(), put);
    text("dst.namespace", namespace.as_deref(), put);
    text("dst.identity", identity.as_deref(), put);
}

/// Shows the fields one by one.
pub(super) fn each(entry: &impl Fields, mut see: impl FnMut(&'static str, FieldValue<'_>)) {
    entry.each(|name, field| {
        see(
            name,
            match field {
                Field::Address(value) => FieldValue::Text(value.to_string().into()),
                Field::Text(value) | Field::Authority(value) => FieldValue::Text(value.into()),
                Field::Shown(value) => FieldValue::Text(value.to_string().into()),
                Field::Number(value) => FieldValue::Number(value),
                Field::Milliseconds(value) => FieldValue::Text(format!("{value}ms").into()),
            },
        );
    });
}

/// `time<TAB>level<TAB>access<TAB>name=value<TAB>…`.
pub(super) fn tab(entry: &impl Fields, time: SystemTime, line: &mut Vec<u8>) {
    put_timestamp(line, time);
    line.push(b'\t');
    line.extend_from_slice(level(entry).as_bytes());
    line.extend_from_slice(b"\taccess");
    entry.each(|name, field| {
        line.push(b'\t');
        line.extend_from_slice(name.as_bytes());
        line.push(b'=');
        match field {
            Field::Address(value) => put_address(line, value),
            Field::Authority(value) if value.bytes().all(|byte| byte.is_ascii_graphic()) => {
                line.extend_from_slice(value.as_bytes());
            }
            Field::Text(value) | Field::Authority(value) => put_quoted(line, value),
            Field::Shown(value) => put_shown(line, value, put_quoted),
            Field::Number(value) => put_number(line, value),
            Field::Milliseconds(value) => put_milliseconds(line, value),
        }
    });
    line.push(b'\n');
}

/// One object, with `time`, `level` and `scope` before the fields.
pub(super) fn json(entry: &impl Fields, time: SystemTime, line: &mut Vec<u8>) {
    line.extend_from_slice(b"{\"time\":\"");
    put_timestamp(line, time);
    line.extend_from_slice(b"\",\"level\":\"");
    line.extend_from_slice(level(entry).as_bytes());
    line.extend_from_slice(b"\",\"scope\":\"access\"");
    entry.each(|name, field| {
        line.extend_from_slice(b",\"");
        line.extend_from_slice(name.as_bytes());
        line.extend_from_slice(b"\":");
        match field {
            Field::Address(value) => {
                line.push(b'"');
                put_address(line, value);
                line.push(b'"');
            }
            Field::Text(value) | Field::Authority(value) => put_json_text(line, value),
            Field::Shown(value) => put_shown(line, value, put_json_text),
            Field::Number(value) => put_number(line, value),
            Field::Milliseconds(value) => put_milliseconds(line, value),
        }
    });
    line.extend_from_slice(b"}\n");
}

fn put(line: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // Writing to a vector cannot fail.
    line.write_fmt(text).ok();
}

/// Whether a text stands in quotes as it is, in both formats.
fn is_plain(text: &[u8]) -> bool {
    text.iter().all(|byte| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\'))
}

fn put_plain(line: &mut Vec<u8>, text: &[u8]) {
    line.push(b'"');
    line.extend_from_slice(text);
    line.push(b'"');
}

/// `Debug` escapes quotes and control characters, so a value cannot forge a field.
fn put_quoted(line: &mut Vec<u8>, text: &str) {
    match is_plain(text.as_bytes()) {
        true => put_plain(line, text.as_bytes()),
        false => put(line, format_args!("{text:?}")),
    }
}

fn put_json_text(line: &mut Vec<u8>, text: &str) {
    match is_plain(text.as_bytes()) {
        true => put_plain(line, text.as_bytes()),
        // As above.
        false => serde_json::to_writer(line, text).unwrap_or_default(),
    }
}

/// Writes a value's text, quoted by `quote` where it does not stand in quotes as it is.
fn put_shown(line: &mut Vec<u8>, value: &dyn Display, quote: fn(&mut Vec<u8>, &str)) {
    let start = line.len();
    line.push(b'"');
    put(line, format_args!("{value}"));
    if line.get(start + 1..).is_some_and(is_plain) {
        return line.push(b'"');
    }
    line.truncate(start);
    quote(line, &value.to_string());
}

fn put_number(line: &mut Vec<u8>, mut value: u64) {
    // The longest has twenty digits.
    let mut digits = [b'0'; 20];
    let mut first = digits.len();
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
        first -= 1;
        if value == 0 {
            break;
        }
    }
    line.extend_from_slice(digits.get(first..).unwrap_or_default());
}

fn put_milliseconds(line: &mut Vec<u8>, value: u128) {
    line.push(b'"');
    put_number(line, u64::try_from(value).unwrap_or(u64::MAX));
    line.extend_from_slice(b"ms\"");
}

fn put_address(line: &mut Vec<u8>, address: SocketAddr) {
    let IpAddr::V4(ip) = address.ip() else { return put(line, format_args!("{address}")) };
    let [first, rest @ ..] = ip.octets();
    put_number(line, first.into());
    for octet in rest {
        line.push(b'.');
        put_number(line, octet.into());
    }
    line.push(b':');
    put_number(line, address.port().into());
}

/// RFC 3339 with microseconds, in UTC.
fn put_timestamp(line: &mut Vec<u8>, time: SystemTime) {
    let time = OffsetDateTime::from(time);
    let (year, month, day) = time.to_calendar_date();
    let (hour, minute, second, micro) = time.to_hms_micro();
    let small: [(u32, usize, u8); 7] = [
        (u32::try_from(year).unwrap_or_default(), 4, b'-'),
        (u8::from(month).into(), 2, b'-'),
        (day.into(), 2, b'T'),
        (hour.into(), 2, b':'),
        (minute.into(), 2, b':'),
        (second.into(), 2, b'.'),
        (micro, 6, b'Z'),
    ];
    for (mut value, width, after) in small {
        let mut digits = [b'0'; 6];
        for digit in digits.iter_mut().take(width).rev() {
            *digit = b'0' + (value % 10) as u8;
            value /= 10;
        }
        line.extend_from_slice(digits.get(..width).unwrap_or_default());
        line.push(after);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use serde_json::Value;

    use super::super::{Dialled, RequestTexts, Status};
    use super::*;

    fn entry() -> Entry {
        Entry {
            source: Party {
                addr: Some("10.0.0.1:41000".parse().unwrap()),
                workload: Some("sleep-1".into()),
                namespace: Some("default".into()),
                identity: Some("spiffe://cluster.local/ns/default/sa/sleep".into()),
                owner: None,
            },
            destination: Party { addr: Some("10.0.0.2:15008".parse().unwrap()), ..Party::default() },
            hbone_addr: Some("10.0.0.2:9080".into()),
            service: Some("reviews.default.svc.cluster.local".into()),
            dialled: Dialled::default(),
            is_udp: false,
            direction: Direction::Outbound,
            status: Status::Ok,
            bytes_sent: 12,
            bytes_received: 34,
            duration: Duration::from_millis(5),
            error: None,
            was_observed: false,
        }
    }

    fn rendered(format: fn(&Entry, SystemTime, &mut Vec<u8>), entry: &Entry) -> String {
        let mut line = Vec::new();
        format(entry, SystemTime::UNIX_EPOCH + Duration::from_micros(1_500_000), &mut line);
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn a_line_has_the_fields_of_the_contract_in_their_order() {
        assert_eq!(
            rendered(tab, &entry()),
            concat!(
                "1970-01-01T00:00:01.500000Z\tinfo\taccess\tsrc.addr=10.0.0.1:41000\tsrc.workload=\"sleep-1\"\t",
                "src.namespace=\"default\"\tsrc.identity=\"spiffe://cluster.local/ns/default/sa/sleep\"\t",
                "dst.addr=10.0.0.2:15008\tdst.hbone_addr=10.0.0.2:9080\t",
                "dst.service=\"reviews.default.svc.cluster.local\"\tdirection=\"outbound\"\tbytes_sent=12\t",
                "bytes_recv=34\tduration=\"5ms\"\n"
            )
        );
    }

    #[test]
    fn a_json_line_parses_and_says_the_same() {
        let failed = Entry { error: Some("denied by policy \"a\"\n".into()), ..entry() };
        let line = rendered(json, &failed);
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["level"], "error");
        assert_eq!(value["scope"], "access");
        assert_eq!(value["src.addr"], "10.0.0.1:41000");
        assert_eq!(value["bytes_recv"], 34);
        assert_eq!(value["error"], "denied by policy \"a\"\n");
        assert_eq!(line.lines().count(), 1);
    }

    fn request(authority: &str, path: &str) -> RequestEntry {
        RequestEntry {
            source: entry().source.into(),
            destination: entry().destination.into(),
            service: entry().service,
            dialled: Dialled::default().into(),
            status: Status::Ok,
            protocol: "HTTP/1.1",
            method: http::Method::GET,
            texts: RequestTexts::new(authority, path, Some("7"), None),
            code: 200,
            grpc_status: Some(0),
            flags: "-",
            route: Some(Arc::new("HTTPRoute/shop/\"web\"")),
            audited_by: None,
            attempts: 1,
            bytes_sent: 10_000_000_000,
            bytes_received: 0,
            duration: Duration::from_millis(120),
            error: None,
            was_observed: false,
        }
    }

    #[test]
    fn a_request_has_the_same_fields_in_both_formats() {
        let entry = request("web:80", "/a b/\u{e9}\\");
        let (mut line, mut object) = (Vec::new(), Vec::new());
        tab(&entry, SystemTime::UNIX_EPOCH, &mut line);
        json(&entry, SystemTime::UNIX_EPOCH, &mut object);
        assert_eq!(
            String::from_utf8(line).unwrap(),
            concat!(
                "1970-01-01T00:00:00.000000Z\tinfo\taccess\tsrc.addr=10.0.0.1:41000\tsrc.workload=\"sleep-1\"\t",
                "src.namespace=\"default\"\tsrc.identity=\"spiffe://cluster.local/ns/default/sa/sleep\"\t",
                "dst.addr=10.0.0.2:15008\tdst.service=\"reviews.default.svc.cluster.local\"\t",
                "protocol=\"HTTP/1.1\"\tmethod=\"GET\"\tauthority=\"web:80\"\tpath=\"/a b/\u{e9}\\\\\"\t",
                "response_code=200\tgrpc_status=0\tresponse_flags=\"-\"\troute=\"HTTPRoute/shop/\\\"web\\\"\"\t",
                "attempts=1\trequest_id=\"7\"\tbytes_sent=10000000000\tbytes_recv=0\tduration=\"120ms\"\n"
            )
        );
        let object: Value = serde_json::from_slice(&object).unwrap();
        assert_eq!(
            (&object["path"], &object["bytes_sent"]),
            (&"/a b/\u{e9}\\".into(), &10_000_000_000_u64.into())
        );
        assert_eq!(object["route"], "HTTPRoute/shop/\"web\"");
    }

    #[test]
    fn times_numbers_and_addresses_are_written_as_their_types_show_them() {
        for (seconds, micros, text) in [
            (0, 0, "1970-01-01T00:00:00.000000Z"),
            (1_709_210_096, 7, "2024-02-29T12:34:56.000007Z"),
            (4_102_444_799, 999_999, "2099-12-31T23:59:59.999999Z"),
        ] {
            let mut line = Vec::new();
            put_timestamp(
                &mut line,
                SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_micros(micros),
            );
            assert_eq!(String::from_utf8(line).unwrap(), text);
        }
        for number in [0, 9, 10, 4096, u64::MAX] {
            let mut line = Vec::new();
            put_number(&mut line, number);
            assert_eq!(String::from_utf8(line).unwrap(), number.to_string());
        }
        for text in ["0.0.0.0:0", "10.20.30.255:65535", "[2001:db8::1]:80", "[::ffff:10.0.0.1]:80"] {
            let mut line = Vec::new();
            put_address(&mut line, text.parse().unwrap());
            assert_eq!(String::from_utf8(line).unwrap(), text);
        }
    }

    #[test]
    fn a_hostile_value_cannot_forge_a_field_or_a_line() {
        let hostile = Entry {
            hbone_addr: Some("evil\tbytes_sent=9\n".into()),
            error: Some("a\"\tdirection=\"inbound\"\n2026 info access".into()),
            ..entry()
        };
        let line = rendered(tab, &hostile);
        assert_eq!(line.lines().count(), 1);
        assert_eq!(line.split('\t').filter(|field| field.starts_with("bytes_sent=")).count(), 1);
        assert_eq!(line.split('\t').filter(|field| field.starts_with("direction=")).count(), 1);
    }
}
