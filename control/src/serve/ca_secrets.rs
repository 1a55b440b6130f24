//! The certificate authority's key and record as Secrets of the system namespace (certificate contract).
//!
//! `cacerts` is a plugged-in CA and is only read; without it, `istio-ca-secret` holds the self-signed one. Either may have
//! the keys of a `kubernetes.io/tls` Secret, as cert-manager writes them. The record of rotations is always in
//! `istio-ca-secret`. Writes name the version that they replace, so that of two replicas the second one gets an error. If it was
//! deleted, it is applied anew: server-side apply names the object, so a right to create it can be limited to that name.

use std::collections::BTreeMap;

use ambit_ca::{AuthorityStore, StoreError, StoreWatch, StoredMaterial};
use async_trait::async_trait;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

use crate::api_server::{CallError, FIELD_MANAGER, call};
use crate::write::roots;

/// The plugged-in CA.
const PLUGGED_IN: &str = "cacerts";
/// The self-signed CA, and the record of rotations whichever CA signs.
const OWN: &str = "istio-ca-secret";
/// Type of [`OWN`] where we make it: that of the chart, since the type of a Secret cannot be changed.
const OWN_TYPE: &str = "Opaque";
/// Key of the record.
const RECORD: &str = "rotation.json";

/// Secrets of one namespace.
#[derive(Clone)]
pub struct SecretStore {
    secrets: Api<Secret>,
    config_maps: Api<ConfigMap>,
    namespace: String,
    /// The field manager of Secrets that this replica makes: of two replicas that make one, the second gets a conflict.
    maker: String,
}

impl SecretStore {
    /// The Secrets of the system namespace.
    pub fn new(client: Client, namespace: &str) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), namespace),
            config_maps: Api::namespaced(client, namespace),
            namespace: namespace.to_owned(),
            maker: format!("{FIELD_MANAGER}-{:08x}", rand::random::<u32>()),
        }
    }

    async fn get(&self, name: &'static str) -> Result<Option<Secret>, StoreError> {
        call(self.secrets.get_opt(name)).await.map_err(|error| self.failed(name, &error))
    }

    fn failed(&self, name: &str, error: &CallError) -> StoreError {
        StoreError::Server { object: self.object(name), reason: error.to_string() }
    }

    fn object(&self, name: &str) -> String {
        let kind = if name == roots::CONFIG_MAP { "ConfigMap" } else { "Secret" };
        format!("{kind} {}/{name}", self.namespace)
    }

    /// Writes keys of our own Secret in place of what `present` is. Returns false if it is no longer that.
    async fn write(&self, present: Option<&Secret>, texts: &[(&str, &str)]) -> Result<bool, StoreError> {
        let data = texts.iter().map(|(key, text)| ((*key).to_owned(), ByteString(text.as_bytes().to_vec())));
        let data: BTreeMap<String, ByteString> = data.collect();
        let outcome = match present {
            Some(present) => {
                let version = &present.metadata.resource_version;
                let patch = json!({ "metadata": { "resourceVersion": version }, "data": data });
                let parameters =
                    PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
                call(self.secrets.patch(OWN, &parameters, &Patch::Merge(patch))).await
            }
            None => {
                let secret = json!({
                    "apiVersion": "v1", "kind": "Secret", "type": OWN_TYPE,
                    "metadata": { "name": OWN }, "data": data,
                });
                call(self.secrets.patch(OWN, &PatchParams::apply(&self.maker), &Patch::Apply(secret))).await
            }
        };
        match outcome {
            Ok(_) => Ok(true),
            // Written, made or deleted by somebody else since it was read.
            Err(error) if error.is_conflict() || (present.is_some() && error.is_not_found()) => Ok(false),
            Err(error) => Err(self.failed(OWN, &error)),
        }
    }
}

