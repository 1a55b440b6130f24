//! What is known of tokens without asking: claims that are read but not believed, and answers of former reviews.
//! No I/O, no clock.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde::Deserialize;

/// How long an accepted token is not asked about again: so long a deleted pod's token is still good.
const ACCEPTED: Duration = Duration::from_secs(60);
/// How long a refused token is not asked about again.
const REFUSED: Duration = Duration::from_secs(10);
/// Answers of each sort that are kept; the oldest goes first. Tokens of proxies are as many as nodes.
const CAPACITY: usize = 8192;
/// Tolerated difference between clocks.
const LEEWAY: Duration = Duration::from_secs(30);

/// Stands for a token, which is not kept itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TokenId([u8; 32]);

impl TokenId {
    pub(super) fn of(token: &str) -> Self {
        let mut id = [0; 32];
        id.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
        Self(id)
    }
}

/// The unverified claims of a token. Nothing is granted for them: they only show that a token need not be reviewed.
#[derive(Debug, Deserialize)]
pub(super) struct UnverifiedClaims {
    #[serde(default)]
    aud: Audiences,
    #[serde(default)]
    exp: u64,
}

/// RFC 7519 §4.1.3: one, or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Audiences {
    One(String),
    Several(Vec<String>),
}

impl Default for Audiences {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

impl UnverifiedClaims {
    /// Reads the claims; the error is for the caller.
    pub(super) fn read(token: &str) -> Result<Self, String> {
        let mut parts = token.split('.');
        let (Some(_), Some(claims), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err("it is no JSON web token".to_owned());
        };
        let claims =
            BASE64_URL_SAFE_NO_PAD.decode(claims).map_err(|_| "its claims cannot be read".to_owned())?;
        serde_json::from_slice(&claims).map_err(|_| "its claims cannot be read".to_owned())
    }

    /// When the token expires, if it can be for one of the audiences and has not expired.
    pub(super) fn check(&self, audiences: &[String], now: SystemTime) -> Result<SystemTime, String> {
        let named = match &self.aud {
            Audiences::One(name) => std::slice::from_ref(name),
            Audiences::Several(names) => names,
        };
        if !named.iter().any(|name| audiences.contains(name)) {
            return Err("it is for another audience".to_owned());
        }
        let expires = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.exp));
        match expires {
            Some(expires) if now.checked_sub(LEEWAY).is_none_or(|now| now < expires) => Ok(expires),
            _ => Err("it has expired".to_owned()),
        }
    }
}

/// What is known of a token.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Known<T> {
    /// An answer that counts.
    Fresh(Result<T, String>),
    /// It was accepted once; that counts only while nobody can be asked.
    Stale(T),
    /// It was never seen, or that was long ago.
    Nothing,
}

/// Answers of former reviews. Refused tokens have a part of their own, so that they push out no accepted ones.
#[derive(Debug)]
pub(super) struct ReviewCache<T> {
    accepted: Answers<Accepted<T>>,
    refused: Answers<Refusal>,
}

#[derive(Debug)]
struct Accepted<T> {
    identified: T,
    fresh_until: SystemTime,
    expires: SystemTime,
}

#[derive(Debug)]
struct Refusal {
    reason: String,
    fresh_until: SystemTime,
}

impl<T> Default for ReviewCache<T> {
    fn default() -> Self {
        Self { accepted: Answers::default(), refused: Answers::default() }
    }
}

impl<T: Clone> ReviewCache<T> {
    pub(super) fn get(&self, id: &TokenId, now: SystemTime) -> Known<T> {
        if let Some(Refusal { reason, .. }) = self.refused.get(id).filter(|refusal| now < refusal.fresh_until)
        {
            return Known::Fresh(Err(reason.clone()));
        }
        match self.accepted.get(id) {
            Some(accepted) if now >= accepted.expires => Known::Nothing,
            Some(accepted) if now < accepted.fresh_until => Known::Fresh(Ok(accepted.identified.clone())),
            Some(accepted) => Known::Stale(accepted.identified.clone()),
            None => Known::Nothing,
        }
    }

