//! TLS settings of a traffic policy: what waypoints do, and why they can't where they can't.

use std::net::IpAddr;

use ambit_api::l7;
use serde::Deserialize;
use serde_json::Value;

use super::settings::Reading;

/// `ClientTLSSettings`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Tls {
    mode: String,
    client_certificate: String,
    private_key: String,
    ca_certificates: String,
    credential_name: String,
    subject_alt_names: Vec<String>,
    sni: String,
    insecure_skip_verify: Option<bool>,
    ca_crl: String,
}

impl Reading {
    /// What is to be done, or why requests can't be sent.
    pub(super) fn tls(&mut self, tls: &Tls, at: &str) -> Result<l7::BackendTls, String> {
        let refused = |reading: &mut Reading, field: &str, reason: &str| {
            reading.unsupported(format!("{at}.{field}"), reason);
            Err(format!("a DestinationRule demands TLS to the endpoints, and {field} {reason}"))
        };
        let names = || tls.subject_alt_names.iter().map(|name| subject_name(name)).collect();
        let mode = match tls.mode.as_str() {
            "" | "DISABLE" => return Ok(l7::BackendTls::default()),
            "ISTIO_MUTUAL" => {
                for (field, value) in [("caCrl", &tls.ca_crl), ("credentialName", &tls.credential_name)] {
                    if !value.is_empty() {
                        self.unsupported(format!("{at}.{field}"), "certificates of the mesh need none");
                    }
                }
                let mode = l7::TlsMode::MeshTls.into();
                return Ok(l7::BackendTls { mode, names: names(), ..l7::BackendTls::default() });
            }
            "SIMPLE" | "MUTUAL" => l7::TlsMode::Tls,
            mode => return refused(self, "mode", &format!("{mode} is not known")),
        };
        let is_mutual = tls.mode == "MUTUAL";
        let has_files = !tls.client_certificate.is_empty() && !tls.private_key.is_empty();
        let is_named = !tls.credential_name.is_empty();
        if is_mutual && !has_files && !is_named {
            return refused(self, "mode", "MUTUAL needs clientCertificate and privateKey, or credentialName");
        }
        let files = [
            ("clientCertificate", &tls.client_certificate),
            ("privateKey", &tls.private_key),
            ("caCertificates", &tls.ca_certificates),
        ];
        // Istio refuses both too.
        if let Some((field, _)) = files.into_iter().find(|(_, file)| is_named && !file.is_empty()) {
            return refused(self, field, "can't be given beside credentialName");
        }
        if tls.insecure_skip_verify == Some(true) && !tls.ca_crl.is_empty() {
            self.unsupported(format!("{at}.caCrl"), "insecureSkipVerify accepts any certificate");
        }
        let certificate = l7::ClientCertificate {
            chain_file: tls.client_certificate.clone(),
            key_file: tls.private_key.clone(),
            ..l7::ClientCertificate::default()
        };
        Ok(l7::BackendTls {
            mode: mode.into(),
            server_name: tls.sni.to_ascii_lowercase(),
            names: names(),
            roots: Some(tls.roots()),
            certificate: is_mutual.then_some(certificate),
            revoked: Default::default(),
            revoked_file: tls.ca_crl.clone(),
            credential_name: tls.credential_name.clone(),
        })
    }
}

impl Tls {
    fn roots(&self) -> l7::backend_tls::Roots {
        use l7::backend_tls::Roots;
        match self.ca_certificates.as_str() {
            _ if self.insecure_skip_verify == Some(true) => Roots::DangerousAny(true),
            // Istio's name for the roots of the system.
            "" | "system" => Roots::System(true),
            file => Roots::File(file.to_owned()),
        }
    }
}

/// Whether a value has TLS settings somewhere.
pub(super) fn is_named(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.iter().any(|(name, value)| name == "tls" || is_named(value)),
        Value::Array(items) => items.iter().any(is_named),
        _ => false,
    }
}

/// A name as certificates have it: a URI, or a DNS name or an address.
pub(crate) fn subject_name(name: &str) -> l7::SubjectName {
    use l7::subject_name::Kind;
    let is_host = !name.contains("://") || name.parse::<IpAddr>().is_ok();
    let kind = if is_host { Kind::Host(name.to_ascii_lowercase()) } else { Kind::Uri(name.to_owned()) };
    l7::SubjectName { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(tls: Value) -> Result<l7::BackendTls, String> {
        Reading::default().tls(&serde_json::from_value(tls).unwrap(), "spec.trafficPolicy.tls")
    }

    #[test]
    fn modes_are_lowered() {
        use l7::backend_tls::Roots;
        let mode = |tls| read(tls).map(|tls| (tls.mode(), tls.roots));
        assert_eq!(mode(json!({"mode": "DISABLE"})), Ok((l7::TlsMode::Plaintext, None)));
        assert_eq!(mode(json!({"mode": "ISTIO_MUTUAL"})), Ok((l7::TlsMode::MeshTls, None)));
        let simple = |roots| Ok((l7::TlsMode::Tls, Some(roots)));
        assert_eq!(mode(json!({"mode": "SIMPLE"})), simple(Roots::System(true)));
        assert_eq!(
            mode(json!({"mode": "SIMPLE", "caCertificates": "/ca.pem"})),
            simple(Roots::File("/ca.pem".to_owned()))
        );
        let unverified = json!({"mode": "SIMPLE", "caCertificates": "/ca.pem", "insecureSkipVerify": true});
        assert_eq!(mode(unverified), simple(Roots::DangerousAny(true)));
    }

    #[test]
    fn a_credential_takes_the_place_of_files() {
        let tls = read(json!({"mode": "MUTUAL", "credentialName": "bank", "caCrl": "/crl.pem"})).unwrap();
        let shown = (tls.credential_name.as_str(), tls.revoked_file.as_str(), tls.certificate.is_some());
        assert_eq!(shown, ("bank", "/crl.pem", true));
        let tls = read(json!({"mode": "SIMPLE", "credentialName": "bank"})).unwrap();
        assert!(tls.certificate.is_none());
    }

    #[test]
    fn names_are_hosts_or_uris() {
        use l7::subject_name::Kind;
        let tls = json!({"mode": "SIMPLE", "subjectAltNames": ["A.example", "spiffe://td/ns/a/sa/B", "::1"]});
        let kinds: Vec<Kind> = read(tls).unwrap().names.into_iter().filter_map(|name| name.kind).collect();
        let host = |name: &str| Kind::Host(name.to_owned());
        assert_eq!(kinds, [host("a.example"), Kind::Uri("spiffe://td/ns/a/sa/B".to_owned()), host("::1")]);
    }

    #[test]
    fn what_can_not_be_done_is_refused() {
        for tls in [
            json!({"mode": "MUTUAL"}),
            json!({"mode": "MUTUAL", "clientCertificate": "/a.pem"}),
            json!({"mode": "SIMPLE", "credentialName": "a", "caCertificates": "/ca.pem"}),
            json!({"mode": "MUTUAL", "credentialName": "a", "clientCertificate": "/a.pem"}),
            json!({"mode": "OTHER"}),
        ] {
            assert!(read(tls.clone()).is_err(), "{tls}");
        }
    }
}
