//! Ambit on a cluster: its images from the Dockerfiles that users build from too, its chart by Helm.

use std::time::Duration;

use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::{self, Layout};

/// The namespace of Ambit's own pods.
pub const NAMESPACE: &str = "ambit-system";
/// Name of the Helm release.
pub const RELEASE: &str = "ambit";
/// How long all of it may take to come up on a busy machine.
const ROLLOUT: Duration = Duration::from_secs(240);

/// The images, whose programs were built with this one (`make build`).
///
/// # Errors
/// [`Error::Missing`] when a program was not built.
pub fn images(layout: &Layout) -> Result<Vec<Image>> {
    let context = layout::built()?;
    let image = |name: &str, programs: &[&str]| Image {
        name: format!("ambit/{name}:{}", env!("CARGO_PKG_VERSION")),
        dockerfile: layout.repository().join(format!("images/{name}.Dockerfile")),
        context: context.clone(),
        files: programs.iter().map(|program| context.join(program)).collect(),
    };
    let images = vec![
        image("control", &["ambit-control"]),
        image("ztunnel", &["ztunnel"]),
        image("node", &["ambit-node", "ambit-cni"]),
    ];
    match images.iter().flat_map(|image| &image.files).find(|file| !file.exists()) {
        Some(file) => Err(Error::Missing(format!("{} is not built: run `make build`", file.display()))),
        None => Ok(images),
    }
}

/// Installs the chart, or upgrades it, with `settings` in the form of Helm's `--set`, and waits until all of it serves.
///
/// # Errors
/// When Helm fails or something does not come up in time.
pub async fn install(cluster: &Cluster, settings: &[&str]) -> Result<()> {
    let chart = cluster.layout().repository().join("charts/ambit").display().to_string();
    let mut args =
        vec!["upgrade", "--install", RELEASE, &chart, "--namespace", NAMESPACE, "--create-namespace"];
    for setting in settings {
        args.extend(["--set", setting]);
    }
    cluster.kubectl().helm(&args).await?;
    for what in ["deployment/ambit-control", "daemonset/ztunnel", "daemonset/ambit-node"] {
        cluster.kubectl().rolled_out(NAMESPACE, what, ROLLOUT).await?;
    }
    Ok(())
}
