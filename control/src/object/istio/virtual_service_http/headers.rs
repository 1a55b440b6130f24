//! How a rule or one of its destinations changes headers.

use std::collections::BTreeMap;

use ambit_api::l7;
use ambit_api::l7::filter::Kind;
use serde::Deserialize;

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(in super::super) struct Headers {
    request: HeaderChanges,
    response: HeaderChanges,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
struct HeaderChanges {
    set: BTreeMap<String, String>,
    add: BTreeMap<String, String>,
    remove: Vec<String>,
}

impl Headers {
    pub(super) fn lower(&self) -> Result<Vec<Kind>, String> {
        let mut kinds = Vec::new();
        if self.request != HeaderChanges::default() {
            kinds.push(Kind::RequestHeaders(self.request.lower()?));
        }
        if self.response != HeaderChanges::default() {
            kinds.push(Kind::ResponseHeaders(self.response.lower()?));
        }
        Ok(kinds)
    }
}

impl HeaderChanges {
    /// Envoy removes first: what is removed and added is set, and what is removed and set is set.
    fn lower(&self) -> Result<l7::HeaderChange, String> {
        let removed = |name: &str| self.remove.iter().any(|gone| gone.eq_ignore_ascii_case(name));
        let known =
            |name: &str, all: &BTreeMap<String, String>| all.keys().any(|key| key.eq_ignore_ascii_case(name));
        let mut change = l7::HeaderChange::default();
        for (name, value) in &self.set {
            change.set.push(header(name, value)?);
        }
        for (name, value) in &self.add {
            let list = if removed(name) { &mut change.set } else { &mut change.add };
            list.push(header(name, value)?);
        }
        let gone = self.remove.iter().filter(|name| !known(name, &self.set) && !known(name, &self.add));
        change.remove = gone.cloned().collect();
        Ok(change)
    }
}

fn header(name: &str, value: &str) -> Result<l7::Header, String> {
    // Envoy's operators stand between percent signs.
    if value.replace("%%", "").contains('%') {
        return Err(format!("the value {value:?} of header {name} has operators, which are not supported"));
    }
    let name = if name.eq_ignore_ascii_case(":authority") { "host" } else { name };
    Ok(l7::Header { name: name.to_owned(), value: value.replace("%%", "%") })
}
