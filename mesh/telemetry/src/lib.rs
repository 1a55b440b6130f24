//! Metrics, access log and the admin server.
