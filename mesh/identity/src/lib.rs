//! SPIFFE identities, workload certificates and their renewal, TLS configurations.
