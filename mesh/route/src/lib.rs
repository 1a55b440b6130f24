//! L7 routes as a waypoint or gateway follows them: compiled once a change, matched once a request.
//!
//! - [`Table`]: every route by what it is attached to; [`Table::routes`] finds those of a service and port;
//! - [`StreamTable`]: every route for connections that are passed on unread;
//! - [`RouteSet::find`]: the rule of a request, by the precedence of Gateway API or by declaration;
//! - [`RouteSet::candidates`]: why a request follows its rule, for people;
//! - [`Rule`]: what to do with the request: [`Filter`]s, [`Backends`], timeouts, retries;
//! - [`filter`]: what filters make of a request or response, as pure functions over `http`'s types.
//!
//! Nothing here opens a socket, reads a clock or draws a random number: numbers that decide come in as arguments.
//! Regular expressions take linear time.

mod backend;
mod compile;
mod conditions;
mod explain;
mod field;
pub mod filter;
mod hosts;
mod route_set;
mod rule;
mod session;
mod stream;
mod table;

pub use backend::{Backend, Backends};
pub use compile::fault;
pub use explain::Candidate;
pub use field::{FieldMatch, StringMatch};
pub use filter::Filter;
pub use hosts::Hosts;
pub use route_set::RouteSet;
pub use rule::{Retry, RouteName, Rule, Timeouts};
pub use session::{SessionCarrier, SessionPersistence};
pub use stream::{ClientHello, ConnectionHead, StreamMatched, StreamTable, stream_fault};
pub use table::{Listed, Matched, RequestHead, Table};
