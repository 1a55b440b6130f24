//! From a pod's volumes to directories of this machine and the places where its containers see them: pure planning,
//! and the writing of the files. Mounting is the sandbox's.
//!
//! All containers of a pod share one file system here, so two volumes cannot be mounted at one path.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, KeyToPath, Pod, Volume, VolumeMount};

use crate::error::{Error, Result};
use crate::kubelet::configuration::{Configuration, Data, Kind};

/// Everything that a pod mounts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Volumes {
    /// The files of each volume by name, with paths relative to the volume; an `emptyDir` has none.
    contents: BTreeMap<String, Data>,
    /// Where each mount leads.
    mounts: BTreeMap<PathBuf, Mount>,
}

/// A volume, or a path in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    volume: String,
    sub_path: Option<PathBuf>,
    read_only: bool,
}

/// One bind mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bind {
    /// What is shown: a directory or a file.
    pub(crate) source: PathBuf,
    /// The absolute path at which it is shown.
    pub(crate) target: PathBuf,
    /// Whether it may only be read.
    pub(crate) read_only: bool,
}

/// Plans the volumes that a pod's containers mount.
///
/// # Errors
/// A sentence that names the volume or mount that cannot be had here.
pub(crate) fn plan(pod: &Pod, configuration: &Configuration) -> std::result::Result<Volumes, String> {
    let Some(spec) = &pod.spec else { return Ok(Volumes::default()) };
    let declared: BTreeMap<&str, &Volume> =
        spec.volumes.iter().flatten().map(|volume| (volume.name.as_str(), volume)).collect();
    let mut volumes = Volumes::default();
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        for mount in container.volume_mounts.iter().flatten() {
            let volume = declared.get(mount.name.as_str()).ok_or_else(|| {
                format!(
                    "container {} mounts volume {}, which the pod does not have",
                    container.name, mount.name
                )
            })?;
            if !volumes.contents.contains_key(&mount.name) {
                volumes.contents.insert(mount.name.clone(), contents(volume, configuration)?);
            }
            volumes.add(container, mount)?;
        }
    }
    Ok(volumes)
}

impl Volumes {
    /// Whether the pod mounts nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.mounts.is_empty()
    }

    fn add(&mut self, container: &Container, mount: &VolumeMount) -> std::result::Result<(), String> {
        let target = PathBuf::from(&mount.mount_path);
        let name = &container.name;
        if !is_plain(&target, true) {
            return Err(format!(
                "container {name} mounts {} at {:?}, which is no absolute path",
                mount.name, target
            ));
        }
        let sub_path = mount.sub_path.as_deref().filter(|path| !path.is_empty()).map(PathBuf::from);
        if let Some(path) = sub_path.as_ref().filter(|path| !is_plain(path, false)) {
            return Err(format!(
                "container {name} mounts {} with subPath {path:?}, which leaves it",
                mount.name
            ));
        }
        let planned =
            Mount { volume: mount.name.clone(), sub_path, read_only: mount.read_only.unwrap_or_default() };
        match self.mounts.get(&target) {
            Some(other) if (&other.volume, &other.sub_path) != (&planned.volume, &planned.sub_path) => {
                Err(format!(
                    "volumes {} and {} are both mounted at {}: containers of a pod share one file system here",
                    other.volume,
                    planned.volume,
                    target.display()
                ))
            }
            Some(other) => {
                // One container may write, so the shared mount must allow it.
                let read_only = other.read_only && planned.read_only;
                self.mounts.insert(target, Mount { read_only, ..planned });
                Ok(())
            }
            None => {
                self.mounts.insert(target, planned);
                Ok(())
            }
        }
    }

    /// Writes the volumes below `directory` and returns the mounts, parents before children.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(crate) fn write(&self, directory: &Path) -> Result<Vec<Bind>> {
        for (name, files) in &self.contents {
            let volume = directory.join(name);
            make_directory(&volume)?;
            for (path, content) in files {
                let file = volume.join(path);
                file.parent().map(make_directory).transpose()?;
                std::fs::write(&file, content).map_err(Error::system(format!("write {}", file.display())))?;
            }
        }
        let mut binds = Vec::new();
        for (target, mount) in &self.mounts {
            let mut source = directory.join(&mount.volume);
            if let Some(path) = &mount.sub_path {
                source.push(path);
                // As a kubelet does: a subPath that is not there is made as a directory.
                if !source.exists() {
                    make_directory(&source)?;
                }
            }
            binds.push(Bind { source, target: target.clone(), read_only: mount.read_only });
        }
        Ok(binds)
    }
}

fn make_directory(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(Error::system(format!("make directory {}", path.display())))
}

