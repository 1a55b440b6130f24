//! Which endpoint gets a request, and which is avoided for a while.
//!
//! Pure: no sockets, no clock and no randomness of its own. Time is an argument (a [`Duration`](std::time::Duration) since any fixed
//! moment), and so are random numbers. The waypoint keeps one [`Pool`] for the endpoints of a service or subset and reports to it how requests
//! ended. Knows neither services nor workloads: endpoints are numbers.

mod cost;
mod hash;
mod level;
mod outlier;
mod pool;

pub use cost::{Cost, Estimate};
pub use hash::{Table, TableKind, hash};
pub use level::{Level, choose_level};
pub use outlier::{Ejection, Outcome, OutlierSettings, may_eject};
pub use pool::{Algorithm, Members, Pool};
