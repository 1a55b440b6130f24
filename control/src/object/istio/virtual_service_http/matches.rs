//! Which requests a rule is for.

use std::collections::BTreeMap;

use ambit_api::l7;
use serde::Deserialize;

use super::Referents;

/// What a text must be; nothing: anything that is there.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(in super::super) struct Text {
    pub(in super::super) exact: Option<String>,
    pub(in super::super) prefix: Option<String>,
    pub(in super::super) regex: Option<String>,
}

type Texts = BTreeMap<String, Text>;

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(in super::super) struct Match {
    pub(in super::super) name: String,
    pub(in super::super) uri: Option<Text>,
    pub(in super::super) ignore_uri_case: bool,
    pub(in super::super) scheme: Option<Text>,
    pub(in super::super) method: Option<Text>,
    pub(in super::super) authority: Option<Text>,
    pub(in super::super) headers: Texts,
    pub(in super::super) without_headers: Texts,
    pub(in super::super) query_params: Texts,
    pub(in super::super) port: u32,
    pub(in super::super) source_labels: BTreeMap<String, String>,
    pub(in super::super) source_namespace: String,
    pub(in super::super) gateways: Vec<String>,
    pub(in super::super) stat_prefix: String,
}

impl Text {
    /// The match; presence where nothing is asked of the text. A prefix of nothing and a pattern of anything ask nothing.
    pub(super) fn lower(&self) -> Result<l7::StringMatch, String> {
        use l7::string_match::Kind::{Exact, Prefix, Present, Regex};
        let kind = match (&self.exact, &self.prefix, &self.regex) {
            (None, None, None) => Present(true),
            (Some(text), None, None) | (None, Some(text), None) | (None, None, Some(text))
                if text.is_empty() =>
            {
                Present(true)
            }
            (None, None, Some(text)) if text == "*" => Present(true),
            (Some(text), None, None) => Exact(text.clone()),
            (None, Some(text), None) => Prefix(text.clone()),
            (None, None, Some(text)) => Regex(text.clone()),
            _ => return Err("one of `exact`, `prefix` and `regex` must be given".to_owned()),
        };
        Ok(l7::StringMatch { kind: Some(kind) })
    }

    fn lower_path(&self, ignore_case: bool) -> Result<l7::PathMatch, String> {
        use l7::path_match::Kind::{Exact, Regex, TextPrefix};
        use l7::string_match::Kind as Of;
        let kind = match self.lower()?.kind {
            Some(Of::Exact(path)) => Exact(path),
            Some(Of::Regex(path)) => Regex(path),
            Some(Of::Prefix(path)) => TextPrefix(path),
            Some(Of::Present(_)) | None => TextPrefix("/".to_owned()),
        };
        Ok(l7::PathMatch { kind: Some(kind), ignore_case })
    }
}

impl Match {
    /// The match; what can't be read of it is added to `faults` and counts as met.
    pub(super) fn lower(&self, referents: &dyn Referents, faults: &mut Vec<String>) -> l7::Match {
        let mut lowered = l7::Match {
            port: self.port,
            source_namespace: self.source_namespace.clone(),
            ..l7::Match::default()
        };
        let mut note = |fault: String| faults.push(fault);
        // Envoy: a match without a path is one of the prefix `/`.
        let path = self
            .uri
            .as_ref()
            .map_or_else(|| Text::default().lower_path(false), |uri| uri.lower_path(self.ignore_uri_case));
        lowered.path = path.map_err(&mut note).ok();
        let mut text = |text: &Option<Text>| {
            let text = text.as_ref().filter(|text| **text != Text::default())?;
            text.lower().map_err(&mut note).ok()
        };
        lowered.scheme = text(&self.scheme);
        lowered.authority = text(&self.authority);
        lowered.method_match = text(&self.method);
        let mut fields = |texts: &Texts, invert: bool| {
            let lower = |(name, text): (&String, &Text)| {
                let value = text.lower().map_err(&mut note).ok();
                value.map(|value| l7::FieldMatch { name: name.clone(), value: Some(value), invert })
            };
            texts.iter().filter_map(lower).collect::<Vec<_>>()
        };
        lowered.headers = fields(&self.headers, false);
        lowered.headers.extend(fields(&self.without_headers, true));
        // Istio, HTTPMatchRequest.headers: these keys are ignored.
        lowered
            .headers
            .retain(|field| !["uri", "scheme", "method", "authority"].contains(&field.name.as_str()));
        lowered.query = fields(&self.query_params, false);
        if !self.source_labels.is_empty() {
            let clients = referents.clients(&self.source_labels, &self.source_namespace);
            lowered.clients = clients.map_err(&mut note).ok();
        }
        lowered
    }
}