/// Whether a path has neither `..` nor `.` in it, and is absolute or relative as wanted.
fn is_plain(path: &Path, absolute: bool) -> bool {
    path.is_absolute() == absolute
        && path.components().all(|part| matches!(part, Component::Normal(_) | Component::RootDir))
        && path.components().any(|part| matches!(part, Component::Normal(_)))
}

fn contents(volume: &Volume, configuration: &Configuration) -> std::result::Result<Data, String> {
    let name = &volume.name;
    if volume.empty_dir.is_some() {
        return Ok(Data::new());
    }
    let (kind, object, items, optional) = if let Some(source) = &volume.config_map {
        (Kind::ConfigMap, Some(source.name.clone()), &source.items, source.optional)
    } else if let Some(source) = &volume.secret {
        (Kind::Secret, source.secret_name.clone(), &source.items, source.optional)
    } else {
        return Err(format!(
            "volume {name} is neither an emptyDir, a configMap nor a secret, which is all there is here"
        ));
    };
    let object = object.unwrap_or_default();
    match configuration.get(kind, &object) {
        Some(data) => chosen(name, data, items.as_deref(), optional == Some(true)),
        None if optional == Some(true) => Ok(Data::new()),
        None => Err(format!("volume {name}: there is no {} {object}", kind.name())),
    }
}

/// The keys that `items` names, at their paths; without `items`, all keys.
fn chosen(
    volume: &str,
    data: &Data,
    items: Option<&[KeyToPath]>,
    optional: bool,
) -> std::result::Result<Data, String> {
    let Some(items) = items.filter(|items| !items.is_empty()) else { return Ok(data.clone()) };
    let mut files = Data::new();
    for item in items {
        if !is_plain(Path::new(&item.path), false) {
            return Err(format!("volume {volume}: path {:?} leaves the volume", item.path));
        }
        match data.get(&item.key) {
            Some(content) => drop(files.insert(item.path.clone(), content.clone())),
            None if optional => {}
            None => return Err(format!("volume {volume}: there is no key {}", item.key)),
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(volumes: &str, mounts: &str) -> Pod {
        let yaml = format!("spec: {{volumes: {volumes}, containers: [{{name: c, volumeMounts: {mounts}}}]}}");
        serde_saphyr::from_str(&yaml).expect("a sound pod")
    }

    fn configuration() -> Configuration {
        let mut configuration = Configuration::default();
        let data = [("a".to_owned(), b"1".to_vec()), ("b".to_owned(), b"2".to_vec())].into();
        configuration.insert(Kind::ConfigMap, "cm", data);
        configuration
    }

    #[test]
    fn volumes_become_files_and_mounts() {
        let pod = pod(
            "[{name: data, emptyDir: {}}, {name: conf, configMap: {name: cm, items: [{key: b, path: x/b}]}}]",
            "[{name: data, mountPath: /data}, {name: conf, mountPath: /etc/app, readOnly: true}, {name: conf, mountPath: /one, subPath: x/b}]",
        );
        let volumes = plan(&pod, &configuration()).expect("all of it can be had");
        let directory = tempfile::tempdir().expect("a directory");
        let binds = volumes.write(directory.path()).expect("a writable directory");
        let targets: Vec<_> = binds.iter().map(|bind| (bind.target.to_str(), bind.read_only)).collect();
        assert_eq!(targets, [(Some("/data"), false), (Some("/etc/app"), true), (Some("/one"), false)]);
        assert_eq!(std::fs::read(&binds[2].source).expect("the file is there"), b"2");
        assert!(!directory.path().join("conf/a").exists(), "only the items are shown");
    }

    #[test]
    fn what_cannot_be_mounted_is_named() {
        let cases = [
            ("[]", "[{name: v, mountPath: /v}]", "volume v, which the pod does not have"),
            ("[{name: v, hostPath: {path: /}}]", "[{name: v, mountPath: /v}]", "volume v is neither"),
            ("[{name: v, secret: {secretName: s}}]", "[{name: v, mountPath: /v}]", "there is no Secret s"),
            ("[{name: v, emptyDir: {}}]", "[{name: v, mountPath: /v/../etc}]", "no absolute path"),
            ("[{name: v, emptyDir: {}}]", "[{name: v, mountPath: /v, subPath: ../x}]", "which leaves it"),
            (
                "[{name: v, emptyDir: {}}, {name: w, emptyDir: {}}]",
                "[{name: v, mountPath: /v}, {name: w, mountPath: /v}]",
                "both mounted at /v",
            ),
        ];
        for (volumes, mounts, message) in cases {
            let error = plan(&pod(volumes, mounts), &configuration()).expect_err(message);
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn optional_objects_may_be_absent() {
        let pod = pod("[{name: v, secret: {secretName: s, optional: true}}]", "[{name: v, mountPath: /v}]");
        assert!(!plan(&pod, &configuration()).expect("it is optional").is_empty());
    }
}
