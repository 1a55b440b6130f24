//! The one form of a path: what waypoints match, authorize and forward, and what paths of policies are compared with.
//!
//! RFC 3986 §6.2.2: what needs no encoding is decoded, escapes are in capitals, dot segments are removed; beyond that slashes
//! that follow one another are one. An encoded slash or backslash stays as it is: it is part of a segment.
//!
//! Delimiters such as `:` and `;` stay as they were written, as an application may distinguish `%3B` from `;`. Policies do
//! not: see [`compared`].

use std::borrow::Cow;

use ambit_api::security::{StringMatch, string_match::MatchType};

use crate::path::Template;

/// The normal form of a request's path. `None` for what is no path: a bad escape, NUL, a backslash, more `..` than there are
/// segments, or one that only a reader of encoded slashes or of parameters would see ([`hides_dots`]).
pub fn normal_path(path: &str) -> Option<String> {
    let rest = path.strip_prefix('/')?;
    let mut segments: Vec<String> = Vec::new();
    let mut is_directory = false;
    for segment in rest.split('/') {
        let segment = decode(segment)?;
        if hides_dots(&segment) {
            return None;
        }
        is_directory = matches!(segment.as_str(), "" | "." | "..");
        match segment.as_str() {
            "" | "." => {}
            ".." => drop(segments.pop()?),
            _ => segments.push(segment),
        }
    }
    let mut normal = String::with_capacity(path.len());
    for segment in &segments {
        normal.push('/');
        normal.push_str(segment);
    }
    if is_directory || normal.is_empty() {
        normal.push('/');
    }
    Some(normal)
}

/// Whether a decoded segment has `.` or `..` beside an encoded slash or backslash, or before parameters: `..%2Fadmin`, `..;a=b`.
/// Applications that decode slashes late or cut parameters off would leave the directory that a policy has seen.
pub fn hides_dots(segment: &str) -> bool {
    let mut parts = segment.split("%2F").flat_map(|part| part.split("%5C"));
    parts.any(|part| {
        let name = part.split(';').next().and_then(|name| name.split("%3B").next()).unwrap_or_default();
        matches!(name, "." | "..") && name.len() < segment.len()
    })
}

/// A path of a policy in the form that paths of requests have. `None` where no request can have a path like that, or where
/// it is not clear what it is meant for.
pub fn normal_text(text: &StringMatch) -> Option<StringMatch> {
    let match_type = match text.match_type.as_ref()? {
        MatchType::Exact(path) => MatchType::Exact(normal_path(readable(path)?)?),
        MatchType::Prefix(path) => MatchType::Prefix(normal_prefix(readable(path)?)?),
        MatchType::Suffix(path) => MatchType::Suffix(normal_suffix(readable(path)?)?),
        MatchType::Presence(()) => MatchType::Presence(()),
    };
    Some(StringMatch { match_type: Some(match_type) })
}

/// A template in the form that paths of requests have; `None` as for [`normal_text`].
pub fn normal_template(template: &str) -> Option<String> {
    let rest = template.strip_prefix('/')?;
    let mut normal = String::with_capacity(template.len());
    let mut is_directory = false;
    for segment in rest.split('/') {
        let segment = match Template::is_template(segment) {
            true => segment.to_owned(),
            false => decode(readable(segment)?)?,
        };
        is_directory = matches!(segment.as_str(), "" | ".");
        match segment.as_str() {
            "" | "." => {}
            ".." => return None,
            _ => {
                normal.push('/');
                normal.push_str(&segment);
            }
        }
    }
    if is_directory || normal.is_empty() {
        normal.push('/');
    }
    Some(normal)
}

/// The last segment may go on, so nothing is known of it: dots at its end are not resolved.
fn normal_prefix(prefix: &str) -> Option<String> {
    let (before, last) = prefix.rsplit_once('/')?;
    let mut normal = normal_path(&format!("{before}/"))?;
    normal.push_str(&decode(last)?);
    Some(normal)
}

/// The first segment may begin earlier; what `..` at the start takes away is not known.
fn normal_suffix(suffix: &str) -> Option<String> {
    let Some((first, rest)) = suffix.split_once('/') else { return decode(suffix) };
    let mut normal = decode(first)?;
    normal.push_str(&normal_path(&format!("/{rest}"))?);
    Some(normal)
}

/// `None` for what begins a query or fragment, and for control characters.
fn readable(path: &str) -> Option<&str> {
    (!path.contains(|letter: char| matches!(letter, '?' | '#') || letter.is_ascii_control())).then_some(path)
}

/// A path in normal form as policies compare it: what a segment may have as it is (RFC 3986 §3.3: `:`, `@` and sub-delims, and
/// brackets, which clients send too) is compared as such, however the client wrote it. An encoded slash stays encoded.
pub(crate) fn compared(path: &str) -> Cow<'_, str> {
    const AS_WRITTEN: &[u8] = b":@!$&'()*+,;=[]";
    if !path.contains('%') {
        return Cow::Borrowed(path);
    }
    let mut compared = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((before, behind)) = rest.split_once('%') {
        compared.push_str(before);
        let byte = behind.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (byte, behind.get(2..)) {
            (Some(byte), Some(after)) if AS_WRITTEN.contains(&byte) => {
                compared.push(char::from(byte));
                rest = after;
            }
            _ => {
                compared.push('%');
                rest = behind;
            }
        }
    }
    compared.push_str(rest);
    Cow::Owned(compared)
}

