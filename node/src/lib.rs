//! The node agent: which pods are in the mesh, and their redirection.
