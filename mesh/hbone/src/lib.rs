//! The tunnel: HTTP/2 CONNECT over mutual TLS, client, server and pool.
