//! How many certificates one core signs.

use std::time::{Duration, Instant};

use ambit_ca::{Authority, AuthorityConfig};
use ambit_identity::{CertificateRequest, SpiffeId, TrustDomain};
use anyhow::Result;

use crate::report::{Row, Section};

/// How long is signed.
const TIME: Duration = Duration::from_secs(3);

const INTRODUCTION: &str =
    "Requests checked and certificates signed (P-256) by one thread, without the network.";

/// Takes the figure of the section.
pub(crate) fn measure() -> Result<Section> {
    let directory = tempfile::tempdir()?;
    let config = AuthorityConfig::new(TrustDomain::new("cluster.local")?, directory.path().to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (authority, _driver) = runtime.block_on(Authority::open(config))?;
    let identity = SpiffeId::new("cluster.local", "shop", "reviews")?;
    let request = CertificateRequest::new(&identity)?;
    let start = Instant::now();
    let mut signed = 0_u32;
    while start.elapsed() < TIME {
        authority.sign(request.csr_pem(), &identity, None)?;
        signed += 1;
    }
    let rate = f64::from(signed) / start.elapsed().as_secs_f64();
    let mut section = Section::new("Certificates", INTRODUCTION);
    section.push(Row::new("certificates signed").per_second(rate).at_least(5_000.0));
    Ok(section)
}
