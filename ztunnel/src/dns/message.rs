//! Questions in, answers out, as bytes: decoding, EDNS, and cutting to size. No I/O.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};

use super::resolver::Answer;
use super::wire;

/// RFC 1035 §4.2.1: what every client takes by UDP.
const MIN_UDP: usize = 512;
/// What we send and take by UDP at most; beyond it, TCP. Within the pod nothing is fragmented.
pub const MAX_UDP: usize = 4096;

/// A question that was read.
#[derive(Debug)]
pub struct Question {
    message: Message,
    /// What is asked.
    pub query: Query,
    /// Largest response that the client takes by UDP, in bytes.
    pub udp_limit: usize,
}

/// Why a message is no question.
#[derive(Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// Not worth a response: too short, or a response itself.
    Ignore,
    /// To be answered with this.
    Refuse(Vec<u8>),
}

impl Question {
    /// Reads a message from a client.
    ///
    /// # Errors
    /// [`Unreadable`], with what to answer.
    pub fn read(bytes: &[u8]) -> Result<Self, Unreadable> {
        if bytes.len() < wire::HEADER || wire::is_response(bytes) {
            return Err(Unreadable::Ignore);
        }
        let id = wire::id(bytes).unwrap_or_default();
        let Ok(message) = Message::from_vec(bytes) else {
            return Err(refusal(&Message::error_msg(id, OpCode::Query, ResponseCode::FormErr)));
        };
        if message.metadata.op_code != OpCode::Query {
            return Err(refusal(&Message::error_msg(id, message.metadata.op_code, ResponseCode::NotImp)));
        }
        let [query] = message.queries.as_slice() else {
            return Err(refusal(&Message::error_msg(id, OpCode::Query, ResponseCode::FormErr)));
        };
        let query = query.clone();
        let udp_limit = message.edns.as_ref().map_or(MIN_UDP, |edns| usize::from(edns.max_payload()));
        let question = Self { message, query, udp_limit: udp_limit.clamp(MIN_UDP, MAX_UDP) };
        // RFC 6891 §6.1.3: a version that is not known is answered with ours.
        if question.message.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            return Err(refusal(&question.response(ResponseCode::BADVERS)));
        }
        Ok(question)
    }

    fn response(&self, code: ResponseCode) -> Message {
        let asked = &self.message.metadata;
        let mut response = Message::new(asked.id, MessageType::Response, asked.op_code);
        response.metadata.recursion_desired = asked.recursion_desired;
        response.metadata.checking_disabled = asked.checking_disabled;
        response.metadata.recursion_available = true;
        response.metadata.response_code = code;
        response.add_query(self.query.clone());
        if self.message.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(u16::try_from(MAX_UDP).unwrap_or(u16::MAX)).set_version(0);
            response.set_edns(edns);
        }
        response
    }

    /// The answer in at most `limit` bytes, and whether records were cut off for it.
    pub fn answer(&self, answer: Answer, limit: usize) -> Option<(Vec<u8>, bool)> {
        let mut response = self.response(ResponseCode::NoError);
        response.metadata.authoritative = true;
        let Answer { answers, authorities, additionals } = answer;
        response.answers = answers;
        response.authorities = authorities;
        response.additionals = additionals;
        within(response, limit)
    }

    /// Answers the client that there is none.
    pub fn fail(&self, code: ResponseCode) -> Option<Vec<u8>> {
        self.response(code).to_vec().ok()
    }
}

fn refusal(message: &Message) -> Unreadable {
    message.to_vec().map_or(Unreadable::Ignore, Unreadable::Refuse)
}

/// RFC 2181 §9: additional records go first and silently; then answers, with the flag set.
fn within(mut response: Message, limit: usize) -> Option<(Vec<u8>, bool)> {
    let mut bytes = response.to_vec().ok()?;
    if bytes.len() <= limit {
        return Some((bytes, false));
    }
    response.additionals.clear();
    bytes = response.to_vec().ok()?;
    while bytes.len() > limit {
        response.metadata.truncation = true;
        if response.answers.pop().is_none() {
            response.authorities.clear();
        }
        // Records of one answer are of like size.
        let fitting = response.answers.len() * limit / bytes.len().max(1);
        response.answers.truncate(fitting);
        let empty = response.answers.is_empty() && response.authorities.is_empty();
        bytes = response.to_vec().ok()?;
        if empty {
            break;
        }
    }
    let truncated = response.metadata.truncation;
    (bytes.len() <= limit).then_some((bytes, truncated))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{Name, RData, Record, RecordType};
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn question(payload: Option<u16>) -> Question {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii("db.shop.").unwrap(), RecordType::A));
        if let Some(payload) = payload {
            let mut edns = Edns::new();
            edns.set_max_payload(payload);
            message.set_edns(edns);
        }
        Question::read(&message.to_vec().unwrap()).unwrap()
    }

    fn addresses(count: u32) -> Answer {
        let name = Name::from_ascii("db.shop.").unwrap();
        let record = |number| Record::from_rdata(name.clone(), 30, RData::A(A(Ipv4Addr::from_bits(number))));
        Answer { answers: (0..count).map(record).collect(), ..Answer::default() }
    }

    #[test]
    fn the_udp_size_of_a_client_is_clamped() {
        for (payload, limit) in [(None, 512), (Some(100), 512), (Some(1232), 1232), (Some(u16::MAX), MAX_UDP)]
        {
            assert_eq!(question(payload).udp_limit, limit, "{payload:?}");
        }
    }

    #[test]
    fn a_large_answer_is_cut_to_as_many_records_as_fit_and_says_so() {
        let question = question(None);
        let (bytes, truncated) = question.answer(addresses(1000), 512).unwrap();
        assert!(truncated && bytes.len() <= 512);
        let cut = Message::from_vec(&bytes).unwrap();
        assert!(cut.metadata.truncation);
        assert!(cut.answers.len() > 20, "{} records are left", cut.answers.len());
        let (bytes, truncated) = question.answer(addresses(1000), 65_535).unwrap();
        assert!(!truncated);
        assert_eq!(Message::from_vec(&bytes).unwrap().answers.len(), 1000);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_refused_or_ignored(bytes: Vec<u8>) {
            if let Ok(question) = Question::read(&bytes) {
                prop_assert!(question.answer(addresses(3), 512).is_some_and(|(bytes, _)| bytes.len() <= 512));
            }
        }

        #[test]
        fn a_question_with_garbage_behind_it_causes_no_panic(tail: Vec<u8>, counts: [u8; 6]) {
            let mut bytes = question(Some(1232)).message.to_vec().unwrap();
            bytes.truncate(12 + 9 + 4);
            bytes[6..12].copy_from_slice(&counts);
            bytes.extend(tail);
            if let Err(Unreadable::Refuse(refusal)) = Question::read(&bytes) {
                prop_assert!(Message::from_vec(&refusal).is_ok());
            }
        }
    }
}
