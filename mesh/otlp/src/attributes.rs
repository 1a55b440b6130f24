//! Attributes and times in the form that the protocol has for them.

use std::time::{SystemTime, UNIX_EPOCH};

use ambit_api::otlp::common::v1::any_value::Value;
use ambit_api::otlp::common::v1::{AnyValue, KeyValue};

/// An attribute whose value is a text.
pub fn text(key: impl Into<String>, value: impl Into<String>) -> KeyValue {
    attribute(key.into(), Value::StringValue(value.into()))
}

/// An attribute whose value is a number. One above `i64::MAX` is that.
pub fn integer(key: impl Into<String>, value: impl TryInto<i64>) -> KeyValue {
    attribute(key.into(), Value::IntValue(value.try_into().unwrap_or(i64::MAX)))
}

fn attribute(key: String, value: Value) -> KeyValue {
    KeyValue { key, value: Some(AnyValue { value: Some(value) }) }
}

/// At most so many bytes of a text, cut between characters.
pub fn bounded(text: &str, most: usize) -> &str {
    text.get(..text.floor_char_boundary(most)).unwrap_or_default()
}

/// Nanoseconds since the epoch; 0 for a time before it.
pub fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_text_is_cut_between_characters() {
        for (all, most, wanted) in [("abc", 5, "abc"), ("abc", 2, "ab"), ("aäb", 2, "a"), ("ä", 0, "")] {
            assert_eq!(bounded(all, most), wanted, "{all} {most}");
        }
    }

    #[test]
    fn times_before_the_epoch_are_zero() {
        assert_eq!(nanos(UNIX_EPOCH + Duration::from_micros(3)), 3000);
        assert_eq!(nanos(UNIX_EPOCH - Duration::from_secs(1)), 0);
    }
}
