//! Keys that sign tokens, and what a signed token must say of itself.

use aws_lc_rs::signature::{self, ParsedPublicKey, RsaParameters, RsaPublicKeyComponents};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, decode_header};
use serde::Deserialize;
use serde_json::{Map, Value};

/// Keys in a set; more are ignored. Also bounds the work for a token that names no key.
pub const MAX_KEYS: usize = 32;
/// Bytes of a key set as it is passed on.
pub const MAX_SIZE: usize = 64 << 10;
/// The members of a key that verifying needs (RFC 7517 §4, RFC 7518 §6, RFC 8037 §2).
pub(crate) const MEMBERS: [&str; 9] = ["kty", "kid", "use", "alg", "n", "e", "crv", "x", "y"];
/// Tolerated difference between clocks, seconds (Envoy's).
const LEEWAY_SECONDS: f64 = 60.0;

/// Why a key set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeySetError {
    /// It is not a JSON Web Key Set.
    #[error("it is no JSON Web Key Set: {0}")]
    Malformed(#[from] serde_json::Error),
    /// No key in it can verify tokens.
    #[error("it has no key that can verify tokens")]
    Empty,
    /// Its usable keys are larger than [`MAX_SIZE`].
    #[error("its keys are larger than {MAX_SIZE} bytes")]
    TooLarge,
}

/// Why a token is not valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.message())]
pub enum TokenError {
    /// It is no signed JSON Web Token.
    Malformed,
    /// No rule is for its issuer.
    Issuer,
    /// The issuer's keys are not known.
    NoKeys,
    /// It names a key or an algorithm that its issuer does not have.
    UnknownKey,
    /// It was not signed with the issuer's key.
    Signature,
    /// It is not valid any more.
    Expired,
    /// It is not valid yet.
    NotYetValid,
    /// It is for somebody else.
    Audience,
}

impl TokenError {
    /// What clients read, in Envoy's words.
    pub fn message(&self) -> &'static str {
        match self {
            Self::Malformed => "Jwt is not in the form of Header.Payload.Signature",
            Self::Issuer => "Jwt issuer is not configured",
            Self::NoKeys => "Jwks of the issuer are not known",
            Self::UnknownKey => "Jwks doesn't have key to match kid or alg from Jwt",
            Self::Signature => "Jwt verification fails",
            Self::Expired => "Jwt is expired",
            Self::NotYetValid => "Jwt not yet valid",
            Self::Audience => "Audiences in Jwt are not allowed",
        }
    }
}

/// A token, taken apart once for all rules that look at it. Nothing of it counts before [`KeySet::verify`] found its signature good.
#[derive(Debug)]
pub struct SignedToken<'a> {
    algorithm: Algorithm,
    key: Option<String>,
    signed: &'a [u8],
    signature: Vec<u8>,
    /// Unverified.
    pub(crate) claims: Map<String, Value>,
}

impl<'a> SignedToken<'a> {
    /// Takes a token apart.
    ///
    /// # Errors
    /// [`TokenError::Malformed`].
    pub fn parse(token: &'a str) -> Result<Self, TokenError> {
        let header = decode_header(token).map_err(|_| TokenError::Malformed)?;
        // RFC 7515 §4.1.11: an extension that is not understood makes the signature invalid.
        if header.crit.is_some() {
            return Err(TokenError::Malformed);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (_, payload) = signed.split_once('.').ok_or(TokenError::Malformed)?;
        let decode = |part| URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed);
        let claims = serde_json::from_slice(&decode(payload)?).map_err(|_| TokenError::Malformed)?;
        let signature = decode(signature)?;
        Ok(Self { algorithm: header.alg, key: header.kid, signed: signed.as_bytes(), signature, claims })
    }
}

/// The keys of an issuer.
#[derive(Debug)]
pub struct KeySet {
    keys: Vec<Key>,
    ignored: usize,
}

