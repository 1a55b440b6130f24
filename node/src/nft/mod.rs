//! nftables over netlink: whole tables as data, applied atomically, verified against the kernel.
//!
//! [`redirect`](crate::redirect) uses it for the rules of pods, and `local` for its substitute of a service proxy.
//! A caller describes a [`Table`] with chains and rules and [`apply`]s it as a whole; rules are never edited one by one.
//! All tables are of the family `inet`. Tables of others are not touched, and no host program is used.

mod expression;
mod message;
mod rule;
mod socket;

pub use rule::{Action, Chain, ChainKind, Compare, Hook, HookPoint, Match, Protocol, Rule, Table};
pub use socket::{Difference, Nft, NftError};

use ambit_net::Netns;

/// Makes the table in `inside` exactly `table`, in one transaction. Connections
/// that are translated already stay so.
pub async fn apply(inside: &Netns, table: Table) -> Result<(), NftError> {
    within(inside, move |nft| nft.apply(&table)).await
}

/// The first difference between the table in `inside` and `table`. Counters are not compared.
pub async fn verify(inside: &Netns, table: Table) -> Result<Option<Difference>, NftError> {
    within(inside, move |nft| nft.verify(&table)).await
}

/// Removes the table called `name` from `inside`, and returns whether there was one.
pub async fn remove(inside: &Netns, name: &str) -> Result<bool, NftError> {
    let name = name.to_owned();
    within(inside, move |nft| nft.remove(&name)).await
}

/// The names of the `inet` tables in `inside`.
pub async fn tables(inside: &Netns) -> Result<Vec<String>, NftError> {
    within(inside, Nft::tables).await
}

/// The names of the chains of the `inet` table called `table`; none if there is no such table.
pub async fn chains(inside: &Netns, table: &str) -> Result<Vec<String>, NftError> {
    let table = table.to_owned();
    within(inside, move |nft| nft.chains(&table)).await
}

/// Runs `talk` on a thread that may block: a commit waits for the kernel's grace periods.
async fn within<T: Send + 'static>(
    inside: &Netns,
    talk: impl FnOnce(&mut Nft) -> Result<T, NftError> + Send + 'static,
) -> Result<T, NftError> {
    let mut nft = inside.run(Nft::open).await??;
    tokio::task::spawn_blocking(move || talk(&mut nft))
        .await
        .map_err(|e| NftError::Talk(std::io::Error::other(e)))?
}
