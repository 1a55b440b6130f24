//! The `baggage` header: a peer's unauthenticated description of itself, for metrics and logs. Never for authorization.

use std::fmt::{self, Write as _};

use http::HeaderValue;

/// Longest header that is looked at (W3C Baggage §3.3.2: at least 8192 bytes must be handled).
const MAX_LENGTH: usize = 8192;

/// The kind of the object that owns a workload's pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkloadKind {
    /// `k8s.deployment.name`
    Deployment,
    /// `k8s.cronjob.name`
    CronJob,
    /// `k8s.pod.name`
    Pod,
    /// `k8s.job.name`
    Job,
}

impl WorkloadKind {
    const ALL: [WorkloadKind; 4] =
        [WorkloadKind::Deployment, WorkloadKind::CronJob, WorkloadKind::Pod, WorkloadKind::Job];

    const fn key(self) -> &'static str {
        match self {
            WorkloadKind::Deployment => "k8s.deployment.name",
            WorkloadKind::CronJob => "k8s.cronjob.name",
            WorkloadKind::Pod => "k8s.pod.name",
            WorkloadKind::Job => "k8s.job.name",
        }
    }
}

/// What the `baggage` header of a CONNECT, or of its answer, says about the sender (HBONE contract).
/// Absent members are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Baggage {
    /// `k8s.cluster.name`
    pub cluster: String,
    /// `k8s.namespace.name`
    pub namespace: String,
    /// `k8s.<kind>.name`
    pub workload: Option<(WorkloadKind, String)>,
    /// `service.name`: the canonical service.
    pub service: String,
    /// `service.version`: the canonical revision.
    pub version: String,
    /// `cloud.region`
    pub region: String,
    /// `cloud.availability_zone`
    pub zone: String,
}

impl Baggage {
    /// Reads a header. Members that are unknown, malformed or repeated are ignored: a
    /// foreign peer's label must not fail its connection.
    pub fn parse(header: &str) -> Baggage {
        let mut baggage = Baggage::default();
        if header.len() > MAX_LENGTH {
            return baggage;
        }
        for member in header.split(',') {
            // W3C Baggage §3.3.1: `key = value` and properties after `;`.
            let member = member.split(';').next().unwrap_or_default();
            let Some((key, value)) = member.split_once('=') else { continue };
            let Some(value) = decode(value.trim()) else { continue };
            baggage.set(key.trim(), value);
        }
        baggage
    }

    fn set(&mut self, key: &str, value: String) {
        let field = match key {
            "k8s.cluster.name" => &mut self.cluster,
            "k8s.namespace.name" => &mut self.namespace,
            "service.name" => &mut self.service,
            "service.version" => &mut self.version,
            "cloud.region" => &mut self.region,
            "cloud.availability_zone" => &mut self.zone,
            _ => {
                let kind = WorkloadKind::ALL.into_iter().find(|kind| kind.key() == key);
                if let (Some(kind), None, false) = (kind, &self.workload, value.is_empty()) {
                    self.workload = Some((kind, value));
                }
                return;
            }
        };
        if field.is_empty() {
            *field = value;
        }
    }

    /// The header's value, or `None` if all members are empty.
    pub fn header(&self) -> Option<HeaderValue> {
        let text = self.to_string();
        if text.is_empty() {
            return None;
        }
        HeaderValue::try_from(text).ok()
    }
}

impl fmt::Display for Baggage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let workload = self.workload.as_ref().map(|(kind, name)| (kind.key(), name.as_str()));
        let (workload_key, workload) = workload.unwrap_or(("", ""));
        let members = [
            ("k8s.cluster.name", self.cluster.as_str()),
            ("k8s.namespace.name", &self.namespace),
            (workload_key, workload),
            ("service.name", &self.service),
            ("service.version", &self.version),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ];
        let mut separator = "";
        for (key, value) in members.into_iter().filter(|(_, value)| !value.is_empty()) {
            write!(f, "{separator}{key}=")?;
            encode(value, f)?;
            separator = ",";
        }
        Ok(())
    }
}

/// W3C Baggage §3.3.1: baggage-octets as they are, everything else percent-encoded.
fn encode(value: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in value.bytes() {
        match byte {
            b'%' | b'"' | b',' | b';' | b'\\' | ..=0x20 | 0x7f.. => write!(f, "%{byte:02X}")?,
            _ => f.write_char(char::from(byte))?,
        }
    }
    Ok(())
}

/// Reverses [`encode`]; `None` if an escape is incomplete or the bytes are not UTF-8.
fn decode(value: &str) -> Option<String> {
    if !value.contains('%') {
        return Some(value.into());
    }
    let mut decoded = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first != b'%' {
            decoded.push(first);
            rest = tail;
            continue;
        }
        let (digits, tail) = tail.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok().filter(|text| !text.starts_with('+'))?;
        decoded.push(u8::from_str_radix(digits, 16).ok()?);
        rest = tail;
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn members_are_in_the_order_of_the_contract() {
        let baggage = Baggage {
            cluster: "Kubernetes".into(),
            namespace: "default".into(),
            workload: Some((WorkloadKind::Deployment, "reviews-v1".into())),
            service: "reviews".into(),
            version: "v1".into(),
            region: "r".into(),
            zone: "z".into(),
        };
        assert_eq!(
            baggage.to_string(),
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=reviews-v1,\
             service.name=reviews,service.version=v1,cloud.region=r,cloud.availability_zone=z"
        );
    }

    #[test]
    fn unknown_and_malformed_members_are_ignored() {
        let baggage =
            Baggage::parse("x=y, service.name = a;p=1 ,service.version=%4,=,,service.name=b,k8s.job.name=j");
        assert_eq!(baggage.service, "a");
        assert_eq!(baggage.version, "");
        assert_eq!(baggage.workload, Some((WorkloadKind::Job, "j".into())));
    }

    #[test]
    fn empty_baggage_has_no_header() {
        assert_eq!(Baggage::default().header(), None);
    }

    fn text() -> impl Strategy<Value = String> {
        "\\PC{0,12}"
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            cluster in text(), namespace in text(), service in text(), version in text(), region in text(),
            zone in text(), kind in 0usize..5, name in "\\PC{1,12}",
        ) {
            let workload = WorkloadKind::ALL.get(kind).map(|kind| (*kind, name));
            let baggage = Baggage { cluster, namespace, workload, service, version, region, zone };
            let header = baggage.header();
            let read = header.as_ref().map(|value| Baggage::parse(value.to_str().unwrap()));
            prop_assert_eq!(read.unwrap_or_default(), baggage);
        }

        #[test]
        fn any_header_is_read_without_harm(header in "\\PC{0,200}") {
            let read = Baggage::parse(&header);
            prop_assert_eq!(Baggage::parse(&read.to_string()), read);
        }
    }
}
