//! Paths of a policy: whole texts, prefixes, suffixes, and templates (`/users/{*}/cart`, `/static/{**}`).

use serde::Serialize;

use crate::matcher::Texts;
use crate::normal::compared;

/// Stands for one segment.
const ONE: &str = "{*}";
/// Stands for any number of segments.
const ANY: &str = "{**}";

/// Why a path template can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// It does not begin with a slash.
    #[error("a path template begins with /")]
    Relative,
    /// An operator behind `{**}`.
    #[error("{{**}} is not the last operator")]
    BehindAny,
    /// A brace that belongs to no operator, or an operator that is not a whole segment.
    #[error("only whole segments {{*}} and {{**}} may have braces")]
    Braces,
    /// A character that no path may have as it is.
    #[error("{0:?} can't be in a path template")]
    Character(char),
}

/// A path with operators. Segments before the first `{**}` match one by one; behind it comes a literal end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub struct Template {
    /// The segments before `{**}`, or all; `None` is `{*}`.
    head: Box<[Option<Box<str>>]>,
    /// What follows `{**}`, with its slash if it has one; `None` where there is no `{**}`.
    tail: Option<Box<str>>,
}

impl Template {
    /// Whether a path has an operator of templates, so that it is one.
    pub fn is_template(path: &str) -> bool {
        path.contains(ONE) || path.contains(ANY)
    }

    /// Reads a template.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let rest = text.strip_prefix('/').ok_or(TemplateError::Relative)?;
        let (mut head, mut tail): (Vec<Option<Box<str>>>, Option<String>) = (Vec::new(), None);
        for segment in rest.split('/') {
            match (segment, &mut tail) {
                (ONE | ANY, Some(_)) => return Err(TemplateError::BehindAny),
                (ANY, None) => tail = Some(String::new()),
                (ONE, None) => head.push(None),
                (literal, tail) => {
                    check(literal)?;
                    match tail {
                        Some(tail) => {
                            tail.push('/');
                            tail.push_str(literal);
                        }
                        None => head.push(Some(literal.into())),
                    }
                }
            }
        }
        Ok(Self { head: head.into(), tail: tail.map(Into::into) })
    }

    /// Whether it matches all of a normalised path.
    pub fn matches(&self, path: &str) -> bool {
        let Some(mut rest) = path.strip_prefix('/') else { return false };
        for (position, wanted) in self.head.iter().enumerate() {
            let is_last = self.tail.is_none() && position + 1 == self.head.len();
            let (segment, behind) = match rest.split_once('/') {
                Some(_) if is_last => return false,
                Some((segment, behind)) => (segment, behind),
                None if is_last => (rest, ""),
                None => return false,
            };
            let matches = match wanted {
                Some(literal) => segment == &**literal,
                None => !segment.is_empty(),
            };
            if !matches {
                return false;
            }
            rest = behind;
        }
        self.tail.as_ref().is_none_or(|tail| rest.ends_with(&**tail))
    }
}

/// RFC 3986 §3.3: a segment is made of pchar.
fn check(literal: &str) -> Result<(), TemplateError> {
    if literal.contains(['{', '}']) {
        return Err(TemplateError::Braces);
    }
    let is_pchar = |c: &char| c.is_ascii_alphanumeric() || "-._~%!$&'()*+,;=:@".contains(*c);
    match literal.chars().find(|c| !is_pchar(c)) {
        Some(c) => Err(TemplateError::Character(c)),
        None => Ok(()),
    }
}

impl std::fmt::Display for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for segment in &self.head {
            write!(f, "/{}", segment.as_deref().unwrap_or(ONE))?;
        }
        match &self.tail {
            Some(tail) => write!(f, "/{ANY}{tail}"),
            None => Ok(()),
        }
    }
}

impl From<Template> for String {
    fn from(template: Template) -> Self {
        template.to_string()
    }
}

/// Paths in the form of [`compared`], one of which must match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Paths {
    #[serde(skip_serializing_if = "Texts::is_empty")]
    pub(crate) texts: Texts,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub(crate) templates: Box<[Template]>,
}

impl Paths {
    pub(crate) fn is_empty(&self) -> bool {
        self.texts.is_empty() && self.templates.is_empty()
    }

    /// `path` in normal form.
    pub(crate) fn matches(&self, path: &str) -> bool {
        let path = compared(path);
        self.texts.matches(Some(&path)) || self.templates.iter().any(|template| template.matches(&path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matcher::Pattern;

    #[test]
    fn an_escaped_delimiter_is_no_way_around_a_path() {
        let texts = Texts::new(vec!["/jobs:export".into()], vec![Pattern::Prefix("/user@".into())]);
        let templates = Box::new([Template::parse("/v1/{*}/keys;all").unwrap()]);
        let paths = Paths { texts, templates };
        for path in
            ["/jobs:export", "/jobs%3Aexport", "/user@a", "/user%40a", "/v1/a/keys;all", "/v1/a/keys%3Ball"]
        {
            assert!(paths.matches(path), "{path}");
        }
        for path in ["/jobs%253Aexport", "/jobs", "/v1/a/keys%2Fall"] {
            assert!(!paths.matches(path), "{path}");
        }
    }

    #[test]
    fn a_template_matches_by_segments() {
        for (template, path, matches) in [
            ("/users/{*}/cart", "/users/7/cart", true),
            ("/users/{*}/cart", "/users//cart", false),
            ("/users/{*}/cart", "/users/7/8/cart", false),
            ("/users/{*}/cart", "/users/7/cart/", false),
            ("/users/{*}/cart", "/users/7/carts", false),
            ("/users/{*}", "/users/7", true),
            ("/users/{*}", "/users/", false),
            ("/users/{*}", "/users/7/", false),
            ("/users/{*}", "/users", false),
            ("/{*}", "/a", true),
            ("/{*}", "/", false),
            ("/{*}/{*}", "/a/b", true),
            ("/static/{**}", "/static/", true),
            ("/static/{**}", "/static/a/b.css", true),
            ("/static/{**}", "/static", false),
            ("/static/{**}", "/statics/a", false),
            ("/{**}", "/", true),
            ("/{**}", "/a/b", true),
            ("/a/{*}/{**}/end", "/a/x/y/z/end", true),
            ("/a/{*}/{**}/end", "/a/x/y/z/ending", false),
            ("/a/{**}/b", "/a/b", false),
            ("/a/{**}/b", "/a/c/b", true),
            ("/a/{**}/b/c", "/a/x/b/c", true),
            ("/a/{**}/b/c", "/a/b/c", false),
            ("/a/{**}/", "/a/x/", true),
            ("/a/{**}/", "/a/x", false),
            ("/a/{*}/", "/a/x/", true),
            ("/a/{*}/", "/a/x", false),
            ("/{*}", "no path", false),
        ] {
            let read = Template::parse(template).expect(template);
            assert_eq!(read.matches(path), matches, "{template} {path}");
            assert_eq!(read.to_string(), template);
        }
    }

    #[test]
    fn what_is_no_template_is_an_error() {
        for (text, error) in [
            ("", TemplateError::Relative),
            ("{*}", TemplateError::Relative),
            ("/{**}/{*}", TemplateError::BehindAny),
            ("/{**}/{**}", TemplateError::BehindAny),
            ("/a{*}", TemplateError::Braces),
            ("/{*}b", TemplateError::Braces),
            ("/{a}", TemplateError::Braces),
            ("/{**}/a b", TemplateError::Character(' ')),
            ("/{*}/a?b", TemplateError::Character('?')),
        ] {
            assert_eq!(Template::parse(text), Err(error), "{text}");
        }
    }
}
