//! Ambit on a cluster: its images from the Dockerfiles that users build from too, its chart by Helm.

use std::fs;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::{self, Layout};

/// The namespace of Ambit's own pods.
pub const NAMESPACE: &str = "ambit-system";
/// Name of the Helm release.
pub const RELEASE: &str = "ambit";
/// Settings for a cluster without a metrics server that an autoscaler could ask.
pub const SETTINGS: [&str; 2] = ["control.autoscaling.enabled=false", "waypoint.autoscaling.enabled=false"];
/// Namespace of the Bookinfo application.
pub const BOOKINFO: &str = "bookinfo";
const BOOKINFO_IMAGE: &str = "local/bookinfo:1";
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
        image("waypoint", &["ambit-waypoint"]),
        image("cli", &["ambit"]),
    ];
    match images.iter().flat_map(|image| &image.files).find(|file| !file.exists()) {
        Some(file) => Err(Error::Missing(format!("{} is not built: run `make build`", file.display()))),
        None => Ok(images),
    }
}

/// The image of the Bookinfo application.
///
/// # Errors
/// [`Error::Missing`] when its program was not built.
pub fn bookinfo_image(layout: &Layout) -> Result<Image> {
    let context = layout::built()?;
    let program = context.join("bookinfo");
    if !program.exists() {
        return Err(Error::Missing(format!("{} is not built: run `make build`", program.display())));
    }
    let dockerfile = layout.source("images/bookinfo/Dockerfile");
    Ok(Image { name: BOOKINFO_IMAGE.to_owned(), dockerfile, context, files: vec![program] })
}

/// Applies the manifests of the Bookinfo application and waits until its pods are up.
///
/// # Errors
/// When a manifest can't be read or something does not come up in time.
pub async fn install_bookinfo(cluster: &Cluster) -> Result<()> {
    let directory = cluster.layout().repository().join("examples/bookinfo/manifests");
    let attempt = format!("read {}", directory.display());
    let mut manifests = String::new();
    for entry in fs::read_dir(&directory).map_err(Error::system(attempt.clone()))? {
        let path = entry.map_err(Error::system(attempt.clone()))?.path();
        manifests += &fs::read_to_string(path).map_err(Error::system(attempt.clone()))?;
        manifests += "\n---\n";
    }
    // The manifests name the nodes of `ambit up`, and a program instead of an image.
    let manifests = manifests.replace("nodeName: node-", "nodeName: n");
    let manifests = manifests.replace("image: bookinfo\n", &format!("image: {BOOKINFO_IMAGE}\n"));
    let kubectl = cluster.kubectl();
    // Namespaces first, whatever the order of the files.
    let namespaces = directory.join("namespace.yaml").display().to_string();
    kubectl.run(&["apply", "--server-side", "--filename", &namespaces]).await?;
    kubectl.apply(&manifests).await?;
    for deployment in kubectl.list(&["deployments", "--namespace", BOOKINFO]).await? {
        let name = deployment["metadata"]["name"].as_str().unwrap_or_default();
        kubectl.rolled_out(BOOKINFO, &format!("deployment/{name}"), ROLLOUT).await?;
    }
    Ok(())
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
