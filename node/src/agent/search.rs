//! Where the network namespace of a recorded pod is, when the agent has lost its descriptor.

use ambit_net::Netns;

use super::Shared;
use crate::discovery;
use crate::registry::Record;

/// Where the namespace of a record is.
pub(super) enum Search {
    Found(Netns),
    /// Neither a process nor a path has it any more.
    Gone,
    /// It was not found, and may exist.
    Unknown,
}

impl Search {
    pub(super) fn found(self) -> Option<Netns> {
        match self {
            Self::Found(netns) => Some(netns),
            Self::Gone | Self::Unknown => None,
        }
    }
}

/// Looks for the namespace of a record: at its path, then anywhere on the node.
pub(super) async fn find_again(shared: &Shared, record: &Record) -> Search {
    if let Some(path) = &record.netns_path
        && let Ok(netns) = Netns::open(path)
        && netns.id() == record.netns
        // An inode is used again; an address in the namespace proves whose it is.
        && holds_all(&netns, record).await
    {
        return Search::Found(netns);
    }
    let walk = shared.config.discovery.walk().await;
    for found in walk.namespaces {
        if found.netns.id() == record.netns && holds_all(&found.netns, record).await {
            return Search::Found(found.netns);
        }
    }
    if walk.complete { Search::Gone } else { Search::Unknown }
}

pub(super) async fn holds_all(netns: &Netns, record: &Record) -> bool {
    discovery::addresses(netns).await.is_ok_and(|held| record.ips.iter().all(|ip| held.contains(ip)))
}
