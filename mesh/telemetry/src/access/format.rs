//! Renders entries: tab-separated for people, JSON for machines. Pure.

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::SystemTime;

use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use super::{Direction, Entry, FieldValue, Party, RequestEntry};

/// RFC 3339 with microseconds, in UTC.
const TIME: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");

/// A field's value: how it is written depends on the format.
pub(super) enum Field<'a> {
    Address(SocketAddr),
    /// Names and reasons from elsewhere; quoted and escaped.
    Text(&'a str),
    /// An authority; holds no spaces, but comes from a peer.
    Authority(&'a str),
    Number(u64),
    Milliseconds(u128),
}

/// What a line says, whatever it is of.
pub(super) trait Fields {
    /// Whether it reports a failure.
    fn has_failed(&self) -> bool;
    /// The fields in the order of the contract; those that are not known are left out.
    fn fields(&self) -> impl Iterator<Item = (&'static str, Field<'_>)>;
}

fn level(entry: &impl Fields) -> &'static str {
    if entry.has_failed() { "error" } else { "info" }
}

fn timestamp(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(TIME).unwrap_or_default()
}

impl Fields for Entry {
    fn has_failed(&self) -> bool {
        self.error.is_some()
    }

    fn fields(&self) -> impl Iterator<Item = (&'static str, Field<'_>)> {
        fields(self)
    }
}

impl Fields for RequestEntry {
    fn has_failed(&self) -> bool {
        self.error.is_some()
    }

    fn fields(&self) -> impl Iterator<Item = (&'static str, Field<'_>)> {
        let RequestEntry {
            source,
            destination,
            service,
            dialled: _,
            status: _,
            protocol,
            method,
            authority,
            path,
            code,
            grpc_status,
            flags,
            route,
            audited_by,
            attempts,
            request_id,
            user_agent,
            bytes_sent,
            bytes_received,
            duration,
            error,
            was_observed: _,
        } = self;
        [
            ("src.addr", source.addr.map(Field::Address)),
            ("src.workload", source.workload.as_deref().map(Field::Text)),
            ("src.namespace", source.namespace.as_deref().map(Field::Text)),
            ("src.identity", source.identity.as_deref().map(Field::Text)),
            ("dst.addr", destination.addr.map(Field::Address)),
            ("dst.service", service.as_deref().map(Field::Text)),
            ("dst.workload", destination.workload.as_deref().map(Field::Text)),
            ("dst.namespace", destination.namespace.as_deref().map(Field::Text)),
            ("dst.identity", destination.identity.as_deref().map(Field::Text)),
            ("protocol", Some(Field::Text(protocol))),
            ("method", Some(Field::Text(method))),
            ("authority", Some(Field::Text(authority))),
            ("path", Some(Field::Text(path))),
            ("response_code", Some(Field::Number(u64::from(*code)))),
            ("grpc_status", grpc_status.map(|status| Field::Number(u64::from(status)))),
            ("response_flags", Some(Field::Text(flags))),
            ("route", route.as_deref().map(Field::Text)),
            ("audited_by", audited_by.as_deref().map(Field::Text)),
            ("attempts", Some(Field::Number(u64::from(*attempts)))),
            ("request_id", request_id.as_deref().map(Field::Text)),
            ("user_agent", user_agent.as_deref().map(Field::Text)),
            ("bytes_sent", Some(Field::Number(*bytes_sent))),
            ("bytes_recv", Some(Field::Number(*bytes_received))),
            ("duration", Some(Field::Milliseconds(duration.as_millis()))),
            ("error", error.as_deref().map(Field::Text)),
        ]
        .into_iter()
        .filter_map(|(name, field)| Some((name, field?)))
    }
}

