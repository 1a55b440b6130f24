//! Sockets, network namespaces, original destinations, relaying and draining.
