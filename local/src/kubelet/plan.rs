//! Translates a container's specification to the command that is run for it. Pure.
//!
//! There are no images here. An image's name stands for a program of this machine, and the container's command,
//! arguments and environment apply to it as they would inside the image.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, EnvVar, Pod};

use crate::kubelet::configuration::{Configuration, Data, Kind};
use crate::process::Command;

/// The reason of a container that refers to an object or field that is not there, as a kubelet gives it.
pub(crate) const CONFIGURATION_FAULT: &str = "CreateContainerConfigError";

/// Which program stands for which image.
#[derive(Debug, Clone, Default)]
pub(crate) struct Programs {
    /// By image name, with or without tag, or by the last part of its path.
    pub(crate) images: BTreeMap<String, PathBuf>,
    /// Where a program of the image's name is looked for otherwise.
    pub(crate) beside: PathBuf,
}

/// Why a container can't be run, in the words of a container's waiting state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlanError {
    /// One word, such as `ImageNotFound`.
    pub(crate) reason: &'static str,
    /// A sentence.
    pub(crate) message: String,
}

impl PlanError {
    fn configuration(message: String) -> Self {
        Self { reason: CONFIGURATION_FAULT, message }
    }
}

impl Programs {
    /// The program of an image.
    fn of_image(&self, image: &str) -> Option<PathBuf> {
        let untagged = without_tag(image);
        let last = untagged.rsplit('/').next().unwrap_or(untagged);
        let mapped = [image, untagged, last].iter().find_map(|name| self.images.get(*name));
        mapped.cloned().or_else(|| self.named(last))
    }

    fn named(&self, name: &str) -> Option<PathBuf> {
        let path = self.beside.join(name);
        path.is_file().then_some(path)
    }

    /// The command line of a container: `command` replaces the image's program, `args` its arguments.
    ///
    /// # Errors
    /// When the image stands for no program here, or the environment refers to what does not exist.
    pub(crate) fn command(
        &self,
        pod: &Pod,
        container: &Container,
        configuration: &Configuration,
    ) -> Result<Command, PlanError> {
        let environment = environment(pod, container, configuration)?;
        let expand = |text: &String| expand(text, &environment);
        let mut words = container.command.iter().flatten().map(expand);
        let program = match words.next() {
            Some(program) if program.contains('/') => PathBuf::from(program),
            Some(program) => self.named(&program).unwrap_or_else(|| PathBuf::from(program)),
            None => self.image_program(container)?,
        };
        let mut command = Command::new(program);
        command = command.args(words).args(container.args.iter().flatten().map(expand));
        if let Some(directory) = &container.working_dir {
            command = command.directory(directory);
        }
        for (name, value) in environment {
            command = command.env(name, value);
        }
        Ok(command)
    }

    fn image_program(&self, container: &Container) -> Result<PathBuf, PlanError> {
        let image = container.image.as_deref().unwrap_or_default();
        self.of_image(image).ok_or_else(|| PlanError {
            reason: "ImageNotFound",
            message: format!(
                "no program stands for image {image:?}: there is none of that name in {}; name one with --image {}=PROGRAM",
                self.beside.display(),
                without_tag(image)
            ),
        })
    }
}

/// An image's name without tag and digest. A colon before the last slash belongs to a registry's port.
fn without_tag(image: &str) -> &str {
    let image = image.split('@').next().unwrap_or(image);
    match image.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => image,
    }
}

fn environment(
    pod: &Pod,
    container: &Container,
    configuration: &Configuration,
) -> Result<BTreeMap<String, String>, PlanError> {
    let mut environment = BTreeMap::new();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        let config_map = source.config_map_ref.as_ref().map(|r| (Kind::ConfigMap, &r.name, r.optional));
        let secret = source.secret_ref.as_ref().map(|r| (Kind::Secret, &r.name, r.optional));
        let Some((kind, name, optional)) = config_map.or(secret) else { continue };
        match configuration.get(kind, name) {
            Some(data) => environment.extend(variables(prefix, data)),
            None if optional == Some(true) => {}
            None => {
                let message = format!("container {}: there is no {} {name}", container.name, kind.name());
                return Err(PlanError::configuration(message));
            }
        }
    }
    for variable in container.env.iter().flatten() {
        // An optional key that is absent leaves the variable unset.
        let Some(value) = value_of(pod, variable, configuration)? else { continue };
        let value = expand(&value, &environment);
        environment.insert(variable.name.clone(), value);
    }
    Ok(environment)
}

