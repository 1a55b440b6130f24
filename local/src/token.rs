//! Service account tokens, as an API server issues them: JWTs with Kubernetes' bound claims, and the key set by
//! which the CA verifies them.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::jwk::{Jwk, JwkSet};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::json;

use crate::error::{Error, Result};

/// The issuer that an API server of a cluster named `cluster.local` has.
pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// The audience of tokens for the CA (certificate contract).
pub const AUDIENCE: &str = "istio-ca";

/// The subject of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Namespace of the service account and the pod.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// Name and uid of the pod that the token is bound to.
    pub pod: Option<(String, String)>,
    /// The node that the pod runs on.
    pub node: Option<String>,
}

/// Signs tokens with a private key that never leaves the process.
pub struct TokenSigner {
    key: EncodingKey,
    key_id: String,
    jwks: String,
}

impl std::fmt::Debug for TokenSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenSigner").field("key_id", &self.key_id).finish_non_exhaustive()
    }
}

impl TokenSigner {
    /// Makes a signer with a fresh P-256 key.
    ///
    /// # Errors
    /// When the key can't be made.
    pub fn new() -> Result<Self> {
        let fault = |reason: String| Error::Token { attempt: "make a signing key".to_owned(), reason };
        let pair = rcgen::KeyPair::generate().map_err(|error| fault(error.to_string()))?;
        let key = EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes())
            .map_err(|error| fault(error.to_string()))?;
        let mut jwk =
            Jwk::from_encoding_key(&key, Algorithm::ES256).map_err(|error| fault(error.to_string()))?;
        let key_id = format!("{:016x}", rand::random::<u64>());
        jwk.common.key_id = Some(key_id.clone());
        let jwks = serde_json::to_string_pretty(&JwkSet { keys: vec![jwk] })
            .map_err(|error| fault(error.to_string()))?;
        Ok(Self { key, key_id, jwks })
    }

    /// The public half as a JSON web key set.
    #[must_use]
    pub fn jwks(&self) -> &str {
        &self.jwks
    }

    /// Signs a token that is valid from now for `lifetime`.
    ///
    /// # Errors
    /// When signing fails.
    pub fn sign(&self, subject: &Subject, audience: &str, lifetime: Duration) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let Subject { namespace, service_account, pod, node } = subject;
        let mut bound = json!({
            "namespace": namespace,
            "serviceaccount": { "name": service_account, "uid": format!("{namespace}-{service_account}") },
        });
        if let Some((name, uid)) = pod {
            bound["pod"] = json!({ "name": name, "uid": uid });
        }
        if let Some(name) = node {
            bound["node"] = json!({ "name": name, "uid": name });
        }
        let claims = json!({
            "iss": ISSUER,
            "sub": format!("system:serviceaccount:{namespace}:{service_account}"),
            "aud": [audience],
            "iat": now,
            "nbf": now,
            "exp": now + lifetime.as_secs(),
            "jti": format!("{:032x}", rand::random::<u128>()),
            "kubernetes.io": bound,
        });
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.key_id.clone());
        jsonwebtoken::encode(&header, &claims, &self.key).map_err(|error| Error::Token {
            attempt: format!("sign a token for {namespace}/{service_account}"),
            reason: error.to_string(),
        })
    }

    /// Signs a token into a file, replacing it in one step, so that a reader never sees half of one.
    ///
    /// # Errors
    /// When signing or writing fails.
    pub(crate) fn write(&self, subject: &Subject, lifetime: Duration, file: &Path) -> Result<()> {
        let token = self.sign(subject, AUDIENCE, lifetime)?;
        replace(file, token.as_bytes())
    }
}

/// Writes a file by renaming a finished one over it.
pub(crate) fn replace(file: &Path, content: &[u8]) -> Result<()> {
    let attempt = format!("write {}", file.display());
    let mut passing = file.as_os_str().to_owned();
    passing.push(".new~");
    std::fs::write(&passing, content)
        .and_then(|()| std::fs::rename(&passing, file))
        .map_err(Error::system(attempt))
}

#[cfg(test)]
mod tests {
    use super::*;
    use jsonwebtoken::{DecodingKey, Validation, decode};

    #[test]
    fn a_token_verifies_and_has_the_bound_claims() {
        let signer = TokenSigner::new().expect("a key can be made");
        let subject = Subject {
            namespace: "ambit-system".to_owned(),
            service_account: "ztunnel".to_owned(),
            pod: Some(("ztunnel-x".to_owned(), "uid".to_owned())),
            node: Some("node-1".to_owned()),
        };
        let token = signer.sign(&subject, AUDIENCE, Duration::from_secs(60)).expect("it can be signed");
        let keys: JwkSet = serde_json::from_str(signer.jwks()).expect("a key set");
        let header = jsonwebtoken::decode_header(&token).expect("a header");
        let jwk = keys.find(header.kid.as_deref().expect("a key id")).expect("the key is listed");
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&[AUDIENCE]);
        let key = DecodingKey::from_jwk(jwk).expect("a usable key");
        let claims = decode::<serde_json::Value>(&token, &key, &validation).expect("it verifies").claims;
        assert_eq!(claims["kubernetes.io"]["node"]["name"], "node-1");
        assert_eq!(claims["sub"], "system:serviceaccount:ambit-system:ztunnel");
    }
}
