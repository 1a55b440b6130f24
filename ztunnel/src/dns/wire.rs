//! DNS messages as bytes: as much of them as forwarding needs, without decoding what others wrote.
//!
//! RFC 1035 §4.1. Every function takes any bytes and fails softly.

/// Length of the header.
pub const HEADER: usize = 12;
/// Largest message over TCP.
pub const MAX_MESSAGE: usize = 65_535;

/// RFC 1035 §4.1.1: the opcode of a question.
const QUERY: u8 = 0;
const QR: u8 = 0x80;
const TC: u8 = 0x02;

/// The message's id.
pub fn id(message: &[u8]) -> Option<u16> {
    u16_at(message, 0)
}

/// The same message under another id.
pub fn with_id(message: &[u8], id: u16) -> Vec<u8> {
    let mut copy = message.to_vec();
    if let Some(place) = copy.get_mut(..2) {
        place.copy_from_slice(&id.to_be_bytes());
    }
    copy
}

/// Whether the message says that it is a response.
pub fn is_response(message: &[u8]) -> bool {
    message.get(2).is_some_and(|flags| flags & QR != 0)
}

fn opcode(message: &[u8]) -> Option<u8> {
    message.get(2).map(|flags| (flags >> 3) & 0x0f)
}

fn u16_at(message: &[u8], at: usize) -> Option<u16> {
    let bytes = message.get(at..at + 2)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

/// The bytes of the only question: name, type and class. A question's name is never compressed, as
/// nothing stands before it.
pub fn question(message: &[u8]) -> Option<&[u8]> {
    if u16_at(message, 4)? != 1 {
        return None;
    }
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        // RFC 1035 §2.3.4: labels to 63 bytes, names to 255.
        if length > 63 || at - HEADER > 254 {
            return None;
        }
        at += 1 + length;
        if length == 0 {
            break;
        }
    }
    message.get(HEADER..at + 4)
}

/// Whether `response` answers `query`: same id and opcode, a response, same question in any case.
pub fn answers(query: &[u8], response: &[u8]) -> bool {
    let same = id(query) == id(response) && opcode(query) == opcode(response);
    if response.len() < HEADER || !same || !is_response(response) {
        return false;
    }
    // A resolver that could not read the question may leave it out, but only with an error.
    let failed = response.get(3).is_some_and(|flags| flags & 0x0f != 0);
    if u16_at(response, 4) == Some(0) {
        // RFC 2136 §3.8: the answer to an UPDATE may be a header alone.
        return failed || opcode(query) != Some(QUERY);
    }
    match (question(query), question(response)) {
        (Some(asked), Some(answered)) => asked.eq_ignore_ascii_case(answered),
        _ => false,
    }
}

/// A response cut down to header and question, with the flag that makes the client ask by TCP.
pub fn truncated(response: &[u8]) -> Option<Vec<u8>> {
    let question = question(response)?;
    let mut cut = response.get(..HEADER)?.to_vec();
    *cut.get_mut(2)? |= TC;
    cut.get_mut(6..HEADER)?.fill(0);
    cut.extend_from_slice(question);
    Some(cut)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `id`, flags, one question for `a.b` A IN.
    fn message(id: u16, flags: u16, name: &[u8]) -> Vec<u8> {
        let mut bytes = id.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend([0, 1, 0, 0, 0, 0, 0, 0]);
        bytes.extend(name);
        bytes.extend([0, 1, 0, 1]);
        bytes
    }

    #[test]
    fn an_answer_has_the_id_and_the_question_of_its_query() {
        let query = message(7, 0x0100, b"\x01a\x01b\0");
        assert!(answers(&query, &message(7, 0x8180, b"\x01A\x01b\0")));
        assert!(!answers(&query, &message(8, 0x8180, b"\x01a\x01b\0")), "another id");
        assert!(!answers(&query, &message(7, 0x0100, b"\x01a\x01b\0")), "no response");
        assert!(!answers(&query, &message(7, 0x8180, b"\x01a\x01c\0")), "another question");
        assert!(!answers(&query, &message(7, 0x8180, b"\xc0\x0c")), "a pointer to itself");
        assert!(!answers(&query, b"\0\x07\x81"));
    }

    #[test]
    fn an_error_may_leave_the_question_out_but_an_answer_may_not() {
        let query = message(7, 0x0100, b"\x01a\0");
        let mut bare = query[..HEADER].to_vec();
        bare[4..6].fill(0);
        bare[2] = 0x81;
        bare[3] = 0x82;
        assert!(answers(&query, &bare));
        bare[3] = 0x80;
        assert!(!answers(&query, &bare));
    }

    #[test]
    fn the_answer_to_an_update_may_be_a_header_alone() {
        let update = message(7, 0x2800, b"\x01a\0");
        let mut bare = message(7, 0xa800, b"")[..HEADER].to_vec();
        bare[4..6].fill(0);
        assert!(answers(&update, &bare));
        assert!(!answers(&message(7, 0x0100, b"\x01a\0"), &bare), "another opcode");
        bare[0] = 1;
        assert!(!answers(&update, &bare), "another id");
    }

    #[test]
    fn a_cut_response_keeps_header_and_question_only() {
        let mut response = message(7, 0x8180, b"\x01a\0");
        response[7] = 9;
        response.extend([0xff; 900]);
        let cut = truncated(&response).unwrap();
        assert_eq!(cut, message(7, 0x8380, b"\x01a\0"));
    }

    proptest! {
        #[test]
        fn no_bytes_cause_a_panic(query: Vec<u8>, response: Vec<u8>) {
            answers(&query, &response);
            truncated(&response);
            question(&query);
            prop_assert_eq!(with_id(&query, 1).len(), query.len());
        }
    }
}
