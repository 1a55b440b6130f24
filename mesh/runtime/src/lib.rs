//! What a proxy program is made of, whatever it proxies: the node proxy and the waypoint build on it.
//!
//! [`workers`] run the data path on single-threaded runtimes; [`tasks`] supervise what a program cannot do without;
//! [`connections`] lists what is open, and [`cut`] closes it; [`loads`] counts connections by endpoint; [`shares`]
//! bounds what one pod or peer can take; [`stop`] hears who ends the program and [`drain`] orders the end. [`configuration`]
//! reads file, flags and environment, [`feed`] subscribes to the control plane, [`hostnames`] asks the resolvers of [`resolv_conf`], [`observe`] and [`peers`]
//! make metrics, [`flows`] remembers who talked to whom, and [`servers`] shows them; [`idle_memory`] returns memory to the system. Nothing here knows what a proxy decides.

pub mod configuration;
pub mod connections;
pub mod cut;
pub mod drain;
pub mod feed;
pub mod flows;
pub mod hostnames;
pub mod idle_memory;
pub mod loads;
pub mod observe;
pub mod peers;
pub mod resolv_conf;
pub mod servers;
pub mod shares;
pub mod stop;
pub mod tasks;
pub mod workers;
