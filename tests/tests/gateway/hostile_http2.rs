//! Hostile frames and fields of HTTP/2 from outside the mesh, each in the clear and inside TLS.

use ambit_tests::beds::Trials;
use ambit_tests::frames::{Outcome, block, frame, kind};

use crate::bed::Gateways;
use crate::edge::{BOTH, Edge};

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("fields of HTTP/2 that HTTP/1 would read otherwise reach no server", async |bed| {
        downgraded(bed).await;
    });
    trials.add("floods of frames from outside end their connection", async |bed| floods(bed).await);
}

/// RFC 9113 §7.
const PROTOCOL_ERROR: u32 = 1;

/// What is well formed for the frames of HTTP/2 and means something else in the lines of HTTP/1.
async fn downgraded(bed: &Gateways) {
    let edge = Edge::start(bed, "downgraded").await;
    let plain: [(&[u8], &[u8]); 4] =
        [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"a")];
    type Fields<'a> = Vec<(&'a [u8], &'a [u8])>;
    let with = |field: (&'static [u8], &'static [u8])| -> Fields<'static> {
        plain.iter().copied().chain([field]).collect()
    };
    let instead = |name: &[u8], value: &'static [u8]| -> Fields<'static> {
        plain.iter().map(|(known, own)| (*known, if *known == name { value } else { *own })).collect()
    };
    let mut wrong = Vec::new();
    for over in BOTH {
        let mut try_one = async |fields: Fields<'_>| {
            let mut frames = edge.frames(over).await;
            let sent = frames.request(1, &fields, true).await;
            let outcome = match sent {
                Ok(()) => frames.outcome(1).await,
                Err(_) => Outcome::Closed,
            };
            let is_refused = matches!(
                outcome,
                Outcome::Reset(PROTOCOL_ERROR)
                    | Outcome::GoAway(_)
                    | Outcome::Status(400)
                    | Outcome::OtherStatus
            );
            let got = edge.got();
            if !is_refused || !got.is_empty() {
                let shown: Vec<_> = fields
                    .iter()
                    .map(|(name, value)| (name.escape_ascii().to_string(), value.escape_ascii().to_string()))
                    .collect();
                wrong.push((over, shown, outcome, got));
            }
        };
        for value in [
            &b"a\r\nhost: b"[..],
            b"a\nb",
            b"a\rb",
            b"a\0b",
            b"a\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n",
        ] {
            try_one(with((b"x", value))).await;
            for pseudo in [&b":method"[..], b":path", b":authority", b":scheme"] {
                try_one(instead(pseudo, value)).await;
            }
        }
        for name in [&b"x: y"[..], b"x y", b"x\r\ny", b"x\0", b"X", b"", b"x:", b":x", b"transfer-encoding"] {
            try_one(with((name, b"chunked"))).await;
        }
        for (name, value) in [
            (&b":path"[..], &b""[..]),
            (b":path", b"a"),
            (b":path", b"/.."),
            (b":path", b"/ HTTP/1.1\r\nx: y"),
            (b":path", b"/a b"),
            (b":path", b"/..%2fa"),
            (b":path", b"*"),
            (b":authority", b"a b"),
            (b":authority", b"user@a"),
            (b":authority", b"a/b"),
            (b":authority", b"a:b"),
            (b":method", b"GET / HTTP/1.1"),
            (b":method", b"CONNECT"),
            (b":scheme", b"http://a/?"),
        ] {
            try_one(instead(name, value)).await;
        }
        for field in [
            (&b"connection"[..], &b"close"[..]),
            (b"keep-alive", b"1"),
            (b"proxy-connection", b"a"),
            (b"upgrade", b"h2c"),
            (b"te", b"gzip"),
            (b"host", b"b"),
            (b"content-length", b"1"),
            (b"content-length", b"-1"),
            (b":path", b"/b"),
        ] {
            try_one(with(field)).await;
        }
        // Extended CONNECT, with a protocol that HTTP/1 would read as lines, or as HTTP.
        let connect = |protocol: &'static [u8]| -> Fields<'static> {
            instead(b":method", b"CONNECT").into_iter().chain([(&b":protocol"[..], protocol)]).collect()
        };
        for protocol in [&b"a\r\nb: c"[..], b"h2c", b"websocket, h2c", b"TLS/1.0"] {
            try_one(connect(protocol)).await;
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    edge.serves().await;
    // A body that is longer or shorter than it says.
    for over in BOTH {
        for body in [&b"ab"[..], b"abcd"] {
            let mut frames = edge.frames(over).await;
            let fields: Fields<'_> = instead(b":method", b"POST")
                .into_iter()
                .chain([(&b"content-length"[..], &b"3"[..])])
                .collect();
            frames.request(1, &fields, false).await.unwrap();
            frames.write(&frame(kind::DATA, 1, 1, body)).await.unwrap();
            let outcome = frames.outcome(1).await;
            assert_ne!(outcome, Outcome::Status(200), "{over:?} {body:?}");
            assert_eq!(edge.got(), Vec::<String>::new(), "{over:?} {body:?}");
        }
    }
}

async fn floods(bed: &Gateways) {
    let edge = Edge::start(bed, "floods").await;
    let head: [(&[u8], &[u8]); 4] =
        [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"a")];
    let head = block(&head);
    let reset = |turn: u32| {
        let stream = 1 + 2 * turn;
        let mut bytes = frame(kind::HEADERS, 4, stream, &head);
        bytes.extend(frame(kind::RST_STREAM, 0, stream, &[0, 0, 0, 8]));
        bytes
    };
    // CVE-2025-8671: the server is made to reset by windows that are none.
    let provoked = |turn: u32| {
        let stream = 1 + 2 * turn;
        let mut bytes = frame(kind::HEADERS, 4, stream, &head);
        bytes.extend(frame(kind::WINDOW_UPDATE, 0, stream, &[0; 4]));
        bytes
    };
    let field = block(&[(&b"x"[..], &b"y"[..])]).repeat(200);
    let begun = frame(kind::HEADERS, 0, 1, &head);
    for over in BOTH {
        assert!(
            edge.frames(over).await.flood_with(reset, 100_000).await,
            "{over:?}: 100,000 resets were taken"
        );
        assert!(
            edge.frames(over).await.flood_with(provoked, 100_000).await,
            "{over:?}: 100,000 faults were taken"
        );
        let mut frames = edge.frames(over).await;
        frames.write(&begun).await.unwrap();
        let goes_on = frame(kind::CONTINUATION, 0, 1, &field);
        assert!(frames.flood(&goes_on, 20_000).await, "{over:?}: 20 MB of one header block were taken");
        let mut frames = edge.frames(over).await;
        frames.write(&frame(kind::HEADERS, 0, 1, &head)).await.unwrap();
        let empty = frame(kind::CONTINUATION, 0, 1, &[]);
        assert!(frames.flood(&empty, 2_000_000).await, "{over:?}: 2,000,000 empty frames were taken");
        edge.serves().await;
    }
}
