//! The gateway profiles: the suite makes Gateways of class `ambit` and calls them at the addresses of their load balancers, from
//! outside the nodes. The servers behind them are enrolled, so that they are reached by tunnels.

use super::{Arguments, announced, echo};
use crate::cluster::Cluster;
use crate::error::Result;
use crate::image::Image;
use crate::layout::Layout;
use crate::plan::Plan;

const PROFILES: &str = "GATEWAY-HTTP,GATEWAY-TLS,GATEWAY-GRPC,GATEWAY-TCP,GATEWAY-UDP";
const CLASS: &str = "ambit";
/// The names that the suite's manifests use.
const ECHO: [&str; 2] = [
    "registry.k8s.io/gateway-api/conformance/echo-basic:v0.1.0",
    "registry.k8s.io/gateway-api/conformance/echo-basic:v0.2.0",
];
/// Outside the range of the load balancer (RFC 5737).
const UNUSABLE: &str = "192.0.2.1";
const LABELS: &str = "istio.io/dataplane-mode=ambient";

/// What the suite is called with.
pub(super) async fn arguments(cluster: &Cluster, plan: Plan) -> Result<Arguments> {
    let features = announced(cluster, CLASS).await?;
    // The first can be had from the load balancer, the second can't.
    let (usable, unusable) = (plan.static_load_balancer(), UNUSABLE);
    let others = vec![
        format!("--gateway-class={CLASS}"),
        format!("--namespace-labels={LABELS}"),
        format!("--usable-address={usable}"),
        format!("--unusable-address={unusable}"),
    ];
    Ok(Arguments { profiles: PROFILES, features, others })
}

/// The images of the servers: one program under both of its names.
pub(super) fn images(layout: &Layout) -> impl Iterator<Item = Image> {
    let context = layout.bin();
    ECHO.into_iter().map(move |name| echo(layout, name, "echo-basic", &context, &["echo-basic"]))
}
