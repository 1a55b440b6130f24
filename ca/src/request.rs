//! Signing requests: what is read of them, which is the public key and the proof of its possession. Where somebody who is trusted
//! has verified that proof, the public key alone.
//!
//! Names in a request are ignored: the identity comes from the caller's authentication.

use rcgen::{PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PublicKeyData, SignatureAlgorithm};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

/// Requests larger than this are refused unread, bytes.
const MAX_REQUEST: usize = 16 * 1024;

/// Why a signing request is not accepted. The caller is to blame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Larger than any request is.
    #[error("signing request of {0} bytes is larger than {MAX_REQUEST}")]
    TooLarge(usize),
    /// Not PEM, or not a request.
    #[error("signing request cannot be read: {0}")]
    Malformed(String),
    /// The caller does not hold the private key.
    #[error("signing request is not signed by its own key")]
    Signature,
    /// The key is of a kind that is not issued for.
    #[error("signing request is for a key that is neither ECDSA P-256 nor P-384")]
    Key,
}

/// The public key of a verified request.
#[derive(Debug)]
pub(crate) struct RequestedKey {
    raw: Vec<u8>,
    algorithm: &'static SignatureAlgorithm,
}

impl PublicKeyData for RequestedKey {
    fn der_bytes(&self) -> &[u8] {
        &self.raw
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.algorithm
    }
}

/// Reads and verifies a request.
pub(crate) fn read(pem: &str) -> Result<RequestedKey, RequestError> {
    if pem.len() > MAX_REQUEST {
        return Err(RequestError::TooLarge(pem.len()));
    }
    let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| RequestError::Malformed(error.to_string()))?;
    read_der(&der)
}

/// Reads and verifies a request in DER.
pub(crate) fn read_der(der: &[u8]) -> Result<RequestedKey, RequestError> {
    if der.len() > MAX_REQUEST {
        return Err(RequestError::TooLarge(der.len()));
    }
    let (rest, request) = X509CertificationRequest::from_der(der)
        .map_err(|error| RequestError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(RequestError::Malformed(format!("{} bytes follow it", rest.len())));
    }
    let key = &request.certification_request_info.subject_pki;
    let algorithm = algorithm_of(key).ok_or(RequestError::Key)?;
    // RFC 2986 §4.2: the request's signature proves possession of the key.
    request.verify_signature().map_err(|_| RequestError::Signature)?;
    Ok(RequestedKey { raw: key.subject_public_key.data.to_vec(), algorithm })
}

/// Reads a public key (SubjectPublicKeyInfo, DER) whose possession somebody else has verified.
pub(crate) fn read_verified_key(der: &[u8]) -> Result<RequestedKey, RequestError> {
    let (rest, key) =
        SubjectPublicKeyInfo::from_der(der).map_err(|error| RequestError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(RequestError::Malformed(format!("{} bytes follow it", rest.len())));
    }
    let algorithm = algorithm_of(&key).ok_or(RequestError::Key)?;
    Ok(RequestedKey { raw: key.subject_public_key.data.to_vec(), algorithm })
}

/// RFC 5480 §2.1.1: an EC key names its curve in the parameters.
fn algorithm_of(key: &SubjectPublicKeyInfo<'_>) -> Option<&'static SignatureAlgorithm> {
    use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384};
    if key.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY {
        return None;
    }
    let curve = key.algorithm.parameters.as_ref()?.as_oid().ok()?;
    if curve == OID_EC_P256 {
        Some(&PKCS_ECDSA_P256_SHA256)
    } else if curve == OID_NIST_EC_P384 {
        Some(&PKCS_ECDSA_P384_SHA384)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair};

    fn request(algorithm: &'static SignatureAlgorithm) -> String {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut parameters = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        parameters.serialize_request(&key).unwrap().pem().unwrap()
    }

    #[test]
    fn requests_for_p256_and_p384_are_accepted() {
        assert_eq!(read(&request(&PKCS_ECDSA_P256_SHA256)).unwrap().raw.len(), 65);
        assert_eq!(read(&request(&PKCS_ECDSA_P384_SHA384)).unwrap().raw.len(), 97);
    }

    #[test]
    fn other_keys_are_refused() {
        assert_eq!(read(&request(&rcgen::PKCS_ED25519)).unwrap_err(), RequestError::Key);
    }

    #[test]
    fn a_verified_key_is_read_like_that_of_a_request() {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        assert_eq!(read_verified_key(&key.subject_public_key_info()).unwrap().raw, key.der_bytes());
        let other = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        assert_eq!(read_verified_key(&other.subject_public_key_info()).unwrap_err(), RequestError::Key);
        assert!(matches!(read_verified_key(b"\x30\x00"), Err(RequestError::Malformed(_))));
    }

    #[test]
    fn a_request_whose_signature_is_altered_is_refused() {
        let der = CertificateSigningRequestDer::from_pem_slice(request(&PKCS_ECDSA_P256_SHA256).as_bytes());
        let mut der = der.unwrap().to_vec();
        let last = der.len() - 1;
        der[last] ^= 1;
        let pem = pem_of("CERTIFICATE REQUEST", &der);
        assert!(matches!(read(&pem), Err(RequestError::Signature | RequestError::Malformed(_))));
    }

    #[test]
    fn a_request_with_another_key_put_in_is_refused() {
        let mine = request(&PKCS_ECDSA_P256_SHA256);
        let mine = CertificateSigningRequestDer::from_pem_slice(mine.as_bytes()).unwrap();
        let theirs = read(&request(&PKCS_ECDSA_P256_SHA256)).unwrap();
        let own = read(&pem_of("CERTIFICATE REQUEST", &mine)).unwrap();
        let position = mine.windows(own.raw.len()).position(|window| window == own.raw).unwrap();
        let mut forged = mine.to_vec();
        forged[position..position + theirs.raw.len()].copy_from_slice(&theirs.raw);
        assert_eq!(read(&pem_of("CERTIFICATE REQUEST", &forged)).unwrap_err(), RequestError::Signature);
    }

    #[test]
    fn what_is_no_request_is_refused() {
        assert!(matches!(read(""), Err(RequestError::Malformed(_))));
        assert!(matches!(read(&"x".repeat(MAX_REQUEST + 1)), Err(RequestError::TooLarge(_))));
        assert!(matches!(read(&pem_of("CERTIFICATE REQUEST", b"\x30\x00")), Err(RequestError::Malformed(_))));
    }

    fn pem_of(label: &str, der: &[u8]) -> String {
        pem::encode(&pem::Pem::new(label, der))
    }
}
