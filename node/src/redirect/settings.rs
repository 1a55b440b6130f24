//! Settings of the kernel in a pod's namespace (sysctl(8)).

use std::io;
use std::path::PathBuf;

use ambit_net::{Netns, NetnsError};

use super::plan::Setting;

/// Why a setting could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum SettingError {
    /// The namespace could not be entered.
    #[error("settings: {0}")]
    Namespace(#[from] NetnsError),
    /// The kernel does not have it, or it may not be written: `/proc/sys` is read-only in most containers.
    #[error("settings: write {name}: {source}")]
    Refused {
        /// Its name.
        name: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// Those of `settings` that have another value, or none.
pub(super) async fn differing(
    inside: &Netns,
    settings: &'static [Setting],
) -> Result<Vec<Setting>, SettingError> {
    Ok(inside.run(move || settings.iter().filter(|setting| !holds(setting)).copied().collect()).await?)
}

/// Gives each of `settings` its value and returns those that had another.
pub(super) async fn ensure(
    inside: &Netns,
    settings: &'static [Setting],
) -> Result<Vec<Setting>, SettingError> {
    let ensured = inside.run(move || {
        let differing = settings.iter().filter(|setting| !holds(setting));
        differing.map(|setting| write(setting, setting.value).map(|()| *setting)).collect()
    });
    ensured.await?
}

/// Gives each of `settings` that still has our value the kernel's own.
pub(super) async fn restore(inside: &Netns, settings: &'static [Setting]) -> Result<(), SettingError> {
    let restored = inside.run(move || {
        let mut ours = settings.iter().filter(|setting| holds(setting));
        ours.try_for_each(|setting| write(setting, setting.default))
    });
    restored.await?
}

/// Where the namespace of the calling thread shows it.
fn path(setting: &Setting) -> PathBuf {
    PathBuf::from("/proc/sys").join(setting.name.replace('.', "/"))
}

/// Whether it has our value.
fn holds(setting: &Setting) -> bool {
    std::fs::read_to_string(path(setting)).is_ok_and(|text| text.trim().parse() == Ok(setting.value))
}

fn write(setting: &Setting, value: u32) -> Result<(), SettingError> {
    std::fs::write(path(setting), value.to_string())
        .map_err(|source| SettingError::Refused { name: setting.name, source })
}
