//! Kernel settings of a pod's namespace (sysctl(8)): reading, changing and restoring them.
//!
//! `/proc/sys` is read-only in most containers, and old kernels lack some settings. A setting that cannot be
//! written weakens a guarantee ([`Setting::guarantee`]) and fails nothing; the agent reports it at start.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use ambit_net::{Netns, NetnsError};
use serde::{Deserialize, Serialize};

use super::plan::Setting;

/// A setting that could not be changed.
#[derive(Debug, thiserror::Error)]
#[error("write {}: {source}", setting.name)]
pub struct SettingError {
    /// The setting.
    pub setting: Setting,
    /// The system's answer.
    pub source: io::Error,
}

/// The values that settings had before the enrolment, by name. Names that this version does not know are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FormerSettings(BTreeMap<String, u32>);

impl FormerSettings {
    /// The value before the enrolment; the kernel's default if it is not known.
    fn value(&self, setting: &Setting) -> u32 {
        self.0.get(setting.name).copied().unwrap_or(setting.default)
    }
}

/// What [`ensure`] did.
#[derive(Debug, Default)]
pub(super) struct Ensured {
    /// Settings that had another value.
    pub(super) changed: Vec<Setting>,
    /// Settings that have another value still.
    pub(super) refused: Vec<SettingError>,
}

/// The present values of `settings`. Those that the kernel does not have are left out.
pub(super) async fn current(
    inside: &Netns,
    settings: &'static [Setting],
) -> Result<FormerSettings, NetnsError> {
    inside
        .run(move || {
            let known = settings.iter().filter_map(|setting| Some((setting.name.to_owned(), read(setting)?)));
            FormerSettings(known.collect())
        })
        .await
}

/// Those of `settings` that have another value, or none.
pub(super) async fn differing(
    inside: &Netns,
    settings: &'static [Setting],
) -> Result<Vec<Setting>, NetnsError> {
    inside.run(move || settings.iter().filter(|setting| !holds(setting)).copied().collect()).await
}

/// Gives each of `settings` its value, as far as the system lets it.
pub(super) async fn ensure(inside: &Netns, settings: &'static [Setting]) -> Result<Ensured, NetnsError> {
    inside
        .run(move || {
            let mut ensured = Ensured::default();
            for setting in settings.iter().filter(|setting| !holds(setting)) {
                match write(setting, setting.value) {
                    Ok(()) => ensured.changed.push(*setting),
                    Err(error) => ensured.refused.push(error),
                }
            }
            ensured
        })
        .await
}

/// Gives each of `settings` that still has our value its former one, and returns those for which that failed.
pub(super) async fn restore(
    inside: &Netns,
    settings: &'static [Setting],
    former: FormerSettings,
) -> Result<Vec<SettingError>, NetnsError> {
    inside
        .run(move || {
            let ours = settings.iter().filter(|setting| holds(setting));
            let changed = ours.filter(|setting| former.value(setting) != setting.value);
            changed.filter_map(|setting| write(setting, former.value(setting)).err()).collect()
        })
        .await
}

/// The file of a setting, in the namespace of the calling thread.
fn path(setting: &Setting) -> PathBuf {
    PathBuf::from("/proc/sys").join(setting.name.replace('.', "/"))
}

fn read(setting: &Setting) -> Option<u32> {
    std::fs::read_to_string(path(setting)).ok()?.trim().parse().ok()
}

fn holds(setting: &Setting) -> bool {
    read(setting) == Some(setting.value)
}

fn write(setting: &Setting, value: u32) -> Result<(), SettingError> {
    std::fs::write(path(setting), value.to_string())
        .map_err(|source| SettingError { setting: *setting, source })
}