/// The known fields, in the order of the observability contract.
fn fields(entry: &Entry) -> impl Iterator<Item = (&'static str, Field<'_>)> {
    let Entry {
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
    } = entry;
    let Party { addr: source_addr, workload, namespace, identity, owner: _ } = source;
    let Party {
        addr: destination_addr,
        workload: destination_workload,
        namespace: destination_namespace,
        identity: destination_identity,
        owner: _,
    } = destination;
    let direction = match direction {
        Direction::Inbound => "inbound",
        Direction::Outbound => "outbound",
    };
    [
        ("src.addr", source_addr.map(Field::Address)),
        ("src.workload", workload.as_deref().map(Field::Text)),
        ("src.namespace", namespace.as_deref().map(Field::Text)),
        ("src.identity", identity.as_deref().map(Field::Text)),
        ("dst.addr", destination_addr.map(Field::Address)),
        ("dst.hbone_addr", hbone_addr.as_deref().map(Field::Authority)),
        ("dst.service", service.as_deref().map(Field::Text)),
        ("dst.workload", destination_workload.as_deref().map(Field::Text)),
        ("dst.namespace", destination_namespace.as_deref().map(Field::Text)),
        ("dst.identity", destination_identity.as_deref().map(Field::Text)),
        ("direction", Some(Field::Text(direction))),
        ("protocol", is_udp.then_some(Field::Text("udp"))),
        ("bytes_sent", Some(Field::Number(*bytes_sent))),
        ("bytes_recv", Some(Field::Number(*bytes_received))),
        ("duration", Some(Field::Milliseconds(duration.as_millis()))),
        ("error", error.as_deref().map(Field::Text)),
    ]
    .into_iter()
    .filter_map(|(name, field)| Some((name, field?)))
}

/// Shows the fields one by one.
pub(super) fn each(entry: &impl Fields, see: &mut impl FnMut(&'static str, FieldValue<'_>)) {
    for (name, field) in entry.fields() {
        see(
            name,
            match field {
                Field::Address(value) => FieldValue::Text(value.to_string().into()),
                Field::Text(value) | Field::Authority(value) => FieldValue::Text(value.into()),
                Field::Number(value) => FieldValue::Number(value),
                Field::Milliseconds(value) => FieldValue::Text(format!("{value}ms").into()),
            },
        );
    }
}

/// `time<TAB>level<TAB>access<TAB>name=value<TAB>…`.
pub(super) fn tab(entry: &impl Fields, time: SystemTime, line: &mut Vec<u8>) {
    put(line, format_args!("{}\t{}\taccess", timestamp(time), level(entry)));
    for (name, field) in entry.fields() {
        match field {
            Field::Address(value) => put(line, format_args!("\t{name}={value}")),
            Field::Authority(value) if value.bytes().all(|byte| byte.is_ascii_graphic()) => {
                put(line, format_args!("\t{name}={value}"));
            }
            // `Debug` escapes quotes and control characters, so a value cannot forge a field.
            Field::Text(value) | Field::Authority(value) => put(line, format_args!("\t{name}={value:?}")),
            Field::Number(value) => put(line, format_args!("\t{name}={value}")),
            Field::Milliseconds(value) => put(line, format_args!("\t{name}=\"{value}ms\"")),
        }
    }
    line.push(b'\n');
}

/// One object, with `time`, `level` and `scope` before the fields.
pub(super) fn json(entry: &impl Fields, time: SystemTime, line: &mut Vec<u8>) {
    let quoted = |text: &str| Value::from(text).to_string();
    let head = (timestamp(time), level(entry));
    put(line, format_args!(r#"{{"time":"{}","level":"{}","scope":"access""#, head.0, head.1));
    for (name, field) in entry.fields() {
        match field {
            Field::Address(value) => put(line, format_args!(r#","{name}":"{value}""#)),
            Field::Text(value) | Field::Authority(value) => {
                put(line, format_args!(r#","{name}":{}"#, quoted(value)));
            }
            Field::Number(value) => put(line, format_args!(r#","{name}":{value}"#)),
            Field::Milliseconds(value) => put(line, format_args!(r#","{name}":"{value}ms""#)),
        }
    }
    line.extend_from_slice(b"}\n");
}

fn put(line: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // Writing to a vector cannot fail.
    line.write_fmt(text).ok();
}

#[cfg(test)]
mod tests {
    use super::super::{Dialled, Status};
    use super::*;
    use std::time::Duration;

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
