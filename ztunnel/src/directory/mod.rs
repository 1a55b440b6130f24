//! What is known of the mesh: from the control plane, on demand, or from a file.

pub mod feed;
pub mod local;
pub mod ondemand;
