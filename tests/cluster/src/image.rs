//! Images from Dockerfiles without a registry: built by buildah, kept as archives that containerd imports.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use crate::error::{Error, Result};
use crate::layout::{self, Layout};
use crate::programs::output_of;

/// An image to build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its name with the tag, as pods write it.
    pub name: String,
    /// Its Dockerfile.
    pub dockerfile: PathBuf,
    /// The directory that the Dockerfile copies from.
    pub context: PathBuf,
    /// The files that it copies, whose change makes a new image.
    pub files: Vec<PathBuf>,
}

/// The images of the test bed itself: `pause`, CoreDNS, and a client and server for tests, which is the program
/// `ambit-cluster-app` beside this one.
///
/// # Errors
/// When a program can't be copied.
pub fn own(layout: &Layout) -> Result<Vec<Image>> {
    let context = layout.images().join("context");
    let attempt = format!("fill {}", context.display());
    fs::create_dir_all(&context).map_err(Error::system(attempt.clone()))?;
    let programs = [
        (PathBuf::from("/bin/busybox"), "busybox"),
        (layout.program("coredns"), "coredns"),
        (layout::built()?.join("ambit-cluster-app"), "ambit-cluster-app"),
    ];
    for (source, name) in programs {
        copy_if_newer(&source, &context.join(name)).map_err(Error::system(attempt.clone()))?;
    }
    let image = |folder: &str, tag: &str, files: &[&str]| Image {
        name: format!("local/{folder}:{tag}"),
        dockerfile: layout.source("images").join(folder).join("Dockerfile"),
        context: context.clone(),
        files: files.iter().map(|file| context.join(file)).collect(),
    };
    Ok(vec![
        image("pause", "1", &["busybox"]),
        image("coredns", "1", &["coredns"]),
        image("app", "1", &["ambit-cluster-app"]),
    ])
}

/// Builds an image if it is missing or older than what it is made from. Returns its archive.
///
/// # Errors
/// [`Error::Program`] with buildah's output.
pub fn build(layout: &Layout, image: &Image) -> Result<PathBuf> {
    let directory = layout.images();
    fs::create_dir_all(&directory).map_err(Error::system(format!("make {}", directory.display())))?;
    let archive = directory.join(format!("{}.tar", image.name.replace(['/', ':'], "-")));
    let sources = std::iter::once(&image.dockerfile).chain(&image.files);
    if modified(&archive).is_some_and(|built| sources.into_iter().all(|file| modified(file) <= Some(built))) {
        return Ok(archive);
    }
    let fresh = archive.with_extension("new");
    // Buildah does not replace an archive.
    fs::remove_file(&fresh).ok();
    let storage = directory.join("storage");
    let buildah = || {
        let mut command = Command::new("buildah");
        command.args(["--storage-driver", "vfs"]);
        command.arg("--root").arg(storage.join("root")).arg("--runroot").arg(storage.join("run"));
        command
    };
    let mut bud = buildah();
    bud.args(["bud", "--quiet", "--isolation", "chroot", "--tag", &image.name, "--file"]);
    output_of(bud.arg(&image.dockerfile).arg(&image.context))?;
    let mut push = buildah();
    push.args(["push", "--quiet", &image.name]);
    output_of(push.arg(format!("docker-archive:{}:{}", fresh.display(), image.name)))?;
    output_of(buildah().args(["rmi", "--all", "--force"]))?;
    fs::rename(&fresh, &archive).map_err(Error::system(format!("name {}", archive.display())))?;
    Ok(archive)
}

/// Copies a file unless its copy is as new.
fn copy_if_newer(source: &Path, copy: &Path) -> std::io::Result<()> {
    if modified(copy).is_none() || modified(copy) < modified(source) {
        fs::remove_file(copy).or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
        fs::copy(source, copy)?;
    }
    Ok(())
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}
