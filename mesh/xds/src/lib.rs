//! Delta xDS, client and server.
