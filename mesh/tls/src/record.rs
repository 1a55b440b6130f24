//! The record layer of TLS 1.3 (RFC 8446 §5): one record in, one record out. No I/O, no buffers of its own.
//!
//! Keys come from rustls after its handshake; aws-lc-rs does the cryptography. This module lays out the parts of a record,
//! numbers the nonces, and checks what a peer put into a record.

use aws_lc_rs::aead::{self, Aad, LessSafeKey, UnboundKey};
use rustls::crypto::cipher::{Iv, Nonce};
use rustls::{AlertDescription, ConnectionTrafficSecrets, ContentType};

/// Content type, version, length (RFC 8446 §5.1).
pub(crate) const HEADER: usize = 5;
/// The most plaintext that one record carries (RFC 8446 §5.1).
pub const MAX_PLAIN: usize = 1 << 14;
/// Added to the plaintext: its real content type, and the tag.
const EXPANSION: usize = 1 + TAG;
const TAG: usize = 16;
/// The most bytes after the header of a record (RFC 8446 §5.2).
const MAX_BODY: usize = MAX_PLAIN + 256;
/// The largest record that a peer may send.
pub(crate) const MAX_RECORD: usize = HEADER + MAX_BODY;
/// The size of the largest record that we send.
pub const MAX_SEALED: usize = HEADER + MAX_PLAIN + EXPANSION;
/// Records after which a key is to be replaced: half of what AES-GCM allows (RFC 8446 §5.5: 2^24.5).
pub(crate) const KEY_LASTS: u64 = 1 << 23;

/// Why a record is rejected or cannot be sent. Each ends the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The record was not encrypted with the key of the connection, or was altered.
    #[error("a TLS record does not authenticate")]
    Unauthentic,
    /// Larger than TLS allows.
    #[error("a TLS record of {0} bytes is larger than TLS allows")]
    Oversized(usize),
    /// A content type that is not allowed after the handshake.
    #[error("a TLS record of content type {0} out of place")]
    Unexpected(u8),
    /// A handshake message that can't be read, or one that TLS 1.3 does not allow after the handshake.
    #[error("a TLS handshake message after the handshake that is malformed or not allowed")]
    Handshake,
    /// More records without application data than any peer needs to send.
    #[error("too many TLS records that carry nothing")]
    Overhead,
    /// The cryptographic library failed.
    #[error("a TLS record can't be sealed")]
    Seal,
    /// The secrets are of a suite that the mesh does not speak, or can't be derived.
    #[error("the connection's TLS secrets can't be used")]
    Secrets,
}

impl RecordError {
    /// The alert that the peer gets (RFC 8446 §6.2).
    pub(crate) fn alert(self) -> AlertDescription {
        match self {
            RecordError::Unauthentic => AlertDescription::BadRecordMac,
            RecordError::Oversized(_) => AlertDescription::RecordOverflow,
            RecordError::Unexpected(_) | RecordError::Overhead => AlertDescription::UnexpectedMessage,
            RecordError::Handshake => AlertDescription::DecodeError,
            RecordError::Seal | RecordError::Secrets => AlertDescription::InternalError,
        }
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

/// A direction's key, and the number of its next record.
struct Key {
    aead: LessSafeKey,
    iv: Iv,
    sequence: u64,
}

impl Key {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Key, RecordError> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
            // HBONE contract: these two suites only.
            _ => return Err(RecordError::Secrets),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| RecordError::Secrets)?;
        Ok(Key { aead: LessSafeKey::new(key), iv, sequence })
    }

    /// RFC 8446 §5.3: a nonce is used once with a key.
    fn next_nonce(&mut self) -> aead::Nonce {
        let nonce = Nonce::new(&self.iv, self.sequence);
        self.sequence += 1;
        aead::Nonce::assume_unique_for_key(nonce.0)
    }
}

fn header(body: usize) -> [u8; HEADER] {
    let [high, low] = u16::try_from(body).unwrap_or(u16::MAX).to_be_bytes();
    // RFC 8446 §5.2: every protected record says "application data", and TLS 1.2.
    [u8::from(ContentType::ApplicationData), 3, 3, high, low]
}

/// Encrypts records.
#[derive(Debug)]
pub struct Sealer(Key);

impl Sealer {
    /// For the secrets, and the number of the next record, that rustls yields.
    ///
    /// # Errors
    ///
    /// [`RecordError::Secrets`] if they are of a suite that the mesh does not speak (HBONE contract).
    pub fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Sealer, RecordError> {
        Key::new(secrets).map(Sealer)
    }

    /// Records that were sealed with this key.
    pub fn sealed(&self) -> u64 {
        self.0.sequence
    }

    /// Writes one record with `plain`, of at most [`MAX_PLAIN`] bytes, to the front of `out` and returns its length.
    ///
    /// # Errors
    ///
    /// [`RecordError::Seal`] if `out` has no room for it.
    pub fn seal(&mut self, kind: ContentType, plain: &[u8], out: &mut [u8]) -> Result<usize, RecordError> {
        let Parts { head, body, end } = parts(plain.len(), out)?;
        let nonce = self.0.next_nonce();
        self.0
            .aead
            .seal_out_of_place_scatter(nonce, Aad::from(head), plain, body, &[u8::from(kind)], end)
            .map_err(|_| RecordError::Seal)?;
        Ok(HEADER + plain.len() + EXPANSION)
    }

