//! The ConfigMaps and Secrets of a namespace, as environments and volumes read them.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};

use crate::error::Result;
use crate::manifest::{Key, Object};

/// Contents by key; a value is text in an environment and a file in a volume.
pub(crate) type Data = BTreeMap<String, Vec<u8>>;

/// The two kinds of objects that hold configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// `ConfigMap`.
    ConfigMap,
    /// `Secret`.
    Secret,
}

impl Kind {
    /// The kind's name in a manifest.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::ConfigMap => "ConfigMap",
            Self::Secret => "Secret",
        }
    }
}

/// The configuration objects of one namespace.
#[derive(Debug, Clone, Default)]
pub(crate) struct Configuration {
    objects: BTreeMap<(Kind, String), Data>,
}

impl Configuration {
    /// The objects of `namespace` among `objects`. An object that cannot be read counts as absent: the caller
    /// names it when something refers to it.
    pub(crate) fn of(namespace: &str, objects: &BTreeMap<Key, Object>) -> Self {
        let mut configuration = Self::default();
        for (key, object) in objects.iter().filter(|(key, _)| key.namespace == namespace) {
            let read = match key.kind.as_str() {
                "ConfigMap" => config_map(object).map(|data| (Kind::ConfigMap, data)),
                "Secret" => secret(object).map(|data| (Kind::Secret, data)),
                _ => continue,
            };
            match read {
                Ok((kind, data)) => configuration.insert(kind, &key.name, data),
                Err(error) => tracing::warn!(%key, %error, "cannot be read"),
            }
        }
        configuration
    }

    /// Adds an object.
    pub(crate) fn insert(&mut self, kind: Kind, name: &str, data: Data) {
        self.objects.insert((kind, name.to_owned()), data);
    }

    /// The contents of an object.
    pub(crate) fn get(&self, kind: Kind, name: &str) -> Option<&Data> {
        self.objects.get(&(kind, name.to_owned()))
    }
}

fn config_map(object: &Object) -> Result<Data> {
    let ConfigMap { data, binary_data, .. } = object.read()?;
    let text = data.into_iter().flatten().map(|(key, value)| (key, value.into_bytes()));
    let binary = binary_data.into_iter().flatten().map(|(key, value)| (key, value.0));
    Ok(text.chain(binary).collect())
}

/// `stringData` overrides `data` (API reference, Secret).
fn secret(object: &Object) -> Result<Data> {
    let Secret { data, string_data, .. } = object.read()?;
    let binary = data.into_iter().flatten().map(|(key, value)| (key, value.0));
    let text = string_data.into_iter().flatten().map(|(key, value)| (key, value.into_bytes()));
    Ok(binary.chain(text).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn string_data_of_a_secret_overrides_data() {
        let text = "apiVersion: v1\nkind: Secret\nmetadata: {name: s, namespace: shop}\ndata: {a: b2xk, b: Yg==}\nstringData: {a: new}\n";
        let objects = crate::manifest::parse(std::path::Path::new("t"), text).expect("a sound secret");
        let objects = objects.into_iter().map(|object| (object.key.clone(), object)).collect();
        let configuration = Configuration::of("shop", &objects);
        let data = configuration.get(Kind::Secret, "s").expect("it is there");
        assert_eq!((data["a"].as_slice(), data["b"].as_slice()), (b"new".as_slice(), b"b".as_slice()));
        assert!(Configuration::of("other", &objects).get(Kind::Secret, "s").is_none());
    }
}
