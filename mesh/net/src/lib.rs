//! Sockets, network namespaces, original destinations and relaying.
//!
//! The node proxy, the tunnel and the node agent build on this crate. It knows no Kubernetes, no
//! certificates and no HTTP. System calls and `unsafe` of the workspace live here.
//!
//! - [`netns`]: entering network namespaces, always on threads of their own;
//! - [`stock`], [`mod@connect`]: marked sockets made ahead, and connections from a chosen source;
//! - [`listen`], [`accept`]: listening sockets in a namespace, and accepting under pressure;
//! - [`datagram`]: a socket for datagrams that answers from the address that was asked;
//! - [`socket`]: options, original destinations, resets;
//! - [`netlink`]: messages to and from the kernel, for the next two and for nftables;
//! - [`conntrack`]: original destinations of datagrams, entries made and removed;
//! - [`sockdiag`], [`pidfd`]: which sockets a namespace has, and who holds them;
//! - [`seqpacket`]: packets with descriptors over unix sockets;
//! - [`splice`], [`relay`], [`pipe`]: moving bytes between connections;
//! - [`process`]: settings of the calling process.

pub mod accept;
pub mod connect;
pub mod conntrack;
pub mod datagram;
pub mod listen;
pub mod netlink;
pub mod netns;
pub mod pidfd;
pub mod pipe;
pub mod process;
mod readiness;
pub mod relay;
pub mod seqpacket;
pub mod sockdiag;
pub mod socket;
pub mod splice;
pub mod stock;

pub use connect::{ConnectError, connect, connect_from, connect_local};
pub use netns::{Netns, NetnsError, NetnsId};
pub use socket::{Family, original_dst};
pub use stock::SocketStock;

/// The mark that every socket of the node proxy in a pod carries (redirection contract).
pub const PROXY_MARK: u32 = 0x539;
/// The connection mark of connections that came from the node proxy (redirection contract).
pub const PROXY_CONNMARK: u32 = 0x111;
/// The bits of a packet or connection mark that belong to the mesh.
pub const MARK_MASK: u32 = 0xfff;
