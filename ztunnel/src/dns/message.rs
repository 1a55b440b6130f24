//! Questions in, answers out, as bytes: decoding, EDNS, and cutting to size. No I/O.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};

use super::resolver::Answer;
use super::wire;

/// RFC 1035 §4.2.1: what every client takes by UDP.
const MIN_UDP: usize = 512;
/// What we send and take by UDP at most; beyond it, TCP. Within the pod nothing is fragmented.
pub(super) const MAX_UDP: usize = 4096;

/// A question that was read.
#[derive(Debug)]
pub(super) struct Question {
    message: Message,
    pub(super) query: Query,
    /// Largest response that the client takes by UDP, in bytes.
    pub(super) udp_limit: usize,
}

/// Why a message is no question.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// Not worth a response: too short, or a response itself.
    Ignore,
    /// To be answered with this.
    Refuse(Vec<u8>),
}

impl Question {
    /// Reads a message from a client.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, Unreadable> {
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
    pub(super) fn answer(&self, answer: Answer, limit: usize) -> Option<(Vec<u8>, bool)> {
        let mut response = self.response(ResponseCode::NoError);
        response.metadata.authoritative = true;
        let Answer { answers, authorities, additionals } = answer;
        response.answers = answers;
        response.authorities = authorities;
        response.additionals = additionals;
        within(response, limit)
    }

    /// Tells the client that there is no answer.
    pub(super) fn fail(&self, code: ResponseCode) -> Option<Vec<u8>> {
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
