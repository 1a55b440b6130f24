//! `/debug/syncz`, by which Kiali and `istioctl` list the proxies that are connected. Pure; the admin interface serves it.

use ambit_xds::StreamStatus;
use serde_json::{Value, json};

/// The list in the form of istiod. What was sent counts as acknowledged: what a proxy rejects is counted beside it.
pub(crate) fn render(streams: &[StreamStatus], cluster_id: &str, version: &str) -> Value {
    streams.iter().map(|stream| proxy(stream, cluster_id, version)).collect()
}

fn proxy(stream: &StreamStatus, cluster_id: &str, version: &str) -> Value {
    let StreamStatus { node, identity, batch, nacks } = stream;
    // xDS contract: `TYPE~ADDRESS~POD.NAMESPACE~DOMAIN`.
    let mut parts = node.split('~');
    let (kind, _, name) = (parts.next(), parts.next(), parts.next());
    let batch = batch.to_string();
    json!({
        "cluster_id": cluster_id,
        "proxy": name.unwrap_or(node),
        "proxy_type": kind.unwrap_or_default(),
        "proxy_version": version,
        "istio_version": version,
        "identity": &**identity,
        "rejected": nacks,
        "cluster_sent": batch, "cluster_acked": batch,
        "listener_sent": batch, "listener_acked": batch,
        "route_sent": batch, "route_acked": batch,
        "endpoint_sent": batch, "endpoint_acked": batch,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_named_by_its_pod() {
        let stream = StreamStatus {
            node: "ztunnel~10.0.0.1~ztunnel-x.ambit-system~ambit-system.svc.cluster.local".to_owned(),
            identity: "spiffe://cluster.local/ns/ambit-system/sa/ztunnel".into(),
            batch: 7,
            nacks: 0,
        };
        let list = render(&[stream], "Kubernetes", "1.31.0");
        let proxy = &list[0];
        assert_eq!(
            (&proxy["proxy"], &proxy["proxy_type"]),
            (&json!("ztunnel-x.ambit-system"), &json!("ztunnel"))
        );
        assert_eq!((&proxy["cluster_sent"], &proxy["cluster_acked"]), (&json!("7"), &json!("7")));
        let nameless = StreamStatus { node: String::new(), identity: "x".into(), batch: 0, nacks: 0 };
        assert_eq!(render(&[nameless], "Kubernetes", "1")[0]["proxy"], "");
        assert_eq!(render(&[], "Kubernetes", "1"), json!([]));
    }
}