    /// As [`seal`](Sealer::seal), of `length` bytes that `gather` puts where they are to be sealed.
    ///
    /// # Errors
    ///
    /// As [`seal`](Sealer::seal).
    pub fn seal_gathered(
        &mut self,
        kind: ContentType,
        length: usize,
        out: &mut [u8],
        gather: impl FnOnce(&mut [u8]),
    ) -> Result<usize, RecordError> {
        let Parts { head, body, end } = parts(length, out)?;
        gather(body);
        let nonce = self.0.next_nonce();
        self.0
            .aead
            .seal_in_place_scatter(nonce, Aad::from(head), body, &[u8::from(kind)], end)
            .map_err(|_| RecordError::Seal)?;
        Ok(HEADER + length + EXPANSION)
    }
}

/// The parts of an output buffer that receive a sealed record.
struct Parts<'a> {
    /// A copy of the header, which is written.
    head: [u8; HEADER],
    body: &'a mut [u8],
    /// The real content type and the tag.
    end: &'a mut [u8],
}

fn parts(plain: usize, out: &mut [u8]) -> Result<Parts<'_>, RecordError> {
    let record = out.get_mut(..HEADER + plain + EXPANSION).ok_or(RecordError::Seal)?;
    let (front, rest) = record.split_at_mut_checked(HEADER).ok_or(RecordError::Seal)?;
    let (body, end) = rest.split_at_mut_checked(plain).ok_or(RecordError::Seal)?;
    let head = header(plain + EXPANSION);
    front.copy_from_slice(&head);
    Ok(Parts { head, body, end })
}

/// Where a complete record ends, by its first bytes; `None` as long as more of it is to come.
///
/// # Errors
///
/// [`RecordError::Unexpected`] and [`RecordError::Oversized`].
pub fn complete(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some(&[kind, _, _, high, low]) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    // RFC 8446 §5: after the handshake nothing else is allowed.
    if kind != u8::from(ContentType::ApplicationData) {
        return Err(RecordError::Unexpected(kind));
    }
    let length = HEADER + usize::from(u16::from_be_bytes([high, low]));
    if length > MAX_RECORD {
        return Err(RecordError::Oversized(length));
    }
    Ok((bytes.len() >= length).then_some(length))
}

/// A decrypted record: its type and the length of its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// What its content is.
    pub kind: ContentType,
    /// Bytes of content.
    pub length: usize,
}

/// Decrypts the peer's records.
#[derive(Debug)]
pub struct Opener(Key);

impl Opener {
    /// For the secrets, and the number of the next record, that rustls yields.
    ///
    /// # Errors
    ///
    /// [`RecordError::Secrets`] if they are of a suite that the mesh does not speak (HBONE contract).
    pub fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Opener, RecordError> {
        Key::new(secrets).map(Opener)
    }

    /// Room that [`open_into`](Opener::open_into) needs for a record of `length` bytes.
    pub fn room(length: usize) -> usize {
        length.saturating_sub(HEADER + TAG)
    }

    /// Opens a whole `record` into the front of `out`.
    ///
    /// # Errors
    ///
    /// [`RecordError::Unauthentic`], [`RecordError::Oversized`], [`RecordError::Unexpected`]. Nothing of `out` is to be used then.
    pub fn open_into(&mut self, record: &[u8], out: &mut [u8]) -> Result<Opened, RecordError> {
        let (head, body) = record.split_first_chunk::<HEADER>().ok_or(RecordError::Unauthentic)?;
        let (sealed, tag) = body.split_last_chunk::<TAG>().ok_or(RecordError::Unauthentic)?;
        let out = out.get_mut(..sealed.len()).ok_or(RecordError::Oversized(record.len()))?;
        let nonce = self.0.next_nonce();
        self.0
            .aead
            .open_separate_gather(nonce, Aad::from(head), sealed, tag, out)
            .map_err(|_| RecordError::Unauthentic)?;
        content(out)
    }

    /// Opens a whole `record` where it lies; its content is behind the five bytes of the header then.
    ///
    /// # Errors
    ///
    /// As [`open_into`](Opener::open_into).
    pub fn open_in_place(&mut self, record: &mut [u8]) -> Result<Opened, RecordError> {
        let (head, body) = record.split_first_chunk_mut::<HEADER>().ok_or(RecordError::Unauthentic)?;
        let nonce = self.0.next_nonce();
        let out = self
            .0
            .aead
            .open_in_place(nonce, Aad::from(&*head), body)
            .map_err(|_| RecordError::Unauthentic)?;
        content(out)
    }
}

/// RFC 8446 §5.4: the content type is the last byte that is not zero; what follows it is padding.
fn content(plain: &[u8]) -> Result<Opened, RecordError> {
    let (length, kind) = match plain.split_last() {
        Some((&kind, rest)) if kind != 0 => (rest.len(), kind),
        _ => {
            let last = plain.iter().rposition(|byte| *byte != 0);
            let last = last.ok_or(RecordError::Unexpected(0))?;
            (last, plain.get(last).copied().unwrap_or_default())
        }
    };
    if length > MAX_PLAIN {
        return Err(RecordError::Oversized(HEADER + length + EXPANSION));
    }
    Ok(Opened { kind: ContentType::from(kind), length })
}
