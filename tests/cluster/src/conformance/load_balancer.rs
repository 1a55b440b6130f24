//! The load balancer of the cluster: gives each Service of type `LoadBalancer` an address of the cluster's range, at which
//! kube-proxy on the nodes takes its connections.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::process::Stdio;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::error::{Error, Result};
use crate::kubectl::Kubectl;
use crate::plan::Plan;

/// What is read of each Service.
const COLUMNS: &str = "NS:.metadata.namespace,NAME:.metadata.name,TYPE:.spec.type,WANTED:.spec.loadBalancerIP,\
                       HAS:.status.loadBalancer.ingress[0].ip,DELETED:.metadata.deletionTimestamp";

/// Addresses by the Services that have them.
struct Pool {
    plan: Plan,
    given: BTreeMap<String, Ipv4Addr>,
}

/// Gives addresses until it is dropped.
///
/// # Errors
/// When Services can't be watched or written.
pub(super) async fn run(kubectl: &Kubectl, plan: Plan) -> Result<()> {
    let fault = |message: String| Error::program("kubectl get services", message);
    let mut pool = Pool { plan, given: BTreeMap::new() };
    let columns = format!("--output=custom-columns={COLUMNS}");
    // A watch ends after some time; the next one begins with every Service.
    loop {
        let args = ["get", "services", "--all-namespaces", "--watch", "--no-headers", &columns];
        let mut command = kubectl.command("kubectl", &args);
        command.stdout(Stdio::piped()).stderr(Stdio::null()).stdin(Stdio::null());
        let mut watch = command.spawn().map_err(|error| fault(error.to_string()))?;
        let Some(output) = watch.stdout.take() else { return Err(fault("it has no output".to_owned())) };
        let mut lines = BufReader::new(output).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let Some((namespace, name, address)) = pool.answer(&line) else { continue };
            let status = json!({ "status": { "loadBalancer": { "ingress": [{ "ip": address }] } } });
            let (status, namespace) = (status.to_string(), namespace.to_owned());
            let args = ["patch", "service", name, "--namespace", &namespace, "--subresource=status"];
            let args = [&args[..], &["--type=merge", "--patch", &status]].concat();
            // A Service that is gone needs none, and one that was changed meanwhile comes again.
            if let Err(error) = kubectl.run(&args).await {
                tracing::info!(%error, "an address was not written");
            }
        }
        watch.wait().await.map_err(|error| fault(error.to_string()))?;
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
}

impl Pool {
    /// What is to be written for a line: namespace, name and address of a Service.
    fn answer<'l>(&mut self, line: &'l str) -> Option<(&'l str, &'l str, Ipv4Addr)> {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let [namespace, name, kind, wanted, has, deleted] = columns[..] else { return None };
        let key = format!("{namespace}/{name}");
        if kind != "LoadBalancer" || deleted != "<none>" {
            self.given.remove(&key);
            return None;
        }
        let range = self.plan.load_balancers();
        let in_range = |address: &Ipv4Addr| address.octets()[..3] == range.octets()[..3];
        let wanted: Option<Ipv4Addr> = wanted.parse().ok();
        let address = match wanted {
            Some(wanted) => Some(wanted).filter(in_range)?,
            None => self.given.get(&key).copied().or_else(|| self.free())?,
        };
        self.given.insert(key, address);
        (has != address.to_string()).then_some((namespace, name, address))
    }

    fn free(&self) -> Option<Ipv4Addr> {
        let mut all = self.plan.dynamic_load_balancers();
        all.find(|address| self.given.values().all(|given| given != address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_service_has_an_address_of_its_own() {
        let mut pool = Pool { plan: Plan::default(), given: BTreeMap::new() };
        let mut answer =
            |line: &str| pool.answer(line).map(|(namespace, name, at)| format!("{namespace} {name} {at}"));
        assert_eq!(answer("a one ClusterIP <none> <none> <none>"), None);
        let first = answer("a two LoadBalancer <none> <none> <none>");
        assert_eq!(first.as_deref(), Some("a two 172.31.0.1"));
        assert_eq!(answer("a two LoadBalancer <none> 172.31.0.1 <none>"), None);
        let other = answer("b two LoadBalancer <none> <none> <none>");
        assert_eq!(other.as_deref(), Some("b two 172.31.0.2"));
        let asked = answer("b three LoadBalancer 172.31.0.200 <none> <none>");
        assert_eq!(asked.as_deref(), Some("b three 172.31.0.200"));
        assert_eq!(answer("b four LoadBalancer 192.0.2.1 <none> <none>"), None);
        assert_eq!(answer("a two LoadBalancer <none> 172.31.0.1 2026-01-01T00:00:00Z"), None);
        let again = answer("c five LoadBalancer <none> <none> <none>");
        assert_eq!(again.as_deref(), Some("c five 172.31.0.1"));
    }
}
