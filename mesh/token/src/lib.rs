//! JSON Web Tokens of requests, as RequestAuthentication has them: where they are ([`location`]), whether they are valid
//! ([`keys`]), and what is passed on of them ([`rules`]).
//!
//! Pure: keys come in the rules, the time as an argument. Waypoints verify with this, the control plane checks key sets.

pub mod keys;
pub mod location;
pub mod rules;

pub use keys::{KeySet, KeySetError, SignedToken, TokenError};
pub use rules::{Rejection, Rule, Rules};
