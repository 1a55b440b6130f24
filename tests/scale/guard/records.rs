//! TLS records of the tunnel, sealed and opened: what a byte costs besides system calls and HTTP/2.

use ambit_tls::{MAX_PLAIN, MAX_SEALED, Opener, RecordError, Sealer, complete};
use anyhow::{Context, Result, ensure};
use rustls::crypto::cipher::{AeadKey, Iv};
use rustls::{ConnectionTrafficSecrets, ContentType};

/// Full records.
pub(crate) fn bulk() -> Result<()> {
    run(2_000, MAX_PLAIN)
}

/// Small records, where the cost of a record counts.
pub(crate) fn small() -> Result<()> {
    run(20_000, 64)
}

fn run(records: usize, length: usize) -> Result<()> {
    let (mut sealer, mut opener) = (Sealer::new(secrets())?, Opener::new(secrets())?);
    let plain = vec![7; length];
    let (mut sealed, mut opened) = (vec![0; MAX_SEALED], vec![0; MAX_SEALED]);
    let moved = guarded_records(records, &plain, &mut sealer, &mut opener, &mut sealed, &mut opened)?;
    ensure!(moved == records * length && opened.starts_with(&plain), "{moved} bytes arrived");
    Ok(())
}

fn secrets() -> (u64, ConnectionTrafficSecrets) {
    (0, ConnectionTrafficSecrets::Aes256Gcm { key: AeadKey::from([7; 32]), iv: Iv::copy(&[9; 12]) })
}

#[inline(never)]
fn guarded_records(
    records: usize,
    plain: &[u8],
    sealer: &mut Sealer,
    opener: &mut Opener,
    sealed: &mut [u8],
    opened: &mut [u8],
) -> Result<usize> {
    let mut moved = 0;
    for _ in 0..records {
        let length = sealer.seal(ContentType::ApplicationData, plain, sealed)?;
        let record = sealed.get(..length).ok_or(RecordError::Seal)?;
        ensure!(complete(record)? == Some(length));
        moved += opener.open_into(record, opened).context("a record is not opened")?.length;
    }
    Ok(moved)
}
