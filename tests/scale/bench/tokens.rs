//! Service account tokens of node proxies, as an API server issues them, and the key set that verifies them.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use jsonwebtoken::jwk::{Jwk, JwkSet};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::json;

/// Seconds that a token is valid.
const LIFETIME: u64 = 3600;
const KEY_ID: &str = "bench";

/// Signs tokens with a key of its own.
pub(crate) struct Signer {
    key: EncodingKey,
    /// The public half as a JSON web key set.
    pub(crate) jwks: String,
}

impl Signer {
    /// Makes a key.
    pub(crate) fn new() -> Result<Self> {
        let pair = rcgen::KeyPair::generate().context("making a key")?;
        let key = EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes())?;
        let mut jwk = Jwk::from_encoding_key(&key, Algorithm::ES256)?;
        jwk.common.key_id = Some(KEY_ID.to_owned());
        Ok(Self { key, jwks: serde_json::to_string(&JwkSet { keys: vec![jwk] })? })
    }

    /// The token of a node's proxy.
    pub(crate) fn node_proxy(&self, node: &str) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let claims = json!({
            "iss": "https://kubernetes.default.svc", "sub": "system:serviceaccount:ambit-system:ztunnel", "aud": ["istio-ca"],
            "iat": now, "nbf": now, "exp": now + LIFETIME,
            "kubernetes.io": {
                "namespace": "ambit-system", "serviceaccount": { "name": "ztunnel", "uid": "ztunnel" },
                "pod": { "name": format!("ztunnel-{node}"), "uid": format!("uid-{node}") },
                "node": { "name": node, "uid": node },
            },
        });
        let header = Header { kid: Some(KEY_ID.to_owned()), ..Header::new(Algorithm::ES256) };
        Ok(jsonwebtoken::encode(&header, &claims, &self.key)?)
    }
}
