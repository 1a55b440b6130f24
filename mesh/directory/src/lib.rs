//! Who is where: workloads, services and policies; where a connection goes, and whether one may come in.
//!
//! One writer ([`Directory`]) applies what the control plane sends and publishes [`Snapshot`]s; any number of readers ([`Reader`]) take the
//! newest without waiting. Snapshots are persistent maps: a change costs the same whatever the number of workloads, and a bulk update holds no
//! reader up. [`resolve`] is a pure function of a snapshot, the client and what was dialled. Used by ztunnel (data path, DNS, admin) and by
//! waypoints. Never does I/O and never opens a connection.

mod candidates;
mod choose;
mod convert;
mod dump;
mod endpoints;
mod error;
mod inbound;
mod intern;
mod list;
mod name;
mod release;
mod resolve;
mod route;
mod service;
mod snapshot;
mod table;
mod upstream;
mod vips;
mod workload;
mod writer;

pub use ambit_api::Authority;
pub use candidates::{Candidate, ServiceState};
pub use choose::Load;
pub use endpoints::{Endpoint, Endpoints};
pub use error::{InvalidResource, Rejected};
pub use inbound::{InboundRefusal, InboundTarget};
pub use list::Iter;
pub use name::{AddressRef, Demand, HostRef, NamespacedHost, NetworkAddress, WorkloadUid};
pub use resolve::{ClientRole, Dependencies, Dependency, Question, resolve, resolve_on_demand};
pub use route::{
    DoubleTunnel, Expected, Lookup, NoEndpoint, Plain, Refusal, Route, Tunnel, Unknown, WaypointTunnel,
};
pub use service::{
    AppProtocol, Gateway, GatewayDestination, HealthPolicy, IpFamilies, LoadBalancing, Mode, PortMapping,
    Ports, Scope, Service, Transport, Vip, Visibility, WeightedWaypoint,
};
pub use snapshot::{Removed, Revision, Snapshot};
pub use workload::{
    ApplicationTunnel, Label, Locality, Membership, Status, TunnelProtocol, Workload, WorkloadType,
};
pub use writer::{Directory, Reader, Update};

/// Name of the [`Extension`](ambit_api::workload::Extension) of a service that keeps a client on one endpoint by its address (Kubernetes'
/// `sessionAffinity: ClientIP`). Its presence is what counts: a client stays as long as the endpoint is there, so the timeout that its `config` may
/// hold is always kept.
pub const SESSION_AFFINITY_EXTENSION: &str = "ambit.dev/session-affinity";
/// Name of the [`Extension`](ambit_api::workload::Extension) of a service or workload whose owner allows the direct way while its waypoint is
/// missing (annotation `ambit.dev/waypoint-failure: open`). Its presence is what counts; it needs no `config`.
pub const WAYPOINT_FAILURE_OPEN_EXTENSION: &str = "ambit.dev/waypoint-failure-open";
/// Name of the [`Extension`](ambit_api::workload::Extension) of a service with a wildcard host whose waypoint resolves the host that a client
/// asks for. Its presence is what counts; it needs no `config`.
pub const DYNAMIC_HOST_EXTENSION: &str = "ambit.dev/dynamic-host";
