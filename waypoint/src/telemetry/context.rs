//! The trace that a request belongs to, as its headers carry it: W3C Trace Context, and B3 in its two forms. Pure.

use ambit_hbone::TraceParent;
use http::header::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT_ID: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// Bit 0 of the flags of a trace: it is sampled.
const SAMPLED: u8 = 1;

/// What the headers of a request say of its trace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Context {
    /// Trace and span that the request belongs to.
    pub parent: Option<Parent>,
    /// Whether the trace is recorded; `None` where nobody has decided that.
    pub sampled: Option<bool>,
}

/// A span of somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    /// Its trace. Never zero.
    pub trace_id: u128,
    /// Itself. Never zero.
    pub span_id: u64,
}

impl Context {
    /// Reads the headers. `traceparent` comes before the two forms of B3.
    pub fn read(headers: &HeaderMap) -> Self {
        let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        if let Some(trace) = text(&TRACEPARENT).and_then(TraceParent::parse) {
            let parent = Parent { trace_id: trace.trace_id, span_id: trace.parent_id };
            return Self { parent: Some(parent), sampled: Some(trace.flags & SAMPLED != 0) };
        }
        if let Some(single) = text(&B3) {
            return of_single(single);
        }
        let sampled = match (text(&B3_FLAGS), text(&B3_SAMPLED)) {
            // A debug trace is sampled.
            (Some("1"), _) | (_, Some("1" | "true")) => Some(true),
            (_, Some("0" | "false")) => Some(false),
            _ => None,
        };
        let parent = text(&B3_TRACE_ID).zip(text(&B3_SPAN_ID)).and_then(|(trace, span)| parent(trace, span));
        Self { parent, sampled }
    }
}

/// `<trace>-<span>[-<sampled>[-<parent>]]`, or the decision alone.
fn of_single(text: &str) -> Context {
    let decision = |text: &str| match text {
        "1" | "d" => Some(true),
        "0" => Some(false),
        _ => None,
    };
    let mut parts = text.split('-');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(alone), None, _) => Context { parent: None, sampled: decision(alone) },
        (Some(trace), Some(span), sampled) => {
            let parent = parent(trace, span);
            // What can't be read decides nothing either.
            Context { parent, sampled: sampled.and_then(decision).filter(|_| parent.is_some()) }
        }
        (None, ..) => Context::default(),
    }
}

fn parent(trace: &str, span: &str) -> Option<Parent> {
    let is_hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !matches!(trace.len(), 16 | 32) || span.len() != 16 || !is_hex(trace) || !is_hex(span) {
        return None;
    }
    let trace_id = u128::from_str_radix(trace, 16).ok()?;
    let span_id = u64::from_str_radix(span, 16).ok()?;
    (trace_id != 0 && span_id != 0).then_some(Parent { trace_id, span_id })
}

