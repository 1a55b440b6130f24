//! Netlink messages of nftables: batches that change tables, dumps that list them.

use ambit_net::netlink::{self, Attribute, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, Request, find};

use super::expression;
use super::rule::{Chain, Rule, Table};

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DEL_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;

pub(super) const TABLE_NAME: u16 = 1;
const TABLE_FLAGS: u16 = 2;
/// `NFT_TABLE_F_DORMANT`.
const TABLE_DORMANT: u32 = 1;
pub(super) const CHAIN_TABLE: u16 = 1;
pub(super) const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
pub(super) const RULE_TABLE: u16 = 1;
pub(super) const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
/// `NFTNL_UDATA_RULE_COMMENT` of libnftnl: how tools find a rule's comment.
const USERDATA_COMMENT: u8 = 0;
/// `NFTNL_UDATA_COMMENT_MAXLEN` of libnftnl, without the terminator.
const COMMENT_MAX: usize = 127;
const POLICY_ACCEPT: u32 = 1;

/// Length of the fixed part of all netfilter messages.
pub(super) const FIXED: usize = 4;

/// `struct nfgenmsg`: family, version, resource id in network byte order.
fn fixed(family: i32, resource: u16) -> [u8; FIXED] {
    let [high, low] = resource.to_be_bytes();
    [family as u8, 0, high, low]
}

/// Messages that take effect together or not at all.
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// Sequence number of the message that opens the batch.
    first: u32,
    next: u32,
    /// The last change, which is not encoded yet: it is the one that is to be acknowledged.
    last: Option<(Request, Vec<Attribute>)>,
}

/// A batch as it is sent.
pub(super) struct Encoded {
    pub(super) bytes: Vec<u8>,
    /// Sequence number of the message that opens the batch.
    pub(super) first: u32,
    /// Sequence number of the change that is acknowledged.
    pub(super) last: u32,
}

impl Batch {
    pub(super) fn begin(sequence: u32) -> Self {
        let mut batch = Self { bytes: Vec::new(), first: sequence, next: sequence, last: None };
        batch.push_boundary(BATCH_BEGIN);
        batch
    }

    /// Replaces the table: made if missing, so that deleting it cannot fail, deleted, made anew.
    pub(super) fn replace(&mut self, table: &Table) {
        let name = || vec![Attribute::string(TABLE_NAME, &table.name)];
        self.push(NEW_TABLE, NLM_F_CREATE, name());
        self.push(DEL_TABLE, 0, name());
        self.push(NEW_TABLE, NLM_F_CREATE, name());
        for chain in &table.chains {
            self.push(NEW_CHAIN, NLM_F_CREATE, chain_attributes(&table.name, chain));
        }
        for chain in &table.chains {
            for rule in &chain.rules {
                let attributes = rule_attributes(&table.name, &chain.name, rule);
                self.push(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, attributes);
            }
        }
    }

    pub(super) fn delete(&mut self, table: &str) {
        self.push(DEL_TABLE, 0, vec![Attribute::string(TABLE_NAME, table)]);
    }

    fn push(&mut self, kind: u16, flags: u16, attributes: Vec<Attribute>) {
        self.flush(0);
        let request = Request { kind: SUBSYSTEM << 8 | kind, flags, sequence: self.next };
        self.next = self.next.wrapping_add(1);
        self.last = Some((request, attributes));
    }

    fn flush(&mut self, flags: u16) -> Option<u32> {
        let (request, attributes) = self.last.take()?;
        let request = Request { flags: request.flags | flags, ..request };
        request.push(&mut self.bytes, &fixed(libc::NFPROTO_INET, 0), &attributes);
        Some(request.sequence)
    }

    fn push_boundary(&mut self, kind: u16) {
        let request = Request { kind, flags: 0, sequence: self.next };
        self.next = self.next.wrapping_add(1);
        request.push(&mut self.bytes, &fixed(libc::AF_UNSPEC, SUBSYSTEM), &[]);
    }

    /// Closes the batch. Only its last change is acknowledged: errors of the others are reported anyway,
    /// and before that.
    pub(super) fn end(mut self) -> Encoded {
        let last = self.flush(NLM_F_ACK).unwrap_or(self.first);
        self.push_boundary(BATCH_END);
        Encoded { bytes: self.bytes, first: self.first, last }
    }
}

impl Encoded {
    /// The first sequence number after the batch.
    pub(super) fn next_sequence(&self) -> u32 {
        self.last.wrapping_add(2)
    }
}

/// What is to be listed.
#[derive(Clone, Copy)]
pub(super) enum Listed {
    Tables,
    Chains,
    Rules,
}

/// A request for all objects of a kind. The kernel filters rules by table; chains it does not.
pub(super) fn dump(what: Listed, table: Option<&str>, sequence: u32) -> Vec<u8> {
    let kind = match what {
        Listed::Tables => GET_TABLE,
        Listed::Chains => GET_CHAIN,
        Listed::Rules => GET_RULE,
    };
    let filter: Vec<Attribute> = table.map(|name| Attribute::string(TABLE_NAME, name)).into_iter().collect();
    let request = Request { kind: SUBSYSTEM << 8 | kind, flags: NLM_F_DUMP, sequence };
    request.encode(&fixed(libc::NFPROTO_INET, 0), &filter)
}

/// The attributes of a chain, which it is made from and compared by.
pub(super) fn chain_attributes(table: &str, chain: &Chain) -> Vec<Attribute> {
    let mut attributes =
        vec![Attribute::string(CHAIN_TABLE, table), Attribute::string(CHAIN_NAME, &chain.name)];
    if let Some(hook) = &chain.hook {
        attributes.push(Attribute::tree(
            CHAIN_HOOK,
            vec![Attribute::number(1, hook.point.number()), Attribute::bytes(2, hook.priority.to_be_bytes())],
        ));
        attributes.push(Attribute::number(CHAIN_POLICY, POLICY_ACCEPT));
        attributes.push(Attribute::string(CHAIN_TYPE, hook.kind.name()));
    }
    attributes
}

/// The attributes of a rule, which it is made from and compared by.
pub(super) fn rule_attributes(table: &str, chain: &str, rule: &Rule) -> Vec<Attribute> {
    let mut attributes = vec![
        Attribute::string(RULE_TABLE, table),
        Attribute::string(RULE_CHAIN, chain),
        Attribute::tree(RULE_EXPRESSIONS, expression::render(rule)),
    ];
    if !rule.comment.is_empty() {
        attributes.push(Attribute::bytes(RULE_USERDATA, comment(&rule.comment)));
    }
    attributes
}

/// Whether a table's chains are detached from their hooks.
pub(super) fn is_dormant(table: &[u8]) -> bool {
    let flags = find(table, TABLE_FLAGS).and_then(|flags| flags.try_into().ok());
    flags.is_some_and(|flags| u32::from_be_bytes(flags) & TABLE_DORMANT != 0)
}

/// The number of expressions of a rule; with [`rule_attributes`] covered, it makes two rules equal.
pub(super) fn expressions(rule: &[u8]) -> usize {
    find(rule, RULE_EXPRESSIONS).map_or(0, |list| netlink::attributes(list).count())
}

fn comment(text: &str) -> Vec<u8> {
    let mut end = text.len().min(COMMENT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = text.as_bytes().get(..end).unwrap_or_default();
    let mut bytes = vec![USERDATA_COMMENT, text.len() as u8 + 1];
    bytes.extend_from_slice(text);
    bytes.push(0);
    bytes
}
