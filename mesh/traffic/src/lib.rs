//! TrafficPolicies: local rate limits and conditions in CEL, compiled when a policy arrives and evaluated for each request.
//!
//! [`TrafficPolicy`] is one compiled `ambit.l7.Traffic`. A waypoint asks it about requests, the control plane compiles
//! [`Expression`]s to say in an object's status what is wrong with them. Everything that is asked is in [`Facts`]; the time is an
//! argument. Nothing here opens a socket or reads a clock.

mod buckets;
mod compile_thread;
mod expression;
mod facts;
mod log_filter;
mod policy;

pub use buckets::{Buckets, CAPACITY, Id, MOST_OF_ONE_CLIENT, Rate, Taken};
pub use expression::{EvaluationError, Expression, ExpressionError, MAX_NESTING, MAX_SIZE};
pub use facts::{DestinationFacts, Facts, RequestFacts, RouteId, SourceFacts};
pub use log_filter::{LogFacts, LogFilter};
pub use policy::{Condition, Denial, Limit, Refusal, RefusalReason, TrafficPolicy};