fn decode(segment: &str) -> Option<String> {
    let mut decoded = String::with_capacity(segment.len());
    let mut rest = segment;
    while let Some(letter) = rest.chars().next() {
        match letter {
            '\\' => return None,
            '%' => {
                let digits =
                    rest.get(1..3).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
                match u8::from_str_radix(digits, 16).ok()? {
                    0 => return None,
                    // RFC 3986 §2.3: unreserved.
                    byte if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => {
                        decoded.push(char::from(byte));
                    }
                    _ => {
                        decoded.push('%');
                        decoded.push_str(&digits.to_ascii_uppercase());
                    }
                }
                rest = rest.get(3..)?;
            }
            // RFC 3986 §2.1: other letters are written as escapes, also those that lenient clients send as they are.
            letter if !letter.is_ascii() || " \"<>^`{|}".contains(letter) => {
                let mut bytes = [0; 4];
                for byte in letter.encode_utf8(&mut bytes).bytes() {
                    decoded.push_str(&format!("%{byte:02X}"));
                }
                rest = rest.get(letter.len_utf8()..)?;
            }
            letter => {
                decoded.push(letter);
                rest = rest.get(letter.len_utf8()..)?;
            }
        }
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_that_only_some_applications_see_are_no_path() {
        for path in [
            "/a/..%2fadmin",
            "/a%2F..%2Fadmin",
            "/a/..%5cadmin",
            "/a/%2e%2e%2fadmin",
            "/a/.%2fb",
            "/a/..;/admin",
            "/a/..;x=1/admin",
            "/a/%2e%2e%3b/admin",
            "/..;",
        ] {
            assert_eq!(normal_path(path), None, "{path}");
        }
        for path in ["/a%2Fb", "/a/...%2Fb", "/a;b", "/a/..b;c", "/a%3Bb", "/.well-known/x;y"] {
            assert_eq!(normal_path(path).as_deref(), Some(path));
        }
    }

    #[test]
    fn paths_of_policies_take_the_form_of_requests() {
        let exact = |path: &str| MatchType::Exact(path.to_owned());
        let prefix = |path: &str| MatchType::Prefix(path.to_owned());
        let suffix = |path: &str| MatchType::Suffix(path.to_owned());
        for (written, normal) in [
            (exact("/a//b"), Some(exact("/a/b"))),
            (exact("/%7Efoo"), Some(exact("/~foo"))),
            (exact("/a/../b"), Some(exact("/b"))),
            (exact("/a/./b/"), Some(exact("/a/b/"))),
            (exact("/a%2fb"), Some(exact("/a%2Fb"))),
            (exact("/a b"), Some(exact("/a%20b"))),
            (exact("/ä"), Some(exact("/%C3%A4"))),
            (exact("/a{b|c}^\"<>`"), Some(exact("/a%7Bb%7Cc%7D%5E%22%3C%3E%60"))),
            (exact("/a%7bb"), Some(exact("/a%7Bb"))),
            (exact("/a:b%3ac"), Some(exact("/a:b%3Ac"))),
            (exact("/../a"), None),
            (exact("a"), None),
            (exact("/a?b=c"), None),
            (exact("/a%zz"), None),
            (exact("/a\\b"), None),
            (prefix("/a//b"), Some(prefix("/a/b"))),
            (prefix("/a//"), Some(prefix("/a/"))),
            (prefix("//"), Some(prefix("/"))),
            (prefix("/a/."), Some(prefix("/a/."))),
            (prefix("/a/../b"), Some(prefix("/b"))),
            (prefix("/%7Efoo"), Some(prefix("/~foo"))),
            (prefix("/a%2"), None),
            (prefix("a"), None),
            (suffix("//b"), Some(suffix("/b"))),
            (suffix(".css"), Some(suffix(".css"))),
            (suffix("%7Efoo"), Some(suffix("~foo"))),
            (suffix("x/./b"), Some(suffix("x/b"))),
            (suffix("x/a/../b/"), Some(suffix("x/b/"))),
            (suffix("x/../b"), None),
            (suffix("/"), Some(suffix("/"))),
            (MatchType::Presence(()), Some(MatchType::Presence(()))),
        ] {
            let text = StringMatch { match_type: Some(written.clone()) };
            let wanted = normal.map(|match_type| StringMatch { match_type: Some(match_type) });
            assert_eq!(normal_text(&text), wanted, "{written:?}");
        }
    }

    #[test]
    fn delimiters_are_compared_however_they_are_written() {
        for (path, wanted) in [
            ("/a:b", "/a:b"),
            ("/a%3Ab%40c%3Bd", "/a:b@c;d"),
            ("/%21%24%26%27%28%29%2A%2B%2C%3D%5B%5D", "/!$&'()*+,=[]"),
            ("/a%2Fb%5Cc%25%3F%23", "/a%2Fb%5Cc%25%3F%23"),
            // Decoded once.
            ("/a%253A", "/a%253A"),
            ("/%C3%A4%3A", "/%C3%A4:"),
            ("/%+A", "/%+A"),
            ("/%3", "/%3"),
            ("/%", "/%"),
        ] {
            assert_eq!(compared(path), wanted, "{path}");
        }
    }

    #[test]
    fn templates_take_the_form_of_requests() {
        for (written, normal) in [
            ("/a//{*}", Some("/a/{*}")),
            ("/%7Ea/{**}/b/", Some("/~a/{**}/b/")),
            ("/./{*}/.", Some("/{*}/")),
            ("/{*}/../a", None),
            ("{*}", None),
        ] {
            assert_eq!(normal_template(written).as_deref(), normal, "{written}");
        }
    }
}
