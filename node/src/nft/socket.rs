//! A netlink socket to nftables: transactions, lists, and comparing lists with tables.

use std::fmt;
use std::io::{self, Read, Write};
use std::time::Duration;

use ambit_net::NetnsError;
use ambit_net::netlink::{self, Content, Family, NLM_F_DUMP_INTR, covers, find_string};
use socket2::Socket;

use super::message::{self, Batch, FIXED, Listed};
use super::rule::Table;

/// How long the kernel may take for one answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// What one receive can take, in bytes; dumps come in pieces of at most 32 KiB.
const RECEIVE: usize = 64 * 1024;
/// Room for the largest batch, in bytes: about 20,000 rules.
const SEND_BUFFER: usize = 16 << 20;

/// Why tables could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The namespace could not be entered.
    #[error("nftables: {0}")]
    Namespace(#[from] NetnsError),
    /// No messages could be exchanged with the kernel.
    #[error("nftables: exchange messages with the kernel: {0}")]
    Talk(io::Error),
    /// The kernel refused a change. Nothing of it took effect.
    #[error("nftables: {attempt}: {source}")]
    Refused {
        /// The operation, as a verb phrase.
        attempt: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A difference between a table in the kernel and the wanted one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// The table is missing.
    NoTable,
    /// The table is dormant: its chains see no packets.
    Dormant,
    /// A chain is missing, or attached elsewhere.
    Chain(String),
    /// The table has a chain that is not wanted.
    ExtraChain(String),
    /// The rule at this position, from 0, is missing or differs.
    Rule(String, usize),
    /// The chain has more rules than wanted.
    ExtraRules(String),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTable => f.write_str("table is missing"),
            Self::Dormant => f.write_str("table is dormant"),
            Self::Chain(name) => write!(f, "chain {name} is missing or attached elsewhere"),
            Self::ExtraChain(name) => write!(f, "chain {name} does not belong there"),
            Self::Rule(chain, at) => write!(f, "rule {at} of chain {chain} is missing or differs"),
            Self::ExtraRules(chain) => write!(f, "chain {chain} has rules that do not belong there"),
        }
    }
}

/// A socket to the nftables of the namespace that it was opened in. Its calls block, mostly for less
/// than a millisecond, a commit for up to some tens.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
    sequence: u32,
}

impl Nft {
    /// Opens one in the calling thread's namespace. Needs `CAP_NET_ADMIN` there.
    pub fn open() -> Result<Self, NftError> {
        let open = || {
            let socket = Family::Netfilter.open()?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.set_write_timeout(Some(PATIENCE))?;
            Ok(socket)
        };
        Ok(Self { socket: open().map_err(NftError::Talk)?, sequence: 1 })
    }

    /// Makes the table exactly `table`, in one transaction.
    pub fn apply(&mut self, table: &Table) -> Result<(), NftError> {
        let mut batch = Batch::begin(self.sequence);
        batch.replace(table);
        self.commit(batch).map_err(|e| e.refused(|| format!("apply table inet {}", table.name)))
    }