/// The text of a key; an empty one is none, as Istio and charts write them.
fn text(secret: &Secret, key: &str) -> Option<String> {
    let ByteString(bytes) = secret.data.as_ref()?.get(key)?;
    let text = String::from_utf8_lossy(bytes);
    (!text.trim().is_empty()).then(|| text.into_owned())
}

fn material(secret: &Secret) -> StoredMaterial {
    let is_tls = text(secret, "tls.crt").is_some();
    let [certificate, key, chain, roots] = match is_tls {
        // The certificate's text holds the chain as well.
        true => ["tls.crt", "tls.key", "", "ca.crt"],
        false => ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"],
    }
    .map(|key| text(secret, key));
    StoredMaterial { certificate, key, chain, roots, revocations: text(secret, "ca-crl.pem") }
}

#[async_trait]
impl AuthorityStore for SecretStore {
    async fn material(&self) -> Result<StoredMaterial, StoreError> {
        let secret = match self.get(PLUGGED_IN).await? {
            Some(plugged_in) => Some(plugged_in),
            None => self.get(OWN).await?,
        };
        Ok(secret.as_ref().map(material).unwrap_or_default())
    }

    async fn replace_material(
        &self,
        replaced: &StoredMaterial,
        certificate: &str,
        key: &str,
    ) -> Result<bool, StoreError> {
        if self.get(PLUGGED_IN).await?.is_some() {
            return Err(StoreError::PluggedIn(self.object(PLUGGED_IN)));
        }
        let present = self.get(OWN).await?;
        let found = present.as_ref().map(material).unwrap_or_default();
        if (&found.certificate, &found.key) != (&replaced.certificate, &replaced.key) {
            return Ok(false);
        }
        self.write(present.as_ref(), &[("ca-cert.pem", certificate), ("ca-key.pem", key)]).await
    }

    async fn rotation(&self) -> Result<Option<String>, StoreError> {
        Ok(self.get(OWN).await?.as_ref().and_then(|secret| text(secret, RECORD)))
    }

    async fn replace_rotation(&self, replaced: Option<&str>, record: &str) -> Result<bool, StoreError> {
        let present = self.get(OWN).await?;
        let found = present.as_ref().and_then(|secret| text(secret, RECORD));
        if found.as_deref() != replaced {
            return Ok(false);
        }
        self.write(present.as_ref(), &[(RECORD, record)]).await
    }

    async fn published_roots(&self) -> Result<Option<String>, StoreError> {
        let map = call(self.config_maps.get_opt(roots::CONFIG_MAP)).await;
        let map = map.map_err(|error| self.failed(roots::CONFIG_MAP, &error))?;
        let text = map.and_then(|map| map.data?.remove(roots::KEY));
        Ok(text.filter(|text| !text.trim().is_empty()))
    }

    fn restores_material(&self) -> bool {
        true
    }

    fn watch(&self) -> StoreWatch {
        StoreWatch::Intervals
    }

    fn name(&self) -> String {
        format!("Secrets of namespace {}", self.namespace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(data: &[(&str, &str)]) -> Secret {
        let data = data.iter().map(|(key, text)| ((*key).to_owned(), ByteString(text.as_bytes().to_vec())));
        Secret { data: Some(data.collect()), ..Secret::default() }
    }

    #[test]
    fn keys_of_a_tls_secret_are_read() {
        let found = material(&secret(&[("tls.crt", "leaf"), ("tls.key", "key"), ("ca.crt", "root")]));
        assert_eq!((found.certificate.as_deref(), found.key.as_deref()), (Some("leaf"), Some("key")));
        assert_eq!((found.chain, found.roots.as_deref()), (None, Some("root")));
    }

    #[test]
    fn an_empty_key_is_a_missing_one() {
        let found =
            material(&secret(&[("ca-cert.pem", "cert"), ("ca-key.pem", "key"), ("root-cert.pem", "")]));
        assert_eq!((found.certificate.as_deref(), found.roots), (Some("cert"), None));
        assert!(material(&Secret::default()) == StoredMaterial::default());
    }
}
