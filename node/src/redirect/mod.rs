//! The redirection of a pod: the plan of its namespace, and bringing the namespace in line with it.
//!
//! [`plan`] decides and is pure; [`apply`], [`verify`] and [`remove`] bring a namespace in line with a
//! plan over netlink. All of them may be repeated at any time. Connections that are older than the rules are entered
//! into connection tracking, so that the rules leave them alone; none is cut when the rules come, and none when they go.

mod connections;
mod plan;
mod routing;
mod rules;
mod settings;

use std::fmt;

use ambit_net::{Netns, NetnsError};

use connections::TrackError;
pub(crate) use connections::{connections, is_mesh};
use plan::{COMPLETE, former_routes};
pub use plan::{
    LocalRoute, Options, OtherProtocols, PROBE_V4, PROBE_V6, Plan, ROUTE_PRIORITY, ROUTE_TABLE, Setting,
    Stage, TABLE, plan,
};
pub(crate) use routing::Routing;
pub use routing::RoutingError;
pub use settings::{FormerSettings, SettingError};

use crate::nft::{self, Difference, NftError};

/// Why a namespace could not be brought in line.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// The packet rules.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// Routing.
    #[error(transparent)]
    Routing(#[from] RoutingError),
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] NetnsError),
}

/// A difference between a namespace and its plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The packet rules differ.
    Rules(Difference),
    /// A routing rule or its route is missing.
    Route(LocalRoute),
    /// A kernel setting has another value.
    Setting(Setting),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rules(difference) => difference.fmt(f),
            Self::Route(route) => write!(f, "{:?} route of mark {:#x} is missing", route.family, route.mark),
            Self::Setting(setting) => write!(f, "{} is not {}", setting.name, setting.value),
        }
    }
}

/// Brings the namespace in line with `plan` and returns the differences that it found. Routing comes first, since the
/// rules make packets depend on it; settings come last, since some are there only once rules track connections. Nothing
/// else is touched. Settings that cannot be written are left as they are.
pub async fn apply(inside: &Netns, plan: &Plan) -> Result<Vec<Fault>, RedirectError> {
    let routing = Routing::open(inside).await?;
    routing.loopback_up().await?;
    let mut faults = Vec::new();
    for route in &plan.routes {
        if routing.ensure(*route).await? {
            faults.push(Fault::Route(*route));
        }
    }
    if let Some(difference) = nft::verify(inside, plan.table.clone()).await? {
        program(inside, plan).await?;
        if difference != Difference::NoTable {
            for former in former_routes() {
                routing.remove(former).await?;
            }
        }
        faults.push(Fault::Rules(difference));
    }
    let settings::Ensured { changed, refused } = settings::ensure(inside, plan.settings).await?;
    faults.extend(changed.into_iter().map(Fault::Setting));
    for error in refused {
        tracing::debug!(netns = %inside.id(), %error, "setting left as it is");
    }
    Ok(faults)
}

/// Whether the namespace carries our rules, complete or not, of this version or another.
pub async fn is_present(inside: &Netns) -> Result<bool, NftError> {
    Ok(nft::tables(inside).await?.iter().any(|name| name == TABLE))
}

/// The values of the settings that [`apply`] changes, for [`remove`] to restore.
pub async fn current_settings(inside: &Netns) -> Result<FormerSettings, NetnsError> {
    settings::current(inside, plan(&Options::default(), Stage::In).settings).await
}

/// The settings of [`apply`] that cannot be written in the namespace, which is left with our values of the others.
pub async fn unwritable_settings(inside: &Netns) -> Result<Vec<SettingError>, NetnsError> {
    Ok(settings::ensure(inside, plan(&Options::default(), Stage::In).settings).await?.refused)
}

/// Puts the rules in place. Where older connections could not be entered into tracking, the opening rules stay, and the
/// next call tries again.
async fn program(inside: &Netns, plan: &Plan) -> Result<(), NftError> {
    let Some(opening) = &plan.opening else { return nft::apply(inside, plan.table.clone()).await };
    // Tracking has known every connection since the rules that are to be replaced were applied. What it does not know
    // now was captured, and would be taken for an older connection.
    if nft::chains(inside, TABLE).await?.iter().any(|name| name == COMPLETE) {
        return nft::apply(inside, plan.table.clone()).await;
    }
    if let Err(error) = open(inside, opening).await? {
        tracing::warn!(
            netns = %inside.id(),
            %error,
            "connections older than the redirection are not tracked: those that the other side speaks on first may be \
             cut, and outgoing connections that tracking loses are not held back"
        );
        return Ok(());
    }
    nft::apply(inside, plan.table.clone()).await
}

/// Applies the opening rules and enters the older connections into tracking. The rules let nothing in that tracking does
/// not know, so connections are entered before as well; what began between the two is entered after.
async fn open(inside: &Netns, opening: &nft::Table) -> Result<Result<(), TrackError>, NftError> {
    let before = connections::track(inside).await;
    nft::apply(inside, opening.clone()).await?;
    let mut entered = match before {
        Ok(entered) => entered,
        Err(error) => return Ok(Err(error)),
    };
    Ok(async {
        entered.extend(connections::track(inside).await?);
        connections::forget_ended(inside, entered).await
    }
    .await)
}

/// The differences between the namespace and `plan`. Changes nothing.
pub async fn verify(inside: &Netns, plan: &Plan) -> Result<Vec<Fault>, RedirectError> {
    let routing = Routing::open(inside).await?;
    let mut faults = Vec::new();
    for route in &plan.routes {
        if !routing.holds(*route).await? {
            faults.push(Fault::Route(*route));
        }
    }
    if let Some(difference) = nft::verify(inside, plan.table.clone()).await? {
        faults.push(Fault::Rules(difference));
    }
    faults.extend(settings::differing(inside, plan.settings).await?.into_iter().map(Fault::Setting));
    Ok(faults)
}

/// Removes whatever [`apply`] made and gives the settings that it changed their former values. The rules go first: they
/// make packets depend on the routing.
pub async fn remove(inside: &Netns, former: &FormerSettings) -> Result<(), RedirectError> {
    nft::remove(inside, TABLE).await?;
    let routing = Routing::open(inside).await?;
    let Plan { routes, settings, .. } = plan(&Options::default(), Stage::In);
    for route in routes.into_iter().chain(former_routes()) {
        routing.remove(route).await?;
    }
    for error in settings::restore(inside, settings, former.clone()).await? {
        tracing::warn!(netns = %inside.id(), %error, "setting not restored");
    }
    Ok(())
}
