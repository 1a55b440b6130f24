//! Session persistence of a rule (Gateway API, GEP-1619).

use ambit_api::l7;
use serde::Deserialize;

use super::route::duration;

/// As written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct SessionPersistence {
    session_name: Option<String>,
    absolute_timeout: Option<String>,
    idle_timeout: Option<String>,
    #[serde(rename = "type", default)]
    kind: Carrier,
    cookie_config: Option<CookieConfig>,
}

#[derive(Debug, Default, PartialEq, Deserialize)]
enum Carrier {
    #[default]
    Cookie,
    Header,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CookieConfig {
    #[serde(default)]
    lifetime_type: Lifetime,
}

#[derive(Debug, Default, PartialEq, Deserialize)]
enum Lifetime {
    #[default]
    Session,
    Permanent,
}

impl SessionPersistence {
    /// Without a name where it has none of its own: the index knows the route.
    ///
    /// # Errors
    /// What can't be followed.
    pub(super) fn lower(self) -> Result<l7::SessionPersistence, String> {
        let span = |field: &str, text: Option<String>| match text {
            None => Ok(0),
            Some(text) => match duration(&text) {
                Ok(0) => Err(format!("sessionPersistence.{field} is no time at all")),
                other => other.map_err(|fault| format!("sessionPersistence.{field}: {fault}")),
            },
        };
        let in_header = self.kind == Carrier::Header;
        if in_header && self.cookie_config.is_some() {
            return Err("sessionPersistence.cookieConfig is for the type Cookie".to_owned());
        }
        let permanent = self.cookie_config.is_some_and(|config| config.lifetime_type == Lifetime::Permanent);
        if permanent && self.absolute_timeout.is_none() {
            return Err("sessionPersistence: a permanent cookie needs an absoluteTimeout".to_owned());
        }
        Ok(l7::SessionPersistence {
            name: self.session_name.unwrap_or_default(),
            in_header,
            permanent,
            absolute_nanos: span("absoluteTimeout", self.absolute_timeout)?,
            idle_nanos: span("idleTimeout", self.idle_timeout)?,
        })
    }
}
