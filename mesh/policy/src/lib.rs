//! Authorization: policies compiled when they arrive, and their evaluation for a connection or an HTTP request.
//!
//! [`Policy`] is one compiled `istio.security.Authorization`; [`PolicySet`] holds all of them, indexed so that a
//! decision costs about the same with ten policies as with ten thousand. The set is persistent: cloning it is cheap and a
//! clone never changes. The directory keeps it in its snapshots; ztunnel asks for a [`Verdict`] per connection and compares
//! [`Stamp`]s to learn whose live connections must be decided again. A waypoint has few policies for a destination and walks over
//! them with [`evaluate_http`]. Never does I/O, never allocates for the decision of a connection.

mod compile;
mod http;
mod index;
mod matcher;
mod name;
mod normal;
mod path;
mod place;
mod request;
mod set;
mod token;

pub use compile::{Action, CompileError, Field, Policy, Scope};
pub use http::{Content, HttpRequest};
pub use name::{PolicyList, PolicyName};
pub use normal::{hides_dots, normal_path, normal_template, normal_text};
pub use path::{Template, TemplateError};
pub use request::{Decision, Peer, Request, Verdict, denied_whatever_is_changed, evaluate, evaluate_http};
pub use set::{PolicySet, Stamp};
pub use token::Token;