/// The vendors' part of the context.
pub fn state(headers: &HeaderMap) -> &str {
    headers.get(TRACESTATE).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// Makes the sampled span `span` of `trace_id` the parent of what the request is sent to: in `traceparent`, and in those forms of B3
/// that the request came with. `above` is the span above that one.
pub fn write(headers: &mut HeaderMap, trace_id: u128, span: u64, above: u64) {
    let trace = TraceParent { trace_id, parent_id: span, flags: SAMPLED };
    // A trace that came by B3 alone has no state of W3C's vendors that is its own.
    if let Some(value) = trace.header() {
        headers.insert(TRACEPARENT, value);
    }
    // B3 has ids of 64 bits too, which stay as short as they were.
    let width = if trace_id > u128::from(u64::MAX) { 32 } else { 16 };
    if headers.contains_key(B3) {
        set(headers, B3, &format!("{trace_id:0width$x}-{span:016x}-1-{above:016x}"));
    }
    if headers.contains_key(B3_TRACE_ID) {
        set(headers, B3_TRACE_ID, &format!("{trace_id:0width$x}"));
        set(headers, B3_SPAN_ID, &format!("{span:016x}"));
        set(headers, B3_PARENT_ID, &format!("{above:016x}"));
        set(headers, B3_SAMPLED, "1");
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    if let Ok(value) = HeaderValue::from_str(text) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn headers(fields: &[(&'static str, String)]) -> HeaderMap {
        let field = |(name, value): &(&'static str, String)| {
            (HeaderName::from_static(name), HeaderValue::try_from(value).unwrap())
        };
        fields.iter().map(field).collect()
    }

    fn parent() -> Parent {
        Parent { trace_id: 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c, span_id: 0xb7ad_6b71_6920_3331 }
    }

    #[test]
    fn each_form_of_a_context_is_read() {
        let short = Parent { trace_id: 0x8448_eb21_1c80_319c, ..parent() };
        let all = [
            (vec![], None, None),
            (vec![("traceparent", format!("00-{TRACE}-{SPAN}-01"))], Some(parent()), Some(true)),
            (vec![("traceparent", format!("00-{TRACE}-{SPAN}-00"))], Some(parent()), Some(false)),
            (vec![("traceparent", "nonsense".to_owned())], None, None),
            (vec![("b3", format!("{TRACE}-{SPAN}-1"))], Some(parent()), Some(true)),
            (vec![("b3", format!("{TRACE}-{SPAN}-0-{SPAN}"))], Some(parent()), Some(false)),
            (vec![("b3", format!("{TRACE}-{SPAN}-d"))], Some(parent()), Some(true)),
            (vec![("b3", format!("{TRACE}-{SPAN}"))], Some(parent()), None),
            (vec![("b3", format!("{}-{SPAN}-1", &TRACE[16..]))], Some(short), Some(true)),
            (vec![("b3", "0".to_owned())], None, Some(false)),
            (vec![("b3", format!("{TRACE}-xyz-1"))], None, None),
            (vec![("b3", format!("00000000000000000000000000000000-{SPAN}-1"))], None, None),
            (
                vec![("x-b3-traceid", TRACE.to_owned()), ("x-b3-spanid", SPAN.to_owned())],
                Some(parent()),
                None,
            ),
            (
                vec![
                    ("x-b3-traceid", TRACE.to_owned()),
                    ("x-b3-spanid", SPAN.to_owned()),
                    ("x-b3-flags", "1".to_owned()),
                ],
                Some(parent()),
                Some(true),
            ),
            (vec![("x-b3-sampled", "0".to_owned())], None, Some(false)),
            (
                vec![("traceparent", format!("00-{TRACE}-{SPAN}-00")), ("x-b3-sampled", "1".to_owned())],
                Some(parent()),
                Some(false),
            ),
        ];
        for (fields, parent, sampled) in all {
            assert_eq!(Context::read(&headers(&fields)), Context { parent, sampled }, "{fields:?}");
        }
    }

    #[test]
    fn a_context_is_written_in_the_forms_that_it_came_in() {
        let Parent { trace_id, span_id } = parent();
        let mut none = HeaderMap::new();
        write(&mut none, trace_id, 2, span_id);
        assert_eq!(none.len(), 1);
        assert_eq!(none["traceparent"], format!("00-{TRACE}-0000000000000002-01"));
        let mut both = headers(&[
            ("b3", format!("{TRACE}-{SPAN}-1")),
            ("x-b3-traceid", TRACE.to_owned()),
            ("x-b3-spanid", SPAN.to_owned()),
        ]);
        write(&mut both, trace_id, 2, span_id);
        assert_eq!(both["b3"], format!("{TRACE}-0000000000000002-1-{SPAN}"));
        assert_eq!(both["x-b3-spanid"], "0000000000000002");
        assert_eq!(both["x-b3-parentspanid"], SPAN);
        assert_eq!(
            (&both["x-b3-traceid"], &both["x-b3-sampled"]),
            (&TRACE.parse().unwrap(), &"1".parse().unwrap())
        );
        let mut short = headers(&[("b3", format!("{}-{SPAN}-1", &TRACE[16..]))]);
        let context = Context::read(&short);
        write(&mut short, context.parent.unwrap().trace_id, 2, span_id);
        assert_eq!(short["b3"], format!("{}-0000000000000002-1-{SPAN}", &TRACE[16..]));
        assert_eq!(Context::read(&short).sampled, Some(true));
    }
}