/// A key, ready to verify with each algorithm that it may be used with.
struct Key {
    id: Option<String>,
    verifiers: Vec<(Algorithm, ParsedPublicKey)>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("id", &self.id).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Content {
    keys: Vec<Value>,
}

/// What a key set comes to: at most [`MAX_KEYS`] usable keys, with nothing but what verifying needs.
///
/// # Errors
/// [`KeySetError`] if it is none, has no usable key, or its keys are too large.
pub fn canonical(content: &[u8]) -> Result<String, KeySetError> {
    let Content { keys: all } = serde_json::from_slice(content)?;
    let is_usable = |value: &Value| Jwk::deserialize(value).ok().as_ref().and_then(key).is_some();
    let mut keys: Vec<Value> = all.into_iter().filter(is_usable).take(MAX_KEYS).collect();
    if keys.is_empty() {
        return Err(KeySetError::Empty);
    }
    for key in keys.iter_mut().filter_map(Value::as_object_mut) {
        key.retain(|member, _| MEMBERS.contains(&member.as_str()));
    }
    let text = serde_json::json!({ "keys": keys }).to_string();
    if text.len() > MAX_SIZE { Err(KeySetError::TooLarge) } else { Ok(text) }
}

impl KeySet {
    /// Reads a JSON Web Key Set.
    ///
    /// # Errors
    /// [`KeySetError`] if it is none, or has no usable key.
    pub fn parse(content: &[u8]) -> Result<Self, KeySetError> {
        let Content { keys: all } = serde_json::from_slice(content)?;
        let count = all.len();
        // RFC 7517 §5: keys that are not understood are ignored.
        let usable = |value| serde_json::from_value::<Jwk>(value).ok().as_ref().and_then(key);
        let keys: Vec<Key> = all.into_iter().filter_map(usable).take(MAX_KEYS).collect();
        if keys.is_empty() {
            return Err(KeySetError::Empty);
        }
        Ok(Self { ignored: count.saturating_sub(keys.len()), keys })
    }

    /// How many keys of the set are not used: of other kinds, or too many.
    pub fn ignored(&self) -> usize {
        self.ignored
    }

    /// Whether one of the keys has signed a token: the one that it names, or each whose algorithm fits. Whether the claims allow
    /// its use is for [`check_times`] and [`check_audience`].
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn verify(&self, token: &SignedToken<'_>) -> Result<(), TokenError> {
        let named =
            self.keys.iter().filter(|key| token.key.is_none() || key.id.is_none() || key.id == token.key);
        let fitting =
            named.flat_map(|key| &key.verifiers).filter(|(algorithm, _)| *algorithm == token.algorithm);
        let mut error = TokenError::UnknownKey;
        for (_, verifier) in fitting {
            match verifier.verify_sig(token.signed, &token.signature) {
                Ok(()) => return Ok(()),
                Err(_) => error = TokenError::Signature,
            }
        }
        Err(error)
    }
}

/// The key with the algorithms that belong to its kind; symmetric keys are none (RFC 8725 §3.2).
fn key(jwk: &Jwk) -> Option<Key> {
    if matches!(jwk.common.public_key_use, Some(PublicKeyUse::Encryption)) {
        return None;
    }
    let decoding = DecodingKey::from_jwk(jwk).ok()?;
    let named = jwk.common.key_algorithm;
    let is_allowed = |algorithm| named.is_none_or(|named| named == KeyAlgorithm::from(algorithm));
    let algorithms = algorithms(jwk)?.iter().copied().filter(|algorithm| is_allowed(*algorithm));
    let verifiers: Vec<(Algorithm, ParsedPublicKey)> = algorithms
        .map(|algorithm| Some((algorithm, verifier(algorithm, &decoding)?)))
        .collect::<Option<_>>()?;
    (!verifiers.is_empty()).then(|| Key { id: jwk.common.key_id.clone(), verifiers })
}

/// The algorithms of a kind of key.
fn algorithms(jwk: &Jwk) -> Option<&'static [Algorithm]> {
    use Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
    match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Some(&[RS256, RS384, RS512, PS256, PS384, PS512]),
        AlgorithmParameters::EllipticCurve(parameters) => match parameters.curve {
            EllipticCurve::P256 => Some(&[ES256]),
            EllipticCurve::P384 => Some(&[ES384]),
            _ => None,
        },
        AlgorithmParameters::OctetKeyPair(parameters) => match parameters.curve {
            EllipticCurve::Ed25519 => Some(&[EdDSA]),
            _ => None,
        },
        _ => None,
    }
}

