//! What proxies connect to: resources over delta xDS, certificates, both on one TLS port.
//!
//! [`port`] accepts connections and bounds them, [`publish`] puts what the index computes into the store, [`live_pods`]
//! answers who runs where, [`admission`] says who
//! may subscribe, [`roots`] hands out the CA's roots as a file. The CA itself is `ambit-ca`, the protocol `ambit-xds`.

pub mod admission;
pub mod live_pods;
pub mod port;
pub mod publish;
pub mod roots;
