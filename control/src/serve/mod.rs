//! What proxies connect to: resources over delta xDS, certificates, both on one TLS port.
//!
//! [`port`] accepts connections and bounds them, [`publish`] puts what the index computes into the store, [`live_pods`]
//! answers who runs where, [`admission`] says who
//! may subscribe, [`roots`] hands out the CA's roots as a file. With Kubernetes, [`token_review`] says who a caller is and
//! [`ca_secrets`] keeps the CA's key. The CA itself is `ambit-ca`, the protocol `ambit-xds`.

pub mod admission;
pub mod ca_secrets;
pub mod live_pods;
pub mod port;
pub mod publish;
mod review_cache;
mod review_turns;
pub mod roots;
pub mod token_review;
