//! Where the objects of the large cluster are: a directory, or a Kubernetes API server.

use std::path::{Path, PathBuf};
use std::time::Instant;

use ambit_scale::objects;
use anyhow::{Context, Result};

use crate::api_server::ApiServer;

/// Every object of the large cluster, in place.
pub(crate) enum World {
    Directory(Directory),
    ApiServer(Box<ApiServer>),
}

impl World {
    /// The source that the control plane reads.
    pub(crate) fn source(&self) -> String {
        match self {
            Self::Directory(directory) => directory.source(),
            Self::ApiServer(server) => server.source(),
        }
    }

    /// Number of resources that a node proxy gets of it.
    pub(crate) fn resources(&self) -> usize {
        let own = match self {
            Self::Directory(_) => 0,
            Self::ApiServer(_) => ApiServer::OWN_RESOURCES,
        };
        (objects::PODS + objects::SERVICES) as usize + own
    }

    /// Puts a ready pod in place. Returns the time just before.
    pub(crate) async fn put_pod(&self, number: u32) -> Result<Instant> {
        match self {
            Self::Directory(directory) => directory.put(&objects::pod(number)),
            Self::ApiServer(server) => server.put_pod(number).await,
        }
    }

    /// Takes a pod away. Returns the time just before.
    pub(crate) async fn take_pod(&self, number: u32) -> Result<Instant> {
        match self {
            Self::Directory(directory) => directory.take(&objects::pod(number)),
            Self::ApiServer(server) => server.take_pod(number).await,
        }
    }
}

/// A file for each object.
pub(crate) struct Directory(tempfile::TempDir);

impl Directory {
    /// Writes every object.
    pub(crate) fn write() -> Result<Self> {
        let this = Self(tempfile::tempdir().context("making a directory")?);
        std::fs::create_dir(this.objects()).context("making the directory of objects")?;
        for file in objects::everything() {
            std::fs::write(this.object(&file.name), file.text).with_context(|| file.name.clone())?;
        }
        Ok(this)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn objects(&self) -> PathBuf {
        self.path().join("objects")
    }

    fn object(&self, name: &str) -> PathBuf {
        self.objects().join(name)
    }

    fn source(&self) -> String {
        format!("dir:{}", self.objects().display())
    }

    /// Puts an object in place at once, as careful writers do.
    fn put(&self, file: &objects::File) -> Result<Instant> {
        let draft = self.path().join(&file.name);
        std::fs::write(&draft, &file.text).context("writing an object")?;
        let now = Instant::now();
        std::fs::rename(draft, self.object(&file.name)).context("putting an object in place")?;
        Ok(now)
    }

    fn take(&self, file: &objects::File) -> Result<Instant> {
        let now = Instant::now();
        std::fs::remove_file(self.object(&file.name)).context("removing an object")?;
        Ok(now)
    }
}