/// Parses a key for an algorithm (RFC 7518 §3.3 to §3.5, RFC 8037 §3.1).
fn verifier(algorithm: Algorithm, key: &DecodingKey) -> Option<ParsedPublicKey> {
    let rsa = |parameters: &'static RsaParameters| match key.kind() {
        DecodingKeyKind::RsaModulusExponent { n, e } => {
            RsaPublicKeyComponents { n, e }.to_parsed_public_key(parameters).ok()
        }
        DecodingKeyKind::SecretOrDer(_) => None,
    };
    let bytes = |verification| ParsedPublicKey::new(verification, key.try_get_as_bytes().ok()?).ok();
    match algorithm {
        Algorithm::RS256 => rsa(&signature::RSA_PKCS1_2048_8192_SHA256),
        Algorithm::RS384 => rsa(&signature::RSA_PKCS1_2048_8192_SHA384),
        Algorithm::RS512 => rsa(&signature::RSA_PKCS1_2048_8192_SHA512),
        Algorithm::PS256 => rsa(&signature::RSA_PSS_2048_8192_SHA256),
        Algorithm::PS384 => rsa(&signature::RSA_PSS_2048_8192_SHA384),
        Algorithm::PS512 => rsa(&signature::RSA_PSS_2048_8192_SHA512),
        Algorithm::ES256 => bytes(&signature::ECDSA_P256_SHA256_FIXED),
        Algorithm::ES384 => bytes(&signature::ECDSA_P384_SHA384_FIXED),
        Algorithm::EdDSA => bytes(&signature::ED25519),
        _ => None,
    }
}

/// Whether a token is valid at `now`, seconds since the epoch. One that does not expire is (as in Envoy).
///
/// # Errors
/// [`TokenError::Expired`], [`TokenError::NotYetValid`], [`TokenError::Malformed`].
pub fn check_times(claims: &Map<String, Value>, now: f64) -> Result<(), TokenError> {
    let time = |name: &str| match claims.get(name) {
        None => Ok(None),
        Some(value) => value.as_f64().map(Some).ok_or(TokenError::Malformed),
    };
    // RFC 7519 §4.1.4 and §4.1.5.
    if time("exp")?.is_some_and(|end| now >= end + LEEWAY_SECONDS) {
        return Err(TokenError::Expired);
    }
    if time("nbf")?.is_some_and(|begin| now + LEEWAY_SECONDS < begin) {
        return Err(TokenError::NotYetValid);
    }
    Ok(())
}

/// Whether a token is for one of `audiences`; none: for anybody. Scheme and a slash at the end don't count, as in Envoy.
///
/// # Errors
/// [`TokenError::Audience`].
pub fn check_audience<'a>(
    audiences: &[Box<str>],
    mut of_token: impl Iterator<Item = &'a str>,
) -> Result<(), TokenError> {
    let is_allowed =
        |audience: &str| audiences.iter().any(|allowed| bare_audience(allowed) == bare_audience(audience));
    if audiences.is_empty() || of_token.any(is_allowed) { Ok(()) } else { Err(TokenError::Audience) }
}

fn bare_audience(audience: &str) -> &str {
    let bare = audience.strip_prefix("https://").or_else(|| audience.strip_prefix("http://"));
    let bare = bare.unwrap_or(audience);
    bare.strip_suffix('/').unwrap_or(bare)
}
