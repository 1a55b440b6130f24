//! The pod of a process, from the control groups that kubelet made.

/// The classes of pods that have groups of their own, as they end a group's name.
const QOS: [&str; 2] = ["-burstable", "-besteffort"];

/// The uid of the pod in whose control group a process with this `/proc/PID/cgroup` is.
///
/// kubelet names a pod's group `podUID`, or `kubepods-QOS-podUID.slice` with underscores under systemd, where a group above
/// all pods may come before, as in kind's `kubelet-kubepods-podUID.slice`. The outermost such group counts, if it is not
/// below a container's: a container may make groups of any name below its own. Hierarchies (cgroup v1) that name
/// different pods prove nothing.
pub(super) fn pod(text: &str) -> Option<String> {
    // cgroups(7): hierarchy-ID:controllers:path
    let paths = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let mut pods = paths
        .filter_map(|path| path.split('/').take_while(|group| !is_container(group)).find_map(uid_of_group));
    let first = pods.next()?;
    pods.all(|other| other == first).then_some(first)
}

/// Whether the group is that of a container of containerd or CRI-O under systemd.
fn is_container(name: &str) -> bool {
    name.ends_with(".scope") && (name.starts_with("cri-containerd-") || name.starts_with("crio-"))
}

fn uid_of_group(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => {
            let (above, uid) = slice.rsplit_once("-pod")?;
            let above = QOS.iter().find_map(|qos| above.strip_suffix(qos)).unwrap_or(above);
            if above != "kubepods" && !above.ends_with("-kubepods") {
                return None;
            }
            uid.replace('_', "-")
        }
        None => name.strip_prefix("pod")?.to_owned(),
    };
    // A UUID; the uid of a static pod is the hash of its manifest.
    let is_uid = [32, 36].contains(&uid.len()) && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    is_uid.then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b0bd2b6-4f4c-4e31-9d6b-0a4f4f6a7d10";
    const OTHER: &str = "1c1ce3c7-4f4c-4e31-9d6b-0a4f4f6a7d10";

    #[test]
    fn pods_are_known_by_the_groups_of_every_driver() {
        let systemd = UID.replace('-', "_");
        for path in [
            format!("0::/kubepods/burstable/pod{UID}/4d0c"),
            format!("0::/../../pod{UID}/4d0c"),
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice/cri-4d.scope"
            ),
            format!("0::/../kubepods-pod{systemd}.slice/cri-containerd-4d0c.scope"),
            format!(
                "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/\
                 kubelet-kubepods-besteffort-pod{systemd}.slice/cri-containerd-4d0c.scope"
            ),
            format!("0::/../../kubelet-kubepods-pod{systemd}.slice/cri-containerd-4d0c.scope"),
            format!("12:cpu,cpuacct:/n1/kubepods/pod{UID}/4d0c\n1:name=systemd:/\n0::/"),
        ] {
            assert_eq!(pod(&path), Some(UID.into()), "{path}");
        }
        let hash = "f7c1d2e3a4b5968778695a4b3c2d1e0f";
        assert_eq!(pod(&format!("0::/kubepods/pod{hash}/4d0c")), Some(hash.into()));
    }

    #[test]
    fn groups_below_a_container_prove_nothing() {
        assert_eq!(pod(&format!("0::/kubepods/pod{UID}/4d0c/kubepods/pod{OTHER}/1")), Some(UID.into()));
        assert_eq!(pod(&format!("2:cpu:/kubepods/pod{UID}/1\n3:pids:/kubepods/pod{OTHER}/1")), None);
        let systemd = OTHER.replace('-', "_");
        for path in [
            format!("0::/../cri-containerd-4d0c.scope/kubepods-pod{systemd}.slice"),
            format!("0::/../crio-4d0c.scope/pod{OTHER}"),
            format!("0::/notkubepods-pod{systemd}.slice"),
        ] {
            assert_eq!(pod(&path), None, "{path}");
        }
        for path in ["0::/", "0::/system.slice/podman.service", "0::/user.slice/pod1", "", "nonsense"] {
            assert_eq!(pod(path), None, "{path}");
        }
    }
}
