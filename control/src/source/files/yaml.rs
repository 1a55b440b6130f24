//! YAML into types, with line and field of what does not fit.

use std::fmt;

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Options, Spanned};

use crate::intake::Mismatch;

fn options() -> Options {
    serde_saphyr::options! { with_snippet: false }
}

/// Reads one document.
pub(super) fn read<T: DeserializeOwned>(text: &str) -> Result<T, Mismatch> {
    // JSON is YAML too (YAML 1.2.2 §1.3) and takes a fraction of the time as what it is. What does not fit is read again, for its line.
    if text.trim_start().starts_with('{')
        && let Ok(value) = serde_json::from_str(text)
    {
        return Ok(value);
    }
    let mut field = None;
    let result = serde_saphyr::with_deserializer_from_str_with_options(text, options(), |deserializer| {
        let mut track = serde_path_to_error::Track::new();
        let result = T::deserialize(serde_path_to_error::Deserializer::new(deserializer, &mut track));
        if result.is_err() {
            field = Some(track.path().to_string()).filter(|path| path != ".");
        }
        result
    });
    result.map_err(|error| mismatch(&error, field))
}

fn mismatch(error: &serde_saphyr::Error, field: Option<String>) -> Mismatch {
    let text = error.without_snippet().to_string();
    // The line is reported beside the message, not in it.
    let message = match text.split_once(": ") {
        Some((place, message)) if place.starts_with("error: line ") => message,
        _ => text.split(" at line ").next().unwrap_or(&text),
    };
    let line = error.location().map(|location| location.line()).filter(|line| *line > 0);
    Mismatch { line, field, message: message.trim().to_owned() }
}

/// Steps of a path that are followed: no field of ours is deeper, and each costs a reading of the text.
const MAX_STEPS: usize = 16;

/// The line of a field's value, as `spec.ports[0].port`, or of the nearest enclosing value that there is.
pub(super) fn locate(text: &str, field: &str) -> Option<u64> {
    locate_as(text, field, Wanted::Value)
}

/// The same, but the line where the field's name is.
pub(super) fn locate_name(text: &str, field: &str) -> Option<u64> {
    locate_as(text, field, Wanted::Name)
}

fn locate_as(text: &str, field: &str, wanted: Wanted) -> Option<u64> {
    let steps: Vec<Step<'_>> = field.split('.').flat_map(steps).take(MAX_STEPS).collect();
    // A path that ends early leads to what encloses it.
    (1..=steps.len()).rev().find_map(|n| {
        let found = serde_saphyr::with_deserializer_from_str_with_options(text, options(), |deserializer| {
            Walk(steps.get(..n).unwrap_or_default(), wanted).deserialize(deserializer)
        });
        found.ok().flatten()
    })
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Key(&'a str),
    Item(usize),
}

/// `ports[0]` is two steps.
fn steps(part: &str) -> impl Iterator<Item = Step<'_>> {
    let (key, rest) = part.split_once('[').unwrap_or((part, ""));
    let items = rest.split(['[', ']']).filter_map(|index| index.parse().ok()).map(Step::Item);
    Some(key).filter(|key| !key.is_empty()).map(Step::Key).into_iter().chain(items)
}

/// What of a field is looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Name,
    Value,
}

struct Walk<'a>(&'a [Step<'a>], Wanted);

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = Option<u64>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<u64>, D::Error> {
        if self.0.is_empty() {
            let value = <Spanned<IgnoredAny> as serde::Deserialize>::deserialize(deserializer)?;
            return Ok(Some(value.referenced.line()));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = Option<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping or a sequence")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<u64>, A::Error> {
        let mut line = None;
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            match self.0.split_first() {
                Some((Step::Key(wanted), [])) if *wanted == key.value && self.1 == Wanted::Name => {
                    map.next_value::<IgnoredAny>()?;
                    line = Some(key.referenced.line());
                }
                Some((Step::Key(wanted), rest)) if *wanted == key.value => {
                    line = map.next_value_seed(Walk(rest, self.1))?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(line)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Option<u64>, A::Error> {
        if let Some((Step::Item(wanted), rest)) = self.0.split_first() {
            for _ in 0..*wanted {
                if items.next_element::<IgnoredAny>()?.is_none() {
                    return Ok(None);
                }
            }
            let line = items.next_element_seed(Walk(rest, self.1))?.flatten();
            while items.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(line);
        }
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "metadata:\n  name: a\nspec:\n  ports:\n  - port: 1\n  - name: b\n    port: 2\n";

    #[test]
    fn a_field_is_found_by_its_path() {
        assert_eq!(locate(TEXT, "spec.ports[1].port"), Some(7));
        assert_eq!(locate(TEXT, "metadata.name"), Some(2));
    }

    #[test]
    fn a_name_is_found_above_its_value() {
        assert_eq!(locate(TEXT, "spec.ports"), Some(5));
        assert_eq!(locate_name(TEXT, "spec.ports"), Some(4));
        assert_eq!(locate_name(TEXT, "spec.ports[1].port"), Some(7));
        assert_eq!(locate_name("{\n\"spec\": {\n\"a\":\n1}}", "spec.a"), Some(3));
    }

    #[test]
    fn a_missing_field_is_located_by_what_encloses_it() {
        assert_eq!(locate(TEXT, "spec.ports[0].targetPort"), Some(5));
        assert_eq!(locate(TEXT, "nothing"), None);
    }

    #[test]
    fn a_value_of_the_wrong_type_is_reported_with_line_and_field() {
        #[derive(Debug, serde::Deserialize)]
        struct Outer {
            #[serde(rename = "spec")]
            _spec: Inner,
        }
        #[derive(Debug, serde::Deserialize)]
        struct Inner {
            #[serde(rename = "count")]
            _count: u16,
        }
        let mismatch = read::<Outer>("spec:\n  other: 1\n  count: many\n").unwrap_err();
        assert_eq!((mismatch.line, mismatch.field.as_deref()), (Some(3), Some("spec.count")), "{mismatch:?}");
        assert!(!mismatch.message.contains("line"), "{mismatch:?}");
    }

    #[test]
    fn broken_syntax_is_reported_with_its_line() {
        let mismatch = read::<serde_json::Value>("a: 1\nb: [1, 2\nc: 3\n").unwrap_err();
        assert!(mismatch.line.is_some(), "{mismatch:?}");
    }
}
