//! What a CONNECT says: its head, and each header of it.

use ambit_hbone::{Authority, Baggage, ConnectRequest, Forwarded, TraceParent};
use http::{HeaderName, HeaderValue, Method, Request, Uri};

/// Beyond this a header that grew by being escaped may no longer be read.
const SURELY_READ: usize = 1024;

/// A head as lines: method, target, and headers as `name: value`.
fn head(data: &[u8]) -> Option<http::request::Parts> {
    let mut lines = data.split(|byte| *byte == b'\n');
    let mut request = Request::new(());
    *request.version_mut() = http::Version::HTTP_2;
    *request.method_mut() = Method::from_bytes(lines.next()?).ok()?;
    *request.uri_mut() = Uri::try_from(lines.next()?).ok()?;
    for line in lines {
        let at = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..at]).ok()?;
        let value = HeaderValue::from_bytes(line[at + 1..].trim_ascii()).ok()?;
        request.headers_mut().append(name, value);
    }
    Some(request.into_parts().0)
}

/// What is read of a head is a plain CONNECT to a destination, and is read again as it was when it is sent on.
pub(crate) fn connect(data: &[u8]) {
    let Some(head) = head(data) else { return };
    let Ok(request) = ConnectRequest::from_http(&head) else { return };
    assert_eq!(head.method, Method::CONNECT);
    assert_eq!(head.uri.scheme(), None);
    assert_ne!(request.authority.port(), 0);
    let text = request.authority.to_string();
    assert_eq!(text.parse::<Authority>().as_ref(), Ok(&request.authority));
    let sent = request.to_http().expect("a request that can be sent");
    let again = ConnectRequest::from_http(&sent.into_parts().0).expect("a request that can be read");
    if data.len() < SURELY_READ / 3 {
        assert_eq!(again, request);
    }
}

/// A header's value as the tunnel sees it: visible ASCII, or nothing.
fn value(data: &[u8]) -> Option<String> {
    HeaderValue::from_bytes(data).ok()?.to_str().ok().map(str::to_owned)
}

/// What was read is written as it was meant.
pub(crate) fn baggage(data: &[u8]) {
    let Some(text) = value(data) else { return };
    let read = Baggage::parse(&text);
    assert_eq!(read.header().is_none(), read == Baggage::default());
    let written = read.to_string();
    if written.len() <= 8 * SURELY_READ {
        assert_eq!(Baggage::parse(&written), read);
    }
}

/// What was read is written as it was meant.
pub(crate) fn forwarded(data: &[u8]) {
    let Some(text) = value(data) else { return };
    let Some(read) = Forwarded::parse(&text) else { return };
    let written = read.header().expect("a header").to_str().expect("visible ASCII").to_owned();
    if written.len() <= SURELY_READ {
        assert_eq!(Forwarded::parse(&written), Some(read));
    }
}

/// What was read is written as it was meant.
pub(crate) fn traceparent(data: &[u8]) {
    let Some(text) = value(data) else { return };
    let Some(read) = TraceParent::parse(&text) else { return };
    assert!(read.trace_id != 0 && read.parent_id != 0);
    assert_eq!(TraceParent::parse(&read.to_string()), Some(read));
    assert_eq!(text.get(2..55), read.to_string().get(2..));
}
