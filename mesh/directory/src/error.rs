//! Why a resource is rejected.

use ambit_identity::SpiffeIdError;
use ambit_policy::CompileError;

/// A resource that was not applied as it came; reported to the control plane as a nack of this resource alone.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{name}: {error}")]
pub struct Rejected {
    /// The resource's name on the wire.
    pub name: String,
    /// Why.
    pub error: InvalidResource,
}

/// What is wrong with a resource.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidResource {
    /// Neither workload nor service.
    #[error("address is neither a workload nor a service")]
    Empty,
    /// A field that must not be empty is.
    #[error("{field} is empty")]
    Missing {
        /// The field's name on the wire.
        field: &'static str,
    },
    /// An address that is neither 4 nor 16 bytes long.
    #[error("an address of {bytes} bytes in {field}")]
    Address {
        /// The field's name on the wire.
        field: &'static str,
        /// The length in bytes.
        bytes: usize,
    },
    /// A prefix length longer than its address.
    #[error("prefix length {length} in {field} is longer than the address")]
    PrefixLength {
        /// The field's name on the wire.
        field: &'static str,
        /// The length in bits.
        length: u32,
    },
    /// A port above 65535, or 0 where a port is needed.
    #[error("{port} in {field} is no port")]
    Port {
        /// The field's name on the wire.
        field: &'static str,
        /// The number.
        port: u32,
    },
    /// A number that names no value of the enumeration known here.
    #[error("{field} has unknown value {value}")]
    Enumeration {
        /// The field's name on the wire.
        field: &'static str,
        /// The number.
        value: i32,
    },
    /// A name that is not `<namespace>/<hostname>`.
    #[error("{name:?} in {field} is not <namespace>/<hostname>")]
    Host {
        /// The field's name on the wire.
        field: &'static str,
        /// The name.
        name: String,
    },
    /// Trust domain, namespace and service account make no identity.
    #[error("no identity: {0}")]
    Identity(#[from] SpiffeIdError),
    /// A policy that cannot be read; what stands in for it refuses.
    #[error("{0}; until it can be read, it refuses")]
    Policy(#[from] CompileError),
}