/// The keys that can be names of variables; Kubernetes skips the others too.
fn variables<'a>(prefix: &'a str, data: &'a Data) -> impl Iterator<Item = (String, String)> + 'a {
    let usable = |name: &str| !name.is_empty() && !name.contains(['=', '\0']);
    data.iter().filter_map(move |(key, value)| {
        let name = format!("{prefix}{key}");
        usable(&name).then(|| (name, String::from_utf8_lossy(value).into_owned()))
    })
}

fn value_of(
    pod: &Pod,
    variable: &EnvVar,
    configuration: &Configuration,
) -> Result<Option<String>, PlanError> {
    let Some(source) = &variable.value_from else {
        return Ok(Some(variable.value.clone().unwrap_or_default()));
    };
    let fault = |message: String| PlanError::configuration(format!("variable {}: {message}", variable.name));
    if let Some(field) = &source.field_ref {
        let value = field_of(pod, &field.field_path);
        return value.map(Some).ok_or_else(|| fault(format!("no field {}", field.field_path)));
    }
    let config_map =
        source.config_map_key_ref.as_ref().map(|r| (Kind::ConfigMap, &r.name, &r.key, r.optional));
    let secret = source.secret_key_ref.as_ref().map(|r| (Kind::Secret, &r.name, &r.key, r.optional));
    let Some((kind, name, key, optional)) = config_map.or(secret) else {
        return Err(fault("resourceFieldRef and fileKeyRef are not supported here".to_owned()));
    };
    match configuration.get(kind, name).and_then(|data| data.get(key)) {
        Some(value) => Ok(Some(String::from_utf8_lossy(value).into_owned())),
        None if optional == Some(true) => Ok(None),
        None => Err(fault(format!("there is no key {key} in {} {name}", kind.name()))),
    }
}

/// The downward API's fields that Kubernetes allows in an environment.
fn field_of(pod: &Pod, path: &str) -> Option<String> {
    let metadata = &pod.metadata;
    let spec = pod.spec.as_ref();
    let status = pod.status.as_ref();
    let keyed = |prefix: &str, map: &Option<BTreeMap<String, String>>| {
        let key = path.strip_prefix(prefix)?.strip_suffix("']")?;
        map.as_ref()?.get(key).cloned().or(Some(String::new()))
    };
    match path {
        "metadata.name" => metadata.name.clone(),
        "metadata.namespace" => metadata.namespace.clone(),
        "metadata.uid" => metadata.uid.clone(),
        "spec.nodeName" => spec?.node_name.clone(),
        "spec.serviceAccountName" => spec?.service_account_name.clone(),
        "status.podIP" => status?.pod_ip.clone(),
        "status.hostIP" => status?.host_ip.clone(),
        "status.podIPs" => {
            let ips = status?.pod_ips.as_ref()?;
            Some(ips.iter().map(|ip| ip.ip.as_str()).collect::<Vec<_>>().join(","))
        }
        _ => keyed("metadata.labels['", &metadata.labels)
            .or_else(|| keyed("metadata.annotations['", &metadata.annotations)),
    }
}

/// Replaces `$(NAME)`; `$$(NAME)` stays as `$(NAME)`, and an unknown name stays as it is.
fn expand(text: &str, environment: &BTreeMap<String, String>) -> String {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        let (before, from) = rest.split_at(at);
        expanded.push_str(before);
        let reference = from.strip_prefix("$(").and_then(|tail| tail.split_once(')'));
        if let Some(escaped) = from.strip_prefix("$$") {
            expanded.push('$');
            rest = escaped;
        } else if let Some((value, tail)) =
            reference.and_then(|(name, tail)| environment.get(name).map(|value| (value, tail)))
        {
            expanded.push_str(value);
            rest = tail;
        } else {
            expanded.push('$');
            rest = from.get(1..).unwrap_or_default();
        }
    }
    expanded.push_str(rest);
    expanded
}

