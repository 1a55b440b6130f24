//! The messages that a peer may send in a record after the handshake. Pure.

use rustls::{AlertDescription, ContentType};

use crate::record::RecordError;

/// Handshake messages that are left (RFC 8446 §4.6).
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
const NOT_REQUESTED: u8 = 0;
const REQUESTED: u8 = 1;
/// Alert levels (RFC 8446 §6).
const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// Which side of the connection the peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// The peer dialled.
    Client,
    /// We dialled the peer.
    Server,
}

/// The meaning of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Bytes for the application.
    Data,
    /// Nothing that needs handling.
    Nothing,
    /// The peer sends no more.
    Closed,
    /// The peer ended the connection with an error.
    Alert(AlertDescription),
    /// The peer's next record uses its next key; with `requested`, ours must do so too.
    KeyUpdate {
        /// Whether the peer asks for an update of our key.
        requested: bool,
    },
}

/// Reads the `content` of an opened record.
///
/// # Errors
///
/// [`RecordError::Unexpected`], [`RecordError::Handshake`].
pub fn read(kind: ContentType, content: &[u8], peer: Peer) -> Result<Message, RecordError> {
    match kind {
        ContentType::ApplicationData if content.is_empty() => Ok(Message::Nothing),
        ContentType::ApplicationData => Ok(Message::Data),
        ContentType::Alert => read_alert(content),
        ContentType::Handshake => read_handshake(content, peer),
        kind => Err(RecordError::Unexpected(kind.into())),
    }
}

fn read_alert(content: &[u8]) -> Result<Message, RecordError> {
    let &[_, description] = content else {
        return Err(RecordError::Unexpected(ContentType::Alert.into()));
    };
    // RFC 8446 §6: the level has no meaning. All but these two end the connection; user_canceled is followed by close_notify.
    Ok(match AlertDescription::from(description) {
        AlertDescription::CloseNotify => Message::Closed,
        AlertDescription::UserCanceled => Message::Nothing,
        other => Message::Alert(other),
    })
}

fn read_handshake(mut content: &[u8], peer: Peer) -> Result<Message, RecordError> {
    // RFC 8446 §5.1: no record of this kind is empty.
    loop {
        let (&[kind, a, b, c], rest) = content.split_first_chunk().ok_or(RecordError::Handshake)?;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        let (message, rest) = rest.split_at_checked(length).ok_or(RecordError::Handshake)?;
        match (kind, message) {
            // Not used: no session outlives the certificate that it was authenticated with.
            (NEW_SESSION_TICKET, _) if peer == Peer::Server => {}
            // RFC 8446 §5.1: nothing may follow a change of keys in one record.
            (KEY_UPDATE, &[request @ (NOT_REQUESTED | REQUESTED)]) if rest.is_empty() => {
                return Ok(Message::KeyUpdate { requested: request == REQUESTED });
            }
            _ => return Err(RecordError::Handshake),
        }
        if rest.is_empty() {
            return Ok(Message::Nothing);
        }
        content = rest;
    }
}

/// A key update that does not request one in return.
pub(super) const fn key_update() -> [u8; 5] {
    [KEY_UPDATE, 0, 0, 1, NOT_REQUESTED]
}

/// An alert; all but `close_notify` are fatal.
pub(super) fn alert(description: AlertDescription) -> [u8; 2] {
    let level = if description == AlertDescription::CloseNotify { WARNING } else { FATAL };
    [level, description.into()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const UPDATE: [u8; 5] = key_update();
    const TICKET: [u8; 6] = [NEW_SESSION_TICKET, 0, 0, 2, 7, 7];

    #[test]
    fn only_tickets_and_key_updates_are_allowed_after_a_handshake() {
        let read = |content: &[&[u8]], peer| read(ContentType::Handshake, &content.concat(), peer);
        let updated = |requested| Ok(Message::KeyUpdate { requested });
        for peer in [Peer::Client, Peer::Server] {
            assert_eq!(read(&[&UPDATE], peer), updated(false));
            assert_eq!(read(&[&[KEY_UPDATE, 0, 0, 1, 1]], peer), updated(true));
            for refused in [
                &[][..],
                &[20, 0, 0, 1, 0],
                &[KEY_UPDATE, 0, 0, 1, 2],
                &[KEY_UPDATE, 0, 0, 2, 0, 0],
                &[KEY_UPDATE, 0, 0, 1],
                &[KEY_UPDATE, 0],
            ] {
                assert_eq!(read(&[refused], peer), Err(RecordError::Handshake), "{refused:?}");
            }
            assert_eq!(read(&[&UPDATE, &UPDATE], peer), Err(RecordError::Handshake));
        }
        assert_eq!(read(&[&TICKET, &TICKET], Peer::Server), Ok(Message::Nothing));
        assert_eq!(read(&[&TICKET, &UPDATE], Peer::Server), updated(false));
        assert_eq!(read(&[&TICKET], Peer::Client), Err(RecordError::Handshake));
    }

    #[test]
    fn every_alert_but_two_ends_the_connection() {
        let read = |content: &[u8]| read(ContentType::Alert, content, Peer::Client);
        assert_eq!(read(&alert(AlertDescription::CloseNotify)), Ok(Message::Closed));
        assert_eq!(read(&[FATAL, 0]), Ok(Message::Closed));
        assert_eq!(read(&[WARNING, 90]), Ok(Message::Nothing));
        assert_eq!(read(&[WARNING, 80]), Ok(Message::Alert(AlertDescription::InternalError)));
        for malformed in [&[][..], &[1], &[1, 0, 0]] {
            assert_eq!(read(malformed), Err(RecordError::Unexpected(21)));
        }
    }
}
