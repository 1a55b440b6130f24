//! Services as providers name them.

/// Namespace and host of `NAMESPACE/HOST`, or of the name of a Service of the cluster.
///
/// # Errors
/// What is missing.
pub(super) fn read(service: &str, port: u16) -> Result<(String, String), String> {
    if service.is_empty() || port == 0 {
        return Err("it needs service and port".to_owned());
    }
    let (namespace, hostname) = service
        .split_once('/')
        .or_else(|| Some((namespace_of_cluster_name(service)?, service)))
        .filter(|(namespace, hostname)| !namespace.is_empty() && !hostname.is_empty())
        .ok_or_else(|| format!("service {service:?} names no namespace: write it as NAMESPACE/HOST"))?;
    Ok((namespace.to_owned(), hostname.to_ascii_lowercase()))
}

/// The namespace in `NAME.NAMESPACE.svc` with any cluster domain. Any other host could be offered by every namespace.
fn namespace_of_cluster_name(host: &str) -> Option<&str> {
    let mut labels = host.split('.');
    let (_, namespace, kind) = (labels.next()?, labels.next()?, labels.next()?);
    kind.eq_ignore_ascii_case("svc").then_some(namespace)
}
