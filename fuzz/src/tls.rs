//! Records of TLS after the handshake: what anybody may send, and what a peer who holds the keys may.

use ambit_tls::{MAX_PLAIN, MAX_SEALED, Message, Opener, Peer, Sealer, complete, read_message};
use rustls::crypto::cipher::{AeadKey, Iv};
use rustls::{ConnectionTrafficSecrets, ContentType};

use crate::pieces;

fn secrets() -> (u64, ConnectionTrafficSecrets) {
    (0, ConnectionTrafficSecrets::Aes256Gcm { key: AeadKey::from([7; 32]), iv: Iv::copy(&[9; 12]) })
}

/// Parts of the input are records in their order: after a zero, as somebody without the keys sends it; else the content of
/// one that is sealed, after its type. What was not sealed is refused, what was is opened as it was meant, either way.
pub(crate) fn record(data: &[u8]) {
    let (mut sealer, mut into, mut in_place) =
        (Sealer::new(secrets()).unwrap(), Opener::new(secrets()).unwrap(), Opener::new(secrets()).unwrap());
    let mut out = vec![0; MAX_SEALED];
    for part in pieces::cut(data) {
        match part.split_first() {
            Some((0, forged)) => {
                if let Ok(Some(length)) = complete(forged) {
                    let mut opener = Opener::new(secrets()).unwrap();
                    assert!(opener.open_into(&forged[..length], &mut out).is_err());
                }
                let mut opener = Opener::new(secrets()).unwrap();
                assert!(opener.open_in_place(&mut forged.to_vec()).is_err());
            }
            Some((&kind, content)) => {
                let content = &content[..content.len().min(MAX_PLAIN)];
                let length = sealer.seal(ContentType::from(kind), content, &mut out).unwrap();
                let mut record = out[..length].to_vec();
                assert_eq!(complete(&record), Ok(Some(length)));
                let opened = into.open_into(&record, &mut out).unwrap();
                assert_eq!((u8::from(opened.kind), &out[..opened.length]), (kind, content));
                assert_eq!(in_place.open_in_place(&mut record), Ok(opened));
                said(opened.kind, content);
            }
            None => {}
        }
    }
}

/// Only what the last byte of its record asks for changes keys, and only application data is data.
fn said(kind: ContentType, content: &[u8]) {
    for peer in [Peer::Client, Peer::Server] {
        match read_message(kind, content, peer) {
            Ok(Message::Data) => assert_eq!(kind, ContentType::ApplicationData),
            Ok(Message::KeyUpdate { requested }) => {
                assert_eq!(kind, ContentType::Handshake);
                assert!(content.ends_with(&[24, 0, 0, 1, u8::from(requested)]));
                assert!(peer == Peer::Server || content.len() == 5);
            }
            Ok(Message::Closed | Message::Alert(_)) => assert_eq!(kind, ContentType::Alert),
            Ok(Message::Nothing) | Err(_) => {}
        }
    }
}
