//! Prints how many certificates a second one core signs: `cargo run --release -p ambit-ca --example signing_rate`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement prints or fails")]

use std::time::{Duration, Instant};

use ambit_ca::{Authority, AuthorityConfig};
use ambit_identity::{CertificateRequest, SpiffeId, TrustDomain};

fn main() {
    let directory = tempfile::tempdir().unwrap();
    let config =
        AuthorityConfig::new(TrustDomain::new("cluster.local").unwrap(), directory.path().to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (authority, _driver) = runtime.block_on(Authority::open(config)).unwrap();
    let identity = SpiffeId::new("cluster.local", "shop", "reviews").unwrap();
    let request = CertificateRequest::new(&identity).unwrap();
    let start = Instant::now();
    let mut signed = 0_u32;
    while start.elapsed() < Duration::from_secs(3) {
        authority.sign(request.csr_pem(), &identity, None).unwrap();
        signed += 1;
    }
    println!("{:.0} certificates a second", f64::from(signed) / start.elapsed().as_secs_f64());
}
