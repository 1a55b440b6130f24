//! The node agent: which pods are in the mesh, and their redirection.
pub mod nft;
pub mod ports;
pub mod redirect;
