//! The rotation of the authority's root, as an operator does it: publish both, sign with the new, drop the old.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};

use crate::bed::PROPAGATION;

/// How long after the new root signs no certificate of the old one is valid any more: a lifetime of a minute, and
/// some seconds for the switch itself.
const OLD_ENDS: Duration = Duration::from_secs(60 + PROPAGATION + 10);

/// A root and its key.
struct Root {
    certificate: String,
    key: String,
}

/// Where a rotation stands.
#[derive(Default)]
pub(crate) struct Rotation {
    made: u32,
    coming: Option<Root>,
    switched: Option<Instant>,
}

impl std::fmt::Debug for Rotation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rotation").field("made", &self.made).finish_non_exhaustive()
    }
}

impl Rotation {
    /// Publishes a new root beside the one in `directory`.
    ///
    /// # Errors
    /// When the files can't be read or written.
    pub(crate) fn publish_both(&mut self, directory: &Path) -> Result<()> {
        self.made += 1;
        let root = make(self.made)?;
        let old = current_root(directory)?;
        replace(directory, "root-cert.pem", &format!("{old}{}", root.certificate))?;
        self.coming = Some(root);
        Ok(())
    }

    /// Lets the new root sign.
    ///
    /// # Errors
    /// When there is none, or the files can't be written.
    pub(crate) fn sign_with_new(&mut self, directory: &Path) -> Result<()> {
        let root = self.coming.as_ref().context("no new root was published")?;
        // A reader in between sees a pair that does not fit, and stays with the former.
        replace(directory, "ca-cert.pem", &root.certificate)?;
        replace(directory, "ca-key.pem", &root.key)?;
        self.switched = Some(Instant::now());
        Ok(())
    }

    /// Takes the old root away, once no certificate under it is valid any more.
    ///
    /// # Errors
    /// When the new one never signed, or the files can't be written.
    pub(crate) async fn drop_old(&mut self, directory: &Path) -> Result<()> {
        let switched = self.switched.take().context("the new root does not sign")?;
        let root = self.coming.take().context("no new root was published")?;
        // The end of the old certificates is a matter of their clock, not of a condition here.
        tokio::time::sleep_until((switched + OLD_ENDS).into()).await;
        replace(directory, "root-cert.pem", &root.certificate)
    }
}

fn make(number: u32) -> Result<Root> {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::CommonName, format!("soak root {number}"));
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().context("making the key of a root")?;
    let certificate = parameters.self_signed(&key).context("making a root")?.pem();
    Ok(Root { certificate, key: key.serialize_pem() })
}

/// The root that signs now: in `ca-cert.pem`, for the authority made it itself.
fn current_root(directory: &Path) -> Result<String> {
    let path = directory.join("ca-cert.pem");
    std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

fn replace(directory: &Path, name: &str, text: &str) -> Result<()> {
    let (path, fresh) = (directory.join(name), directory.join(format!(".{name}.new")));
    std::fs::write(&fresh, text)
        .and_then(|()| std::fs::rename(&fresh, &path))
        .with_context(|| format!("replacing {}", path.display()))
}