/// Whether a path names a program that can be run; for messages before anything is started.
pub(crate) fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs() -> Programs {
        let images = [("redis".to_owned(), PathBuf::from("/usr/bin/redis-server"))];
        Programs { images: images.into(), beside: PathBuf::from("/nonexistent") }
    }

    fn container(yaml: &str) -> Container {
        serde_saphyr::from_str(yaml).expect("a sound container")
    }

    fn pod() -> Pod {
        let yaml = "metadata: {name: p, namespace: n, labels: {app: x}}\nspec: {nodeName: node-1, containers: []}\nstatus: {podIP: 10.0.0.1}\n";
        serde_saphyr::from_str(yaml).expect("a sound pod")
    }

    #[test]
    fn an_image_is_found_by_its_last_part_without_tag_and_registry() {
        let programs = programs();
        for image in ["redis", "redis:7", "docker.io:5000/library/redis@sha256:0", "library/redis"] {
            let container = container(&format!("{{name: c, image: '{image}', args: [--port, '1']}}"));
            let command =
                programs.command(&pod(), &container, &Configuration::default()).expect("redis is mapped");
            assert_eq!(command.program, Path::new("/usr/bin/redis-server"), "{image}");
            assert_eq!(command.args, ["--port", "1"]);
        }
    }

    #[test]
    fn an_unknown_image_is_reported() {
        let error =
            programs().command(&pod(), &container("{name: c, image: 'nginx:1'}"), &Configuration::default());
        let error = error.expect_err("not mapped");
        assert_eq!(error.reason, "ImageNotFound");
        assert!(error.message.contains("--image nginx=PROGRAM"), "{}", error.message);
    }

    #[test]
    fn a_command_replaces_the_program_and_references_are_expanded() {
        let container = container(
            "{name: c, image: any, command: [/bin/echo, $(A)], args: [$(B), $$(A), $(MISSING)], env: [{name: A, value: one}, {name: B, value: $(A)-two}]}",
        );
        let command = programs()
            .command(&pod(), &container, &Configuration::default())
            .expect("the command is absolute");
        assert_eq!(command.program, Path::new("/bin/echo"));
        assert_eq!(command.args, ["one", "one-two", "$(A)", "$(MISSING)"]);
    }

    #[test]
    fn fields_of_the_pod_reach_the_environment() {
        let yaml = "{name: c, command: [/bin/true], env: [{name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}, {name: APP, valueFrom: {fieldRef: {fieldPath: \"metadata.labels['app']\"}}}]}";
        let command = programs().command(&pod(), &container(yaml), &Configuration::default());
        let command = command.expect("both fields exist");
        assert_eq!(command.env.get(std::ffi::OsStr::new("IP")), Some(&"10.0.0.1".into()));
        assert_eq!(command.env.get(std::ffi::OsStr::new("APP")), Some(&"x".into()));
    }

    #[test]
    fn keys_of_config_maps_and_secrets_reach_the_environment() {
        let mut configuration = Configuration::default();
        let data = |value: &str| Data::from([("k".to_owned(), value.as_bytes().to_vec())]);
        configuration.insert(Kind::ConfigMap, "cm", data("plain"));
        configuration.insert(Kind::Secret, "s", data("hidden"));
        let yaml = "{name: c, command: [/bin/true], envFrom: [{prefix: CM_, configMapRef: {name: cm}}, {secretRef: {name: gone, optional: true}}], env: [{name: S, valueFrom: {secretKeyRef: {name: s, key: k}}}, {name: NONE, valueFrom: {configMapKeyRef: {name: cm, key: gone, optional: true}}}]}";
        let command = programs().command(&pod(), &container(yaml), &configuration).expect("all is there");
        let value = |name: &str| command.env.get(std::ffi::OsStr::new(name)).and_then(|value| value.to_str());
        assert_eq!((value("CM_k"), value("S"), value("NONE")), (Some("plain"), Some("hidden"), None));
    }

    #[test]
    fn a_missing_key_is_named() {
        let yaml =
            "{name: c, command: [/bin/true], env: [{name: S, valueFrom: {secretKeyRef: {name: s, key: k}}}]}";
        let command = programs().command(&pod(), &container(yaml), &Configuration::default());
        let error = command.expect_err("there is no such secret");
        assert_eq!(error.reason, "CreateContainerConfigError");
        assert!(error.message.contains("no key k in Secret s"), "{}", error.message);
    }
}