    /// Keeps an answer about a token that expires at `expires`.
    pub(super) fn insert(
        &mut self,
        id: TokenId,
        answer: Result<T, String>,
        expires: SystemTime,
        now: SystemTime,
    ) {
        match answer {
            Ok(identified) => {
                self.refused.remove(&id);
                self.accepted.insert(id, Accepted { identified, fresh_until: now + ACCEPTED, expires });
            }
            Err(reason) => {
                self.accepted.remove(&id);
                self.refused.insert(id, Refusal { reason, fresh_until: now + REFUSED });
            }
        }
    }
}

/// At most [`CAPACITY`] answers, in the order in which they came.
#[derive(Debug)]
struct Answers<V> {
    by_token: HashMap<TokenId, (u64, V)>,
    order: BTreeMap<u64, TokenId>,
    next: u64,
}

impl<V> Default for Answers<V> {
    fn default() -> Self {
        Self { by_token: HashMap::new(), order: BTreeMap::new(), next: 0 }
    }
}

impl<V> Answers<V> {
    fn get(&self, id: &TokenId) -> Option<&V> {
        self.by_token.get(id).map(|(_, value)| value)
    }

    fn insert(&mut self, id: TokenId, value: V) {
        self.remove(&id);
        if self.by_token.len() >= CAPACITY
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.by_token.remove(&oldest);
        }
        self.order.insert(self.next, id);
        self.by_token.insert(id, (self.next, value));
        self.next += 1;
    }

    fn remove(&mut self, id: &TokenId) {
        if let Some((place, _)) = self.by_token.remove(id) {
            self.order.remove(&place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn token(claims: &str) -> String {
        format!("e30.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(claims))
    }

    fn check(claims: &str) -> Result<SystemTime, String> {
        UnverifiedClaims::read(&token(claims))?.check(&["istio-ca".to_owned()], at(1000))
    }

    #[test]
    fn what_cannot_be_for_us_is_refused_unasked() {
        assert_eq!(check(r#"{"aud":"istio-ca","exp":2000}"#), Ok(at(2000)));
        assert_eq!(check(r#"{"aud":["x","istio-ca"],"exp":2000}"#), Ok(at(2000)));
        assert!(check(r#"{"aud":"api","exp":2000}"#).unwrap_err().contains("audience"));
        assert!(check(r#"{"aud":"istio-ca","exp":900}"#).unwrap_err().contains("expired"));
        assert!(check(r#"{"aud":"istio-ca","exp":18446744073709551615}"#).is_err());
        for junk in ["", "a", "a.b", "a.b.c.d", "a.!.c", "a.e30x.c"] {
            assert!(UnverifiedClaims::read(junk).is_err(), "{junk}");
        }
    }

    #[test]
    fn an_accepted_token_is_fresh_then_stale_then_expired() {
        let (mut cache, id) = (ReviewCache::default(), TokenId::of("t"));
        assert_eq!(cache.get(&id, at(0)), Known::<u8>::Nothing);
        cache.insert(id, Ok(7), at(500), at(100));
        assert_eq!(cache.get(&id, at(159)), Known::Fresh(Ok(7)));
        assert_eq!(cache.get(&id, at(160)), Known::Stale(7));
        assert_eq!(cache.get(&id, at(500)), Known::Nothing);
    }

    #[test]
    fn a_refused_token_is_asked_about_again() {
        let (mut cache, id) = (ReviewCache::default(), TokenId::of("t"));
        cache.insert(id, Ok(7), at(500), at(100));
        cache.insert(id, Err("deleted".to_owned()), at(500), at(200));
        assert_eq!(cache.get(&id, at(205)), Known::Fresh(Err("deleted".to_owned())));
        assert_eq!(cache.get(&id, at(210)), Known::Nothing);
    }

    #[test]
    fn refused_tokens_push_out_no_accepted_ones() {
        let mut cache = ReviewCache::default();
        cache.insert(TokenId::of("good"), Ok(7), at(5000), at(0));
        for n in 0..2 * CAPACITY {
            cache.insert(TokenId::of(&n.to_string()), Err("no".to_owned()), at(5000), at(0));
        }
        assert_eq!(cache.get(&TokenId::of("good"), at(1)), Known::Fresh(Ok(7)));
        assert_eq!(cache.refused.by_token.len(), CAPACITY);
        assert_eq!(cache.refused.order.len(), CAPACITY);
        assert_eq!(cache.get(&TokenId::of("0"), at(1)), Known::Nothing);
    }
}
