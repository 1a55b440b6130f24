//! Paths of which parts vary, such as identifiers of objects, as one pattern: `/users/17/cart` is `/users/{*}/cart`.
//!
//! A pattern is a path of an AuthorizationPolicy: a text without operators, or a template of whole segments `{*}` and `{**}`.

/// The pattern of any path.
pub const ANY_PATH: &str = "/{**}";

/// Segments that are kept; what is deeper becomes `{**}`.
const MAX_SEGMENTS: usize = 12;
/// Longest pattern, in bytes; what is longer becomes `{**}`.
const MAX_PATTERN: usize = 200;
/// Longest segment that is kept.
const MAX_SEGMENT: usize = 64;

/// Writes the pattern of a normalised path to `pattern`, whose content is replaced.
pub fn path_pattern(path: &str, pattern: &mut String) {
    pattern.clear();
    let Some(rest) = path.strip_prefix('/') else {
        pattern.push_str(ANY_PATH);
        return;
    };
    for (position, segment) in rest.split('/').enumerate() {
        if position >= MAX_SEGMENTS || pattern.len() + segment.len() > MAX_PATTERN {
            pattern.push_str(ANY_PATH);
            return;
        }
        pattern.push('/');
        pattern.push_str(if varies(segment) { "{*}" } else { segment });
    }
}

/// Whether a segment looks like an identifier, or can't stand in a policy as it is.
fn varies(segment: &str) -> bool {
    let bytes = segment.as_bytes();
    let digits = bytes.iter().filter(|byte| byte.is_ascii_digit()).count();
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~".contains(byte);
    let is_number = digits > 0 && bytes.iter().all(|byte| byte.is_ascii_digit() || b"-._".contains(byte));
    let is_hex = bytes.len() >= 12 && bytes.iter().all(|byte| byte.is_ascii_hexdigit() || *byte == b'-');
    let is_token = bytes.len() >= 20 && digits >= 2 && bytes.iter().any(u8::is_ascii_uppercase);
    let is_version = segment.strip_prefix('v').is_some_and(|rest| rest.len() <= 3);
    !bytes.iter().all(is_plain)
        || bytes.len() > MAX_SEGMENT
        || !is_version && (is_number || is_hex && digits >= 2 || is_token)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(path: &str) -> String {
        let mut pattern = "before".to_owned();
        path_pattern(path, &mut pattern);
        pattern
    }

    #[test]
    fn segments_that_vary_become_operators() {
        for (path, expected) in [
            ("/", "/"),
            ("/users", "/users"),
            ("/users/17/cart", "/users/{*}/cart"),
            ("/users/17/", "/users/{*}/"),
            ("/v1/reviews/0", "/v1/reviews/{*}"),
            ("/api/v2.1/x", "/api/v2.1/x"),
            ("/o/123e4567-e89b-12d3-a456-426614174000", "/o/{*}"),
            ("/o/507f1f77bcf86cd799439011", "/o/{*}"),
            ("/days/2026-11-28", "/days/{*}"),
            ("/shop.Cart/AddItem", "/shop.Cart/AddItem"),
            (
                "/hipstershop.ProductCatalogService/ListProducts",
                "/hipstershop.ProductCatalogService/ListProducts",
            ),
            ("/t/eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9", "/t/{*}"),
            ("/deadbeefcafe", "/deadbeefcafe"),
            ("/a*", "/{*}"),
            ("/{x}/y", "/{*}/y"),
            ("/me@example.com", "/{*}"),
            ("/a%20b", "/{*}"),
            ("*", ANY_PATH),
            ("", ANY_PATH),
        ] {
            assert_eq!(pattern(path), expected, "{path}");
        }
    }

    #[test]
    fn long_and_deep_paths_end_in_anything() {
        assert_eq!(pattern(&"/a".repeat(20)), format!("{}/{{**}}", "/a".repeat(MAX_SEGMENTS)));
        assert!(pattern(&format!("/x{}", "/abcdefghij-abcdefghij".repeat(11))).ends_with("/{**}"));
        assert_eq!(pattern(&format!("/{}", "a".repeat(300))), ANY_PATH);
    }

    proptest! {
        #[test]
        fn a_pattern_is_bounded_and_stays_as_it_is(path in "(/[ -~]{0,30}){0,20}") {
            let once = pattern(&path);
            prop_assert!(once.len() <= MAX_PATTERN + MAX_SEGMENT + ANY_PATH.len());
            prop_assert!(once.starts_with('/'));
        }
    }
}
