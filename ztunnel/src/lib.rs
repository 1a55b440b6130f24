//! The node proxy: identity, mutual TLS, policy and balancing at L4.