    /// Removes a table, and returns whether there was one.
    pub fn remove(&mut self, name: &str) -> Result<bool, NftError> {
        let mut batch = Batch::begin(self.sequence);
        batch.delete(name);
        match self.commit(batch) {
            Ok(()) => Ok(true),
            Err(CommitError::Refused(source)) if source.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error.refused(|| format!("remove table inet {name}"))),
        }
    }

    /// The names of the `inet` tables.
    pub fn tables(&mut self) -> Result<Vec<String>, NftError> {
        let listed = self.dump(Listed::Tables, None)?;
        Ok(listed.iter().filter_map(|table| find_string(table, message::TABLE_NAME)).collect())
    }

    /// The names of the chains of an `inet` table.
    pub fn chains(&mut self, table: &str) -> Result<Vec<String>, NftError> {
        let listed = self.chains_of(table)?;
        Ok(listed.iter().filter_map(|chain| find_string(chain, message::CHAIN_NAME)).collect())
    }

    fn chains_of(&mut self, table: &str) -> Result<Vec<Vec<u8>>, NftError> {
        let mut listed = self.dump(Listed::Chains, None)?;
        listed.retain(|chain| find_string(chain, message::CHAIN_TABLE).as_deref() == Some(table));
        Ok(listed)
    }

    /// The first difference between the kernel's table and `table`.
    pub fn verify(&mut self, table: &Table) -> Result<Option<Difference>, NftError> {
        let tables = self.dump(Listed::Tables, None)?;
        let named =
            |listed: &&Vec<u8>| find_string(listed, message::TABLE_NAME).as_ref() == Some(&table.name);
        let Some(listed) = tables.iter().find(named) else { return Ok(Some(Difference::NoTable)) };
        if message::is_dormant(listed) {
            return Ok(Some(Difference::Dormant));
        }
        let chains = self.chains_of(&table.name)?;
        let rules = self.dump(Listed::Rules, Some(&table.name))?;
        Ok(compare(table, &chains, &rules))
    }

    fn commit(&mut self, batch: Batch) -> Result<(), CommitError> {
        let batch = batch.end();
        self.sequence = batch.next_sequence();
        if batch.bytes.len() > 64 * 1024 {
            ambit_net::socket::force_send_buffer(&self.socket, SEND_BUFFER).map_err(CommitError::Talk)?;
        }
        self.send(&batch.bytes).map_err(CommitError::Talk)?;
        let mut refused = None;
        let mut buffer = vec![0; RECEIVE];
        loop {
            let n = self.receive(&mut buffer).map_err(CommitError::Talk)?;
            for message in netlink::messages(buffer.get(..n).unwrap_or_default()) {
                if message.sequence < batch.first {
                    continue;
                }
                match message.content {
                    Content::Refused(error) => drop(refused.get_or_insert(error)),
                    Content::Acknowledged => {}
                    Content::Body(_) | Content::Done => continue,
                }
                // A batch that fails as a whole is answered with the number of its opening.
                if message.sequence == batch.last || message.sequence == batch.first {
                    return refused.map_or(Ok(()), |error| Err(CommitError::Refused(error)));
                }
            }
        }
    }

    fn dump(&mut self, what: Listed, table: Option<&str>) -> Result<Vec<Vec<u8>>, NftError> {
        // EINTR: the tables changed in the middle of the list (nfnetlink's generation check).
        for _ in 0..8 {
            match self.dump_once(what, table) {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(NftError::Talk(error)),
                Ok(Some(listed)) => return Ok(listed),
                Ok(None) => {}
            }
        }
        Err(NftError::Talk(io::Error::from_raw_os_error(libc::EBUSY)))
    }

    /// `None` when the list was interrupted by a change.
    fn dump_once(&mut self, what: Listed, table: Option<&str>) -> io::Result<Option<Vec<Vec<u8>>>> {
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(1);
        self.send(&message::dump(what, table, sequence))?;
        let mut listed = Vec::new();
        let mut interrupted = false;
        let mut buffer = vec![0; RECEIVE];
        loop {
            let n = self.receive(&mut buffer)?;
            for message in netlink::messages(buffer.get(..n).unwrap_or_default()) {
                if message.sequence != sequence {
                    continue;
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.content {
                    Content::Body(body) => listed.push(body.get(FIXED..).unwrap_or_default().to_vec()),
                    Content::Done => return Ok((!interrupted).then_some(listed)),
                    Content::Refused(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                        return Ok(Some(Vec::new()));
                    }
                    Content::Refused(error) => return Err(error),
                    Content::Acknowledged => {}
                }
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let n = self.socket.write(bytes)?;
        if n == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.socket.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }
}

enum CommitError {
    Talk(io::Error),
    Refused(io::Error),
}

impl CommitError {
    fn refused(self, attempt: impl FnOnce() -> String) -> NftError {
        match self {
            Self::Talk(source) => NftError::Talk(source),
            Self::Refused(source) => NftError::Refused { attempt: attempt(), source },
        }
    }
}

fn compare(table: &Table, chains: &[Vec<u8>], rules: &[Vec<u8>]) -> Option<Difference> {
    for chain in &table.chains {
        let wanted = message::chain_attributes(&table.name, chain);
        if !chains.iter().any(|listed| covers(listed, &wanted)) {
            return Some(Difference::Chain(chain.name.clone()));
        }
    }
    for listed in chains {
        let name = find_string(listed, message::CHAIN_NAME).unwrap_or_default();
        if !table.chains.iter().any(|chain| chain.name == name) {
            return Some(Difference::ExtraChain(name));
        }
    }
    for chain in &table.chains {
        let mut listed =
            rules.iter().filter(|r| find_string(r, message::RULE_CHAIN).as_ref() == Some(&chain.name));
        for (at, rule) in chain.rules.iter().enumerate() {
            let wanted = message::rule_attributes(&table.name, &chain.name, rule);
            let count = super::expression::render(rule).len();
            if !listed.next().is_some_and(|l| covers(l, &wanted) && message::expressions(l) == count) {
                return Some(Difference::Rule(chain.name.clone(), at));
            }
        }
        if listed.next().is_some() {
            return Some(Difference::ExtraRules(chain.name.clone()));
        }
    }
    None
}
