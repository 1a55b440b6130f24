//! Keys of gateways: each gateway gets its own, and nobody else gets any.

use std::time::Duration;

use ambit_api::l7::{KeyPair, Listener};
use ambit_api::{KEY_PAIR_TYPE_URL, LISTENER_TYPE_URL};
use ambit_identity::ControlPlane;
use ambit_xds::{Client, Found};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;

use super::{Held, connector, node};
use crate::world::World;

const GATEWAYS: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: web, namespace: edge}
spec:
  gatewayClassName: ambit
  listeners:
  - {name: https, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: other, namespace: edge}
spec: {gatewayClassName: ambit, listeners: [{name: http, port: 80, protocol: HTTP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: edge}
spec: {gatewayClassName: ambit-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
";

/// The key as the resource of gateway `edge/web`.
const NAME: &str = "edge/web/edge/cert";

fn secret() -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
    let certificate = certificate.self_signed(&key).unwrap().pem();
    let key = key.serialize_pem();
    let (encoded, encoded_key) = (STANDARD.encode(certificate), STANDARD.encode(&key));
    let text = format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: cert, namespace: edge}}\ntype: kubernetes.io/tls\n\
         data: {{tls.crt: {encoded}, tls.key: {encoded_key}}}\n"
    );
    (text, key)
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_for_their_own_gateway_alone() {
    let (secret, key) = secret();
    let world = World::start_with(&[("gateways.yaml", GATEWAYS), ("secret.yaml", &secret)], &[]);
    let subscribe = |account: &str| {
        let (held, pairs) = (Held::default(), std::sync::Arc::new(Mutex::default()));
        let caller = world.caller(&world.signer.token("edge", account, "node-a"));
        let listeners = std::sync::Arc::new(Mutex::default());
        let (client, driver) = Client::builder(node(), held.handler())
            .wildcard::<KeyPair>(KEY_PAIR_TYPE_URL, Held::keep(&pairs))
            .wildcard::<Listener>(LISTENER_TYPE_URL, Held::keep(&listeners))
            .build(connector(caller));
        tokio::spawn(driver.run());
        (client, held, pairs, listeners)
    };
    let (_web, held, pairs, listeners) = subscribe("web");
    held.until("the key of the gateway", |_| pairs.lock().contains_key(NAME)).await;
    held.until("the listener", |_| listeners.lock().contains_key("edge/web/https")).await;
    assert_eq!(&*pairs.lock()[NAME].private_key, key.as_bytes());
    // Another gateway of the namespace sees its own listener and no key.
    let (other, held, pairs, listeners) = subscribe("other");
    held.until("the other listener", |_| listeners.lock().contains_key("edge/other/http")).await;
    assert!(other.ready().await);
    assert_eq!((pairs.lock().len(), listeners.lock().len()), (0, 1));
    // Nobody else gets it by its name.
    for caller in [
        world.caller(&world.signer.token("edge", "other", "node-a")),
        world.caller(&world.signer.token("edge", "waypoint", "node-a")),
        world.node_proxy("node-a"),
        world.caller(&world.signer.token("shop", "web", "node-a")),
    ] {
        assert!(!gets(caller).await);
    }
    assert!(gets(world.caller(&world.signer.token("edge", "web", "node-b"))).await);
    // Nor does anybody who reads what the control plane shows of itself.
    for section in ["resources", "findings"] {
        let shown = world.config_dump(section).to_string();
        assert!(!shown.contains("PRIVATE KEY") && !shown.contains(&STANDARD.encode(&key)), "{shown}");
    }
}

/// Whether a caller gets the key by asking for its name. What it holds decides: a demand that an answer does not mention counts as
/// present at the client.
async fn gets(caller: ControlPlane) -> bool {
    let (held, pairs) = (Held::default(), std::sync::Arc::new(Mutex::default()));
    let (client, driver) = Client::builder(node(), held.handler())
        .on_demand::<KeyPair>(KEY_PAIR_TYPE_URL, Held::keep(&pairs))
        .build(connector(caller));
    let driver = tokio::spawn(driver.run());
    // Who is refused is never answered.
    let asked = tokio::time::timeout(Duration::from_secs(3), client.demand(KEY_PAIR_TYPE_URL, NAME)).await;
    driver.abort();
    let has_key = !pairs.lock().is_empty();
    assert!(!has_key || matches!(asked, Ok(Ok(Found::Present))), "{asked:?}");
    has_key
}
