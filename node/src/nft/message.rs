//! Netlink messages of nftables: batches that change tables, dumps that list them.

use super::attribute::{Attribute, encode_all};
use super::expression;
use super::rule::{Chain, Rule, Table};

pub(super) const NLMSG_ERROR: u16 = 2;
pub(super) const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;

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

/// Length of a netlink header.
pub(super) const HEADER: usize = 16;
/// Length of the header that all netfilter messages have after it.
pub(super) const GENERIC: usize = 4;

/// Messages that take effect together or not at all.
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    /// Sequence number of the message that opens the batch.
    pub(super) first: u32,
    /// Sequence number of the last message that is acknowledged.
    pub(super) last: u32,
    next: u32,
    last_at: usize,
}

impl Batch {
    pub(super) fn begin(sequence: u32) -> Self {
        let mut batch =
            Self { bytes: Vec::new(), first: sequence, last: sequence, next: sequence, last_at: 0 };
        batch.push_raw(BATCH_BEGIN, NLM_F_REQUEST, libc::AF_UNSPEC as u8, SUBSYSTEM, &[]);
        batch
    }

    /// Replaces the table: made if missing, so that deleting it cannot fail, deleted, made anew.
    pub(super) fn replace(&mut self, table: &Table) {
        let name = [Attribute::string(TABLE_NAME, &table.name)];
        self.push(NEW_TABLE, NLM_F_CREATE, &name);
        self.push(DEL_TABLE, 0, &name);
        self.push(NEW_TABLE, NLM_F_CREATE, &name);
        for chain in &table.chains {
            self.push(NEW_CHAIN, NLM_F_CREATE, &chain_attributes(&table.name, chain));
        }
        for chain in &table.chains {
            for rule in &chain.rules {
                let attributes = rule_attributes(&table.name, &chain.name, rule);
                self.push(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, &attributes);
            }
        }
    }

    pub(super) fn delete(&mut self, table: &str) {
        self.push(DEL_TABLE, 0, &[Attribute::string(TABLE_NAME, table)]);
    }

    fn push(&mut self, kind: u16, flags: u16, attributes: &[Attribute]) {
        self.last = self.next;
        self.last_at = self.bytes.len();
        let kind = SUBSYSTEM << 8 | kind;
        self.push_raw(kind, NLM_F_REQUEST | flags, libc::NFPROTO_INET as u8, 0, attributes);
    }

    fn push_raw(&mut self, kind: u16, flags: u16, family: u8, resource: u16, attributes: &[Attribute]) {
        push(&mut self.bytes, kind, flags, self.next, family, resource, attributes);
        self.next = self.next.wrapping_add(1);
    }

    /// Closes the batch. Only its last change is acknowledged: errors of the others are told anyway,
    /// and before that.
    pub(super) fn end(&mut self) {
        let at = self.last_at + 6;
        if let Some(flags) = self.bytes.get_mut(at..at + 2) {
            let now = u16::from_ne_bytes([flags[0], flags[1]]);
            flags.copy_from_slice(&(now | NLM_F_ACK).to_ne_bytes());
        }
        self.push_raw(BATCH_END, NLM_F_REQUEST, libc::AF_UNSPEC as u8, SUBSYSTEM, &[]);
    }

    pub(super) fn next_sequence(&self) -> u32 {
        self.next
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
    let mut bytes = Vec::new();
    let flags = NLM_F_REQUEST | NLM_F_DUMP;
    push(&mut bytes, SUBSYSTEM << 8 | kind, flags, sequence, libc::NFPROTO_INET as u8, 0, &filter);
    bytes
}

fn push(
    out: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    resource: u16,
    attributes: &[Attribute],
) {
    let start = out.len();
    out.extend_from_slice(&0_u32.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&sequence.to_ne_bytes());
    out.extend_from_slice(&0_u32.to_ne_bytes());
    // struct nfgenmsg: family, version, resource id in network byte order.
    out.extend_from_slice(&[family, 0]);
    out.extend_from_slice(&resource.to_be_bytes());
    encode_all(attributes, out);
    let len = (out.len() - start) as u32;
    if let Some(field) = out.get_mut(start..start + 4) {
        field.copy_from_slice(&len.to_ne_bytes());
    }
}

/// What makes a chain: also what it is compared by.
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

/// What makes a rule: also what it is compared by.
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
    let flags = super::attribute::find(table, TABLE_FLAGS).and_then(|flags| flags.try_into().ok());
    flags.is_some_and(|flags| u32::from_be_bytes(flags) & TABLE_DORMANT != 0)
}

/// The number of expressions of a rule; with [`rule_attributes`] covered, it makes two rules equal.
pub(super) fn expressions(rule: &[u8]) -> usize {
    super::attribute::find(rule, RULE_EXPRESSIONS).map_or(0, |list| super::attribute::walk(list).count())
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
