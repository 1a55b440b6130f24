//! What a proxy program is made of, whatever it proxies: the node proxy and the waypoint build on it.
//!
//! [`workers`] run the data path on single-threaded runtimes; [`tasks`] supervise what a program cannot do without;
//! [`connections`] lists what is open, and [`cut`] closes it; [`loads`] counts connections by endpoint; [`shares`]
//! bounds what one pod or peer can take; [`drain`] orders the end; [`settings`] reads file, flags and environment. Nothing here
//! knows what a proxy decides.

pub mod connections;
pub mod cut;
pub mod drain;
pub mod loads;
pub mod settings;
pub mod shares;
pub mod tasks;
pub mod workers;
