//! Lines of the access log, one for each request.

use std::time::{Duration, SystemTime};

use ambit_telemetry::access::{Dialled, Ended, Format, Party, Record, RequestEntry, RequestTexts, Status};
use anyhow::{Context, Result, ensure};
use http::Method;

/// Counted lines.
const CALLS: usize = 1_000;

fn party(name: &str, address: &str) -> Result<Party> {
    Ok(Party {
        addr: Some(address.parse().context("an address")?),
        workload: Some(format!("{name}-7d4b9c-x2x8q").into()),
        namespace: Some("app".into()),
        identity: Some(format!("spiffe://cluster.local/ns/app/sa/{name}").into()),
        owner: Some(name.into()),
    })
}

/// A request's line as text.
pub(crate) fn line() -> Result<()> {
    let entry = RequestEntry {
        source: party("cli", "10.1.2.3:41000")?.into(),
        destination: party("web", "10.1.2.4:8080")?.into(),
        service: Some("web.app.svc.cluster.local".into()),
        dialled: Dialled::default().into(),
        status: Status::Ok,
        protocol: "HTTP/1.1",
        method: Method::GET,
        texts: RequestTexts::new(
            "web.app.svc.cluster.local:80",
            "/team-99/r9999/items/17",
            Some("8a6a9ad2-4ea1-4ba5-9df0-6d5ab1e13ee6"),
            Some("Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
        ),
        code: 200,
        grpc_status: None,
        flags: "-",
        route: Some(std::sync::Arc::new("HTTPRoute/app/web")),
        audited_by: None,
        attempts: 1,
        bytes_sent: 4096,
        bytes_received: 0,
        duration: Duration::from_millis(12),
        error: None,
        was_observed: false,
    };
    let record = Record { ended: Ended::Request(entry), is_open: false, time: SystemTime::UNIX_EPOCH };
    let mut lines = Vec::with_capacity(1 << 20);
    guarded_lines(&record, &mut lines);
    let count = lines.iter().filter(|byte| **byte == b'\n').count();
    ensure!(count == CALLS, "{count} lines");
    Ok(())
}

#[inline(never)]
fn guarded_lines(record: &Record, lines: &mut Vec<u8>) {
    for _ in 0..CALLS {
        record.render(Format::Tab, lines);
    }
}
